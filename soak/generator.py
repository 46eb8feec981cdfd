"""A load generator that costs little: one thread around epoll(7), requests written beforehand.

A request takes it some 30 µs, its share of the kernel included, so at several thousand a second it
is not what gives way. Closed loop: each connection asks again as soon as it has its answer. Open
loop: each request is due at its own instant, whatever became of those before; one that finds no
connection idle waits for one.
"""

import json
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from todo_api.errors import Overloaded

OVERLOADED = json.dumps(Overloaded().body()).encode()
"""The body of the 503 that refuses excess requests."""

PATIENCE = 10.0
"""Seconds after the last request in which every answer has to be there."""


@dataclass
class Tally:
    """What came back."""

    seconds: float
    in_time: int = 0
    """How many were accepted, and answered before the time was up."""
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    """Of what was accepted, in seconds."""
    wrong: Counter[str] = field(default_factory=Counter)
    """What is neither a success nor a refusal in the contract's shape."""

    @property
    def accepted(self) -> int:
        """How many were answered with 2xx."""
        return len(self.latencies)

    @property
    def goodput(self) -> float:
        """Successes per second, as long as requests were sent."""
        return self.in_time / self.seconds

    def percentile(self, percent: int) -> float:
        """Return what so many percent of the accepted stayed below, in seconds."""
        ordered = sorted(self.latencies)
        return ordered[len(ordered) * percent // 100] if ordered else float("inf")

    def take(self, answer: bytes, latency: float) -> None:
        """Count an answer."""
        status = int(answer[9:12])
        self.statuses[status] += 1
        if answer.startswith(b"HTTP/1.1 2"):
            self.latencies.append(latency)
        elif not is_refusal(answer):
            self.wrong[f"status {status}"] += 1


def is_refusal(answer: bytes) -> bool:
    """Tell whether this is a 503 as the contract has it."""
    return (
        answer.startswith(b"HTTP/1.1 503 ")
        and b"\r\nretry-after: 1\r\n" in answer
        and answer.endswith(b"\r\n\r\n" + OVERLOADED)
    )


def is_whole(answer: bytes) -> bool:
    """Tell whether all of an answer is there; all of ours here have a length."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    _, _, length = head.partition(b"content-length: ")
    return len(body) >= int(length.split(b"\r\n", 1)[0])


class Connection:
    """One connection, with at most one request under way."""

    def __init__(self, address: str) -> None:
        url = urlsplit(address)
        self.socket = socket.create_connection((url.hostname, url.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due: float | None = None
        self.answer = b""

    def receive(self) -> bool:
        """Take in what has arrived; False: the other side is gone."""
        try:
            data = self.socket.recv(1 << 18)
        except ConnectionError:
            return False
        self.answer += data
        return bool(data)


class Generator:
    """So many connections to one address. A context manager."""

    def __init__(self, address: str, connections: int) -> None:
        self._address = address
        self._poll = select.epoll()
        self._all: dict[int, Connection] = {}
        self._idle: deque[Connection] = deque()
        self._busy = 0
        for _ in range(connections):
            self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._all.values():
            connection.socket.close()
        self._poll.close()

    def closed_loop(self, messages: Iterator[bytes], at_once: int, seconds: float) -> Tally:
        """Ask so many at once, the next one as soon as one is answered, on all in turn."""
        tally, start = Tally(seconds=seconds), time.perf_counter()
        while (now := time.perf_counter()) < start + seconds:
            while self._busy < at_once:
                self._send(next(messages), now, tally)
            self._receive(0.1, tally)
        self._finish(tally)
        return tally

    def open_loop(self, messages: Iterator[bytes], rate: float, seconds: float) -> Tally:
        """Ask so many times a second, as long as a connection is idle; times begin with sending."""
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
        """Wait for what is under way. It counts, though not as something that was done in time."""
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

    def _send(self, message: bytes, due: float, tally: Tally) -> None:
        connection = self._idle.popleft()
        connection.due, connection.answer = due, b""
        self._busy += 1
        with suppress(ConnectionError):  # the answer will say so
            connection.socket.sendall(message)
            return
        tally.wrong["broken while sending"] += 1

    def _receive(self, wait: float, tally: Tally) -> None:
        for number, _ in self._poll.poll(wait):
            connection = self._all[number]
            if not connection.receive():
                self._replace(connection, tally)
            elif connection.due is not None and is_whole(connection.answer):
                tally.take(connection.answer, time.perf_counter() - connection.due)
                self._rest(connection)

    def _rest(self, connection: Connection) -> None:
        connection.due = None
        self._busy -= 1
        self._idle.append(connection)

    def _replace(self, connection: Connection, tally: Tally) -> None:
        """Open another for one that was closed; only one without a request may be."""
        if connection.due is None:
            self._idle.remove(connection)
        else:
            self._busy -= 1
            tally.wrong["closed without an answer"] += 1
        del self._all[connection.socket.fileno()]
        connection.socket.close()
        self._connect()
