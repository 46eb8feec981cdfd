"""Checks of promises against results, and the table of them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One promise. A measured one depends on the machine, so a short run does not judge it."""

    promise: str
    seen: str
    kept: bool
    kind: Literal["counted", "measured"] = "counted"


def say(line: str = "") -> None:
    """Print a line and flush it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def verdict(checks: Sequence[Check], *, measured: bool = True) -> int:
    """Print a line for each check and return the exit code.

    Args:
        checks: the promises and their results.
        measured: False shows measured checks without judging them.
    """
    failed = 0
    for check in checks:
        judged = measured or check.kind == "counted"
        failed += judged and not check.kept
        word = "----" if not judged else "PASS" if check.kept else "FAIL"
        say(f"{word}  {check.promise:<66} {check.seen}")
    say(f"\n{'FAIL' if failed else 'PASS'}: {len(checks)} checks, {failed} failed")
    return 1 if failed else 0
