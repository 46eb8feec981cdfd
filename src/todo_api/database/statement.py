"""A statement: SQL compiled once, with the name under which connections prepare it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Self

from sqlalchemy import Executable
from sqlalchemy.dialects import postgresql

_dialect = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]

Rows = list[bytes]
"""The rows of a statement: one text column each."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement, which returns rows of one text column."""

    name: bytes
    sql: bytes
    parameters: tuple[str, ...]
    """The names of $1, $2, … in order."""
    writes: bool
    """Whether running it twice differs from running it once. Such a statement is not sent again
    after its connection broke."""
    streamed: bool = False
    """Whether the number of rows has no limit, so they are read in batches."""
    planned_once: bool = False
    """Whether PostgreSQL shall use one plan for all values. Otherwise it may plan a statement anew
    for each request, if it expects another number of rows each time."""
    first: tuple["Statement", ...] = ()
    """Statements that run before it, in the same transaction."""

    @classmethod
    def compiled(
        cls, name: str, expression: Executable, *, writes: bool = False, streamed: bool = False
    ) -> Self:
        """Compile an SQLModel expression for libpq's `$1` placeholders."""
        compiled = expression.compile(dialect=_dialect)  # type: ignore[attr-defined]
        parameters = tuple(compiled.positiontup)
        return cls(name.encode(), str(compiled).encode(), parameters, writes, streamed)

    def after(self, *first: "Statement") -> Self:
        """Return this statement with others to run before it."""
        return replace(self, first=first)

    def bind(self, values: Mapping[str, object]) -> list[bytes | None]:
        """Return the values in the order of the placeholders, in PostgreSQL's text format."""
        return list(map(encode, map(values.__getitem__, self.parameters)))


def _element(value: object) -> bytes:
    """Return an element of an array, quoted so that no character of it has a meaning."""
    text = encode(value) or b""
    return b'"' + text.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def encode(value: object) -> bytes | None:
    """Return a value in PostgreSQL's text format. Raises `ValueError` for text with a NUL.

    libpq reads a value as a C string, so a NUL would cut a user's id short and name another user.
    Therefore this check does not rely on earlier ones.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        return b"\\x" + value.hex().encode()
    if isinstance(value, list):
        return b"{" + b",".join(map(_element, value)) + b"}"
    text = value.isoformat() if isinstance(value, datetime) else str(value)
    if "\0" in text:
        raise ValueError("a NUL cannot be stored")
    return text.encode()
