"""`todo-api check`: what is configured, whether it works, and what to do where it does not."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

from todo_api.auth.key_set import REFRESH_SECONDS, Fetched, FetchFailed, fetch, read_key_set
from todo_api.auth.tokens import LEEWAY
from todo_api.database import schema
from todo_api.database.database import Database
from todo_api.errors import ApiError, StartupError
from todo_api.settings import Settings, is_loopback, origin_of

CLOCK_SECONDS = 2.0
"""A difference of the clocks that is worth a word: `Date` has whole seconds."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, and what to do if it is not well."""

    subject: str
    status: Literal["ok", "warning", "failure"]
    detail: str


async def findings(settings: Settings, database_url: str) -> AsyncIterator[Finding]:
    """Look at everything, in the order in which a request needs it. No secret is in a detail."""
    async for finding in _database(settings, database_url):
        yield finding
    yield _secret(settings)
    if settings.jwks_url:
        async for finding in _key_set(settings.jwks_url):
            yield finding
    yield _origins(settings)


async def _database(settings: Settings, url: str) -> AsyncIterator[Finding]:
    database = Database(url, settings)
    try:
        await database.ping()
        yield Finding("database", "ok", f"PostgreSQL {database.server_version} answers")
        schema = _schema(settings, url)
        yield schema
        if schema.status == "ok" or "newer" in schema.detail:
            yield await _row_security(settings, database)
        yield await _prepared_statements(settings, database)
    except StartupError as error:
        yield Finding("database", "failure", str(error))
    except ApiError as error:
        yield Finding("database", "failure", f"DATABASE_URL: {error.__cause__}")
    finally:
        database.close()


def _schema(settings: Settings, url: str) -> Finding:
    try:
        current = schema.current(url)
    except StartupError as error:
        return Finding("schema", "failure", str(error))
    newest = schema.newest()
    if current == newest:
        return Finding("schema", "ok", f"at its newest version, {newest}")
    if current is not None and current > newest:
        return Finding("schema", "warning", f"newer ({current}) than this program ({newest})")
    missing = f"at version {current or 'none'}, this program needs {newest}"
    if settings.auto_migrate:
        return Finding("schema", "warning", f"{missing}; `todo-api serve` will migrate it")
    return Finding("schema", "failure", f"{missing}; run `todo-api migrate`")


async def _row_security(settings: Settings, database: Database) -> Finding:
    try:
        await database.check()
    except StartupError as error:
        return Finding("row security", "failure", str(error))
    if not settings.row_security:
        return Finding(
            "row security", "warning", "off; set ROW_SECURITY=on for the database's own lock"
        )
    return Finding("row security", "ok", "active for the role that requests take")


async def _prepared_statements(settings: Settings, database: Database) -> Finding:
    """A pooler that cannot keep them fails when the same statement comes again."""
    if not settings.prepared_statements:
        return Finding("prepared statements", "ok", "not used")
    try:
        for _ in range(5):
            await database.ping()
    except ApiError:
        return Finding(
            "prepared statements", "failure", "the pooler loses them; set PREPARED_STATEMENTS=off"
        )
    return Finding("prepared statements", "ok", "work, with or without a pooler between")


def _secret(settings: Settings) -> Finding:
    if settings.better_auth_secret is None:
        return Finding("shared secret", "ok", "not used; BETTER_AUTH_SECRET is not set")
    return Finding("shared secret", "ok", "long enough")  # Settings refuses a shorter one


async def _key_set(url: str) -> AsyncIterator[Finding]:
    try:
        fetched = await fetch(url)
        keys = read_key_set(fetched.content)
    except FetchFailed as error:
        yield Finding(
            "key set", "failure", f"{error}; is BETTER_AUTH_URL right, and the issuer running?"
        )
        return
    algorithms = ", ".join(sorted({key.algorithm for key in keys.values()}))
    if keys:
        every = f"our copy gets at most {REFRESH_SECONDS:.0f} s old"
        yield Finding("key set", "ok", f"{len(keys)} keys ({algorithms}); {every}")
    else:
        yield Finding("key set", "warning", "empty; Better Auth makes a key with its first token")
    yield _clock(fetched)


def _clock(fetched: Fetched) -> Finding:
    try:
        theirs = parsedate_to_datetime(fetched.date or "").timestamp()
    except ValueError:
        return Finding("clock", "warning", "the issuer does not say what time it is")
    skew = time.time() - theirs
    difference = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the issuer's"
    if abs(skew) <= CLOCK_SECONDS:
        return Finding("clock", "ok", "agrees with the issuer's")
    if abs(skew) <= LEEWAY:
        return Finding("clock", "warning", f"{difference}; {LEEWAY:.0f} s are tolerated")
    return Finding("clock", "failure", f"{difference}; tokens are refused: synchronize it")


def _origins(settings: Settings) -> Finding:
    insecure = [
        origin
        for origin in settings.cors_origins
        if origin.startswith("http://") and not is_loopback(origin.split("/")[2].split(":")[0])
    ]
    if insecure:
        return Finding("origins", "warning", f"CORS_ORIGINS: {insecure[0]} is not https")
    front_end = origin_of(settings.better_auth_url) if settings.better_auth_url else None
    if front_end and front_end not in settings.cors_origins:
        return Finding(
            "origins", "warning", f"CORS_ORIGINS lacks {front_end}, where BETTER_AUTH_URL is"
        )
    return Finding("origins", "ok", ", ".join(settings.cors_origins) or "none may call")
