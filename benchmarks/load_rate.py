"""Load at a fixed rate with one operation, without coordinated omission.

Each request has a fixed start time, independent of earlier requests. Its latency counts from that
time, so it includes the wait for a connection. The loop uses select(2), because select(2) wakes up
to the microsecond and epoll(7) does not.

`python load_rate.py ADDRESS CONNECTIONS SECONDS RATE OPERATION TOKENS FIRST_ID TASKS_PER_USER`
"""

import gc
import sys
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from os import read, write
from select import select
from socket import IPPROTO_TCP, TCP_NODELAY, create_connection, socket
from urllib.parse import urlsplit

from workload import Request, print_result, requests

PATIENCE = 10.0
"""Give up on the server after this many seconds without an answer."""

CHUNK = 65_536
"""Bytes per read. With more, each read would map new memory."""


def encode(request: Request) -> bytes:
    """Return a request as HTTP/1.1 text."""
    headers = request.headers | {"Host": "127.0.0.1", "Content-Length": str(len(request.body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{request.method} {request.path} HTTP/1.1\r\n{lines}\r\n{request.body}".encode()


def is_whole(answer: bytes) -> bool:
    """Return whether a response has arrived completely."""
    head, end, body = answer.partition(b"\r\n\r\n")
    head = head.lower()
    if not end or b"transfer-encoding: chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    _, _, length = head.partition(b"content-length:")
    return len(body) >= int(length.split(b"\r\n")[0] or 0)


def connect(address: str, connections: int) -> list[socket]:
    """Open the connections and send one request on each, because accepting is not measured."""
    url = urlsplit(address)
    opened = [create_connection((url.hostname, url.port)) for _ in range(connections)]
    for connection in opened:
        connection.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while not is_whole(answer):
            answer += connection.recv(CHUNK)
    return opened


def drive(connections: Sequence[socket], messages: Sequence[bytes], rate: float) -> None:
    """Send each message when it is due, on the connection idle for longest, and print the result.

    A message is never sent early. Without an idle connection, it waits for one.
    """
    idle = deque(connection.fileno() for connection in connections)
    busy: dict[int, tuple[float, bytes]] = {}
    latencies, failures, sent = [], 0, 0
    start = time.perf_counter()
    while sent < len(messages) or busy:
        wait = PATIENCE
        while idle and sent < len(messages):
            due = start + sent / rate
            wait = due - time.perf_counter()
            if wait > 0:
                break
            connection = idle.popleft()
            write(connection, messages[sent])
            busy[connection] = due, b""
            sent += 1
            wait = PATIENCE
        ready, _, _ = select(busy, [], [], wait)
        if not ready and wait == PATIENCE:
            raise TimeoutError("the server does not answer")
        for connection in ready:
            due, answer = busy[connection]
            answer += read(connection, CHUNK)
            busy[connection] = due, answer
            if is_whole(answer):
                latencies.append(time.perf_counter() - due)
                failures += not answer.startswith(b"HTTP/1.1 2")
                del busy[connection]
                idle.append(connection)
    print_result(latencies, time.perf_counter() - start, failures)


def main() -> None:
    """Prepare all messages first, so that the run itself costs little."""
    address, connections, seconds, rate, *what = sys.argv[1:]
    number = int(float(seconds) * float(rate))
    messages = [encode(request) for request in islice(requests(*what), number)]
    gc.disable()
    drive(connect(address, int(connections)), messages, float(rate))


main()
