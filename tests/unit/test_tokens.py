"""The verifier. It has no I/O, so every rule is tested without a server."""

import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from todo_api.auth import tokens
from todo_api.auth.tokens import Expected, Identity, Key, Keys, UnknownKey, Verifier
from todo_api.errors import ExpiredToken, InvalidToken, KeysUnavailable

NOW = 1_800_000_000.0
SECRET = "a shared secret of more than thirty-two bytes"
PRIVATE = Ed25519PrivateKey.generate()
PUBLIC = Key("EdDSA", PRIVATE.public_key())
SHARED = Keys(secret=Key("HS256", SECRET.encode()))
PUBLISHED = Keys(
    published={"k1": PUBLIC, "k2": Key("EdDSA", Ed25519PrivateKey.generate().public_key())},
    published_expects=Expected("https://app.example", "https://app.example"),
)
BOTH = Keys(SHARED.secret, Expected(), PUBLISHED.published, PUBLISHED.published_expects)
CLAIMS = {"sub": "alice", "exp": NOW + 60}
ISSUED = {**CLAIMS, "iss": "https://app.example", "aud": "https://app.example"}


def verify(token: str, keys: Keys, now: float) -> Identity:
    """Verify with an empty cache."""
    return Verifier(keys).verify(token, now)


def encode(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(header: bytes, payload: bytes, secret: str = SECRET) -> str:
    """Sign raw bytes, which need not be JSON."""
    text = f"{encode(header)}.{encode(payload)}"
    algorithm = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    return f"{text}.{encode(algorithm.sign(text.encode(), secret.encode()))}"


def shared(claims: dict[str, Any] | None = None, **header: Any) -> str:
    """Return a token signed with the shared secret."""
    full = {"alg": "HS256", "typ": "JWT", **header}
    return signed(json.dumps(full).encode(), json.dumps(claims or CLAIMS).encode())


def published(claims: dict[str, Any] | None = None, **header: Any) -> str:
    """Return a token signed with the published key k1."""
    full = {"alg": "EdDSA", "kid": "k1", **header}
    full = {name: value for name, value in full.items() if value is not ...}
    text = f"{encode(json.dumps(full).encode())}.{encode(json.dumps(claims or ISSUED).encode())}"
    return f"{text}.{encode(PRIVATE.sign(text.encode()))}"


def refuse(token: str, keys: Keys = SHARED, now: float = NOW) -> str:
    """See a token refused, and return the name of the check."""
    return reason(token, keys, now).partition(": ")[0]


def reason(token: str, keys: Keys = SHARED, now: float = NOW) -> str:
    """See a token refused, and return what the log says."""
    with pytest.raises(InvalidToken) as caught:
        verify(token, keys, now)
    assert caught.value.reason is not None
    assert caught.value.reason.isascii()
    assert "alice" not in caught.value.reason
    return caught.value.reason


def test_good_tokens_of_both_kinds() -> None:
    claims = {**CLAIMS, "email": "a@example.com", "iat": NOW - 5}
    assert verify(shared(claims), BOTH, NOW) == Identity("alice", "a@example.com", NOW - 5)
    assert verify(published(), BOTH, NOW) == Identity("alice", None, None)
    assert verify(published(alg="Ed25519"), BOTH, NOW).subject == "alice"
    assert verify(published({**ISSUED, "aud": ["x", ISSUED["aud"]]}), BOTH, NOW).subject == "alice"


@pytest.mark.parametrize("type_", ["JWT", "at+jwt"])
def test_type_of_an_access_token_is_accepted(type_: str) -> None:
    assert verify(shared(typ=type_), SHARED, NOW).subject == "alice"


@pytest.mark.parametrize("type_", ["logout+jwt", "secevent+jwt", 1, None, "", ["JWT"]])
def test_other_type_is_refused(type_: object) -> None:
    assert refuse(shared(typ=type_)) == "typ"


@pytest.mark.parametrize(
    "algorithm",
    [
        *("none", "nOnE", "NONE", "", " HS256", "hs256", "HS384", "HS512", "RS256", "ES256"),
        *("EdDSA", "Ed25519", "PS256", "ES512", "Ed448", "dir", None, 1, ["HS256"], {}),
    ],
)
def test_other_algorithm_is_refused_with_the_secret_alone(algorithm: object) -> None:
    assert refuse(shared(alg=algorithm)) == "alg"


def test_missing_algorithm_is_refused() -> None:
    assert refuse(signed(b"{}", json.dumps(CLAIMS).encode())) == "alg"


def test_unsigned_token_is_refused() -> None:
    header = encode(b'{"alg":"none"}')
    text = f"{header}.{encode(json.dumps(CLAIMS).encode())}."
    for keys in (SHARED, PUBLISHED, BOTH):
        refuse(text, keys)


def test_each_kind_of_key_is_used_for_its_own_algorithm_only() -> None:
    assert refuse(shared(), PUBLISHED) == "alg"
    assert refuse(published(), SHARED) == "alg"
    raw = PUBLIC.material.public_bytes_raw()
    for secret in (encode(raw), raw.hex(), json.dumps({"x": encode(raw)}), "", "k1", "secret"):
        text = signed(b'{"alg":"HS256","kid":"k1"}', json.dumps(ISSUED).encode(), secret)
        assert refuse(text, PUBLISHED) == "alg"
        assert refuse(text, BOTH) == "signature"
    for algorithm in ("ES256", "RS256", "PS256", "ES512"):
        assert refuse(published(alg=algorithm), BOTH) == "alg"


def test_key_is_found_by_its_id() -> None:
    with pytest.raises(UnknownKey):
        verify(published(kid="k3"), PUBLISHED, NOW)
    assert refuse(published(kid="k2"), PUBLISHED) == "signature"
    with pytest.raises(UnknownKey):
        verify(published(kid=...), PUBLISHED, NOW)
    single = Keys(published={"k1": PUBLIC}, published_expects=PUBLISHED.published_expects)
    assert verify(published(kid=...), single, NOW).subject == "alice"


@pytest.mark.parametrize("key_id", [1, None, ["k1"], {}, True, "\0", "a\nb", "x" * 256])
def test_key_id_that_is_not_a_plain_string_is_refused(key_id: object) -> None:
    assert refuse(published(kid=key_id), PUBLISHED) == "kid"
    assert refuse(shared(kid=key_id), SHARED) == "kid"


@pytest.mark.parametrize("key_id", ["../../etc/passwd", "' OR 1=1--", "k1 ", "x" * 255, ""])
def test_hostile_key_id_is_unknown(key_id: str) -> None:
    with pytest.raises(UnknownKey):
        verify(published(kid=key_id), PUBLISHED, NOW)


def test_token_is_not_judged_before_the_keys_are_loaded() -> None:
    keys = Keys(published_expects=Expected("https://app.example", "https://app.example"))
    with pytest.raises(KeysUnavailable):
        verify(published(), keys, NOW)
    assert refuse(shared(), keys) == "alg"


@pytest.mark.parametrize("crit", [["foo"], [], "exp", ["b64"], None])
def test_critical_extension_is_refused(crit: object) -> None:
    assert refuse(shared(crit=crit, b64=False)) == "crit"


def test_keys_inside_the_token_have_no_effect() -> None:
    attacker = Ed25519PrivateKey.generate()
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": encode(attacker.public_key().public_bytes_raw())}
    header = {"alg": "EdDSA", "kid": "k1", "jwk": jwk, "x5c": ["AAAA"], "jku": "http://127.0.0.1:1"}
    text = f"{encode(json.dumps(header).encode())}.{encode(json.dumps(ISSUED).encode())}"
    assert refuse(f"{text}.{encode(attacker.sign(text.encode()))}", PUBLISHED) == "signature"
    assert verify(published(jwk=jwk, x5u="http://127.0.0.1:1"), PUBLISHED, NOW)


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"[]", b'"x"', b"1", b"null", b"x", b"[" * 3000, b'{"alg":"HS256","alg":"HS256"}'),
        *('{"alg":"HS256"}'.encode("utf-16"), b'\xef\xbb\xbf{"alg":"HS256"}', b"{} {}"),
    ],
)
def test_header_that_is_not_a_strict_object_is_refused(header: bytes) -> None:
    refuse(signed(header, json.dumps(CLAIMS).encode()))


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"[]", b'"x"', b"1", b"null", b"x", b'{"a":' * 900, b"[" * 3000),
        *(b'{"sub":"alice","sub":"bob","exp":1800000060}', b'{"sub":"alice","exp":NaN}'),
        *(b'{"sub":"alice","exp":Infinity}', b'{"sub":"alice","exp":' + b"9" * 5000 + b"}"),
        *(b'{"sub":"\\ud800","exp":1800000060}', b'{"sub":"\xed\xa0\x80","exp":1800000060}'),
        json.dumps(CLAIMS).encode("utf-16"),
        b"\xef\xbb\xbf" + json.dumps(CLAIMS).encode(),
    ],
)
def test_payload_that_is_not_a_strict_object_is_refused(payload: bytes) -> None:
    refuse(signed(b'{"alg":"HS256"}', payload))


