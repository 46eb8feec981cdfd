"""HTTP/1.1 on the wire: a strict subclass of uvicorn's httptools protocol.

uvicorn 0.54, together with its parser httptools 0.9, has these faults. This module corrects them:

- Header fields have no limit.
- It adds trailers to the header fields, so a client can send `Authorization` after the body.
- The body of a request with an unsupported `Upgrade` is lost.
- Errors are plain text.
- It closes a socket with unread body data, so the client gets a reset instead of the error.
- It answers 400 for valid methods that httptools does not know.
- It accepts invalid `Host` values and invalid targets, such as one with a fragment.
"""

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from ipaddress import IPv6Address
from itertools import chain
from typing import Any, NoReturn, cast
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from todo_api.errors import ApiError, BadRequest, HeaderFieldsTooLarge, UriTooLong
from todo_api.request_context import RequestContext

HEAD_BYTES = 65_536
HEAD_FIELDS = 256
"""Limits of a head, which is the request line and its header fields."""

TARGET_BYTES = 8_192
"""Limit of a request target. RFC 9112 (section 3) recommends at least 8,000."""

FIRST_BYTE_SECONDS = 5.0
"""How long a client may keep a new connection idle. After its first request, it may be idle for
`KEEP_ALIVE_TIMEOUT`."""

HEAD_SECONDS = 10.0
"""How long a client may take to send a head, from its first byte."""

STALL_SECONDS = 10.0
"""How long a client may stop reading before its response is sent completely."""

DISCARD_BYTES = 1_048_576
DISCARD_SECONDS = 2.0
"""How much of a refused body the server discards, and for how long, so that the client can read
the answer. Closing a socket with unread data resets the connection (RFC 9112, section 9.6)."""

_USUAL_METHODS = (b"GET ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ", b"HEAD ", b"OPTIONS ")

_METHOD = re.compile(rb"[\r\n]*([\w!#$%&'*+.^`|~-]{1,32})( ?)", re.ASCII)
"""A method with the blank lines before it (RFC 9112, sections 2.2 and 3.1)."""

_TARGET = re.compile(rb"""[^#"<>\\`{}?]*(\?[^#"<>]*)?""")
"""A target with the characters of RFC 3986, and those that browsers do not encode."""

_STRAY_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
"""A percent sign that encodes nothing."""

_HOST = re.compile(rb"(\[([\w:.]+)]|[\w.~!$&'()*+,;=%-]*)(:[0-9]*)?", re.ASCII)
"""A value of `Host` (RFC 9110, section 7.2), except for stray percent signs."""

SCHEMES = {b"http", b"https"}
"""The schemes of an absolute target."""

BODILESS = {204, 304}
"""Statuses whose answers have no body, and so need no framing (RFC 9112, section 6.3)."""


