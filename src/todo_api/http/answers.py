"""How an answer is written: JSON bytes, and every error in the one shape."""

import json
from asyncio import CancelledError
from collections.abc import Mapping

import structlog
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from todo_api.errors import ApiError, InternalError, ShuttingDown

log = structlog.get_logger()


def json_answer(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer whose body is JSON already."""
    return Response(body, status, headers, "application/json")


def error_answer(error: ApiError) -> Response:
    """Return an error as its class says: status, headers and `{"error": …}`."""
    return json_answer(json.dumps(error.body()).encode(), error.status, error.headers)


class Errors:
    """Answers every error: one of ours as its class says, any other as a generic 500.

    What is our fault is logged once, with its cause. Inside CORS, so that a browser can read the
    answer. Once a response has started an exception goes on, and the server cuts the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        started = False

        async def remember_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, remember_start)
        except (Exception, CancelledError) as error:
            if started:
                raise
            await error_answer(_as_ours(error, scope["request_id"]))(scope, receive, send)


def _as_ours(error: BaseException, request_id: str) -> ApiError:
    """Return the error that a client hears of."""
    if isinstance(error, CancelledError):  # by the server alone, when its time to stop is over
        return ShuttingDown()
    if not isinstance(error, ApiError):
        log.error("unexpected error", request_id=request_id, exc_info=error)
        return InternalError()
    # Without a cause there is nothing to say that the answer does not.
    if error.__cause__ is not None or isinstance(error, InternalError):
        name, cause = type(error).__name__, str(error.__cause__ or "")
        log.error("request failed", error=name, cause=cause, request_id=request_id)
    return error
