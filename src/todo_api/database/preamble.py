"""The statement that a request's transaction begins with, in the same pipeline as its own one."""

from todo_api.database.row_security import ROLE
from todo_api.database.statement import Statement
from todo_api.settings import Settings

_PLAN_ONCE = "plan_once()"
_PLAN_STREAM = (
    # If one user has many more tasks than the others, PostgreSQL would plan every list anew.
    _PLAN_ONCE,
    # At the default cost of a random page the planner sorts a user's scattered rows, instead of
    # reading them in the order of an index.
    "set_config('random_page_cost', '1.1', true)",
    # For a very long list the planner would start parallel workers.
    "set_config('max_parallel_workers_per_gather', '0', true)",
)
"""Planner settings for a streamed statement."""


class Preamble:
    """Takes the role and names the owner, sets the timeouts, and counts the request.

    It sets the timeouts in each transaction, because poolers refuse startup options. It counts the
    request if PostgreSQL keeps the rate limit, unless `counted` is False.
    """

    def __init__(self, settings: Settings, *, counted: bool = True) -> None:
        role = settings.row_security
        in_database = settings.rate_limit_store == "postgresql"
        quota = settings.rate_limit if counted and in_database else 0
        self.counts = quota > 0
        """Whether PostgreSQL counts the request."""
        timeouts = settings.statement_timeout, settings.lock_timeout
        self.timeouts = _select(b"transaction_timeouts", _set_timeouts(*timeouts))
        """Only sets the timeouts, for statements that name no owner."""
        self.session = None if role else _select(b"timeouts", _set_timeouts(*timeouts, "false"))
        """A statement that each new connection runs once, unless requests set the timeouts."""
        owner = [f"set_config('role', '{ROLE}', true)", "name_owner($1)"] if role else []
        count = [f"take_request($1, {quota})"] if quota else []
        plain = [*owner, *(_set_timeouts(*timeouts) if role else ()), *count]
        # The server waits while a client reads a stream, for as long as the request may take.
        stream_timeouts = _set_timeouts(settings.request_timeout, settings.lock_timeout)
        stream = [*owner, *stream_timeouts, *_PLAN_STREAM, *count]
        planned = [*owner, *(_set_timeouts(*timeouts) if role else ()), _PLAN_ONCE, *count]
        parameters = ("owner",) if role or quota else ()
        suffix = b"_counted" if quota else b""
        self.plain = _select(b"preamble" + suffix, plain, parameters) if plain else None
        """The statement before an ordinary one, if any."""
        self._planned = _select(b"planned_preamble" + suffix, planned, parameters)
        self._stream = _select(b"stream_preamble" + suffix, stream, parameters)

    def before(self, statement: Statement) -> Statement | None:
        """Return the statement to send before this one, if any."""
        if statement.streamed:
            return self._stream
        return self._planned if statement.planned_once else self.plain


def _select(name: bytes, calls: list[str], parameters: tuple[str, ...] = ()) -> Statement:
    return Statement(name, f"SELECT {', '.join(calls)}".encode(), parameters, writes=False)


def _set_timeouts(statement_timeout: float, lock_timeout: float, local: str = "true") -> list[str]:
    """Return the calls that set timeouts in seconds, of the session unless `local` is "true"."""
    return [
        f"set_config('statement_timeout', '{statement_timeout * 1000:.0f}', {local})",
        f"set_config('lock_timeout', '{lock_timeout * 1000:.0f}', {local})",
    ]
