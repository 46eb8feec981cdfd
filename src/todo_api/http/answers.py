"""How an answer is written: JSON bytes, and every error in the one shape."""

import json
from asyncio import CancelledError
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from inspect import isawaitable
from typing import Any, Protocol

import structlog
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from todo_api.errors import (
    FIELD_REASONS,
    ApiError,
    FieldError,
    InternalError,
    InvalidFields,
    RaisedError,
    ShuttingDown,
)
from todo_api.request_context import RequestContext

log = structlog.get_logger()


class Problem(BaseModel):
    """An error. `code` is for programs, the message for people."""

    error: str = Field(description="What is wrong, for people.", examples=[InvalidFields.message])
    detail: str = Field(description="The same as `error`.", examples=[InvalidFields.message])
    code: str = Field(
        description="What is wrong, for programs. The responses list the codes.",
        examples=[InvalidFields.code],
    )
    operation: int | SkipJsonSchema[None] = Field(
        default=None,
        description="In a batch: the number of the operation that failed, from 0.",
        examples=[2],
        json_schema_extra={"format": "int64"},
    )


class FieldsProblem(Problem):
    """A 400. With the code `invalid_fields` it has a message and a code for each field."""

    fields: dict[str, str] | SkipJsonSchema[None] = Field(
        default=None,
        description="The message for each invalid field. Absent with any other code.",
        examples=[InvalidFields.example()["fields"]],
    )
    codes: dict[str, str] | SkipJsonSchema[None] = Field(
        default=None,
        description="The reason for each invalid field. Absent with any other code. "
        + "; ".join(f"`{reason}`: {meaning}" for reason, meaning in FIELD_REASONS.items())
        + ".",
        examples=[InvalidFields.example()["codes"]],
    )


def json_answer(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an answer whose body is JSON already."""
    return Response(body, status, headers, "application/json")


class Batches(Protocol):
    """An asynchronous iterator over batches of JSON values."""

    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        """Iterate over the batches."""

    def close(self) -> None:
        """Give up what has not been read."""


class _LongArray(Response):
    """A streamed JSON array. It holds one batch in memory at a time."""

    def __init__(
        self, first: list[bytes], rest: Batches, headers: Mapping[str, str] | None
    ) -> None:
        super().__init__(media_type="application/json", headers=headers)
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; if the client leaves, stop."""
        del scope, receive
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await _send_more(send, b"[" + b",".join(self._first))
            self._first = []
            async for batch in self._rest:
                await _send_more(send, b"".join(b"," + each for each in batch))
            await send({"type": "http.response.body", "body": b"]"})
        except OSError:
            log.debug("the client left in the middle of a list")
        finally:
            self._rest.close()


async def _send_more(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def array_answer(
    first: list[bytes], rest: Batches | None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON array of values that are JSON already, whole or streamed."""
    if rest is None:
        return json_answer(b"[" + b",".join(first) + b"]", headers=headers)
    return _LongArray(first, rest, headers)


def error_answer(error: ApiError) -> Response:
    """Return an error as its class says: status, headers and `{"error": …}`."""
    return json_answer(json.dumps(error.body()).encode(), error.status_code, error.headers)


class Errors:
    """Answers every error: with a handler that the application has for it, else in our shape.

    Logs an error of the service once, with its cause. CORS is outside of it, so that a browser
    can read the answer. A response that has started cannot become an error, so the server cuts the
    connection.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[Any, Any]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        context = RequestContext.of(scope)
        try:
            if context.refusal is not None:
                raise context.refusal  # noqa: TRY301  answered like any other error
            await self._app(scope, receive, send)
        except (Exception, CancelledError) as error:  # noqa: BLE001  every one ends here
            if response := await self._answer(error, scope, context):
                await response(scope, receive, send)

    async def _answer(
        self, error: BaseException, scope: Scope, context: RequestContext
    ) -> Response | None:
        """Note the error, and return its answer, unless one has begun.

        If `__call__` kept the error, the error's traceback would keep `__call__`, and the memory
        of both would wait for the garbage collector.
        """
        ours = _as_ours(error, context.request_id)
        context.error = type(ours).__name__
        context.reason = ours.reason or context.reason
        if context.status:
            return None
        handler = self._handler(error, ours.status_code)
        return await _handled(handler, error, Request(scope)) or error_answer(ours)

    def _handler(self, error: BaseException, status: int) -> Any:
        """Return the application's handler for the status or the nearest class.

        As in Starlette, a handler for `Exception` is for internal errors only.
        """
        classes = [each for each in type(error).__mro__ if each is not Exception]
        keys = [getattr(error, "status_code", None), *classes, status]
        if status == HTTPStatus.INTERNAL_SERVER_ERROR:
            keys.append(Exception)
        return next((self._handlers[key] for key in keys if key in self._handlers), None)


async def _handled(handler: Any, error: BaseException, request: Request) -> Response | None:
    """Call a handler that the application may have for the error."""
    if handler is None:
        return None
    answer = handler(request, error)
    response: Response | None = await answer if isawaitable(answer) else answer
    return response


def _as_ours(error: BaseException, request_id: str) -> ApiError:
    """Return the error that the client gets."""
    if isinstance(error, CancelledError):  # only the server cancels, when its time to stop is over
        return ShuttingDown()
    if isinstance(error, HTTPException):
        return RaisedError(error.status_code, str(error.detail), error.headers or {})
    if isinstance(error, RequestValidationError):
        return InvalidFields(
            {
                ".".join(map(str, each["loc"][1:])): FieldError(each["type"], each["msg"])
                for each in error.errors()
            }
        )
    if not isinstance(error, ApiError):
        log.error("unexpected error", request_id=request_id, exc_info=error)
        return InternalError()
    # Without a cause the log would say only what the answer says.
    is_ours = error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    if is_ours and (error.__cause__ is not None or isinstance(error, InternalError)):
        name, cause = type(error).__name__, str(error.__cause__ or "")
        log.error("request failed", error=name, cause=cause, request_id=request_id)
    return error
