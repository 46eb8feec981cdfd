"""Better Auth's published keys: fetched, cached, and kept while the issuer does not answer.

A request waits for the issuer only if its token names a key that is not in the cache.
`jwt.PyJWKClient` is not used, because it blocks the event loop, follows redirects, and does not
find a rotated key for half a minute.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import jiter
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.exceptions import PyJWTError

from todo_api.auth.issuer import Clocks, FetchFailed, fetch
from todo_api.auth.tokens import LEEWAY, SYNONYMS, Key, Verifier, shown

REFRESH_SECONDS = 300.0
"""The time between two fetches, after which a withdrawn key stops working."""

RETRY_SECONDS = 10.0
"""The time between a failed fetch and the next one."""

WINDOW_SECONDS = 10.0
"""The service fetches for unknown keys once in this time, because clients can invent key ids."""

FIRST_WINDOW_SECONDS = 1.0
"""The shorter time until the first set is loaded, because every token needs a key."""

CLOCK_SECONDS = 2.0
"""A smaller difference between the issuer's clock and ours is not worth a warning."""

SHOWN_REFUSALS = 5
"""The log and `todo-api check` name at most so many refused keys."""

RSA_BITS = range(2048, 8193)
"""RFC 7518, section 3.3, requires the minimum; the maximum bounds the cost of a signature."""

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
"""Ed25519 points of order 1, 2, 4 and 8, without the sign bit. Anyone can sign as such a key."""

_KINDS: Mapping[str, tuple[type[Algorithm], tuple[str, ...]]] = {
    "OKP Ed25519": (OKPAlgorithm, ("EdDSA", "Ed25519")),
    "EC P-256": (ECAlgorithm, ("ES256",)),
    "EC P-521": (ECAlgorithm, ("ES512",)),
    "RSA ": (RSAAlgorithm, ("RS256", "PS256")),
}
"""The reader of a key by `kty` and `crv`, and the algorithms it allows, the default first."""

log = structlog.get_logger()


class KeyRefused(Exception):
    """A key of the set is not safe. The message is the reason."""


