"""Better Auth's published keys: fetched, cached, rotated, and kept through an outage.

No request waits for the issuer as long as it is signed with a key we have. `jwt.PyJWKClient` is
not used: it blocks, follows redirects and is deaf to a rotated key for half a minute.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpx2
import jiter
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.exceptions import PyJWTError

from todo_api.auth.tokens import SYNONYMS, Key, Verifier
from todo_api.settings import is_loopback

MAXIMUM_BYTES = 65_536
MAXIMUM_SECONDS = 5.0
"""Limits of one fetch, from the first byte to the last."""

REFRESH_SECONDS = 300.0
"""How often the set is fetched anew: what is withdrawn stops working after that at the latest."""

RETRY_SECONDS = 10.0
"""How soon a fetch that failed is repeated, without anybody asking."""

WINDOW_SECONDS = 10.0
"""At most one fetch in this time for keys that nobody has seen, however many are made up."""

FIRST_WINDOW_SECONDS = 1.0
"""The same while there is no set at all: then every token waits for it."""

RSA_BITS = range(2048, 8193)
"""RFC 7518, section 3.3, asks for the lower end; the upper one bounds what a signature costs."""

PRIVATE_MEMBERS = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}

SMALL_ORDER = {
    bytes.fromhex(each)
    for each in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
}
"""Points of order 1, 2, 4 and 8 on Ed25519, without the sign bit: anybody can sign under them."""

log = structlog.get_logger()


class KeyRefused(Exception):
    """A key of the set is not one that we would trust; the message says why."""


class FetchFailed(Exception):
    """The key set could not be had; the message says why, without the address."""


class KeySet:
    """The keys at one address, handed to a `Verifier` whenever they change."""

    def __init__(
        self, url: str, verifier: Verifier, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url
        self._verifier = verifier
        self._clock = clock
        self._loading: asyncio.Task[bool] | None = None
        self._asked_at = float("-inf")
        self._fetched_at = float("-inf")

    @asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """Fetch the set now, and every five minutes while the context lasts."""
        keeper = asyncio.create_task(self._keep_fresh())
        try:
            yield
        finally:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper
            if self._loading is not None:
                self._loading.cancel()

    @property
    def is_loaded(self) -> bool:
        """Whether there is a set at all."""
        return self._verifier.keys.published is not None

    @property
    def age(self) -> float:
        """How many seconds ago the set was fetched; infinite as long as there is none."""
        return self._clock() - self._fetched_at

    async def ask(self) -> None:
        """Fetch the set because a token names a key that it lacks.

        At most once a window, and once for all who ask at the same time. Raises nothing: whether
        the key is there now is for the verifier to say. A fetch that was under way may be older
        than the key; then asking again begins another.
        """
        if self._loading is None:
            window = WINDOW_SECONDS if self.is_loaded else FIRST_WINDOW_SECONDS
            if self._clock() - self._asked_at < window:
                return
            self._asked_at = self._clock()
        await self._load()

    async def _keep_fresh(self) -> None:
        while True:
            loaded = await self._load()
            await asyncio.sleep(REFRESH_SECONDS if loaded else RETRY_SECONDS)

    async def _load(self) -> bool:
        """Fetch the set, or wait for the fetch that is under way; return whether it came."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._fetch_and_use())
            self._loading.add_done_callback(self._loaded)
        loading = self._loading
        # A request that is cancelled must not take the others' fetch with it.
        return await asyncio.shield(loading)

    def _loaded(self, _: asyncio.Task[bool]) -> None:
        self._loading = None

    async def _fetch_and_use(self) -> bool:
        try:
            keys = read_key_set((await fetch(self._url)).content)
        except Exception as error:  # noqa: BLE001  whatever it is, the last good keys stay
            said = str(error) if isinstance(error, FetchFailed) else type(error).__name__
            log.warning("key set not loaded, keeping the last good one", reason=said)
            return False
        self._fetched_at = self._clock()
        if keys != self._verifier.keys.published:
            self._verifier.replace_keys(replace(self._verifier.keys, published=keys))
            log.info("key set loaded", algorithms=sorted(key.algorithm for key in keys.values()))
        return True


@dataclass(frozen=True, slots=True)
class Fetched:
    """An issuer's answer, and what its clock said (the `Date` header), if anything."""

    content: bytes
    date: str | None


