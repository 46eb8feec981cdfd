"""Authentication. It runs before the service reads anything else of a request."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from todo_api.auth.key_set import KeySet
from todo_api.auth.rate_limits import RateLimits
from todo_api.auth.tokens import Identity, UnknownKey, Verifier, is_subject
from todo_api.errors import Forbidden, InvalidToken, KeysUnavailable, Unauthorized
from todo_api.request_context import HeaderFields, RequestContext


@dataclass(frozen=True, slots=True)
class Owner:
    """A user whose token was verified, or whom an operator names.

    Only this module creates one, as the proof of access.
    """

    id: str
    email: str | None
    issued_at: float | None
    """When the token was issued, in seconds since the epoch, or None if the token has no `iat`."""


def named_by_operator(user_id: str, now: float) -> Owner:
    """Return the user whom an operator names on the command line, as if they had just signed in.

    No request may come here. The operator needs no token, because they have the database's address
    and with it every row. Raises `ValueError` unless the id could be a token's `sub`.
    """
    user_id.encode()  # an argument that is not UTF-8 cannot be a `sub`
    if not is_subject(user_id):
        raise ValueError("not a subject")
    return Owner(user_id, None, now)


class Authenticator:
    """Turns a request's `Authorization` header into an `Owner`.

    It needs I/O only for a token whose key is not in our copy of the key set.
    """

    def __init__(
        self,
        verifier: Verifier,
        rate_limits: RateLimits,
        key_set: KeySet | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._verifier = verifier
        self._rate_limits = rate_limits
        self._key_set = key_set
        self._clock = clock

    async def owner(self, context: RequestContext, named: str | None = None) -> Owner:
        """Return the user who sent the request.

        If the path names a user (`named`), it must be the token's user. Raises `Unauthorized`,
        `Forbidden`, `TooManyRequests` or `KeysUnavailable`.
        """
        try:
            identity = await self._identify(_bearer_token(context.headers))
        except InvalidToken as refusal:
            context.reason = refusal.reason  # the log keeps it if a 429 replaces the 401
            self._rate_limits.count_failure(context.client_address)
            raise
        context.user = identity.subject
        if named is not None and named != identity.subject:
            raise Forbidden
        self._rate_limits.count_request(context, identity.subject)
        return Owner(identity.subject, identity.email, identity.issued_at)

    async def _identify(self, token: str) -> Identity:
        for _ in range(2):  # the first refresh may join a fetch older than the key
            try:
                return self._verifier.verify(token, self._clock())
            except (UnknownKey, KeysUnavailable):
                if self._key_set is None:
                    raise
                await self._key_set.refresh()
        return self._verifier.verify(token, self._clock())


def _bearer_token(headers: HeaderFields) -> str:
    """Return the single bearer token of a request (RFC 6750, 2.1; RFC 9110, 11.4)."""
    values = headers.get(b"authorization")
    if not values:
        raise Unauthorized("no Authorization header")
    if len(values) > 1:
        raise InvalidToken("more than one Authorization header")
    scheme, _, rest = values[0].decode("latin-1").partition(" ")
    token = rest.strip(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized("the Authorization header has no bearer token")
    return token
