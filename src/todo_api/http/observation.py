"""What is told of each request: one line of the log, and the metrics. Never a token or a text."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

log = structlog.get_logger()

NO_ROUTE = "none"
"""Where no route was served: an unknown path, or another verb. The path itself may say anything."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A request that has been answered."""

    request_id: str
    method: str
    route: str
    """The route's template, such as `/api/tasks/{id}`."""
    status: int
    """0 where the client left before there was an answer."""
    seconds: float
    user: str | None
    error: str | None
    """The class of the error, see `todo_api.errors`."""


Observer = Callable[[Observation], None]


class Observed:
    """Tells the observers of each request when it is over."""

    def __init__(self, app: ASGIApp, observers: list[Observer]) -> None:
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        started = time.perf_counter()
        try:
            await self._app(scope, receive, send)
        finally:
            seconds = time.perf_counter() - started
            route = scope.get("route")
            sent = scope.get("sent", scope)  # of HEAD, what the client asked for
            seen = Observation(
                scope["request_id"],
                sent["method"],
                NO_ROUTE if route is None else route.path,
                0 if sent.get("client_left") else scope.get("status", 0),
                seconds,
                scope.get("user"),
                scope.get("error"),
            )
            for observe in self._observers:
                observe(seen)


def access_log(key: bytes) -> Observer:
    """Write one line a request. The user is a hash under `key`, so that the line names nobody."""

    def observe(seen: Observation) -> None:
        user = seen.user and blake2b(seen.user.encode(), digest_size=8, key=key).hexdigest()
        log.info(
            "request",
            request_id=seen.request_id,
            method=seen.method,
            route=seen.route,
            status=seen.status,
            ms=round(seen.seconds * 1000, 3),
            user=user,
            error=seen.error,
        )

    return observe
