"""Rate limits: requests of a user, and refused tokens from an address.

Each key has a token bucket that holds the quota and refills within a minute. The bucket is stored
as one number: the time at which it is full again (generic cell rate algorithm, ITU-T I.371).
"""

import math
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address, ip_network
from time import monotonic

from todo_api.errors import TooManyRequests
from todo_api.request_context import RequestContext
from todo_api.settings import RATE_SECONDS, Settings

NANOSECONDS = 1_000_000_000
MAXIMUM_KEYS = 100_000
"""The most keys that are remembered. Beyond it, the least recently used key is forgotten."""


class Buckets:
    """Buckets of one quota, in this process. Times are whole nanoseconds, so they are exact."""

    def __init__(self, quota: int, clock: Callable[[], float] = monotonic) -> None:
        self._step = round(RATE_SECONDS * NANOSECONDS / quota)
        self._whole = self._step * quota
        self._clock = clock
        self._full_at: dict[str, int] = {}

    def take(self, key: str) -> tuple[int, float]:
        """Take one request: return how many are left, and the seconds to wait if it is refused."""
        now = round(self._clock() * NANOSECONDS)
        full_at = max(self._full_at.pop(key, now), now)
        wait = full_at + self._step - now - self._whole
        if wait <= 0:
            full_at += self._step
        self._forget(now)
        self._full_at[key] = full_at
        return (now + self._whole - full_at) // self._step, max(wait, 0) / NANOSECONDS

    def _forget(self, now: int) -> None:
        """Drop full buckets, oldest first. If there are too many, drop the oldest too."""
        while self._full_at:
            oldest = next(iter(self._full_at))
            if self._full_at[oldest] > now and len(self._full_at) < MAXIMUM_KEYS:
                return
            del self._full_at[oldest]


class RateLimits:
    """The rate limits from the settings. The response shows the user's remaining quota.

    The header fields follow draft-ietf-httpapi-ratelimit-headers.
    """

    def __init__(self, settings: Settings) -> None:
        quota, failures = settings.rate_limit, settings.rate_limit_failures
        self._policy = f'"minute";q={quota};w={RATE_SECONDS:.0f}'.encode()
        in_memory = settings.rate_limit_store == "memory"
        self._is_on = quota > 0
        self._step = RATE_SECONDS / max(quota, 1)
        self._users = Buckets(quota) if quota and in_memory else None
        self._addresses = Buckets(failures) if failures else None

    def count_request(self, context: RequestContext, user: str) -> None:
        """Count a request of a user. Raises `TooManyRequests`.

        If PostgreSQL counts, `take_request` (migration 0001) refuses excess requests, and the
        response shows only the policy.
        """
        if not self._is_on:
            return
        context.rate_limit_headers = [(b"ratelimit-policy", self._policy)]
        if self._users is None:
            return
        left, wait = self._users.take(user)
        until_next = wait or (0 if left else self._step)
        limit = f'"minute";r={left};t={math.ceil(until_next)}'.encode()
        context.rate_limit_headers = [(b"ratelimit-policy", self._policy), (b"ratelimit", limit)]
        if wait > 0:
            raise TooManyRequests(math.ceil(wait))

    def count_failure(self, client_address: str | None) -> None:
        """Count a refused token. Raises `TooManyRequests` instead of the 401.

        Valid tokens from the same address still work, because other users may share it.
        """
        if self._addresses is None or not client_address:
            return
        _, wait = self._addresses.take(_subscriber(client_address))
        if wait > 0:
            raise TooManyRequests(math.ceil(wait))


def _subscriber(address: str) -> str:
    """Return the IPv4 address, or the /64 network of an IPv6 address (one subscriber, RFC 6177)."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(ip_network((parsed, 64), strict=False))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
