"""The verification of bearer tokens, strict and without I/O.

The rules are RFC 7519 (JWT), RFC 7515 (JWS) and RFC 8725 (best practices). A token that a lenient
parser would repair is refused before a library sees it. The library (PyJWT) does the cryptography
and nothing else.
"""

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import jiter
from jwt.algorithms import get_default_algorithms

from todo_api.errors import ExpiredToken, InvalidToken, KeysUnavailable

MAXIMUM_BYTES = 8192
"""A longer token is refused unread. Better Auth puts the whole user into it, with the avatar."""

LEEWAY = 10.0
"""Seconds by which the issuer's clock and ours may differ."""

LATEST = 253_402_300_799
"""The end of the year 9999. A later time, or one as long before 1970, is refused."""

SUBJECT_LENGTH = 255
KEY_ID_LENGTH = 255
SHOWN_LENGTH = 200
"""The log shows at most so many characters of a value."""

CACHED_TOKENS = 10_000

TYPES = {"JWT", "at+jwt"}
"""The values of `typ` that an access token may have (RFC 8725, section 3.11)."""

_SHAPE = re.compile(r"([\w-]+)\.([\w-]+)\.([\w-]+)", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_ALGORITHMS = get_default_algorithms()

SHARED_ALGORITHM = "HS256"
PUBLISHED_ALGORITHMS = {"EdDSA", "ES256", "ES512", "RS256", "PS256"}
"""The algorithms that Better Auth can sign with."""

SYNONYMS = {"Ed25519": "EdDSA"}
"""RFC 9864 has another name for EdDSA with Ed25519."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The user that a token names, and the other claims that are used."""

    subject: str
    email: str | None
    issued_at: float | None


@dataclass(frozen=True, slots=True)
class Key:
    """A key and its one algorithm (RFC 8725, section 3.1)."""

    algorithm: str
    material: Any


@dataclass(frozen=True, slots=True)
class Expected:
    """The issuer and the audience that a token must name; None is not checked."""

    issuer: str | None = None
    audience: str | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """All keys, of both kinds. Neither kind is ever tried in place of the other.

    `secret` is for HS256 only, and None if none is configured. `published` is by `kid`, and None
    until the set is loaded. `published_expects` is None if no set is configured.
    """

    secret: Key | None = None
    secret_expects: Expected = Expected()
    published: Mapping[str, Key] | None = None
    published_expects: Expected | None = None


class UnknownKey(InvalidToken):
    """The token names a key that is not in our copy of the set, which may be outdated."""


@dataclass(frozen=True, slots=True)
class _Claims:
    """The claims of a token with a good signature; its times are checked at every use."""

    identity: Identity
    expires_at: float
    valid_from: float
    valid_from_claim: str
    """The claim with the later of the two times that `valid_from` can be: `nbf` or `iat`."""

    def valid_at(self, now: float) -> Identity:
        """Return the identity, or raise `InvalidToken` if the token is not valid at this time.

        Expiry is the last of all checks, because `ExpiredToken` says that the others passed.
        """
        if now < self.valid_from - LEEWAY:
            raise InvalidToken(
                f"{self.valid_from_claim}: expected at most {shown_time(now + LEEWAY)} "
                f"(our clock + {LEEWAY:.0f} s), received {shown_time(self.valid_from)}"
            )
        if now >= self.expires_at + LEEWAY:
            issued_at = self.identity.issued_at
            issued = "" if issued_at is None else f", with iat {shown_time(issued_at)}"
            raise ExpiredToken(
                f"exp: expected more than {shown_time(now - LEEWAY)} "
                f"(our clock - {LEEWAY:.0f} s), received {shown_time(self.expires_at)}{issued}"
            )
        return self.identity


class Verifier:
    """Verifies tokens, with a bounded cache of those whose signature was good.

    A token costs 30 µs (HS256) to 140 µs (EdDSA) the first time, and about 1 µs from the cache.
    The cache is safe for three reasons. Its key is the SHA-256 of the whole token, so no other
    token finds the entry. `exp`, `nbf` and `iat` are compared with the clock every time. New keys
    empty the cache.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self._cache: dict[bytes, _Claims] = {}

    def replace_keys(self, keys: Keys) -> None:
        """Verify with these keys from now on."""
        self.keys = keys
        self._cache.clear()

    def verify(self, token: str, now: float) -> Identity:
        """Return the identity that a valid token proves, or raise `InvalidToken`.

        `now` is in seconds since the epoch. Raises `UnknownKey` for a `kid` that is not published,
        and `KeysUnavailable` if no key set was ever loaded.
        """
        if len(token) > MAXIMUM_BYTES:
            raise InvalidToken(f"size: longer than {MAXIMUM_BYTES} bytes")
        digest = sha256(token.encode("latin-1")).digest()
        claims = self._cache.get(digest)
        if claims is None:
            claims = _verified_claims(token, self.keys)
            if len(self._cache) >= CACHED_TOKENS:
                del self._cache[next(iter(self._cache))]
            self._cache[digest] = claims
        return claims.valid_at(now)


def is_subject(text: str) -> bool:
    """Tell whether a text can be a `sub`: 1 to 255 characters, not blank, no control characters."""
    return 1 <= len(text) <= SUBJECT_LENGTH and text.strip() != "" and not _CONTROL.search(text)


def _verified_claims(token: str, keys: Keys) -> _Claims:
    """Return the claims of a token after all checks that do not depend on the time."""
    shape = _SHAPE.fullmatch(token)
    if shape is None:
        raise InvalidToken("form: not a JWT, which has three base64url segments")
    header, payload, signature = (_decode(segment) for segment in shape.groups())
    algorithm, key_id = _read_header(_parse(header, "header"))
    key, expected = _find_key(algorithm, key_id, keys)
    signed = token[: shape.end(2)].encode()
    try:
        genuine = _ALGORITHMS[key.algorithm].verify(signed, key.material, signature)
    except (ValueError, TypeError):  # the signature does not fit the algorithm
        genuine = False
    if not genuine:
        shared = algorithm == SHARED_ALGORITHM
        signer = "BETTER_AUTH_SECRET" if shared else "the published key that kid names"
        raise InvalidToken(f"signature: not made with {signer}")
    return _read_claims(_parse(payload, "payload"), expected)


def _decode(segment: str) -> bytes:
    """Decode canonical base64url without padding (RFC 7515, section 2)."""
    try:
        decoded = urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError:
        raise InvalidToken("form: not base64url") from None
    if urlsafe_b64encode(decoded).rstrip(b"=") != segment.encode():
        raise InvalidToken("form: the base64url is not canonical")
    return decoded


def _parse(text: bytes, part: str) -> dict[str, Any]:
    """Return a JSON object, which must be UTF-8 without duplicate members and NaN."""
    try:
        value = jiter.from_json(
            text, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="none"
        )
    except ValueError:
        raise InvalidToken(f"{part}: not strict JSON") from None
    if not isinstance(value, dict):
        raise InvalidToken(f"{part}: not a JSON object")
    return value


def _read_header(header: dict[str, Any]) -> tuple[str, str | None]:
    """Return `alg` and `kid`. Other members that name a key (`jwk`, `jku`, `x5c`) are ignored."""
    if "crit" in header:
        raise InvalidToken("crit: no critical extension is supported")
    if "typ" in header and not (isinstance(header["typ"], str) and header["typ"] in TYPES):
        raise InvalidToken("typ: expected JWT, at+jwt or none")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str):
        raise InvalidToken("alg: not a string")
    key_id = header.get("kid")
    if "kid" in header and not _is_key_id(key_id):
        raise InvalidToken("kid: not a plain string")
    return SYNONYMS.get(algorithm, algorithm), key_id


def _is_key_id(key_id: object) -> bool:
    return isinstance(key_id, str) and len(key_id) <= KEY_ID_LENGTH and not _CONTROL.search(key_id)


def _find_key(algorithm: str, key_id: str | None, keys: Keys) -> tuple[Key, Expected]:
    """Return the one key that the token must be signed with, and the expected claims."""
    if algorithm == SHARED_ALGORITHM:
        if keys.secret is None:
            raise InvalidToken(f"alg: {algorithm}, but BETTER_AUTH_SECRET is not set")
        return keys.secret, keys.secret_expects
    if algorithm not in PUBLISHED_ALGORITHMS:
        raise InvalidToken("alg: not a supported algorithm")
    if keys.published_expects is None:
        raise InvalidToken(f"alg: {algorithm}, but BETTER_AUTH_URL is not set")
    if keys.published is None:
        raise KeysUnavailable
    if key_id is None and len(keys.published) == 1:
        (key,) = keys.published.values()
    elif key_id is not None and key_id in keys.published:
        key = keys.published[key_id]
    else:
        raise UnknownKey(_unknown_key(key_id, keys.published))
    if key.algorithm != algorithm:
        raise InvalidToken(f"alg: expected {key.algorithm} for this key, received {algorithm}")
    return key, keys.published_expects


def _unknown_key(key_id: str | None, published: Mapping[str, Key]) -> str:
    """Return why no key was found. It does not show `kid`, because nobody has signed it yet."""
    if not published:
        return "kid: the key set has no usable key"
    if key_id is None:
        return f"kid: missing, and the key set has {len(published)} keys"
    return "kid: not in the key set of BETTER_AUTH_URL"


def _read_claims(claims: dict[str, Any], expected: Expected) -> _Claims:
    subject = claims.get("sub")
    if not isinstance(subject, str) or not is_subject(subject):
        raise InvalidToken(f"sub: not a string of 1 to {SUBJECT_LENGTH} visible characters")
    if expected.issuer is not None and claims.get("iss") != expected.issuer:
        raise InvalidToken(_unexpected("iss", claims, expected.issuer))
    if expected.audience is not None and not _is_audience(claims.get("aud"), expected.audience):
        raise InvalidToken(_unexpected("aud", claims, expected.audience))
    times = {name: _time(claims, name) for name in ("exp", "nbf", "iat") if name in claims}
    if "exp" not in times:
        raise InvalidToken("exp: missing")
    email = claims.get("email")
    valid_from, valid_from_claim = max((times.get(name, 0.0), name) for name in ("nbf", "iat"))
    return _Claims(
        Identity(subject, email if isinstance(email, str) else None, times.get("iat")),
        expires_at=times["exp"],
        valid_from=valid_from,
        valid_from_claim=valid_from_claim,
    )


def _unexpected(name: str, claims: dict[str, Any], expected: str) -> str:
    """Return the reason for a claim of a genuine token that another value was expected for."""
    received = shown(claims[name]) if name in claims else "none"
    return f"{name}: expected {shown(expected)}, received {received}"


def shown(value: object) -> str:
    """Return a value as JSON in ASCII, which cannot forge a line of the log, and not too long."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}..."


def shown_time(seconds: float) -> str:
    """Return a time in UTC; one before 1970 as a number, because a date has no year before 1."""
    if seconds < 0:
        return f"{seconds:.0f}"
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _is_audience(claim: object, audience: str) -> bool:
    """Tell whether `aud`, a string or a list of strings, names `audience` (RFC 7519, 4.1.3)."""
    names = claim if isinstance(claim, list) else [claim]
    return all(isinstance(name, str) for name in names) and audience in names


def _time(claims: dict[str, Any], name: str) -> float:
    """Return a NumericDate (RFC 7519, section 2), which must be a JSON number."""
    value = claims[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and abs(value) <= LATEST):
        raise InvalidToken(f"{name}: not a number of seconds")
    return float(value)
