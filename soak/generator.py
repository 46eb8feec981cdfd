"""A cheap load generator: one thread around epoll(7), with requests encoded in advance.

Only the tag of a conditional request is added when it is sent: the latest one of its task or list.
A request costs it about 30 µs, kernel time included. So it is not the bottleneck at several
thousand requests per second. In the closed loop, a new request starts as soon as an answer arrives.
In the open loop, each request has a fixed start time, independent of earlier requests. It waits if
no connection is idle.
"""

import json
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self
from urllib.parse import urlsplit

from soak.workload import Message
from todo_api.errors import Overloaded

OVERLOADED = json.dumps(Overloaded().body()).encode()
"""The body of the 503 that refuses excess requests."""

PATIENCE = 10.0
"""Seconds to wait for the remaining answers after the last request."""


@dataclass
class Tally:
    """The answers of a run."""

    seconds: float
    in_time: int = 0
    """Successes before the end of the run."""
    statuses: Counter[int] = field(default_factory=Counter)
    created: int = 0
    """Tasks that acknowledged requests have created."""
    replayed: int = 0
    """Successes that were the stored answer of an earlier request with the same key."""
    latencies: list[float] = field(default_factory=list)
    """Latencies of accepted requests, in seconds."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Answers that are neither a success, nor a 412 to `If-Match`, nor a 503 in the right shape."""

    @property
    def accepted(self) -> int:
        """The number of successes: of answers with 2xx or 304."""
        return len(self.latencies)

    @property
    def goodput(self) -> float:
        """Successes per second while requests were sent."""
        return self.in_time / self.seconds

    def percentile(self, percent: int) -> float:
        """Return this percentile of the latencies, in seconds."""
        ordered = sorted(self.latencies)
        return ordered[len(ordered) * percent // 100] if ordered else float("inf")

    def take(self, message: Message, answer: bytes, latency: float) -> None:
        """Count an answer by its status, and keep its latency if it is a success."""
        status = int(answer[9:12])
        self.statuses[status] += 1
        if status < HTTPStatus.BAD_REQUEST:
            self.latencies.append(latency)
            is_replayed = b"\r\nidempotency-replayed: true\r\n" in answer
            self.replayed += is_replayed
            self.created += 0 if is_replayed else message.creates
        elif not is_refusal(answer) and not is_changed(message, answer):
            self.wrong[f"status {status}"] += 1


def is_changed(message: Message, answer: bytes) -> bool:
    """Return whether this is a 412 because another request has changed the task."""
    return answer.startswith(b"HTTP/1.1 412 ") and message.condition == b"If-Match"


def is_refusal(answer: bytes) -> bool:
    """Return whether this is a 503 in the shape of the contract."""
    return (
        answer.startswith(b"HTTP/1.1 503 ")
        and b"\r\nretry-after: 1\r\n" in answer
        and answer.endswith(b"\r\n\r\n" + OVERLOADED)
    )


def is_whole(answer: bytes) -> bool:
    """Return whether an answer has arrived completely. All answers with a body have a length."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    _, _, length = head.partition(b"content-length: ")
    return len(body) >= int(length.split(b"\r\n", 1)[0] or 0)


def tag_of(answer: bytes) -> bytes | None:
    """Return the tag of an answer, or None."""
    head, _, _ = answer.partition(b"\r\n\r\n")
    _, _, tag = head.partition(b"\r\netag: ")
    return tag.split(b"\r\n", 1)[0] or None


class Connection:
    """One connection, with at most one request in flight."""

    def __init__(self, address: str) -> None:
        url = urlsplit(address)
        self.socket = socket.create_connection((url.hostname, url.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        """When the request in flight was sent."""
        self.message: Message | None = None
        """The request in flight."""
        self.answer = b""

    def receive(self) -> bool:
        """Read the data that has arrived. False if the server closed the connection."""
        try:
            data = self.socket.recv(1 << 18)
        except ConnectionError:
            return False
        self.answer += data
        return bool(data)


class Generator:
    """A context manager with a fixed number of connections to one address.

    It sends the tags that conditional requests need, and keeps those of the answers.
    """

    def __init__(self, address: str, connections: int, tags: dict[str, bytes]) -> None:
        self._address = address
        self._poll = select.epoll()
        self._all: dict[int, Connection] = {}
        self._idle: deque[Connection] = deque()
        self._tags = tags
        self._busy = 0
        for _ in range(connections):
            self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._all.values():
            connection.socket.close()
        self._poll.close()

    def closed_loop(self, messages: Iterator[Message], at_once: int, seconds: float) -> Tally:
        """Keep `at_once` requests in flight, on all connections in turn."""
        tally, start = Tally(seconds=seconds), time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            while self._busy < at_once:
                self._send(next(messages), now, tally)
            self._receive(0.1, tally)
        self._finish(tally)
        return tally

    def open_loop(self, messages: Iterator[Message], rate: float, seconds: float) -> Tally:
        """Send `rate` requests per second if a connection is idle. Latencies count from sending."""
        tally, start, sent = Tally(seconds=seconds), time.perf_counter(), 0
        while sent < rate * seconds:
            due = start + sent / rate
            wait = due - (now := time.perf_counter())
            if wait <= 0 and self._idle:
                self._send(next(messages), now, tally)
                sent += 1
            elif self._idle:
                self._receive(wait, tally)
            else:
                self._receive(1, tally)
        tally.seconds = time.perf_counter() - start
        self._finish(tally)
        return tally

    def _finish(self, tally: Tally) -> None:
        """Wait for requests in flight. They count, but not as successes in time."""
        tally.in_time = tally.accepted
        deadline = time.perf_counter() + PATIENCE
        while self._busy and time.perf_counter() < deadline:
            self._receive(0.1, tally)
        tally.wrong["no answer"] += self._busy

    def _connect(self) -> None:
        connection = Connection(self._address)
        self._poll.register(connection.socket, select.EPOLLIN)
        self._all[connection.socket.fileno()] = connection
        self._idle.append(connection)

    def _send(self, message: Message, due: float, tally: Tally) -> None:
        connection = self._idle.popleft()
        connection.due, connection.message, connection.answer = due, message, b""
        self._busy += 1
        with suppress(ConnectionError):  # the missing answer will be counted
            connection.socket.sendall(message.encoded(self._tags))
            return
        tally.wrong["connection broken while sending"] += 1

    def _receive(self, wait: float, tally: Tally) -> None:
        for number, _ in self._poll.poll(wait):
            connection = self._all[number]
            if not connection.receive():
                self._replace(connection, tally)
            elif connection.message is not None and is_whole(connection.answer):
                self._take(connection.message, connection, tally)

    def _take(self, message: Message, connection: Connection, tally: Tally) -> None:
        """Count the answer to a request, keep its tag, and free the connection."""
        tally.take(message, connection.answer, time.perf_counter() - connection.due)
        if message.about and (tag := tag_of(connection.answer)):
            self._tags[message.about] = tag
        connection.message = None
        self._busy -= 1
        self._idle.append(connection)

    def _replace(self, connection: Connection, tally: Tally) -> None:
        """Replace a closed connection. The server may close only idle ones."""
        if connection.message is None:
            self._idle.remove(connection)
        else:
            self._busy -= 1
            tally.wrong["connection closed without an answer"] += 1
        del self._all[connection.socket.fileno()]
        connection.socket.close()
        self._connect()
