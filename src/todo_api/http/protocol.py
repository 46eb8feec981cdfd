"""HTTP/1.1 on the wire: uvicorn's httptools protocol, strict where that one is lenient.

Found by attacking it (uvicorn 0.54, httptools 0.9): header fields without any limit; trailers taken
for header fields, so that a token could come after the body; the body lost behind an `Upgrade` that
nobody offered; errors in plain text; a reset in place of the answer to a request that was refused
before its body had been read.
"""

import asyncio
import json
import secrets
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

HEAD_BYTES = 65_536
HEAD_FIELDS = 256
"""Limits of a request line with its header fields."""

LINGER_BYTES = 1_048_576
LINGER_SECONDS = 2.0
"""How much more of a refused body is thrown away, and for how long, so that the client can read
the answer: closing a socket with unread data resets the connection (RFC 9112, section 9.6)."""


class _Corked:
    """A transport that sends the head of a response together with the start of its body.

    One system call in place of two, which is a tenth of what a request costs (measured).
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        cycle: RequestResponseCycle,
        linger: Callable[[], None],
    ) -> None:
        self._linger = linger
        self._transport = transport
        self._cycle = cycle
        self._head: bytes | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Keep the head; send it with what follows."""
        if self._head is None and self._cycle.response_started:
            self._head = data
        else:
            self._transport.write(self._head + data if self._head else data)
            self._head = b"" if self._cycle.response_started else None

    def flush(self) -> None:
        """Send a head that nothing followed: the answer to HEAD."""
        if self._head:
            self._transport.write(self._head)
            self._head = b""

    def close(self) -> None:
        """Send what is left and close, in order if the client is still sending."""
        self.flush()
        if self._cycle.more_body and self._cycle.response_complete:
            self._linger()
        else:
            self._transport.close()


class _Refused(Exception):
    """Raised in a callback of the parser; it ends in `send_400_response`."""


class StrictProtocol(HttpToolsProtocol):
    """One connection. The callbacks are those of `httptools.HttpRequestParser`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_open = True
        self._head_bytes = 0
        self._resuming = False
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._unwanted: int | None = None
        self._lingering: int | None = None
        self._refusal = 400, "The request is not valid HTTP/1.1"

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived; of a refused request, throw it away."""
        if self._lingering is not None:
            self._lingering += len(data)
            if self._lingering > LINGER_BYTES:
                self.transport.close()
            return
        if self._unwanted is not None:
            self._unwanted += len(data)
            if self._unwanted > LINGER_BYTES:
                self._linger()
                return
        if self._head_open:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
            if self._head_open and self._head_bytes > HEAD_BYTES:
                self._refuse_head()
        except httptools.HttpParserUpgrade as upgrade:
            self._resume_without_upgrade(data[upgrade.args[0] :])
        except (httptools.HttpParserError, _Refused):
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin a request."""
        if not self._resuming:
            self._head_open, self._head_bytes = True, 0
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        if not self._resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header field; what comes after the body is a trailer, and means nothing here."""
        if self._head_open and not self._resuming:
            if len(self.headers) >= HEAD_FIELDS:
                self._refuse_head()
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to serve the request, unless its framing is in doubt (RFC 9112, section 3.2, 6)."""
        if self._resuming:
            return
        self._head_open = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > HEAD_BYTES:
            self._refuse_head()
        version = self.parser.get_http_version()
        hosts = sum(name == b"host" for name, _ in self.headers)
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if version not in {"1.0", "1.1"} or hosts > 1 or (version == "1.1" and hosts == 0):
            raise _Refused
        if codings and [coding.strip().lower() for coding in codings] != [b"chunked"]:
            raise _Refused
        super().on_headers_complete()
        transport = _Corked(self.transport, self.cycle, self._linger)
        self.cycle.transport = transport  # type: ignore[assignment]  # all that it is asked for
        self._unanswered.append(self.cycle)
        self.cycle.on_response = partial(self._answered, self.cycle, transport)

    def on_message_complete(self) -> None:
        """End the request; the body of one that asks for an upgrade is still to come."""
        if self._resuming or not self.parser.should_upgrade():
            super().on_message_complete()
            self.cycle.more_body = False
            self._unwanted = None

    def _answered(self, cycle: RequestResponseCycle, transport: _Corked) -> None:
        """Go on with the next request; what is left of this one's body is thrown away."""
        transport.flush()
        self._unanswered.remove(cycle)
        self.on_response_complete()
        if cycle.more_body:
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
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        status, message = self._refusal
        body = json.dumps({"error": message}).encode()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + f"content-length: {len(body)}\r\n".encode()
            + f"x-request-id: {secrets.token_hex(16)}\r\n\r\n".encode()
            + body
        )
        self._linger()

    def _refuse_head(self) -> None:
        self._refusal = 431, f"The header fields must be {HEAD_BYTES} bytes or less"
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
        if self._lingering is not None or self.transport.is_closing():
            return
        self._lingering = 0
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
