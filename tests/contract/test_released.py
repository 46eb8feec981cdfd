"""What a released version has, later ones keep: docs/compatibility.md."""

import json
from pathlib import Path

import pytest

from support.promises import promises

RELEASED = json.loads(Path(__file__).with_name("released.json").read_text())
CURRENT = promises()


@pytest.mark.parametrize("kind", CURRENT)
def test_nothing_that_was_released_is_missing(kind: str) -> None:
    missing = set(RELEASED[kind]) - set(CURRENT[kind])
    assert not missing, "docs/compatibility.md says how to deprecate it first"


def test_every_kind_of_promise_is_compared() -> None:
    assert set(RELEASED) == set(CURRENT)
    assert all(RELEASED.values())