@pytest.mark.parametrize(
    "exp", [None, "abc", "1900000000", True, [], {}, -1, 0, NOW - 10, NOW - 1000]
)
def test_expiry_must_be_a_number_in_the_future(exp: object) -> None:
    assert refuse(shared({"sub": "alice", "exp": exp})) == "exp"


@pytest.mark.parametrize("exp", [b"1e400", b"-1e400", b"1" + b"0" * 400, b"253402300800"])
def test_expiry_beyond_a_double_is_refused(exp: bytes) -> None:
    assert refuse(signed(b'{"alg":"HS256"}', b'{"sub":"a","exp":' + exp + b"}")) == "exp"


def test_missing_expiry_is_refused() -> None:
    assert refuse(shared({"sub": "alice"})) == "exp"


def test_ten_seconds_of_leeway_and_no_more() -> None:
    assert verify(shared({"sub": "alice", "exp": NOW - 9.999}), SHARED, NOW)
    assert refuse(shared({"sub": "alice", "exp": NOW - 10})) == "exp"
    for name in ("nbf", "iat"):
        assert verify(shared({**CLAIMS, name: NOW + 10}), SHARED, NOW)
        assert refuse(shared({**CLAIMS, name: NOW + 10.001})) == name
    assert verify(shared({"sub": "alice", "exp": NOW + 0.5}), SHARED, NOW)


