"""The addresses of the files that a page loads. They change with their content."""

import re

LARGEST = "swagger-ui-bundle.js"


def address_of(name: str, page: str) -> str:
    """Return the address of a file that a page loads."""
    found = re.search(rf'"(/docs/files/[0-9a-f]+/{re.escape(name)})"', page)
    assert found, f"the page does not load {name}"
    return found[1]
