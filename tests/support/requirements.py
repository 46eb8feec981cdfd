"""What some tests need beside Python: Node, a browser, a port, a Citus cluster."""

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


def citus_coordinator() -> str:
    """Return the address of a Citus coordinator; skip the module where there is none.

    TODO_API_TEST_EVERYTHING does not ask for it: no package registry has Citus.
    """
    url = os.environ.get("TODO_API_TEST_CITUS")
    if not url:
        pytest.skip("no Citus: TODO_API_TEST_CITUS names no coordinator", allow_module_level=True)
    return url
