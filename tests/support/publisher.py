"""An issuer's key set on loopback, with keys of our own making and every way to misbehave."""

import asyncio
import gzip
import json
import ssl
import time
from email.utils import formatdate
from types import TracebackType
from typing import Any, Literal, Self

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

Mode = Literal["ok", "error", "html", "redirect", "large", "endless", "drip", "hang"]
Encoding = Literal["gzip", "br", "not gzip", "cut", "bomb"]


class SigningKey:
    """An Ed25519 key with a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.private = Ed25519PrivateKey.generate()

    @property
    def published(self) -> dict[str, Any]:
        """The key as Better Auth publishes it."""
        jwk = OKPAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        return {"alg": "EdDSA", "crv": "Ed25519", "x": jwk["x"], "kty": "OKP", "kid": self.name}


class Publisher:
    """Publishes `keys` at `/api/auth/jwks`, and counts who asks."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.key = SigningKey("first")
        self.keys: list[Any] = [self.key.published]
        self.mode: Mode = "ok"
        self.encoding: Encoding | None = None
        self.age: int | None = None
        """Answer like a cache, with a copy that is so many seconds old."""
        self.clock_offset: float | None = 0.0
        """Seconds that our clock is ahead; None: we do not say what time it is."""
        self.hold: asyncio.Event | None = None
        """Answer with the keys of the moment, but not before this event."""
        self.requests = 0
        self.others = 0
        self._port = 0
        self._connections: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """What `BETTER_AUTH_URL` must be."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    def rotate(self, name: str, *, keep: bool = True) -> SigningKey:
        """Sign with a new key from now on; publish the old ones too, or not."""
        self.key = SigningKey(name)
        self.keys = [*(self.keys if keep else []), self.key.published]
        return self.key

    def token(self, user: str, key: SigningKey | None = None, **claims: Any) -> str:
        """Return a token as Better Auth issues it."""
        signing, now = key or self.key, int(time.time())
        payload = {"sub": user, "iat": now, "exp": now + 900, "iss": self.url, "aud": self.url}
        given = {k: v for k, v in {**payload, **claims}.items() if v is not None}
        return jwt.encode(given, signing.private, "EdDSA", {"kid": signing.name, "typ": None})

    async def start(self) -> None:
        """Listen; after `stop`, on the same port."""
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self._port, ssl=self._tls
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Listen no more."""
        self._server.close()
        for connection in self._connections:
            connection.close()
        await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            if request.startswith(b"GET /api/auth/jwks "):
                self.requests += 1
                await self._answer(writer)
            else:
                self.others += 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        body = json.dumps({"keys": self.keys}).encode()
        if self.hold is not None:
            await self.hold.wait()
        head, length = "200 OK\r\nContent-Type: application/json", len(body)
        if self.mode == "error":
            head = "500 Oops"
        elif self.mode == "redirect":
            head = f"302 Found\r\nLocation: {self.url}/elsewhere"
        elif self.mode == "html":
            body = b"<html>"
        elif self.mode == "large":
            body = body.ljust(10_000_000)
        if self.encoding is not None:
            name, body = _encoded(self.encoding, body)
            head += f"\r\nContent-Encoding: {name}"
        head += self._times()
        length = len(body)
        endless = self.mode in {"endless", "drip", "hang"}
        framing = "Connection: close" if endless else f"Content-Length: {length}"
        writer.write(f"HTTP/1.1 {head}\r\n{framing}\r\n\r\n".encode())
        while endless:
            if self.mode != "hang":
                writer.write(b" " * (65_536 if self.mode == "endless" else 1))
                await writer.drain()
            await asyncio.sleep(0 if self.mode == "endless" else 0.02)
        writer.write(body)
        await writer.drain()

    def _times(self) -> str:
        """Return the header fields about the time."""
        fields = "" if self.age is None else f"\r\nAge: {self.age}"
        if self.clock_offset is not None:
            fields += f"\r\nDate: {formatdate(time.time() + self.clock_offset, usegmt=True)}"
        return fields


def _encoded(encoding: Encoding, body: bytes) -> tuple[str, bytes]:
    """Return the name of an encoding, and a body that fits it or not."""
    if encoding == "br":
        return "br", body
    if encoding == "not gzip":
        return "gzip", body
    if encoding == "bomb":
        return "gzip", gzip.compress(bytes(10_000_000))
    compressed = gzip.compress(body)
    return "GZIP", compressed[:-20] if encoding == "cut" else compressed
