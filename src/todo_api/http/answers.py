"""How an answer is written: JSON bytes, and every error in the one shape."""

import json
from asyncio import CancelledError
from collections.abc import Mapping

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from todo_api.errors import ApiError, InternalError, NotFound, ShuttingDown

log = structlog.get_logger()


def json_answer(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer whose body is JSON already."""
    return Response(body, status, headers, "application/json")


def error_answer(error: ApiError) -> Response:
    """Return an error as its class says: status, headers and `{"error": …}`."""
    return json_answer(json.dumps(error.body()).encode(), error.status, error.headers)


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer any of our errors; what is our fault is logged once, with its cause."""
    if not isinstance(error, ApiError):
        raise TypeError("not an ApiError")
    if error.status >= InternalError.status:
        log.error(
            "request failed",
            status=error.status,
            error=type(error).__name__,
            cause=str(error.__cause__ or ""),
            request_id=request.scope.get("request_id"),
        )
    return error_answer(error)


async def answer_http_exception(_request: Request, error: Exception) -> Response:
    """Answer what the framework raises itself: a path that no route has."""
    if not isinstance(error, HTTPException):
        raise TypeError("not an HTTPException")
    if error.status_code == NotFound.status:
        return error_answer(NotFound())
    body = json.dumps({"error": error.detail}).encode()
    return json_answer(body, error.status_code, error.headers)


class UnexpectedErrors:
    """Turns an exception that nobody expected into a generic 500, logged once.

    Inside CORS, so that a browser can read the answer. Once a response has started the exception
    goes on, and the server cuts the connection.
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
        except CancelledError:  # by the server alone, when its time to shut down is over
            if started:
                raise
            await error_answer(ShuttingDown())(scope, receive, send)
        except Exception:
            if started or scope["type"] != "http":
                raise
            log.exception("unexpected error", request_id=scope.get("request_id"))
            await error_answer(InternalError())(scope, receive, send)
