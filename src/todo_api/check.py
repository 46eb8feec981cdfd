"""`todo-api check`: what is configured, whether it works, and what to do if it does not."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from todo_api.auth.issuer import Clocks, FetchFailed, fetch
from todo_api.auth.key_set import CLOCK_SECONDS, REFRESH_SECONDS, Published, read_key_set
from todo_api.auth.tokens import LEEWAY
from todo_api.database import schema
from todo_api.database.database import Database
from todo_api.errors import ApiError, StartupError
from todo_api.settings import Settings, is_loopback, origin_of


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked thing, its status, and in `detail` what to do if something is wrong."""

    subject: str
    status: Literal["ok", "warning", "failure"]
    detail: str


async def findings(settings: Settings, database_url: str) -> list[Finding]:
    """Check everything in the order in which a request needs it. No detail contains a secret."""
    warnings = settings.warnings()
    return [
        *([Finding("settings", "warning", "; ".join(warnings))] if warnings else []),
        *await _database(settings, database_url),
        _secret(settings),
        *(await _key_set(settings.jwks_url) if settings.jwks_url else []),
        _origins(settings),
    ]


async def _database(settings: Settings, url: str) -> list[Finding]:
    database = Database(url, settings)
    try:
        await database.ping()
        return [
            Finding("database", "ok", _answers(settings, database)),
            *await _schema(settings, url, database),
            await _prepared_statements(settings, database),
        ]
    except StartupError as error:
        return [Finding("database", "failure", str(error))]
    except ApiError as error:
        return [Finding("database", "failure", f"DATABASE_URL: {error.__cause__}")]
    finally:
        database.close()


def _answers(settings: Settings, database: Database) -> str:
    place = database.pool.place if settings.database_url else "embedded"
    return f"PostgreSQL {database.server_version} answers ({place})"


async def _schema(settings: Settings, url: str, database: Database) -> list[Finding]:
    """Check the schema, and row security if the schema has it."""
    try:
        current, newest = schema.current(url), schema.newest()
    except StartupError as error:
        return [Finding("schema", "failure", str(error))]
    if current is None or current < newest:
        return [_old_schema(settings, current or "none", newest)]
    if current == newest:
        version = Finding("schema", "ok", f"at its newest version, {newest}")
    else:
        version = Finding("schema", "warning", f"newer ({current}) than this program ({newest})")
    return [version, await _row_security(settings, database)]


def _old_schema(settings: Settings, current: str, newest: str) -> Finding:
    problem = f"at version {current}, this program needs {newest}"
    if settings.auto_migrate:
        return Finding("schema", "warning", f"{problem}; `todo-api serve` will migrate it")
    return Finding("schema", "failure", f"{problem}; run `todo-api migrate`")


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
    """Repeat a statement, because a pooler that loses prepared statements fails then."""
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


async def _key_set(url: str) -> list[Finding]:
    try:
        fetched = await fetch(url)
        published = read_key_set(fetched.content)
    except FetchFailed as error:
        hint = "is BETTER_AUTH_URL right, and the issuer running?"
        return [Finding("key set", "failure", f"{error}; {hint}")]
    return [_keys(published), _clock(fetched.clocks)]


def _keys(published: Published) -> Finding:
    keys, refused = published.keys, len(published.refused)
    if not keys and not refused:
        return Finding("key set", "warning", "empty; Better Auth makes a key with its first token")
    algorithms = ", ".join(sorted({key.algorithm for key in keys.values()}))
    usable = f"{len(keys)} keys ({algorithms})" if keys else "no usable key"
    if refused:
        status: Literal["warning", "failure"] = "warning" if keys else "failure"
        reasons = f"{refused} refused: {published.refused_in_short}"
        return Finding("key set", status, f"{usable}; {reasons}")
    return Finding("key set", "ok", f"{usable}; our copy is at most {REFRESH_SECONDS:.0f} s old")


def _clock(clocks: Clocks | None) -> Finding:
    if clocks is None:
        return Finding("clock", "warning", "the issuer does not send its time, or a cache answered")
    ahead = clocks.difference
    difference = f"{abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} the issuer's"
    if abs(ahead) <= CLOCK_SECONDS:
        return Finding("clock", "ok", "agrees with the issuer's")
    if abs(ahead) <= LEEWAY:
        return Finding("clock", "warning", f"{difference}; {LEEWAY:.0f} s are tolerated")
    return Finding("clock", "failure", f"{difference}; tokens are refused, so synchronize it")


def _origins(settings: Settings) -> Finding:
    for origin in settings.cors_origins:
        url = urlsplit(origin)
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            return Finding("origins", "warning", f"CORS_ORIGINS: {origin} is not https")
    front_end = origin_of(settings.better_auth_url) if settings.better_auth_url else None
    if front_end and front_end not in settings.cors_origins:
        return Finding(
            "origins", "warning", f"CORS_ORIGINS lacks {front_end}, where BETTER_AUTH_URL is"
        )
    return Finding("origins", "ok", ", ".join(settings.cors_origins))
