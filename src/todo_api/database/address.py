"""The database's address, as libpq takes it. It never goes to a log."""

import re
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from todo_api.errors import StartupError

DEFAULTS = {
    # Our values are UTF-8 text, whatever the server's default is.
    "client_encoding": "UTF8",
    # TCP detects a dead peer within a minute.
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    # For connections outside the pool, which has CONNECT_TIMEOUT. psycopg would wait 130 s.
    "connect_timeout": "10",
    "application_name": "todo-api",
}

_NEON_POOLER = re.compile(r"-pooler((?:\.[\w-]+)*\.neon\.tech)")


def conninfo(url: str, *, direct: bool = False) -> str:
    """Return libpq's connection string, with our defaults for what the URL does not set.

    Only libpq reads the URL, so every URL that libpq accepts works. With `direct`, Neon's direct
    host replaces its pooled one, for callers that need a session of their own.
    Raises `StartupError` if libpq cannot read the URL.
    """
    try:
        given: dict[str, Any] = conninfo_to_dict(url)
        if direct and "host" in given:
            given["host"] = _NEON_POOLER.sub(r"\1", given["host"])
        return make_conninfo("", **{**DEFAULTS, **given})
    except psycopg.Error:  # its message contains the URL
        raise StartupError("DATABASE_URL: is not a PostgreSQL URL that libpq can read") from None


def reason(error: BaseException | None) -> str:
    """Return why a connection failed, without the address that libpq names first.

    libpq has no code for this, only a text. A text without a known prefix may contain the address,
    so it becomes "cannot connect".
    """
    if isinstance(error, TimeoutError):
        return "no answer in time"
    _, *parts = re.split(r"FATAL: +|failed: |error: |address: ", str(error or "").strip())
    return parts[-1].partition("\n")[0] if parts else "cannot connect"
