"""HTTP/1.1 on the wire: uvicorn's httptools protocol, strict where that one is lenient.

Found by attacking it (uvicorn 0.54, httptools 0.9): header fields without any limit; trailers taken
for header fields, so that a token could come after the body; the body lost behind an `Upgrade` that
nobody offered; errors in plain text; a reset in place of the answer to a request that was refused
before its body had been read.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from todo_api.errors import ApiError, BadRequest, HeaderFieldsTooLarge
from todo_api.request_context import RequestContext

HEAD_BYTES = 65_536
HEAD_FIELDS = 256
"""Limits of a request line with its header fields."""

HEAD_SECONDS = 10.0
"""How long a client may take for a head, from its first byte."""

STALL_SECONDS = 10.0
"""How long a client may leave a response unread that waits to be sent on."""

LINGER_BYTES = 1_048_576
LINGER_SECONDS = 2.0
"""How much more of a refused body is thrown away, and for how long, so that the client can read
the answer: closing a socket with unread data resets the connection (RFC 9112, section 9.6)."""


BODILESS = {204, 304}
"""Statuses whose answers have no body, and so need no framing (RFC 9112, section 6.3)."""


class _Exchange(RequestResponseCycle):
    """A request and its response.

    The head of a response leaves together with the start of its body: one system call in place of
    two, which is a tenth of what a request costs (measured).
    """

    _head = b""
    _has_awaited = False
    """Whether the application has waited for a part of the body."""
    _body_ended = False
    """Whether the application has the whole body."""

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]  # the same, untyped
        """Serve the request. A response that broke off must not be taken for a whole one."""
        if self.flow.write_paused:  # the answers before this one: let them be read first
            await self._until_read()
        if self.disconnected:
            return
        try:
            await app(self.scope, self.receive, self.send)  # type: ignore[arg-type]
        finally:
            if not self.response_complete:
                self.transport.abort()

    async def send(self, message: Message) -> None:  # type: ignore[override]  # the same, untyped
        """Send a part of the response.

        Raises `OSError` where more is to come and nobody is left to read it (ASGI 2.4).
        """
        if self.flow.write_paused and not self.disconnected:
            await self._until_read()
        if self.disconnected:
            self.context.client_left = not self.response_started
            if message.get("more_body"):
                raise ConnectionResetError
        elif message["type"] == "http.response.start":
            self._start(message["status"], message["headers"])
        else:
            self._write(message.get("body", b""), more_body=message.get("more_body", False))

    async def receive(self) -> Message:  # type: ignore[override]  # the same, untyped
        """Return what has arrived of the body, then wait: for the rest of it, or for the end."""
        if self._body_ended:
            return await self._until_disconnect()
        if self.more_body or self._has_awaited or self.disconnected or self.response_complete:
            self._has_awaited = True
            message = await self.context.await_body(super().receive())  # type: ignore[arg-type]  # the same, untyped
        else:
            body, self.body = bytes(self.body), bytearray()
            message = {"type": "http.request", "body": body, "more_body": False}
        self._body_ended = not message.get("more_body", False)
        return message

    async def _until_disconnect(self) -> Message:
        """Wait for the client to leave, or for the response to be complete (ASGI 2.3)."""
        while not (self.disconnected or self.response_complete):
            self.message_event.clear()
            await self.message_event.wait()
        return {"type": "http.disconnect"}

    @property
    def context(self) -> RequestContext:
        """What is known of the request."""
        return RequestContext.of(cast("Scope", self.scope))

    async def _until_read(self) -> None:
        """Wait for the client to read; cut off one that does not."""
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self.flow.drain()
        except TimeoutError:
            self.disconnected = True
            self.transport.abort()

    def _start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep the head for what follows. Without a length the body is chunked (RFC 9112, 7.1)."""
        self.response_started = True
        if self.waiting_for_100_continue:  # nobody knows whether the body will come
            self.waiting_for_100_continue = self.keep_alive = False
        lines = [b"%b: %b\r\n" % field for field in chain(self.default_headers, headers)]
        head = STATUS_LINE[status] + b"".join(lines)
        if head.count(b"\r") > len(lines) + 1 or head.count(b"\n") > len(lines) + 1:
            raise ValueError("a header field would end early")
        self.chunked_encoding = status not in BODILESS and b"\ncontent-length: " not in head
        if self.chunked_encoding:
            if self.scope["http_version"] == "1.1":
                head += b"transfer-encoding: chunked\r\n"
            else:  # the end of the connection is the end of the body
                self.chunked_encoding = self.keep_alive = False
        self._head = head + (b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")

    def _write(self, body: bytes, *, more_body: bool) -> None:
        if self.scope["method"] == "HEAD":
            body = b""
        elif self.chunked_encoding:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (
                b"" if more_body else b"0\r\n\r\n"
            )
        self.transport.write(self._head + body)
        self._head = b""
        if not more_body:
            self.response_complete = True
            self.message_event.set()
            self.on_response(self)


class _Refused(Exception):
    """Raised in a callback of the parser; it ends in `send_400_response`."""


class StrictProtocol(HttpToolsProtocol):
    """One connection. The callbacks are those of `httptools.HttpRequestParser`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_open = True
        self._head_bytes = 0
        self._framing_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._resuming = False
        self._unanswered: deque[_Exchange] = deque()
        self._unwanted: int | None = None
        self._lingering: int | None = None
        self._half_closed = False
        self._refusal: ApiError = BadRequest("The request is not valid HTTP/1.1")

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived; of a refused request, throw it away."""
        if self._lingering is not None:
            self._lingering += len(data)
            if self._lingering > LINGER_BYTES:
                self.timeout_keep_alive_handler()
            return
        if self._unwanted is not None:
            self._unwanted += len(data)
            if self._unwanted > LINGER_BYTES:
                self._linger()
                return
        if self._head_open:
            self._head_bytes += len(data)
        self._framing_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
            if self._head_open or not self._unanswered:
                self._expect_head()
            else:
                self._check_framing()
        except httptools.HttpParserUpgrade as upgrade:
            self._resume_without_upgrade(data[upgrade.args[0] :])
        except (httptools.HttpParserError, _Refused):
            self.send_400_response("")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give the client as long for its first byte as for the next request."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._unset_keepalive_if_required()
        self._unset_head_timer()
        super().connection_lost(exc)
        self.pipeline.clear()
        for exchange in self._unanswered:  # uvicorn knows only of the newest
            exchange.disconnected = True
            exchange.message_event.set()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing is asked for."""
        super().timeout_keep_alive_handler()
        self._abort_unless_read()

    def _abort_unless_read(self, left_before: int = -1) -> None:
        """Cut off a client that does not read its last response: closing waits for that."""
        left = self.transport.get_write_buffer_size()
        if left == left_before:
            self.transport.abort()
        elif left:
            self.loop.call_later(STALL_SECONDS, self._abort_unless_read, left)

    def _expect_head(self) -> None:
        """Wait for the rest of a head, neither for ever nor for any size."""
        if self._head_open and self._head_bytes > HEAD_BYTES:
            self._refuse_head()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_overdue)

    def _check_framing(self) -> None:
        """Refuse a body that is all chunks of nothing, or has an endless trailer."""
        if self._framing_bytes > LINGER_BYTES:
            raise _Refused

    def _head_is_overdue(self) -> None:
        self._head_timer = None
        if self.flow.read_paused:  # the rest may have come, and waits until we read on
            self._expect_head()
        else:
            self.transport.abort()

    def _unset_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_message_begin(self) -> None:
        """Begin a request."""
        if not self._resuming:
            self._head_open, self._head_bytes, self._framing_bytes = True, 0, 0
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; what comes after the body is a trailer, and means nothing here."""
        if self._head_open:
            if len(self.headers) >= HEAD_FIELDS:
                self._refuse_head()
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Start to serve the request, or queue it behind the one before."""
        if self._resuming:
            return
        self._head_open = False
        self._unset_head_timer()
        self._check_head()
        self._set_target()
        previous = self.cycle
        exchange = self.cycle = self._exchange()
        self._unanswered.append(exchange)
        if previous is None or previous.response_complete:
            self._start_asgi_task(exchange, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    def _check_head(self) -> None:
        """Refuse a head that is too large, or leaves the framing in doubt (RFC 9112, 3.2 and 6)."""
        if len(self.url) + sum(map(len, chain.from_iterable(self.headers))) > HEAD_BYTES:
            self._refuse_head()
        version = self.parser.get_http_version()
        names = [name for name, _ in self.headers]
        hosts = names.count(b"host")
        if version not in {"1.0", "1.1"} or hosts > 1 or (version == "1.1" and hosts == 0):
            raise _Refused
        if b"transfer-encoding" in names and self._values(b"transfer-encoding") != [b"chunked"]:
            raise _Refused
        if b"expect" in names:
            self.expect_100_continue = b"100-continue" in self._values(b"expect")
        self.scope["http_version"] = version

    def _values(self, wanted: bytes) -> list[bytes]:
        return [value.strip().lower() for name, value in self.headers if name == wanted]

    def _set_target(self) -> None:
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        self.scope["method"] = self.parser.get_method().decode("ascii")
        self.scope["path"] = unquote(path) if "%" in path else path
        self.scope["raw_path"] = url.path
        self.scope["query_string"] = url.query or b""

    def _exchange(self) -> _Exchange:
        return _Exchange(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=self.scope["http_version"] != "1.0" and self.parser.should_keep_alive(),
            on_response=self._answered,
        )

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._framing_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request; the body of one that asks for an upgrade is still to come."""
        if self._resuming or not self.parser.should_upgrade():
            super().on_message_complete()
            self.cycle.more_body = False
            self._unwanted = None

    def _answered(self, exchange: _Exchange) -> None:
        """Go on with the next request; what is left of this one's body is thrown away."""
        self._unanswered.remove(exchange)
        if not exchange.keep_alive and exchange.more_body:
            self._linger()
        elif not exchange.keep_alive:
            self.transport.close()
            self._abort_unless_read()
        self.on_response_complete()
        if self.pipeline:  # what was sent ahead is answered before more is read
            self.flow.pause_reading()
        if exchange.more_body:
            self._unwanted = 0

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be parsed, after the answers to the requests before it."""
        del msg
        if len(self._unanswered) > 1 and self._unanswered[-1].more_body:
            self.pipeline.popleft()  # the newest, which has not been started
            self._unanswered.pop()
        if self._unanswered and not self._unanswered[-1].more_body:
            self._unanswered[-1].keep_alive = False
            self._lingering = 0
            return
        known = self.headers if self._head_open or self._unanswered else None
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._lingering = 0
        self._start_asgi_task(self._refusing_exchange(known or []), self.app)

    def _refusing_exchange(self, headers: Sequence[tuple[bytes, bytes]]) -> _Exchange:
        """Have the application answer, so that this is an error like any other: logged, counted."""
        super().on_message_begin()
        self.headers.extend(headers)
        self.scope["method"] = "-"
        self.scope["path"], self.scope["raw_path"], self.scope["query_string"] = "", b"", b""
        exchange = self.cycle = self._exchange()
        exchange.context.refusal = self._refusal
        exchange.keep_alive = False
        self._unanswered.append(exchange)
        return exchange

    def _refuse_head(self) -> None:
        self._refusal = HeaderFieldsTooLarge(
            f"The header fields must be {HEAD_BYTES} bytes or less"
        )
        raise _Refused

    def _resume_without_upgrade(self, rest: bytes) -> None:
        """Ignore an upgrade that is not on offer (RFC 9110, section 7.8) and read the body.

        The parser stops at such a head, so another one takes over: it is given only the framing.
        """
        framing = [
            name + b": " + value
            for name, value in self.headers
            if name in {b"content-length", b"transfer-encoding"}
        ]
        self.parser = httptools.HttpRequestParser(self)
        self._resuming = True
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", b""]))
        self._resuming = False
        self.data_received(rest)

    def _linger(self) -> None:
        """Say that nothing more will be sent, and close when the client has had time to read."""
        if self._half_closed or self.transport.is_closing():
            return
        self._half_closed, self._lingering = True, 0
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.timeout_keep_alive_handler)
