"""The outermost layer: common header fields, the request's id, and HEAD."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from todo_api.request_context import RequestContext

COMMON_HEADERS = (
    (b"vary", b"Origin"),  # CORS header fields depend on it, and so does their absence
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
)
"""Sent unless the response has a field of the same name."""


class Envelope:
    """Completes every response, a refused preflight and a 500 included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request."""
        context = RequestContext.of(scope)
        request_id = context.request_id.encode()
        is_head = context.method == "HEAD"
        if is_head:  # HEAD is GET without the body (RFC 9110, section 9.3.2)
            scope = {**scope, "method": "GET"}

        async def send_enveloped(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = message["headers"]
                present = dict(headers)
                headers += [each for each in COMMON_HEADERS if each[0] not in present]
                if b"Origin" not in present.get(b"vary", b"Origin"):
                    headers.append((b"vary", b"Origin"))
                headers.append((b"x-request-id", request_id))
                headers += context.rate_limit_headers
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        await self._app(scope, receive, send_enveloped)
