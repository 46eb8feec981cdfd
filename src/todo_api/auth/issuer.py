"""One fetch from the issuer, within limits, and why it failed if it did."""

import asyncio
import os
import socket
import ssl
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import urlsplit

import httpx2

from todo_api.auth.tokens import shown
from todo_api.settings import is_loopback

MAXIMUM_BYTES = 65_536
MAXIMUM_SECONDS = 5.0
"""Limits of one fetch, from the first byte to the last."""

UNKNOWN_AUTHORITY = {18, 19, 20, 21}
"""OpenSSL's codes for a certificate that no authority we know has signed (x509_vfy.h)."""

_REASONS: Mapping[type[BaseException], str] = {
    socket.gaierror: "its host name is not known",
    httpx2.ProxyError: "the proxy refused the connection",
    httpx2.InvalidURL: "its address is not valid",
    httpx2.ProtocolError: "its answer is not valid HTTP",
}
"""What we say for an error that has no code."""


class FetchFailed(Exception):
    """The key set could not be fetched. The message is the reason, without the address."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """How far the issuer's clock is ahead of ours, in seconds: at least and at most.

    `Date` has whole seconds, and was written between the request and the answer.
    """

    least: float
    most: float

    @property
    def difference(self) -> float:
        """The smallest difference that is possible, 0 if the clocks can agree."""
        return max(self.least, 0.0) or min(self.most, 0.0)


@dataclass(frozen=True, slots=True)
class Fetched:
    """The issuer's response, and what it says about its clock, if anything."""

    content: bytes
    clocks: Clocks | None


async def fetch(url: str) -> Fetched:
    """Fetch a key set, within the limits of this module. Raises `FetchFailed`.

    Redirects are refused, because an attacker who can cause one would choose our keys.
    """
    headers = {
        "Accept": "application/json",
        "Accept-Encoding": "identity",  # a few servers compress all the same
        "Cache-Control": "no-cache",  # an old copy would hide a new key and tell an old time
    }
    # A proxy could answer anything, so an issuer on this machine is asked directly.
    through_proxy = not is_loopback(urlsplit(url).hostname or "")
    authorities = _authorities()
    content = bytearray()
    asked_at = time.time()
    try:
        async with (
            asyncio.timeout(MAXIMUM_SECONDS),
            httpx2.AsyncClient(
                headers=headers,
                follow_redirects=False,
                trust_env=through_proxy,
                verify=authorities,
            ) as client,
            client.stream("GET", url) as response,
        ):
            clocks = _clocks(response.headers, asked_at)
            if response.status_code != HTTPStatus.OK:
                raise FetchFailed(f"the issuer answered with status {response.status_code}")
            async for chunk in response.aiter_raw():
                content += chunk
                _refuse_long(content)
    except TimeoutError:
        raise FetchFailed("no complete answer in time") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise FetchFailed(_why_no_answer(error)) from error
    return Fetched(_decoded(bytes(content), response.headers.get("content-encoding", "")), clocks)


def _authorities() -> ssl.SSLContext:
    """Return the trusted authorities: those of `SSL_CERT_FILE` or `SSL_CERT_DIR`, or the system's.

    They also count for an issuer on this machine, for which the proxy's variables do not.
    """
    try:
        return httpx2.create_ssl_context()
    except (OSError, ssl.SSLError) as error:
        why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise FetchFailed(f"SSL_CERT_FILE or SSL_CERT_DIR: cannot be read ({why})") from error


def _clocks(headers: Mapping[str, str], asked_at: float) -> Clocks | None:
    """Compare the issuer's clock with ours, unless it is unknown: a cache sends an old `Date`."""
    if "age" in headers:
        return None
    try:
        date = parsedate_to_datetime(headers.get("date", "")).timestamp()
    except ValueError:
        return None
    return Clocks(least=date - time.time(), most=date + 1 - asked_at)


def _refuse_long(content: bytes | bytearray) -> None:
    if len(content) > MAXIMUM_BYTES:
        raise FetchFailed(f"the answer is over {MAXIMUM_BYTES} bytes")


def _decoded(content: bytes, encoding: str) -> bytes:
    """Undo a `Content-Encoding`, within the limit of size."""
    encoding = encoding.strip().lower()
    if encoding in {"", "identity"}:
        return content
    if encoding not in {"gzip", "x-gzip"}:
        raise FetchFailed(f"the answer has the Content-Encoding {shown(encoding)}, not gzip")
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        decoded = decoder.decompress(content, MAXIMUM_BYTES + 1)
    except zlib.error:
        raise FetchFailed("the answer is said to be gzip and is not") from None
    _refuse_long(decoded)
    if not decoder.eof:
        raise FetchFailed("the gzip of the answer is cut off")
    return decoded


def _why_no_answer(error: BaseException) -> str:
    """Return why a fetch failed, without the address."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            private = cause.verify_code in UNKNOWN_AUTHORITY
            hint = "; set SSL_CERT_FILE if its authority is private" if private else ""
            return f"its certificate is not trusted ({cause.verify_message}){hint}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed ({cause.reason})"
        for kind, reason in _REASONS.items():
            if isinstance(cause, kind):
                return reason
    number = next((each.errno for each in causes if isinstance(each, OSError) and each.errno), 0)
    return f"no answer ({os.strerror(number) if number else type(error).__name__})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
