"""Observers of requests: the access log and the metrics. They never see a token or a text."""

import time
from collections.abc import Callable
from hashlib import blake2b

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from todo_api.request_context import RequestContext

log = structlog.get_logger()

NO_ROUTE = "none"
"""Reported for an unknown path or method. The path itself may contain anything."""

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

OTHER_METHOD = "other"
"""Reported for an unknown method, which may contain anything too."""

Observer = Callable[[RequestContext, float], None]
"""Called after each request, with the seconds that it took."""


class Observed:
    """Calls the observers after each request."""

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
            context = RequestContext.of(scope)
            for observe in self._observers:
                observe(context, seconds)


def reported_status(context: RequestContext) -> int:
    """Return the status of the response, or 0 if the client left before it started."""
    return 0 if context.client_left else context.status


def reported_method(context: RequestContext) -> str:
    """Return the method as it was sent, also in lower case, or `other`."""
    method = context.method
    return method if method == "-" or method.upper() in METHODS else OTHER_METHOD


def access_log(key: bytes) -> Observer:
    """Write one line per request. The user is a hash under `key`, so the line names nobody."""

    def observe(context: RequestContext, seconds: float) -> None:
        user = context.user and blake2b(context.user.encode(), digest_size=8, key=key).hexdigest()
        log.info(
            "request",
            request_id=context.request_id,
            method=reported_method(context),
            route=context.route or NO_ROUTE,
            status=reported_status(context),
            ms=round(seconds * 1000, 3),
            user=user,
            error=context.error,
            reason=context.reason,
        )

    return observe
