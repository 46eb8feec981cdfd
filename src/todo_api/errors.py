"""Every error of the service. Each class carries its status, its message and its headers.

One handler (`todo_api.http.answers`) answers them all. This module imports nothing of ours.

    StartupError                 the program cannot start: one line for the operator
    ApiError                     any error a client sees
    ├── BadRequest               400
    │   └── InvalidFields        400 with a message for each field
    ├── Unauthorized             401
    │   └── InvalidToken         401, a token was sent (RFC 6750, section 3.1)
    │       ├── ExpiredToken     401, and everything else about the token is right
    │       └── AccountErased    401, the user was erased after the token was issued
    ├── Forbidden                403
    ├── NotFound                 404
    │   └── TaskNotFound         404, unused or another user's: the same answer
    ├── MethodNotAllowed         405
    ├── BodyTooLarge             413
    ├── UnsupportedMediaType     415
    ├── HeaderFieldsTooLarge     431
    ├── TooManyRequests          429
    ├── RaisedError              the status of an `HTTPException`
    ├── InternalError            500
    │   └── DatabaseUnreachable  500
    └── ServiceUnavailable       503
        ├── Overloaded           503, too many requests at once
        ├── RequestTimeout       503
        ├── ShuttingDown         503
        ├── DatabaseBusy         503, no free connection in time
        ├── StatementTimeout     503
        └── KeysUnavailable      503, no signing key could be loaded yet
"""

from collections.abc import Mapping


class StartupError(Exception):
    """The program cannot start. The message is one line with the setting, not its value."""


class ApiError(Exception):
    """An error with its answer: `status_code`, `headers`, and `message` for the body."""

    status_code: int
    message: str = ""
    headers: Mapping[str, str] = {}
    reason: str | None = None
    """Why, for the request's line in the log. The client never sees it."""

    def __init__(self, message: str | None = None) -> None:
        if message is not None:
            self.message = message
        super().__init__(self.message)

    def body(self) -> dict[str, object]:
        """Return the members of the JSON body."""
        return {"error": self.message}


class BadRequest(ApiError):
    """The request breaks a rule of the API. The message names the rule and the place."""

    status_code = 400


class InvalidFields(BadRequest):
    """Some members of the body are wrong. `fields` has a message for each, in order."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = dict(fields)
        super().__init__(next(iter(self.fields.values())))

    def body(self) -> dict[str, object]:
        """Return the first message as `error`, and all of them under `fields`."""
        return {"error": self.message, "fields": self.fields}


class Unauthorized(ApiError):
    """No token was sent. Every 401 has the same body, so that a stranger learns nothing."""

    status_code = 401
    message = "A valid bearer token is required"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class InvalidToken(Unauthorized):
    """A token was sent and refused. `reason` names the check that failed."""

    headers: Mapping[str, str] = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


class ExpiredToken(InvalidToken):
    """The token has expired, and everything else about it is right."""


class AccountErased(InvalidToken):
    """The token was issued before its user was erased, and must not bring them back."""

    def __init__(self, reason: str = "iat: from before the erasure of the account") -> None:
        super().__init__(reason)


class Forbidden(ApiError):
    """The user named in the path is not the token's user."""

    status_code = 403
    message = "You can only access your own tasks"


class NotFound(ApiError):
    """No route has this path."""

    status_code = 404
    message = "Not found"


class TaskNotFound(NotFound):
    """This user has no such task. The id may be unused or another user's."""

    message = "Task not found"


class MethodNotAllowed(ApiError):
    """The path exists, but not with this verb."""

    status_code = 405
    message = "Method not allowed"

    def __init__(self, allow: str) -> None:
        super().__init__()
        self.headers = {"Allow": allow}


class BodyTooLarge(ApiError):
    """The body is over the limit. The rest of it is not read."""

    status_code = 413


class UnsupportedMediaType(ApiError):
    """The body is not declared as plain JSON."""

    status_code = 415
    message = "Content-Type must be application/json"
    headers: Mapping[str, str] = {"Accept": "application/json"}


class HeaderFieldsTooLarge(ApiError):
    """The request line and its header fields are over the limit (RFC 6585, section 5)."""

    status_code = 431


class TooManyRequests(ApiError):
    """This user or this address has sent too many requests. `wait` is in seconds."""

    status_code = 429
    message = "Too many requests"

    def __init__(self, wait: int) -> None:
        super().__init__()
        self.headers = {"Retry-After": str(wait)}


class RaisedError(ApiError):
    """An `HTTPException` of a route that somebody added to the service."""

    def __init__(self, status_code: int, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.headers = headers


class InternalError(ApiError):
    """The service is at fault. The log has the cause, under the request's id."""

    status_code = 500
    message = "Internal server error"


class DatabaseUnreachable(InternalError):
    """The database cannot be reached, or the connection broke and the outcome is unknown."""

    headers: Mapping[str, str] = {"Retry-After": "1"}


class ServiceUnavailable(ApiError):
    """The client may try again after `Retry-After` seconds."""

    status_code = 503
    message = "Service temporarily unavailable"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class Overloaded(ServiceUnavailable):
    """This process has as many requests in flight as it accepts."""


class RequestTimeout(ServiceUnavailable):
    """The request took longer than `REQUEST_TIMEOUT`."""


class ShuttingDown(ServiceUnavailable):
    """The request was unfinished when the time for graceful shutdown ran out."""


class DatabaseBusy(ServiceUnavailable):
    """No connection became free in time, or the database lacks resources."""


class StatementTimeout(ServiceUnavailable):
    """The statement or its wait for a lock took too long, and was rolled back."""


class KeysUnavailable(ServiceUnavailable):
    """No signing key could be loaded yet, so the token cannot be verified."""