class _Exchange(RequestResponseCycle):
    """A request and its response.

    It sends the head of a response together with the start of the body. This saves one of two
    system calls, which is a tenth of a request's cost (measured).
    """

    _head = b""
    """The head of the response, until it is sent."""
    _has_awaited = False
    """Whether the application has waited for a part of the body."""
    _body_ended = False
    """Whether the application has received the whole body."""

    async def run_asgi(self, app: ASGIApp) -> None:  # type: ignore[override]  # the same, untyped
        """Serve the request. Abort the connection if the response is incomplete."""
        if self.flow.write_paused:  # the client has not read the answers before this one
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

        Raises `OSError` if the client has left and this is not the last part (ASGI 2.4).
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
        """Return the next part of the body, and after the last one wait for the disconnect."""
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
        """Wait for the client to leave, or for the response to be complete (ASGI 2.3).

        While pipelined requests wait, the server does not read, and notices nothing.
        """
        self.flow.resume_reading()  # after a long body it has stopped
        while not (self.disconnected or self.response_complete):
            self.message_event.clear()
            await self.message_event.wait()
        return {"type": "http.disconnect"}

    @property
    def context(self) -> RequestContext:
        """The context of the request."""
        return RequestContext.of(cast("Scope", self.scope))

    async def _until_read(self) -> None:
        """Wait until the client reads, and abort the connection if it does not."""
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self.flow.drain()
        except TimeoutError:
            self.disconnected = True
            self.transport.abort()

    def _start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Build the head of the response. A body without a length is chunked (RFC 9112, 7.1)."""
        self.response_started = True
        if self.waiting_for_100_continue:  # the client may or may not send the body
            self.waiting_for_100_continue = self.keep_alive = False
        if self.more_body and self.context.announced_length > DISCARD_BYTES:
            self.keep_alive = False  # the server does not skip so much
        lines = [b"%b: %b\r\n" % field for field in chain(self.default_headers, headers)]
        head = STATUS_LINE[status] + b"".join(lines)
        if head.count(b"\r") > len(lines) + 1 or head.count(b"\n") > len(lines) + 1:
            raise ValueError("a header field would end early")
        self.chunked_encoding = status not in BODILESS and b"\ncontent-length: " not in head
        if self.chunked_encoding:
            if self.scope["http_version"] == "1.1":
                head += b"transfer-encoding: chunked\r\n"
            else:  # the end of the connection ends the body
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
    """Raised in a callback of the parser, so that `data_received` sends `_refusal`."""


class StrictProtocol(HttpToolsProtocol):
    """A connection. Methods named `on_…` are callbacks of `httptools.HttpRequestParser`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_idle = True
        """Whether the next byte begins a request."""
        self._partial_method = b""
        """The beginning of a request, as long as its method is incomplete."""
        self._unusual_method: str | None = None
        """The method of the request, if the parser reads POST instead."""
        self._head_open = True
        """Whether the head of the request is incomplete."""
        self._framing_bytes = 0
        """The bytes of this request so far, except for the content of its body."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._resuming = False
        """Whether a second parser reads the head again, see `_resume_without_upgrade`."""
        self._unanswered: deque[_Exchange] = deque()
        """The requests without a complete response, the oldest first."""
        self._skipped_bytes: int | None = None
        """The bytes since a response, while its request has not ended, or None."""
        self._discarded_bytes: int | None = None
        """The bytes after the last request that this connection serves, or None."""
        self._half_closed = False
        self._refusal: ApiError = BadRequest("The request is not valid HTTP/1.1")

    def data_received(self, data: bytes) -> None:
        """Parse the data, or discard it after the last request."""
        if self._discarded_bytes is not None:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > DISCARD_BYTES:
                self.timeout_keep_alive_handler()
            return
        if self._skipped_bytes is not None:
            self._skipped_bytes += len(data)
            if self._skipped_bytes > DISCARD_BYTES:
                self._half_close()
                return
        self._framing_bytes += len(data)
        self._unset_keepalive_if_required()
        if self._is_idle and (self._partial_method or not data.startswith(_USUAL_METHODS)):
            data = self._replace_method(data)
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

    def _replace_method(self, data: bytes) -> bytes:
        """Return the data with POST for a method that the parser may not know.

        Data that ends within the method is kept, and prepended to the next.
        """
        data, self._partial_method = self._partial_method + data, b""
        found = _METHOD.match(data)
        if found is None:  # no request, or only blank lines
            return data
        method, space = found.groups()
        if not space:
            if found.end() < len(data):  # not a method
                return data
            self._partial_method, self._head_open, self._framing_bytes = data, True, len(data)
            return b""
        if method + space in _USUAL_METHODS:
            return data
        self._unusual_method = method.decode("ascii")
        return b"POST" + data[found.end(1) :]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Close the connection if the client sends nothing at first."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            FIRST_BYTE_SECONDS, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, and tell every unanswered request that the client has left."""
        self._unset_keepalive_if_required()
        self._unset_head_timer()
        super().connection_lost(exc)
        self.pipeline.clear()
        for exchange in self._unanswered:  # uvicorn tells only the newest
            self._disconnect(exchange)
        # An exchange refers to its connection. Garbage would wait long for the collector.
        self._unanswered.clear()
        self.cycle = None  # type: ignore[assignment]  # as in uvicorn, before a request

    def shutdown(self) -> None:
        """Finish the requests in flight, and end the waits of those that only wait."""
        super().shutdown()
        for exchange in self._unanswered:
            if exchange.context.on_shutdown:
                exchange.context.on_shutdown()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        self._abort_unless_read()

    def _abort_unless_read(self, left_before: int = -1) -> None:
        """Abort a closing connection if the client stops reading, or it would stay open."""
        left = self.transport.get_write_buffer_size()
        if left == left_before:
            self.transport.abort()
        elif left:
            self.loop.call_later(STALL_SECONDS, self._abort_unless_read, left)

    def _expect_head(self) -> None:
        """Limit the size of the head and the time for the rest of it."""
        if self._head_open and self._framing_bytes > HEAD_BYTES:
            self._refuse_head()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_overdue)

    def _check_framing(self) -> None:
        """Refuse a body with too many bytes of chunk headers or trailers."""
        if self._framing_bytes > DISCARD_BYTES:
            raise _Refused

    def _head_is_overdue(self) -> None:
        self._head_timer = None
        if self.flow.read_paused:  # the rest may wait in the socket until the server reads on
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
            self._is_idle, self._head_open, self._framing_bytes = False, True, 0
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Append a part of the target."""
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Append a header field. Fields after the body are trailers, and are ignored."""
        if self._head_open:
            if len(self.headers) >= HEAD_FIELDS:
                self._refuse_head()
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Start to serve the request, or queue it behind the requests before it."""
        if self._resuming:
            return
        self._unset_head_timer()
        self._check_head()
        self._set_target()
        self._head_open = False
        previous = self.cycle
        exchange = self.cycle = self._exchange()
        self._unanswered.append(exchange)
        if previous is None or previous.response_complete:
            self._start_asgi_task(exchange, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    def _check_head(self) -> None:
        """Refuse a head that is too large, or ambiguous in framing or host (RFC 9112, 3.2, 6)."""
        size = len(self.url) + sum(map(len, chain.from_iterable(self.headers)))
        if size > HEAD_BYTES or len(self.url) > TARGET_BYTES:
            self._refuse_head()
        version = self.parser.get_http_version()
        names = [name for name, _ in self.headers]
        hosts = self._values(b"host")
        if version not in {"1.0", "1.1"} or len(hosts) > 1 or (version == "1.1" and not hosts):
            raise _Refused
        if hosts and not _is_host(hosts[0]):
            self._refuse(BadRequest("The Host header field must be a host name or address"))
        if b"transfer-encoding" in names and self._values(b"transfer-encoding") != [b"chunked"]:
            raise _Refused
        if b"expect" in names:
            self.expect_100_continue = b"100-continue" in self._values(b"expect")
        self.scope["http_version"] = version

    def _values(self, wanted: bytes) -> list[bytes]:
        return [value.strip().lower() for name, value in self.headers if name == wanted]

    def _set_target(self) -> None:
        """Put method, path and query into the scope, and refuse an invalid target."""
        method = self._unusual_method or self.parser.get_method().decode("ascii")
        self._unusual_method = None
        if not _TARGET.fullmatch(self.url) or (self.url == b"*" and method != "OPTIONS"):
            self._refuse_target()
        try:
            url = httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            self._refuse_target()
        if url.userinfo is not None or (url.schema or b"http").lower() not in SCHEMES:
            self._refuse_target()
        raw_path = url.path or b"/"
        self.scope["method"] = method
        self.scope["path"] = (
            self._decode(raw_path) if b"%" in raw_path else raw_path.decode("ascii")
        )
        self.scope["raw_path"] = raw_path
        self.scope["query_string"] = url.query or b""

    def _decode(self, path: bytes) -> str:
        try:
            decoded = unquote(path.decode("ascii"), errors="strict")
        except UnicodeDecodeError:
            decoded = None
        if decoded is None or _STRAY_PERCENT.search(path):
            self._refuse(BadRequest("The path cannot be decoded: percent-encode it as UTF-8"))
        return decoded

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
        """Append a part of the body."""
        self._framing_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request. The parser also calls this before the body of an upgrade."""
        if self._resuming or not self.parser.should_upgrade():
            super().on_message_complete()
            self._is_idle = True
            self.cycle.more_body = False
            self._skipped_bytes = None

    def _answered(self, exchange: _Exchange) -> None:
        """Start the next request, and skip the rest of this one's body."""
        self._unanswered.remove(exchange)
        if not exchange.keep_alive and exchange.more_body:
            self._half_close()
        elif not exchange.keep_alive:
            self.transport.close()
            self._abort_unless_read()
        self.on_response_complete()
        if self.pipeline:  # answer pipelined requests before reading more
            self.flow.pause_reading()
        if exchange.more_body:
            self._skipped_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """Refuse an invalid request.

        If earlier requests await their answers, send only those, and close the connection.
        """
        del msg
        self._discarded_bytes = 0
        if len(self._unanswered) > 1 and self._unanswered[-1].more_body:
            self.pipeline.popleft()  # the newest, which has not started
            self._unanswered.pop()
        if self._unanswered and not self._unanswered[-1].more_body:
            self._unanswered[-1].keep_alive = False
        else:
            self._start_refusal()

    def _start_refusal(self) -> None:
        """Let the application answer with the refusal, in place of the request under way."""
        known = self.headers if self._head_open or self._unanswered else []
        for exchange in self._unanswered:
            self._disconnect(exchange)
        self._start_asgi_task(self._refusing_exchange(known), self.app)

    @staticmethod
    def _disconnect(exchange: _Exchange) -> None:
        exchange.disconnected = True
        exchange.message_event.set()

    def _refusing_exchange(self, headers: Sequence[tuple[bytes, bytes]]) -> _Exchange:
        """Return a request for the application, which answers it with the refusal and logs it."""
        super().on_message_begin()
        self.headers.extend(headers)
        self.scope["method"] = "-"
        self.scope["path"], self.scope["raw_path"], self.scope["query_string"] = "", b"", b""
        exchange = self.cycle = self._exchange()
        exchange.context.refusal = self._refusal
        exchange.keep_alive = False
        self._unanswered.append(exchange)
        return exchange

    def _refuse_head(self) -> NoReturn:
        if len(self.url) > TARGET_BYTES:
            self._refuse(UriTooLong(f"The request target must be {TARGET_BYTES} bytes or less"))
        limit = f"{HEAD_BYTES} bytes or less, in at most {HEAD_FIELDS} fields"
        self._refuse(HeaderFieldsTooLarge(f"The header fields must be {limit}"))

    def _refuse_target(self) -> NoReturn:
        self._refuse(
            BadRequest("The request target must be a percent-encoded path without a fragment")
        )

    def _refuse(self, error: ApiError) -> NoReturn:
        self._refusal = error
        raise _Refused

    def _resume_without_upgrade(self, rest: bytes) -> None:
        """Ignore an unsupported upgrade (RFC 9110, section 7.8), and read the body.

        The parser stops after such a head. A new parser gets only the framing of the head, and
        then goes on with the body.
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

    def _half_close(self) -> None:
        """End the sending side, and close after the client has had time to read the answer."""
        if self._half_closed or self.transport.is_closing():
            return
        self._half_closed, self._discarded_bytes = True, 0
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(DISCARD_SECONDS, self.timeout_keep_alive_handler)


def _is_host(value: bytes) -> bool:
    found = _HOST.fullmatch(value)
    if found is None or (b"%" in value and _STRAY_PERCENT.search(value)):
        return False
    try:
        return found[2] is None or bool(IPv6Address(found[2].decode("ascii")))
    except ValueError:
        return False