@pytest.mark.parametrize("name", ["nbf", "iat"])
@pytest.mark.parametrize("value", ["1", None, True, [], {}, -3e11, -1e300, 1e300])
def test_other_times_must_be_numbers(name: str, value: object) -> None:
    assert refuse(shared({**CLAIMS, name: value})) == name


@pytest.mark.parametrize(
    "sub",
    [None, "", " ", "\u3000", 1, ["alice"], {}, True, "a\0b", "a\nb", "\x7f", "\x85", "x" * 256],
)
def test_subject_must_be_a_plain_string(sub: object) -> None:
    assert refuse(shared({**CLAIMS, "sub": sub})) == "sub"


@pytest.mark.parametrize("name", ["email", "id", "userId"])
def test_no_other_claim_replaces_the_subject(name: str) -> None:
    assert refuse(shared({"exp": NOW + 60, name: "alice"})) == "sub"
    assert refuse(shared({"exp": NOW + 60, "user": {"id": "alice"}, "session": {}})) == "sub"


@pytest.mark.parametrize("sub", ["a", "x" * 255, " a ", "ä😀", "auth0|1", "a/b"])
def test_subject_is_used_unchanged(sub: str) -> None:
    assert verify(shared({**CLAIMS, "sub": sub}), SHARED, NOW).subject == sub


@pytest.mark.parametrize(
    "iss",
    [
        None,
        "",
        "https://app.example/",
        "https://app.exampl",
        "https://evil.example",
        [ISSUED["iss"]],
    ],
)
def test_issuer_must_match(iss: object) -> None:
    assert refuse(published({**ISSUED, "iss": iss}), PUBLISHED) == "iss"


