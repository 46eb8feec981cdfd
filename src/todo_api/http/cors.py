"""Cross-origin requests: who may call from a browser, and a refusal that says so in our shape."""

from collections.abc import Sequence
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from todo_api.errors import CorsRefused
from todo_api.http.answers import error_answer
from todo_api.request_context import RequestContext

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "X-Request-ID",
    "If-Match",
    "If-None-Match",
    "Idempotency-Key",
    # Tracing tools and HTTP clients add these on their own. The service ignores them.
    "Prefer",
    "traceparent",
    "tracestate",
    "baggage",
    "sentry-trace",
)
RESPONSE_HEADERS = (
    "ETag",
    "Link",
    "X-Total-Count",
    "Idempotency-Replayed",
    "Location",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "X-Request-ID",
    "WWW-Authenticate",
)
"""Header fields that a page may read (https://fetch.spec.whatwg.org/#http-cors-protocol)."""

PREFLIGHT_SECONDS = 7200
"""How long a browser may cache a preflight. Chromium caches none for longer."""


class CORS(CORSMiddleware):
    """Starlette's CORS for a fixed list of origins. Bearer tokens need no credentials flag."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=REQUEST_HEADERS,
            expose_headers=RESPONSE_HEADERS,
            max_age=PREFLIGHT_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request. CORS concerns only requests with an origin."""
        if b"origin" in RequestContext.of(scope).headers:
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight; a refusal is an error like any other."""
        response = super().preflight_response(request_headers)
        allowed = response.status_code == HTTPStatus.OK
        answer = (
            Response(status_code=HTTPStatus.NO_CONTENT)
            if allowed
            else error_answer(CorsRefused(bytes(response.body).decode()))
        )
        del response.headers["content-type"], response.headers["content-length"]
        answer.headers.update(response.headers)
        return answer
