"""A statement: SQL compiled once, with a name that prepared connections know it by."""

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
    """One SQL statement that answers with rows of one text column.

    `parameters` are the names of $1, $2, … in order. `writes` says that running it twice is not
    the same as running it once, so it is not sent again after a broken connection. `many` says that
    the number of rows has no limit, so they are read in batches. The
    statements in `first` run before it, in the same transaction.
    """

    name: bytes
    sql: bytes
    parameters: tuple[str, ...]
    writes: bool
    many: bool = False
    first: tuple["Statement", ...] = ()

    @classmethod
    def compiled(
        cls, name: str, expression: Executable, *, writes: bool = False, many: bool = False
    ) -> Self:
        """Compile an SQLModel expression for libpq's `$1` placeholders."""
        compiled = expression.compile(dialect=_dialect)  # type: ignore[attr-defined]
        parameters = tuple(compiled.positiontup)
        return cls(name.encode(), str(compiled).encode(), parameters, writes, many)

    def after(self, *first: "Statement") -> Self:
        """Return this statement with others to run before it."""
        return replace(self, first=first)

    def encode(self, values: Mapping[str, object]) -> list[bytes | None]:
        """Return the values in the order of the placeholders, as libpq's text format."""
        return list(map(encode, map(values.__getitem__, self.parameters)))


def encode(value: object) -> bytes | None:
    """Return a value in PostgreSQL's text format.

    A NUL is refused here whatever was checked before: libpq reads a text value as a C string,
    so one that slipped through would cut a user's id short and make him another.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        return b"\\x" + value.hex().encode()
    text = value.isoformat() if isinstance(value, datetime) else str(value)
    if "\0" in text:
        raise ValueError("a NUL cannot be stored")
    return text.encode()