@pytest.mark.parametrize(
    "aud", [None, "", {}, [], [1, ISSUED["aud"]], "https://app.example/", ["other"], "other"]
)
def test_audience_must_match(aud: object) -> None:
    assert refuse(published({**ISSUED, "aud": aud}), PUBLISHED) == "aud"


def test_shared_secret_checks_issuer_and_audience_only_if_configured() -> None:
    keys = Keys(SHARED.secret, Expected("me", "you"))
    assert refuse(shared(), keys) == "iss"
    assert refuse(shared({**CLAIMS, "iss": "me"}), keys) == "aud"
    assert verify(shared({**CLAIMS, "iss": "me", "aud": "you"}), keys, NOW)
    assert verify(shared({**CLAIMS, "iss": "any", "aud": "any"}), SHARED, NOW)


@pytest.mark.parametrize(
    ("claim", "shown"),
    [
        ({"iss": "https://www.app.example"}, '"https://www.app.example"'),
        ({"iss": None}, "null"),
        ({"aud": ["a", 1]}, '["a", 1]'),
        ({"aud": "\x1b[2J\n\u202e"}, r'"\u001b[2J\n\u202e"'),
        ({"iss": "x" * 5000}, '"' + "x" * 199 + "..."),
    ],
)
def test_reason_shows_the_expected_and_the_received_value(
    claim: dict[str, Any], shown: str
) -> None:
    (name,) = claim
    said = reason(published({**ISSUED, **claim}), PUBLISHED)
    assert said == f'{name}: expected "https://app.example", received {shown}'


def test_reason_says_that_a_claim_is_missing() -> None:
    assert reason(published(CLAIMS), PUBLISHED).endswith("received none")


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        (
            {"exp": NOW - 10},
            (
                "exp: expected more than 2027-01-15T07:59:50.000Z (our clock - 10 s), "
                "received 2027-01-15T07:59:50.000Z"
            ),
        ),
        (
            {"exp": NOW - 100.5, "iat": NOW - 1000, "nbf": 0},
            (
                "exp: expected more than 2027-01-15T07:59:50.000Z (our clock - 10 s), "
                "received 2027-01-15T07:58:19.500Z, with iat 2027-01-15T07:43:20.000Z"
            ),
        ),
        (
            {"exp": -1e9},
            (
                "exp: expected more than 2027-01-15T07:59:50.000Z (our clock - 10 s), "
                "received -1000000000"
            ),
        ),
        (
            {"exp": NOW + 900, "iat": NOW + 60},
            (
                "iat: expected at most 2027-01-15T08:00:10.000Z (our clock + 10 s), "
                "received 2027-01-15T08:01:00.000Z"
            ),
        ),
        (
            {"exp": NOW + 900, "iat": NOW, "nbf": NOW + 3600},
            (
                "nbf: expected at most 2027-01-15T08:00:10.000Z (our clock + 10 s), "
                "received 2027-01-15T09:00:00.000Z"
            ),
        ),
    ],
)
def test_reason_shows_both_times(claims: dict[str, Any], said: str) -> None:
    assert reason(shared({"sub": "alice", **claims})) == said


def test_reason_names_the_setting_that_is_missing_or_wrong() -> None:
    assert reason(shared(), PUBLISHED) == "alg: HS256, but BETTER_AUTH_SECRET is not set"
    assert reason(published(), SHARED) == "alg: EdDSA, but BETTER_AUTH_URL is not set"
    assert reason(published(kid="k3"), PUBLISHED) == "kid: not in the key set of BETTER_AUTH_URL"
    assert reason(published(kid=...), PUBLISHED) == "kid: missing, and the key set has 2 keys"
    no_keys = Keys(published={}, published_expects=Expected())
    assert reason(published(), no_keys) == "kid: the key set has no usable key"
    wrong = Keys(secret=Key("HS256", b"another secret of more than 32 bytes"))
    assert reason(shared(), wrong) == "signature: not made with BETTER_AUTH_SECRET"
    assert reason(published(alg="ES256"), PUBLISHED) == (
        "alg: expected EdDSA for this key, received ES256"
    )


