"""What requests rely on in the database, and what is wrong with it.

The program inspects the database at start, and again for `/readyz` after a failure. `todo-api
check` shows every result. A request itself checks nothing, so this costs it nothing.

`FACTS` reads only the catalogue, under the role that requests take if the login can take it. So it
finds tables as requests do, and needs no privilege. Then `row_security.STATE` reads the version of
the schema.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from todo_api.database import row_security, schema
from todo_api.database.row_security import ROLE
from todo_api.database.statement import Statement
from todo_api.errors import StartupError
from todo_api.settings import Settings

_WRITTEN = (
    *("title", "title_key", "description", "description_key", "description_filter"),
    *("status", "priority", "due_date", "due_is_day", "completed_at", "version"),
)
"""The columns of a task that both its creation and a change write."""

PRIVILEGES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "alembic_version": {"SELECT": ("version_num",)},
    "answers": {
        "SELECT": ("user_id", "key", "operation", "request_hash", "body", "created_at"),
        "INSERT": ("user_id", "key", "operation", "request_hash", "body"),
        "DELETE": (),
    },
    "erasures": {
        "SELECT": ("user_hash", "version", "tokens_from"),
        "INSERT": ("user_hash", "version", "tokens_from"),
        "UPDATE": ("version", "tokens_from"),
    },
    "rate_limits": {
        "SELECT": ("user_hash", "full_at"),
        "INSERT": ("user_hash", "full_at"),
        "UPDATE": ("full_at",),
    },
    "restorations": {"SELECT": ("version", "restored_at")},
    "tasks": {
        "SELECT": ("user_id", "id", "created_at", "updated_at", "source", *_WRITTEN),
        "INSERT": ("user_id", "source", *_WRITTEN),
        "UPDATE": ("updated_at", *_WRITTEN),
        "DELETE": (),
    },
    "tombstones": {
        "SELECT": ("user_id", "version", "task_id", "deleted_at"),
        "INSERT": ("user_id", "version", "task_id"),
        "DELETE": (),
    },
    "users": {
        "SELECT": ("id", "version", "changes_from", "tokens_from"),
        "INSERT": ("id", "email", "version", "changes_from"),
        "UPDATE": ("version", "changes_from", "tokens_from"),
        "DELETE": (),
    },
}
"""The tables, and the columns that requests use. The migrations grant exactly this."""

FUNCTIONS = (
    "begin_owner(text,text,double precision,bigint)",
    "name_owner(text)",
    "plan_once()",
    "take_request(text,integer)",
    "versions_of(text[])",
)
"""The functions that requests call."""

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "client_encoding": ("UTF8",),
    # A write that has waited for a lock has to read its rows again (ADR 12).
    "default_transaction_isolation": ("read committed", "read uncommitted"),
    # With on, an error of a statement would end the connection.
    "exit_on_error": ("off",),
    # With off, a statement that row security would filter is an error.
    "row_security": ("on",),
    # With replica there are no foreign keys, so an erased user's tasks would stay.
    "session_replication_role": ("origin", "local"),
}
"""Settings that change what our statements mean, with the values that they need. Transactions set
their timeouts themselves (`preamble.py`). No statement depends on another setting:
`test_result_does_not_depend_on_settings` in tests/database/test_inspection.py."""

_DURABILITY = ("fsync", "full_page_writes", "synchronous_commit")
_SET_TRUE_SINCE = 160_000
"""The PostgreSQL whose membership in a role may exclude taking it."""
_TIMEOUT = "transaction_timeout"  # from PostgreSQL 17 on
_READ_ONLY = "default_transaction_read_only"


def _values(rows: Iterator[tuple[str, ...]]) -> str:
    return ", ".join(f"({', '.join(row)})" for row in rows)


def _needed() -> Iterator[tuple[str, str, str]]:
    """Return rows of SQL literals: the table, the privilege, the column or NULL."""
    for table, privileges in PRIVILEGES.items():
        for privilege, columns in privileges.items():
            for column in columns or (None,):
                yield f"'{table}'", f"'{privilege}'", f"'{column}'" if column else "NULL"


_SETTINGS = ", ".join(f"'{name}'" for name in (*REQUIRED, *_DURABILITY, _TIMEOUT, _READ_ONLY))
_TABLES = ", ".join(f"'{table}'" for table in PRIVILEGES)
_SCHEMA_TABLES = f"relname IN ({_TABLES}) AND relkind IN ('r', 'p')"
_CAN_TAKE_ROLE = f"""
    pg_has_role(session_user, oid, CASE
        WHEN current_setting('server_version_num')::int >= {_SET_TRUE_SINCE} THEN 'SET'
        ELSE 'MEMBER'
    END)
    AND rolname = '{ROLE}'
