"""Every error of the service. Each class carries its status, its message and its headers.

One handler (`todo_api.http.answers`) answers them all. This module imports nothing of ours.

    StartupError                 the program cannot start: one line for the operator
    ApiError                     any error a client sees
    ├── BadRequest               400
    │   ├── InvalidJson          400
    │   ├── InvalidTaskId        400
    │   ├── InvalidParameter     400
    │   ├── NothingToChange      400
    │   ├── InvalidBatch         400, the batch or one of its operations
    │   ├── CorsRefused          400, a preflight
    │   └── InvalidFields        400 with a message and a code for each field
    ├── Unauthorized             401
    │   └── InvalidToken         401, a token was sent (RFC 6750, section 3.1)
    │       ├── ExpiredToken     401, and everything else about the token is right
    │       └── AccountErased    401, the user was erased after the token was issued
    ├── Forbidden                403
    ├── NotFound                 404
    │   └── TaskNotFound         404, unused or another user's: the same answer
    ├── MethodNotAllowed         405
    ├── CursorExpired            410
    ├── TaskChanged              412
    ├── BodyTooLarge             413
    ├── UriTooLong               414
    ├── UnsupportedMediaType     415
    ├── IdempotencyKeyReused     422
    ├── HeaderFieldsTooLarge     431
    ├── TooManyRequests          429
    ├── TooManyWaiting           429
    ├── RaisedError              the status of an `HTTPException`
    ├── InternalError            500
    │   └── DatabaseUnreachable  500
    └── ServiceUnavailable       503
        ├── Overloaded           503, too many requests at once
        ├── WaitingIsFull        503
        ├── RequestTimeout       503
        ├── ShuttingDown         503
        ├── DatabaseBusy         503, no free connection in time
        ├── StatementTimeout     503
        ├── NotReady             503, `/readyz`
        └── KeysUnavailable      503, no signing key could be loaded yet
"""

from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple


class StartupError(Exception):
    """The program cannot start. The message is one line with the setting, not its value."""


class ApiError(Exception):
    """An error with its answer: `status_code`, `code`, `headers`, and `message` for the body.

    People read the message. Programs decide on the code, which is part of the contract.
    """

    status_code: int
    code: str
    message: str = ""
    headers: Mapping[str, str] = {}
    reason: str | None = None
    """Why, for the request's line in the log. The client never sees it."""
    operation: int | None = None
    """The number of the operation that failed, from 0, if the request is a batch."""

    def __init__(self, message: str | None = None) -> None:
        if message is not None:
            self.message = message
        super().__init__(self.message)

    def body(self) -> dict[str, object]:
        """Return the members of the JSON body. Many clients read `detail`, as FastAPI calls it."""
        body: dict[str, object] = {
            "error": self.message,
            "detail": self.message,
            "code": self.code,
        }
        return body if self.operation is None else {**body, "operation": self.operation}

    @classmethod
    def example(cls) -> dict[str, object]:
        """Return a body for the OpenAPI document, with the message of the class."""
        return {"error": cls.message, "detail": cls.message, "code": cls.code}


class BadRequest(ApiError):
    """The request breaks a rule of the API. The message names the rule and the place."""

    status_code = 400
    code = "invalid_request"
    message = "The request is not valid HTTP/1.1"


class InvalidJson(BadRequest):
    """The body is not strict JSON, or not an object."""

    code = "invalid_json"
    message = "Body must be a JSON object"


class InvalidTaskId(BadRequest):
    """The id in the path is not a plain decimal number in range."""

    code = "invalid_task_id"
    message = "Invalid task ID"


class InvalidParameter(BadRequest):
    """A query parameter is unknown, repeated, or has a value that is not allowed."""

    code = "invalid_parameter"
    message = "Invalid order value. Must be asc or desc"


class NothingToChange(BadRequest):
    """A change has no field that a client can set."""

    code = "nothing_to_change"
    message = "At least one field must be provided"


class InvalidBatch(BadRequest):
    """A batch, or an operation of it, does not have the documented form."""

    code = "invalid_batch"
    message = "operations must be an array of 1 to 100 operations"


class CorsRefused(BadRequest):
    """A preflight asks for what CORS does not allow."""

    code = "cors_refused"
    message = "Disallowed CORS origin"


FIELD_REASONS: Mapping[str, str] = {
    "required": "a new task needs the field",
    "blank": "the title has no visible text",
    "too_long": "the text is over its length",
    "wrong_type": "the value has another JSON type than the field",
    "invalid_value": "the type fits, but the value is not one of those allowed",
    "invalid_text": "the text contains NUL",
    "unknown_field": "a task has no such field",
    "conflict": "`status` and `completed` disagree",
}
"""Each code that a field's error can have, and when."""


class FieldError(NamedTuple):
    """The error of one member of a body. Its code is one of `FIELD_REASONS`."""

    code: str
    message: str


class InvalidFields(BadRequest):
    """One or more members of the body are wrong; `fields` has an error for each, in order."""

    code = "invalid_fields"
    message = "Title is required"
    MAXIMUM_FIELDS = 20

    def __init__(self, fields: Mapping[str, FieldError]) -> None:
        self.fields = dict(islice(fields.items(), self.MAXIMUM_FIELDS))
        super().__init__(next(iter(self.fields.values())).message)

    def body(self) -> dict[str, object]:
        """Return the first message as `error`, and message and code of every field."""
        return {
            **super().body(),
            "fields": {name: error.message for name, error in self.fields.items()},
            "codes": {name: error.code for name, error in self.fields.items()},
        }

    @classmethod
    def example(cls) -> dict[str, object]:
        """Return a body with one invalid field."""
        return cls({"title": FieldError("required", cls.message)}).body()