@pytest.mark.parametrize(
    ("claims", "error"),
    [
        ({}, ExpiredToken),
        ({"iss": "https://evil.example"}, InvalidToken),
        ({"aud": None}, InvalidToken),
        ({"sub": ""}, InvalidToken),
        ({"nbf": NOW + 60}, InvalidToken),
        ({"iat": NOW + 60}, InvalidToken),
        ({"iat": "1"}, InvalidToken),
    ],
)
def test_token_is_expired_only_if_everything_else_is_right(
    claims: dict[str, Any], error: type[InvalidToken]
) -> None:
    verifier = Verifier(PUBLISHED)
    token = published({**ISSUED, "exp": NOW - 60, **claims})
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InvalidToken) as caught:
            verifier.verify(token, NOW)
        assert type(caught.value) is error


def test_only_three_canonical_segments() -> None:
    good = shared()
    header, payload, signature = good.split(".")
    for bad in [
        *("", ".", "..", "...", header, f"{header}.{payload}", f"{header}.{payload}."),
        *(f".{payload}.{signature}", f"{header}..{signature}", f"{good}.x", f"{good}.x.y"),
        *(f".{good}", f"{good}.", f"{good}=", f"{good}==", f" {good}", f"{good}\n", f"{good} "),
        *(good.replace(".", ".\n", 1), f"{header}=.{payload}.{signature}", good + "A", good + "é"),
        json.dumps({"payload": payload, "signatures": [{"protected": header}]}),
        signature_with_spare_bits(good),
    ]:
        refuse(bad)


def signature_with_spare_bits(token: str) -> str:
    """Change the bits of the last character that decoding ignores."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]


def test_long_token_is_refused_unread() -> None:
    for size in (9_000, 100_000, 5_000_000):
        assert refuse("a" * size) == "size"
    padded = shared({**CLAIMS, "image": "x" * 8000})
    assert refuse(padded) == "size"
    assert verify(shared({**CLAIMS, "image": "x" * 5900}), SHARED, NOW)


@pytest.mark.parametrize("make", [shared, published])
def test_token_changed_at_any_character_is_refused(make: Any) -> None:
    token = make()
    for position in range(len(token)):
        for other in ("A", "B", "-", ".", "="):
            if token[position] != other:
                refuse(token[:position] + other + token[position + 1 :], BOTH)


def test_signature_plus_the_group_order_is_refused() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    head, _, signature = published().rpartition(".")
    raw = urlsafe_b64decode(signature + "==")
    shifted = int.from_bytes(raw[32:], "little") + order
    forged = raw[:32] + shifted.to_bytes(32, "little")
    assert refuse(f"{head}.{encode(forged)}", PUBLISHED) == "signature"


def test_cached_token_still_expires() -> None:
    verifier = Verifier(SHARED)
    token = shared()
    assert verifier.verify(token, NOW) is verifier.verify(token, NOW + 69)
    with pytest.raises(InvalidToken, match="bearer"):
        verifier.verify(token, NOW + 70)
    with pytest.raises(InvalidToken):
        verifier.verify(token, NOW + 1_000_000)


def test_new_keys_empty_the_cache() -> None:
    verifier = Verifier(SHARED)
    token = shared()
    verifier.verify(token, NOW)
    verifier.replace_keys(Keys(secret=Key("HS256", b"another secret of more than 32 bytes")))
    with pytest.raises(InvalidToken):
        verifier.verify(token, NOW)


def test_cache_of_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CACHED_TOKENS", 10)
    verifier = Verifier(SHARED)
    for number in range(100):
        assert verifier.verify(shared({**CLAIMS, "sub": f"user {number}"}), NOW)
    assert len(verifier._cache) == 10
    refused = signed(b'{"alg":"HS256"}', json.dumps(CLAIMS).encode(), "wrong")
    with pytest.raises(InvalidToken):
        verifier.verify(refused, NOW)
    assert len(verifier._cache) == 10


def test_clock_is_in_seconds() -> None:
    assert verify(shared({"sub": "alice", "exp": time.time() + 60}), SHARED, time.time())
