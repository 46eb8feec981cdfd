"""What some tests need beside Python: Node, a browser, a port."""

import os

import pytest


def need(missing: str | None) -> None:
    """Skip for want of what is missing, or fail where TODO_API_TEST_EVERYTHING is set.

    Args:
        missing: one sentence, or None where there is everything.
    """
    if missing is None:
        return
    if os.environ.get("TODO_API_TEST_EVERYTHING"):
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing, allow_module_level=True)