class Unauthorized(ApiError):
    """No token was sent. Every 401 has the same body, so that a stranger learns nothing."""

    status_code = 401
    code = "token_missing"
    message = "A valid bearer token is required"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class InvalidToken(Unauthorized):
    """A token was sent and refused. `reason` names the check that failed."""

    code = "token_invalid"
    headers: Mapping[str, str] = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


class ExpiredToken(InvalidToken):
    """The token has expired, and everything else about it is right."""

    code = "token_expired"


class AccountErased(InvalidToken):
    """The token was issued before its user was erased, and must not bring them back."""

    def __init__(self, reason: str = "iat: from before the erasure of the account") -> None:
        super().__init__(reason)


class Forbidden(ApiError):
    """The user named in the path is not the token's user."""

    status_code = 403
    code = "forbidden"
    message = "You can only access your own tasks"


class NotFound(ApiError):
    """No route has this path."""

    status_code = 404
    code = "not_found"
    message = "Not found"


class TaskNotFound(NotFound):
    """This user has no such task. The id may be unused or another user's."""

    code = "task_not_found"
    message = "Task not found"


class CursorExpired(ApiError):
    """The client's copy cannot be brought up to date any more. It has to start over."""

    status_code = 410
    code = "cursor_expired"
    message = "The cursor is too old, or from before an erasure: start over, without since"


class TaskChanged(ApiError):
    """The task has another version than `If-Match` names. The client gets the current one."""

    status_code = 412
    code = "task_changed"
    message = "The task has changed"

    def __init__(self, version: int) -> None:
        super().__init__()
        self.headers = {"ETag": f'"{version}"'}


class MethodNotAllowed(ApiError):
    """The path exists, but not with this method, which is case-sensitive."""

    status_code = 405
    code = "method_not_allowed"
    message = "Method not allowed"

    def __init__(self, method: str, allow: str) -> None:
        hint = (
            "" if method == method.upper() else ": methods are case-sensitive, use capital letters"
        )
        super().__init__(self.message + hint)
        self.headers = {"Allow": allow}


class BodyTooLarge(ApiError):
    """The body is over the limit. The rest of it is not read."""

    status_code = 413
    code = "body_too_large"
    message = "Body must be 131072 bytes or less"


class UriTooLong(ApiError):
    """The target of the request is over the limit (RFC 9110, section 15.5.15)."""

    status_code = 414
    code = "uri_too_long"
    message = "The request target must be 8192 bytes or less"


class UnsupportedMediaType(ApiError):
    """The body is not declared as plain JSON."""

    status_code = 415
    code = "unsupported_media_type"
    message = "Content-Type must be application/json, without a charset or with charset=utf-8"
    headers: Mapping[str, str] = {"Accept": "application/json"}


class HeaderFieldsTooLarge(ApiError):
    """The request line and its header fields are over the limit (RFC 6585, section 5)."""

    status_code = 431
    code = "header_fields_too_large"
    message = "The header fields must be 65536 bytes or less"


class IdempotencyKeyReused(ApiError):
    """The idempotency key belongs to another request of this user."""

    status_code = 422
    code = "idempotency_key_reused"
    message = "This Idempotency-Key was used with another method, path or body"


class TooManyRequests(ApiError):
    """This user or this address has sent too many requests. `wait` is in seconds."""

    status_code = 429
    code = "too_many_requests"
    message = "Too many requests"

    def __init__(self, wait: int) -> None:
        super().__init__()
        self.headers = {"Retry-After": str(wait)}


class TooManyWaiting(ApiError):
    """This user has too many requests that wait for changes."""

    status_code = 429
    code = "too_many_waiting"
    message = "Too many requests wait for changes: end one of them, or ask without wait"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class RaisedError(ApiError):
    """An `HTTPException` of a route that somebody added to the service."""

    def __init__(self, status_code: int, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = f"http_{status_code}"
        self.headers = headers


class InternalError(ApiError):
    """The service is at fault. The log has the cause, under the request's id."""

    status_code = 500
    code = "internal_error"
    message = "Internal server error"


class DatabaseUnreachable(InternalError):
    """The database cannot be reached, or the connection broke and the outcome is unknown."""

    code = "database_unreachable"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class ServiceUnavailable(ApiError):
    """The database is busy. The client may try again after `Retry-After` seconds."""

    status_code = 503
    code = "database_busy"
    message = "Service temporarily unavailable"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class Overloaded(ServiceUnavailable):
    """This process has as many requests in flight as it accepts."""

    code = "overloaded"


class WaitingIsFull(ServiceUnavailable):
    """As many requests of this process wait for changes as it accepts. Ask without `wait`."""

    code = "waiting_is_full"


class RequestTimeout(ServiceUnavailable):
    """The request took longer than `REQUEST_TIMEOUT`."""

    code = "timeout"


class ShuttingDown(ServiceUnavailable):
    """The request was unfinished when the time for graceful shutdown ran out."""

    code = "shutting_down"


class DatabaseBusy(ServiceUnavailable):
    """No connection became free in time, or the database lacks resources."""


class StatementTimeout(ServiceUnavailable):
    """The statement or its wait for a lock took too long, and was rolled back."""

    code = "timeout"


class NotReady(ServiceUnavailable):
    """The service cannot serve requests yet. The message says why."""

    code = "not_ready"
    message = "No signing key could be loaded yet"


class KeysUnavailable(ServiceUnavailable):
    """No signing key could be loaded yet, so the token cannot be verified."""

    code = "keys_unavailable"
