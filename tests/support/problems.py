"""The body that an error has to have (contract: error, detail and code)."""

from collections.abc import Mapping
from typing import Any


def problem(code: str, message: str) -> dict[str, Any]:
    """Return the body of an error that concerns no field."""
    return {"error": message, "detail": message, "code": code}


def invalid_fields(messages: Mapping[str, str], codes: Mapping[str, str]) -> dict[str, Any]:
    """Return the body of an error with these messages and codes. The first is the `error`."""
    first = next(iter(messages.values()))
    return {**problem("invalid_fields", first), "fields": dict(messages), "codes": dict(codes)}
