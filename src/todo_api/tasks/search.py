"""How texts are compared, for search and for the order by title.

A search looks for each of its words inside the words of a task. It reads what this module makes of
a description: the folded words, and a Bloom filter of them if they are long.
"""

import re
import unicodedata
from functools import reduce
from itertools import pairwise

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
_COMBINING = [*filter(unicodedata.combining, map(chr, range(0x300, 0x20000)))]
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


_MANY_LETTERS = "\u2e80"
"""From here on, scripts have so many letters that two of them tell as much as three of others."""

_UNFILTERED = 1000
"""The size of a key, in bytes, up to which a filter would save little."""

_IN_ROW = 3000
"""The size of a key, in bytes, up to which it lies in its task's row beside the filter."""

_LARGEST_FILTER = 3800
"""In bytes. Two tasks with it fit in a page, because all that is long can go elsewhere."""

_FACTOR = 1_000_003
"""The base in which the letters of a run are the digits of a number. Three fit in 64 bits."""

TESTED_RUNS = 4
"""How many runs of each word a search looks up in a filter."""


def bloom_filter(key: str) -> bytes | None:
    """Return a Bloom filter of the short runs of letters in a text, or None if the text is short.

    It has two bits for each run of one to three letters, or to two in scripts with many letters. If
    one of the bits is not set, the text does not contain the run. If both are, the text probably
    does: less than a third of the other runs have two bits that others have set.
    """
    length = len(key.encode())
    if length <= _UNFILTERED:
        return None
    usual = length // 3 if length <= _IN_ROW else length // 2
    # Even the largest differ in size, so that runs with the same bits in one differ in another.
    size = min(usual, _LARGEST_FILTER - len(key) % 128)
    count = 8 * size
    bits = bytearray(b"0" * count)
    for run in _numbers_of_runs(key):
        bits[run % count] = bits[run % (count - 1)] = ord("1")
    return int(bits[::-1], 2).to_bytes(size, "little")


def _numbers_of_runs(key: str) -> set[int]:
    """Return the number of each run in a text, as `run_numbers` does.

    Expressions without calls take a third of the time: 1 to 3 ms for 5,000 letters.
    """
    letters = list(map(ord, key))
    limit = ord(_MANY_LETTERS)
    numbers = {a * _FACTOR**2 for a in set(letters)}
    numbers.update((a * _FACTOR + b) * _FACTOR for a, b in pairwise(letters))
    numbers.update(
        (a * _FACTOR + b) * _FACTOR + c
        for a, b, c in zip(letters, letters[1:], letters[2:], strict=False)
        if a < limit and b < limit and c < limit
    )
    return numbers


def run_numbers(word: str) -> list[int]:
    """Return the numbers of `TESTED_RUNS` runs of letters in a word, from its start to its end.

    A number modulo the number of bits in a filter, and modulo one less, are the places of its bits.
    """
    length = 2 if max(word) >= _MANY_LETTERS else 3
    runs = [word[start : start + length] for start in range(max(len(word) - length, 0) + 1)]
    last = len(runs) - 1
    places = (last * number // (TESTED_RUNS - 1) for number in range(TESTED_RUNS))
    return [_number(runs[place]) for place in places]


def _number(run: str) -> int:
    return reduce(lambda number, letter: number * _FACTOR + ord(letter), run.ljust(3, "\0"), 0)


def _without_marks(text: str) -> str:
    base = _MARKS.sub("", text)
    return _RARE_MARKS.sub("", base) if max(base, default="") > LAST_OF_BMP else base
