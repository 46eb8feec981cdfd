"""The database's address: as Neon's console gives it, as libpq takes it, and never in a log."""

import re
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from todo_api.errors import StartupError

DEFAULTS = {
    # Values are sent and read as UTF-8 text, whatever the server's default is.
    "client_encoding": "UTF8",
    # A peer that vanished without a word is noticed within a minute, busy or idle.
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "application_name": "todo-api",
}

_NEON_POOLER = re.compile(r"-pooler((?:\.[\w-]+)*\.neon\.tech)")


def conninfo(url: str, *, direct: bool = False) -> str:
    """Return libpq's connection string, with our defaults where the URL says nothing.

    libpq alone reads the URL: what it accepts is accepted. `direct` asks for Neon's direct host in
    place of its pooled one, for what needs a session of its own.
    Raises `StartupError` where libpq cannot read it.
    """
    try:
        given: dict[str, Any] = conninfo_to_dict(url)
        if direct and "host" in given:
            given["host"] = _NEON_POOLER.sub(r"\1", given["host"])
        return make_conninfo("", **{**DEFAULTS, **given})
    except psycopg.Error:  # its message shows the URL
        raise StartupError("DATABASE_URL: is not a PostgreSQL URL that libpq can read") from None


def reason(error: BaseException | None) -> str:
    """Return why a connection failed, without the address that libpq puts before it."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    *_, said = re.split(r"FATAL: +|failed: |error: |address: ", str(error or "").strip())
    line = said.partition("\n")[0]
    return line if said != str(error).strip() else "cannot connect"