"""
"""Whether the login can take a role. Since PostgreSQL 16, membership alone is not enough."""

TAKE_ROLE = Statement(
    b"take_role_if_possible",
    f"SELECT set_config('role', '{ROLE}', true) FROM pg_roles WHERE {_CAN_TAKE_ROLE}".encode(),  # noqa: S608  constants of this module
    (),
    writes=False,
)
"""Takes the role for this transaction, if it exists and the login can take it."""

FACTS = Statement(
    b"facts",
    f"""
    WITH needed (table_name, privilege, column_name) AS (VALUES {_values(_needed())}),
    found AS (
        SELECT table_name, privilege, column_name, relation, attnum,
            CASE WHEN column_name IS NULL
                THEN has_table_privilege(relation, privilege)
                ELSE has_column_privilege(relation, attnum, privilege)
            END AS is_granted
        FROM needed
        CROSS JOIN LATERAL (SELECT to_regclass(table_name)::oid AS relation) AS named
        LEFT JOIN pg_attribute
            ON attrelid = relation AND attname = column_name AND NOT attisdropped
    ),
    functions AS (
        SELECT signature, to_regprocedure(signature)::oid AS function
        FROM unnest(ARRAY[{", ".join(f"'{each}'" for each in FUNCTIONS)}]) AS signature
    )
    SELECT json_build_object(
        'server_version', current_setting('server_version_num')::int,
        'encoding', current_setting('server_encoding'),
        'login', quote_ident(session_user),
        'user', quote_ident(current_user),
        'database', quote_ident(current_database()),
        'role_exists', EXISTS (SELECT FROM pg_roles WHERE rolname = '{ROLE}'),
        'can_take_role', EXISTS (SELECT FROM pg_roles WHERE {_CAN_TAKE_ROLE}),
        'standby', pg_is_in_recovery(),
        'settings', (
            SELECT json_object_agg(name, json_build_object('value', setting, 'source', source))
            FROM pg_settings WHERE name IN ({_SETTINGS})
        ),
        'missing_tables', (
            SELECT coalesce(json_agg(DISTINCT table_name), '[]') FROM found WHERE relation IS NULL
        ),
        'schemas', (
            SELECT coalesce(json_agg(DISTINCT quote_ident(nspname)), '[]')
            FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
            WHERE pg_class.oid IN (SELECT relation FROM found)
        ),
        'schemas_elsewhere', (
            SELECT coalesce(
                json_object_agg(quote_ident(nspname), has_schema_privilege(schema, 'USAGE')), '{{}}'
            )
            FROM (
                SELECT relnamespace AS schema FROM pg_class
                WHERE {_SCHEMA_TABLES}
                GROUP BY relnamespace HAVING count(*) = {len(PRIVILEGES)}
            ) AS whole JOIN pg_namespace ON pg_namespace.oid = schema
        ),
        'missing_columns', (
            SELECT coalesce(json_agg(DISTINCT table_name || '.' || column_name), '[]') FROM found
            WHERE relation IS NOT NULL AND column_name IS NOT NULL AND attnum IS NULL
        ),
        'missing_privileges', (
            SELECT coalesce(json_agg(privilege || ' ON ' || table_name ORDER BY table_name), '[]')
            FROM (
                SELECT table_name, privilege
                    || coalesce(' (' || string_agg(column_name, ', ') || ')', '') AS privilege
                FROM found WHERE NOT is_granted GROUP BY table_name, found.privilege
            ) AS denied
        ),
        'missing_functions', (
            SELECT coalesce(json_agg(signature), '[]') FROM functions WHERE function IS NULL
        ),
        'denied_functions', (
            SELECT coalesce(json_agg(signature), '[]') FROM functions
            WHERE NOT has_function_privilege(function, 'EXECUTE')
        )
    )
    """.encode(),  # noqa: S608  constants of this module
    (),
    writes=False,
)
"""What the catalogue says, under the role if `TAKE_ROLE` has taken it."""

MIGRATION = Statement(
    b"migration",
    f"""
    WITH login AS (SELECT rolsuper, rolcreaterole FROM pg_roles WHERE rolname = current_user)
    SELECT json_build_object(
        'schema', quote_ident(current_schema()),
        'creates', coalesce(has_schema_privilege(current_schema(), 'CREATE'), false),
        'grants_usage', coalesce(
            has_schema_privilege(current_schema(), 'USAGE WITH GRANT OPTION')
            OR has_schema_privilege('public', current_schema(), 'USAGE')
            OR (SELECT has_schema_privilege(oid, current_schema(), 'USAGE')
                FROM pg_roles WHERE rolname = '{ROLE}'), false
        ),
        'owns', (
            SELECT coalesce(bool_and(pg_has_role(relowner, 'USAGE')), true)
            FROM pg_class WHERE {_SCHEMA_TABLES} AND relnamespace = current_schema()::regnamespace
        ),
        'makes_role', rolsuper OR rolcreaterole,
        'grants_role', rolsuper
            OR (rolcreaterole AND current_setting('server_version_num')::int < {_SET_TRUE_SINCE})
            OR EXISTS (
                SELECT FROM pg_roles
                WHERE rolname = '{ROLE}' AND pg_has_role(oid, 'MEMBER WITH ADMIN OPTION')
            )
    ) FROM login
    """.encode(),  # noqa: S608  constants of this module
    (),
    writes=False,
)
"""What the login may do of what a migration does."""


class Problem(NamedTuple):
    """A thing that is wrong. Requests work in spite of it if it is not `fatal`."""

    subject: str
    detail: str
    """One line with the variable, and what to do."""
    fatal: bool = True


class Inspection:
    """The result of `FACTS`, and then that of `row_security.STATE` (or `STATE_OFF`)."""

    def __init__(self, facts: Mapping[str, Any], settings: Settings) -> None:
        self.facts = facts
        self.version: str | None = None
        """The version of the schema, or None if there is none or it cannot be read."""
        self._settings = settings
        self._state: Mapping[str, Any] | None = None

    @property
    def shows_state(self) -> bool:
        """Whether `STATE` can run, so the schema's version can be read."""
        return not [*self._encoding(), *self._role(), *self._version_unreadable()]

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Add the result of `STATE` or `STATE_OFF`."""
        self._state = state
        self.version = state["version"]

    @property
    def lacks_schema(self) -> bool:
        """Whether the schema is missing or older than this program, so a migration helps."""
        if self._state is None:
            return "alembic_version" in self.facts["missing_tables"] and not self._elsewhere()
        return self.version is None or self.version < schema.newest()

    @property
    def is_complete(self) -> bool:
        """Whether the schema is there, so its privileges and row security could be inspected."""
        return self._state is not None and not self.lacks_schema

    @property
    def read_only(self) -> bool:
        """Whether every write fails."""
        return self.facts["standby"] or self._setting(_READ_ONLY) == "on"

    def problems(self) -> Iterator[Problem]:
        """Return everything that is wrong, in the order in which to mend it."""
        yield from self._encoding()
        yield from self._required_settings()
        yield from self._writes()
        yield from self._durability()
        if not self.lacks_schema:
            yield from self._role()
        yield from self._schema()
        if self._state is not None and self.is_complete:
            yield from self._row_security(self._state)

    def _encoding(self) -> Iterator[Problem]:
        if self.facts["encoding"] != "UTF8":
            yield Problem("encoding", wrong_encoding(self.facts["encoding"]))

    def _required_settings(self) -> Iterator[Problem]:
        for name, allowed in REQUIRED.items():
            if name == "row_security" and not self._settings.row_security:
                continue
            if self._setting(name) not in allowed:
                yield Problem("database settings", self._change(name, allowed[0]))
        longest = 1000 * max(self._settings.request_timeout, self._settings.statement_timeout)
        if 0 < int(self._setting(_TIMEOUT) or 0) <= longest:
            yield Problem("database settings", self._change(_TIMEOUT, "0"))

    def _writes(self) -> Iterator[Problem]:
        if not self.read_only:
            return
        if self.facts["standby"]:
            why = "DATABASE_URL: the database is a standby, which can only be read"
        else:
            why = self._change(_READ_ONLY, "off")
        yield Problem("writes", f"{why}; until then reads work and writes are 503", fatal=False)
        if self._settings.rate_limit and self._settings.rate_limit_store == "postgresql":
            yield Problem(
                "writes",
                "RATE_LIMIT_STORE: postgresql needs a database that can be written; "
                "set it to memory for a read-only copy",
            )

    def _durability(self) -> Iterator[Problem]:
        if off := [name for name in _DURABILITY if self._setting(name) == "off"]:
            yield Problem(
                "durability",
                f"DATABASE_URL: the database has {' and '.join(off)} off, "
                "so a crash can lose acknowledged writes",
                fatal=False,
            )

    def _role(self) -> Iterator[Problem]:
        if not self._settings.row_security:
            return
        if not self.facts["role_exists"]:
            yield Problem(
                "row security",
                f"ROW_SECURITY: there is no role {ROLE}; run `todo-api migrate`, or "
                "restore the database again after `CREATE ROLE` (docs/operations.md)",
            )
        elif not self.facts["can_take_role"]:
            option = " WITH SET TRUE" if self.facts["server_version"] >= _SET_TRUE_SINCE else ""
            yield Problem(
                "row security",
                f"ROW_SECURITY: the database user cannot take the role {ROLE}; as its administrator"
                f" run `GRANT {ROLE} TO {self.facts['login']}{option}`",
            )

    def _version_unreadable(self) -> Iterator[Problem]:
        """Say whether the version is missing, or not found, or not permitted."""
        if "alembic_version" in self.facts["missing_tables"]:
            yield self._elsewhere() or Problem(
                "schema",
                "DATABASE_URL: the schema is missing; "
                "run `todo-api migrate`, or set AUTO_MIGRATE=on",
            )
        elif any("alembic_version" in each for each in self.facts["missing_privileges"]):
            yield self._denied()

    def _schema(self) -> Iterator[Problem]:
        if self._state is None:
            yield from self._version_unreadable()
        elif self.lacks_schema:
            yield Problem(
                "schema",
                f"DATABASE_URL: the schema is missing, or older than this program (at version"
                f" {self.version or 'none'}, needed {schema.newest()}); "
                "run `todo-api migrate`, or set AUTO_MIGRATE=on",
            )
        elif missing := self._missing():
            yield Problem(
                "schema",
                f"DATABASE_URL: the schema has its version, but not {', '.join(missing)}; "
                "restore it (`todo-api migrate --sql` prints the intended state)",
            )
        elif len(self.facts["schemas"]) > 1:
            yield Problem(
                "schema",
                f"DATABASE_URL: its tables are found in several schemas"
                f" ({', '.join(self.facts['schemas'])}); {self._alter('search_path', '…')}"
                " so that one schema with all of them comes first",
            )
        elif self.facts["missing_privileges"] or self.facts["denied_functions"]:
            yield self._denied()

    def _missing(self) -> list[str]:
        return [
            *self.facts["missing_tables"],
            *self.facts["missing_columns"],
            *self.facts["missing_functions"],
        ]

    def _elsewhere(self) -> Problem | None:
        """Return the problem of a schema that is there, and that the user does not find."""
        if not (elsewhere := self.facts["schemas_elsewhere"]):
            return None
        name, is_usable = next(iter(elsewhere.items()))
        if is_usable:
            what = f"not in the search_path; {self._alter('search_path', name)}"
        else:
            what = (
                f"not permitted to the user; run `GRANT USAGE ON SCHEMA {name}"
                f" TO {self.facts['user']}`"
            )
        return Problem("schema", f"DATABASE_URL: the tables are in the schema {name}, {what}")

    def _denied(self) -> Problem:
        user = self.facts["user"]
        grants = [f"GRANT {each} TO {user}" for each in self.facts["missing_privileges"]]
        grants += [
            f"GRANT EXECUTE ON FUNCTION {each} TO {user}" for each in self.facts["denied_functions"]
        ]
        if not self._settings.row_security:
            return Problem("row security", row_security.OFF_NEEDS)
        return Problem(
            "privileges",
            f"DATABASE_URL: requests lack privileges; as the owner of the tables run"
            f" `{'; '.join(grants)}`",
        )

    def _row_security(self, state: Mapping[str, Any]) -> Iterator[Problem]:
        if problem := row_security.problem(state, role=self._settings.row_security):
            yield Problem("row security", problem)

    def _setting(self, name: str) -> str | None:
        found = self.facts["settings"].get(name)
        return found and str(found["value"])

    def _change(self, name: str, value: str) -> str:
        """Return a sentence about a setting with the wrong value."""
        wrong = f"DATABASE_URL: {name} is {self._setting(name)}"
        if self.facts["settings"][name]["source"] == "client":
            return f"{wrong}; remove it from the URL and from PGOPTIONS"
        return f"{wrong}; {self._alter(name, value)}"

    def _alter(self, name: str, value: str) -> str:
        """Return advice that wins over the settings of the server, the database and the role."""
        login, database = self.facts["login"], self.facts["database"]
        quoted = value if name == "search_path" else f"'{value}'"
        return f"run `ALTER ROLE {login} IN DATABASE {database} SET {name} = {quoted}`"


def wrong_encoding(encoding: str) -> str:
    """Return what to say of a database that is not encoded in UTF-8."""
    return (
        f"DATABASE_URL: the database is encoded in {encoding}, and texts need UTF8; "
        "make another with `CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0`"
    )


def why_not_migrating(rights: Mapping[str, Any], found: Inspection) -> str | None:
    """Return why the login of a `MIGRATION` result cannot migrate, or None if it can."""
    facts = found.facts
    target = rights["schema"] or "(none in the search_path)"
    obstacles = {
        "the database is read-only": found.read_only,
        f"it may not create tables in the schema {target}": not rights["creates"],
        "it does not own the tables": not rights["owns"],
        f"it has no CREATEROLE to make the role {ROLE}": not (
            facts["role_exists"] or rights["makes_role"]
        ),
        f"it may not take or grant the role {ROLE}": facts["role_exists"]
        and not (facts["can_take_role"] or rights["grants_role"]),
        f"it may not grant USAGE on the schema {target}": not rights["grants_usage"],
    }
    return next((why for why, is_so in obstacles.items() if is_so), None)


def refuse(problems: list[Problem]) -> None:
    """Raise `StartupError` for the first problem with which requests cannot work."""
    for problem in problems:
        if problem.fatal:
            raise StartupError(problem.detail)
