"""The database's address, as libpq takes it. It never goes to a log."""

import re
from typing import Any, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from todo_api.errors import StartupError

DEFAULTS = {
    # TCP detects a dead peer within a minute.
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    # For connections outside the pool, which has CONNECT_TIMEOUT. psycopg would wait 130 s.
    "connect_timeout": "10",
    "fallback_application_name": "todo-api",
}

OURS = {
    # Our values are UTF-8 text, whatever the URL, PGCLIENTENCODING or the server says.
    "client_encoding": "UTF8",
}

_NEON_POOLER = re.compile(r"-pooler((?:\.[\w-]+)*\.neon\.tech)")


def conninfo(url: str, *, direct: bool = False) -> str:
    """Return libpq's connection string, with our defaults for what the URL does not set.

    Only libpq reads the URL, so every URL that libpq accepts works, and its environment variables
    (PGHOST, PGPASSWORD, …) count for what the URL leaves out. With `direct`, Neon's direct
    host replaces its pooled one, for callers that need a session of their own.
    Raises `StartupError` if libpq cannot read the URL.
    """
    try:
        given: dict[str, Any] = conninfo_to_dict(url)
        if direct and "host" in given:
            given["host"] = _NEON_POOLER.sub(r"\1", given["host"])
        return make_conninfo("", **{**DEFAULTS, **given, **OURS})
    except psycopg.Error:  # its message contains the URL
        raise StartupError("DATABASE_URL: is not a PostgreSQL URL that libpq can read") from None


_FAILED = re.compile(
    r'^.*connection to server (?:at|on socket) ".*?"(?: \(.*?\))?(?:, port \d+)? failed: (.+)$',
    re.MULTILINE,
)
"""A failed attempt to connect. libpq may make several: for each host, and without TLS."""

_SENT_BY_SERVER = re.compile(r"[^\s:][^:]{0,30}:  ")
"""The severity, in the server's language. libpq separates it by two spaces, and nothing else."""

_FULL = re.compile(
    "too many clients"  # PostgreSQL: max_connections
    "|too many connections"  # a CONNECTION LIMIT of a role or a database
    "|remaining connection slots are reserved"
    "|no more connections allowed"  # PgBouncer: max_client_conn, max_db_connections
    "|[Mm]ax client connections reached"  # Supavisor
)
"""The server's texts for SQLSTATE 53300 and the like. libpq hides the SQLSTATE of a connection that
was refused. A server that speaks another language is reported as unreachable."""


class Refusal(NamedTuple):
    """Why a connection failed."""

    reason: str
    by_server: bool = False
    """Whether PostgreSQL or a pooler gave the reason, as opposed to libpq."""

    @property
    def is_full(self) -> bool:
        """Whether the server or a pooler has no free connection."""
        return self.by_server and bool(_FULL.search(self.reason))


def refusal(error: BaseException | None) -> Refusal:
    """Return why a connection failed, without the address that libpq names first.

    libpq has no code for this, only a text. A text without a known prefix may contain the address,
    so it becomes "cannot connect".
    """
    if isinstance(error, TimeoutError | psycopg.errors.ConnectionTimeout):
        return Refusal("no answer in time")
    if isinstance(error, psycopg.Error) and error.sqlstate:
        return Refusal(f"SQLSTATE {error.sqlstate}", by_server=True)
    text = str(error or "").strip()
    failed = dict.fromkeys(_FAILED.findall(text))
    if failed:
        reasons = [_SENT_BY_SERVER.sub("", each, count=1) for each in failed]
        return Refusal("; ".join(reasons), any(map(_SENT_BY_SERVER.match, failed)))
    if resolving := re.search(r"^failed to resolve host .*: \[Errno -?\d+\] (.+)$", text):
        return Refusal(resolving[1])
    if bad := re.search(r"^connection is bad: (.+)", text):
        # A password that is not percent-encoded may be read as a port, so no value is shown.
        return Refusal(re.sub('"[^"]*"', "…", bad[1]))
    return Refusal("cannot connect")


def reason(error: BaseException | None) -> str:
    """Return the text of `refusal`."""
    return refusal(error).reason
