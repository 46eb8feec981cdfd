"""The database's address: as Neon's console gives it, as libpq takes it, and never in a log."""

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

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


def libpq_url(url: str) -> str:
    """Return a `postgres://` URL in the spelling that every library takes."""
    return "postgresql://" + url.split("://", 1)[1]


def direct_url(url: str) -> str:
    """Return Neon's direct host for its pooled one: migrations need a session of their own."""
    parts = urlsplit(libpq_url(url))
    login, at, host = parts.netloc.rpartition("@")
    name, dot, domain = host.partition(".")
    if not (name.endswith("-pooler") and ".neon.tech" in domain):
        return libpq_url(url)
    direct = f"{login}{at}{name.removesuffix('-pooler')}{dot}{domain}"
    return urlunsplit(parts._replace(netloc=direct))


def conninfo(url: str) -> str:
    """Return libpq's connection string, with our defaults where the URL says nothing.

    Raises `StartupError` where libpq cannot read it.
    """
    try:
        given: dict[str, Any] = conninfo_to_dict(libpq_url(url))
        return make_conninfo("", **{**DEFAULTS, **given})
    except psycopg.ProgrammingError:  # its message shows the URL
        raise StartupError("DATABASE_URL: is not a PostgreSQL URL that libpq can read") from None


def reason(error: BaseException | None) -> str:
    """Return why a connection failed, without the address that libpq puts before it."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    *_, said = re.split(r"FATAL: +|failed: |error: |address: ", str(error or "").strip())
    line = said.partition("\n")[0]
    return line if said != str(error).strip() else "cannot connect"
