"""How texts are compared, for search and for the order by title.

A search looks for each of its words inside the words of a task. It reads what this module makes of
a description: the folded words, and a Bloom filter of them if they are long.
"""

import re
import unicodedata
from functools import reduce

LAST_OF_BMP = "\uffff"
"""The last character of the basic multilingual plane."""

_OTHER_LETTERS = {"ł": "l", "ø": "o", "đ": "d", "ħ": "h", "ŧ": "t", "ð": "d"} | {
    "æ": "ae",
    "œ": "oe",
    "þ": "th",
    "\N{LATIN SMALL LETTER DOTLESS I}": "i",
}
_OTHER_LETTER = re.compile(f"[{''.join(_OTHER_LETTERS)}]")
# The named ones are not combining themselves, and decompose into nothing but combining marks.
_COMBINING = [chr(code) for code in range(0x300, 0x20000) if unicodedata.combining(chr(code))]
_COMBINING += "\u0f73\u0f75\u0f81\uff9e\uff9f"
_MARKS = re.compile(f"[{''.join(mark for mark in _COMBINING if mark <= LAST_OF_BMP)}]+")
_RARE_MARKS = re.compile(f"[{''.join(mark for mark in _COMBINING if mark > LAST_OF_BMP)}]+")
"""Combining marks, such as accents. In a character class of `re`, those beyond the basic
multilingual plane are slow, because `re` compares with one after the other."""


def fold(text: str) -> str:
    """Return a text without case and accents, for order and search.

    The result does not depend on the collation of the database: NFKD without combining marks,
    case-folded, and letters that do not decompose replaced.
    """
    if text.isascii():
        return text.lower()
    # The marks also go before the decomposition, which sorts long runs of them in quadratic time.
    base = _without_marks(unicodedata.normalize("NFKD", _without_marks(text)))
    return _OTHER_LETTER.sub(lambda found: _OTHER_LETTERS[found[0]], base.casefold())


def words(text: str) -> list[str]:
    """Return the folded words of a text, the longest first.

    A search looks inside single words. So a word that is part of another one is left out.
    """
    kept = ""
    for word in sorted(dict.fromkeys(fold(text).split()), key=len, reverse=True):
        if word not in kept:
            kept += f" {word}"
    return kept.split()


_RUN = 3
"""The length of the longest runs of letters in a filter."""

_UNFILTERED = 1000
"""The length up to which a filter would save little: 10,000 keys are searched in 30 ms."""

_FILTER_BYTES = 2048
"""The largest filter. A task with it always fits in a page, because the rest can go elsewhere."""

_FACTOR = 1_000_003
"""The base in which the letters of a run are the digits of a number. Three fit in 64 bits."""


def bloom_filter(key: str) -> bytes | None:
    """Return a Bloom filter of the runs of one to three letters in a text, or None if it is short.

    If the bit of a run is not set, the text does not contain the run. If it is, the text probably
    does: about one in five of the other runs has the same bit.
    """
    if len(key) <= _UNFILTERED:
        return None
    size = min(len(key) // 3, _FILTER_BYTES)
    count = 8 * size
    bits = bytearray(b"0" * count)
    # One loop without calls takes half as long as sets of runs: 0.8 to 2 ms for 5,000 letters.
    letters = list(map(ord, f"{key}  "))
    for first, second, third in zip(letters, letters[1:], letters[2:], strict=False):
        two = first * _FACTOR + second
        bits[first % count] = bits[two % count] = bits[(two * _FACTOR + third) % count] = ord("1")
    return int(bits[::-1], 2).to_bytes(size, "little")


def run_numbers(word: str) -> tuple[int, int]:
    """Return the numbers of the runs of letters that a word begins and ends with.

    The number modulo the number of bits in a filter is the place of the run's bit.
    """
    last = word[-_RUN:] if len(word) > _RUN else word[-1]
    return _run_number(word[:_RUN]), _run_number(last)


def _run_number(run: str) -> int:
    return reduce(lambda number, letter: number * _FACTOR + ord(letter), run, 0)


def _without_marks(text: str) -> str:
    base = _MARKS.sub("", text)
    return _RARE_MARKS.sub("", base) if max(base, default="") > LAST_OF_BMP else base