class KeySet:
    """The keys at one address. A `Verifier` gets them whenever they change."""

    def __init__(
        self, url: str, verifier: Verifier, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url
        self._verifier = verifier
        self._clock = clock
        self._loading: asyncio.Task[bool] | None = None
        self._unknown_at = float("-inf")
        """When an unknown key last caused a fetch."""
        self._fetched_at = float("-inf")
        self._refused: Sequence[str] = ()
        self._clocks: Clocks | None = None

    @asynccontextmanager
    async def kept_fresh(self) -> AsyncIterator[None]:
        """Fetch the set now, and every five minutes while the context lasts."""
        refreshing = asyncio.create_task(self._refresh_forever())
        try:
            yield
        finally:
            refreshing.cancel()
            with suppress(asyncio.CancelledError):
                await refreshing
            if self._loading is not None:
                self._loading.cancel()

    @property
    def is_loaded(self) -> bool:
        """Whether a set was ever loaded."""
        return self._verifier.keys.published is not None

    @property
    def age(self) -> float:
        """The seconds since the set was fetched, infinite until then."""
        return self._clock() - self._fetched_at

    @property
    def issuer_ahead(self) -> float:
        """The most seconds that the issuer's clock can be ahead of ours; negative if behind.

        At most `LEEWAY` in both directions, because no token with a larger difference is valid.
        """
        most = self._clocks.most if self._clocks else LEEWAY
        return max(-LEEWAY, min(most, LEEWAY))

    async def refresh(self) -> None:
        """Fetch the set for an unknown key, at most once in `WINDOW_SECONDS`.

        Simultaneous calls share one fetch. A fetch that is running may miss a key that was just
        published, so the caller then calls again. If a fetch fails, the last good keys stay.
        """
        if self._loading is None:
            window = WINDOW_SECONDS if self.is_loaded else FIRST_WINDOW_SECONDS
            if self._clock() - self._unknown_at < window:
                return
            self._unknown_at = self._clock()
        await self._load()

    async def _refresh_forever(self) -> None:
        while True:
            loaded = await self._load()
            await asyncio.sleep(REFRESH_SECONDS if loaded else RETRY_SECONDS)

    async def _load(self) -> bool:
        """Fetch the set, or wait for the fetch that is under way; return whether it succeeded."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._fetch_and_use())
            self._loading.add_done_callback(self._loaded)
        # A cancelled request must not cancel the fetch that others wait for.
        return await asyncio.shield(self._loading)

    def _loaded(self, _: asyncio.Task[bool]) -> None:
        self._loading = None

    async def _fetch_and_use(self) -> bool:
        try:
            fetched = await fetch(self._url)
            published = read_key_set(fetched.content)
        except Exception as error:  # noqa: BLE001  the last good keys stay after any error
            reason = str(error) if isinstance(error, FetchFailed) else type(error).__name__
            log.warning("key set not loaded, keeping the last good one", reason=reason)
            return False
        self._fetched_at = self._clock()
        self._clocks = fetched.clocks
        if fetched.clocks and abs(seconds := fetched.clocks.difference) > CLOCK_SECONDS:
            log.warning("the issuer's clock differs from ours", ahead_seconds=round(seconds))
        self._use(published)
        return True

    def _use(self, published: "Published") -> None:
        if published.refused and published.refused != self._refused:
            log.warning("keys refused", reasons=published.refused_in_short)
        self._refused = published.refused
        keys = published.keys
        if keys == self._verifier.keys.published:
            return
        self._verifier.replace_keys(replace(self._verifier.keys, published=keys))
        algorithms = sorted(key.algorithm for key in keys.values())
        if keys:
            log.info("key set loaded", algorithms=algorithms)
        else:
            log.warning("the key set has no usable key", refused=len(published.refused))


@dataclass(frozen=True, slots=True)
class Published:
    """The usable keys of a set by `kid`, and the reason for each key that is not used."""

    keys: Mapping[str, Key]
    refused: Sequence[str]

    @property
    def refused_in_short(self) -> str:
        """The first reasons, and how many there are beyond them."""
        more = len(self.refused) - SHOWN_REFUSALS
        rest = [f"and {more} more"] if more > 0 else []
        return "; ".join([*self.refused[:SHOWN_REFUSALS], *rest])


def read_key_set(content: bytes) -> Published:
    """Return the keys of a set (RFC 7517): the safe ones, and why the others are not used.

    Without a safe key, no token is valid. Raises `FetchFailed` if the content is not a key set.
    """
    try:
        members = jiter.from_json(content, allow_inf_nan=False, catch_duplicate_keys=True)["keys"]
    except (ValueError, TypeError, KeyError):
        raise FetchFailed("the answer is not a JSON key set") from None
    if not isinstance(members, list):
        raise FetchFailed("the answer is not a JSON key set")
    keys: dict[str, Key] = {}
    refused: list[str] = []
    # Two keys with one `kid` are both refused, because a token does not say which of them it means.
    uses = Counter(_key_id(member) for member in members)
    for member in members:
        key_id = _key_id(member)
        try:
            if uses[key_id] > 1:
                raise KeyRefused("the kid is not unique")  # noqa: TRY301  refused like any other
            keys[key_id] = read_key(member)
        except KeyRefused as refusal:
            refused.append(f"kid {shown(key_id)}: {refusal}")
    return Published(keys, tuple(refused))


def read_key(member: Any) -> Key:
    """Return a published key with its one algorithm. Raises `KeyRefused`.

    The algorithm is `alg`, or without it the default of the type and curve (RS256 for RSA).
    """
    if not isinstance(member, dict):
        raise KeyRefused("not an object")
    if PRIVATE_MEMBERS & member.keys():
        raise KeyRefused("a private or symmetric key")
    operations = member.get("key_ops", ["verify"])
    if member.get("use", "sig") != "sig" or not (
        isinstance(operations, list) and "verify" in operations
    ):
        raise KeyRefused("not for signatures")
    kind = f"{member.get('kty')} {member.get('crv', '')}"
    if kind not in _KINDS:
        raise KeyRefused(f"the type {shown(kind.strip())} is not supported")
    library, algorithms = _KINDS[kind]
    algorithm = str(member.get("alg", algorithms[0]))
    if algorithm not in algorithms:
        supported = " or ".join(algorithms)
        raise KeyRefused(f"alg {shown(algorithm)} is not supported for this type, {supported} is")
    try:
        material = library.from_jwk(member)
    except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, AttributeError):
        raise KeyRefused("not a valid key") from None
    if isinstance(material, RSAPublicKey) and material.key_size not in RSA_BITS:
        raise KeyRefused("an RSA key of an unsafe length")
    if isinstance(material, Ed25519PublicKey) and _is_small_order(material):
        raise KeyRefused("a point of small order")
    return Key(SYNONYMS.get(algorithm, algorithm), material)


def _key_id(member: Any) -> str:
    """Return `kid`, or "" for a key without one, which is used only if it is the only key."""
    key_id = member.get("kid", "") if isinstance(member, dict) else ""
    return key_id if isinstance(key_id, str) else ""


def _is_small_order(key: Ed25519PublicKey) -> bool:
    encoded = bytearray(key.public_bytes_raw())
    encoded[31] &= 0x7F
    return bytes(encoded) in SMALL_ORDER