async def fetch(url: str) -> Fetched:
    """Fetch a key set, within the limits of this module. Raises `FetchFailed`.

    No redirects: whoever can make the issuer redirect would choose our keys.
    """
    # Identity: the limit is on what arrives, and so on what there is to parse.
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    # What is on this machine is not asked for through a proxy, which could answer what it likes.
    through_proxy = not is_loopback(urlsplit(url).hostname or "")
    content = bytearray()
    try:
        async with (
            asyncio.timeout(MAXIMUM_SECONDS),
            httpx2.AsyncClient(
                headers=headers, follow_redirects=False, trust_env=through_proxy
            ) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != HTTPStatus.OK:
                raise FetchFailed(f"the issuer answered with status {response.status_code}")
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > MAXIMUM_BYTES:
                    raise FetchFailed(f"the answer is over {MAXIMUM_BYTES} bytes")
    except TimeoutError:
        raise FetchFailed("no whole answer in time") from None
    except (httpx2.HTTPError, OSError) as error:
        raise FetchFailed(f"no answer ({type(error).__name__})") from error
    return Fetched(bytes(content), response.headers.get("date"))


def read_key_set(content: bytes) -> dict[str, Key]:
    """Return the keys of a set (RFC 7517) that we trust, by `kid`; the others are left out.

    Raises `FetchFailed` where it is no key set. An empty set is a set, and one without a key to
    trust is an empty one: then no key is good.
    """
    try:
        members = jiter.from_json(content, allow_inf_nan=False, catch_duplicate_keys=True)["keys"]
    except (ValueError, TypeError, KeyError):
        raise FetchFailed("the answer is not a JSON key set") from None
    if not isinstance(members, list):
        raise FetchFailed("the answer is not a JSON key set")
    keys: dict[str, Key] = {}
    # One name for two keys: which of them signed is anybody's guess.
    names = Counter(_name(member) for member in members)
    unique = [member for member in members if names[_name(member)] == 1]
    if len(unique) < len(members):
        log.warning("keys refused", reason="kid is not unique")
    for member in unique:
        try:
            keys[_name(member)] = read_key(member)
        except KeyRefused as refusal:
            log.warning("key refused", reason=str(refusal))
    return keys


def read_key(member: Any) -> Key:
    """Return a published key, bound to the one algorithm that it is used with.

    That is `alg`, or where it is missing the one of the type and curve; RSA is RS256.
    Raises `KeyRefused`.
    """
    if not isinstance(member, dict):
        raise KeyRefused("not an object")
    if PRIVATE_MEMBERS & member.keys():
        raise KeyRefused("a private or symmetric key was published")
    operations = member.get("key_ops", ["verify"])
    if member.get("use", "sig") != "sig" or not (
        isinstance(operations, list) and "verify" in operations
    ):
        raise KeyRefused("not for signatures")
    kind = f"{member.get('kty')} {member.get('crv', '')}"
    if kind not in _KINDS:
        raise KeyRefused("unsupported type or curve")
    library, algorithms = _KINDS[kind]
    algorithm = str(member.get("alg", algorithms[0]))
    if algorithm not in algorithms:
        raise KeyRefused("alg does not fit the type")
    try:
        material = library.from_jwk(member)
    except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, AttributeError):
        raise KeyRefused("not a valid key") from None
    if isinstance(material, RSAPublicKey) and material.key_size not in RSA_BITS:
        raise KeyRefused("RSA key of a length that is not safe")
    if isinstance(material, Ed25519PublicKey) and _is_small_order(material):
        raise KeyRefused("anybody can sign under this point")
    return Key(SYNONYMS.get(algorithm, algorithm), material)


_KINDS: Mapping[str, tuple[type[Algorithm], tuple[str, ...]]] = {
    "OKP Ed25519": (OKPAlgorithm, ("EdDSA", "Ed25519")),
    "EC P-256": (ECAlgorithm, ("ES256",)),
    "EC P-521": (ECAlgorithm, ("ES512",)),
    "RSA ": (RSAAlgorithm, ("RS256", "PS256")),
}
"""By `kty` and `crv`: who reads the key, and what it may be used with, the default first."""


def _name(member: Any) -> str:
    """Return `kid`; a key without one is found only where it is the only key."""
    name = member.get("kid", "") if isinstance(member, dict) else ""
    return name if isinstance(name, str) else ""


def _is_small_order(key: Ed25519PublicKey) -> bool:
    encoded = bytearray(key.public_bytes_raw())
    encoded[31] &= 0x7F
    return bytes(encoded) in SMALL_ORDER
