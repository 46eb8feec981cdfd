"""`todo-api check`: what is configured, whether it works, and what to do if it does not."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from todo_api.auth.issuer import Clocks, FetchFailed, fetch
from todo_api.auth.key_set import CLOCK_SECONDS, REFRESH_SECONDS, Published, read_key_set
from todo_api.auth.tokens import LEEWAY
from todo_api.database import schema
from todo_api.database.database import Database
from todo_api.database.inspection import Inspection, Problem
from todo_api.errors import ApiError, StartupError
from todo_api.settings import Settings, is_loopback, origin_of

_FINE = {
    "encoding": "UTF8",
    "database settings": "those that statements depend on are right",
    "writes": "are possible",
    "durability": "a commit is on the disk before it is acknowledged",
    "schema": "at its newest version",
    "privileges": "requests have all that they need",
    "row security": "active for the role that requests take",
}
"""What there is to say of each subject of the database if nothing is wrong, in order."""

_OF_SCHEMA = ("schema", "privileges", "row security")
"""The last subjects, of which nothing is known without the schema."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked thing, its status, and in `detail` what to do if something is wrong."""

    subject: str
    status: Literal["ok", "warning", "failure"]
    detail: str


_ROW_SECURITY_OFF = Finding(
    "row security", "warning", "off; set ROW_SECURITY=on for the database's own lock"
)


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
            *await _inspection(settings, database),
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


async def _inspection(settings: Settings, database: Database) -> list[Finding]:
    """Return a finding for each subject that could be inspected."""
    found = await database.inspect()
    known = [*_FINE] if found.is_complete else [*_FINE][: -len(_OF_SCHEMA)]
    findings = {subject: Finding(subject, "ok", _FINE[subject]) for subject in known}
    if found.is_complete:
        findings["schema"] = _version(str(found.version))
        if not settings.row_security:
            findings["row security"] = _ROW_SECURITY_OFF
    problems = list(found.problems())
    for subject in dict.fromkeys(problem.subject for problem in problems):
        findings[subject] = _finding(subject, [each for each in problems if each[0] == subject])
    if found.lacks_schema:
        findings["schema"] = await _migration(settings, database, found)
    return list(findings.values())


def _finding(subject: str, problems: list[Problem]) -> Finding:
    is_fatal = any(problem.fatal for problem in problems)
    details = "; ".join(problem.detail for problem in problems)
    return Finding(subject, "failure" if is_fatal else "warning", details)


def _version(current: str) -> Finding:
    newest = schema.newest()
    if current == newest:
        return Finding("schema", "ok", f"{_FINE['schema']}, {newest}")
    return Finding("schema", "warning", f"newer ({current}) than this program ({newest})")


async def _migration(settings: Settings, database: Database, found: Inspection) -> Finding:
    """Say what becomes of a schema that is missing or older than this program."""
    problem = f"at version {found.version or 'none'}, this program needs {schema.newest()}"
    if not settings.auto_migrate:
        return Finding("schema", "failure", f"{problem}; run `todo-api migrate`")
    if why := await database.why_not_migrating(found):
        return Finding(
            "schema",
            "failure",
            f"{problem}; the database user cannot migrate it, because {why}; migrate once as an "
            "administrator (`todo-api migrate`) and set AUTO_MIGRATE=off",
        )
    return Finding("schema", "warning", f"{problem}; `todo-api serve` will migrate it")


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
