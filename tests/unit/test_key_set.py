"""Reading a key set. Each key is accepted or refused on its own."""

import json
from base64 import urlsafe_b64encode
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from todo_api.auth.issuer import FetchFailed
from todo_api.auth.key_set import (
    SHOWN_REFUSALS,
    SMALL_ORDER,
    KeyRefused,
    Published,
    read_key,
    read_key_set,
)

ED25519 = OKPAlgorithm.to_jwk(Ed25519PrivateKey.generate().public_key(), as_dict=True)
P256 = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True)
P384 = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), as_dict=True)
P521 = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP521R1()).public_key(), as_dict=True)
RSA = rsa.generate_private_key(65537, 2048)
RSA2048 = RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True)
for public in (ED25519, P256, P384, P521, RSA2048):
    public.pop("key_ops", None)


def rsa_of(bits: int) -> dict[str, Any]:
    key = rsa.generate_private_key(65537, bits).public_key()
    return {"kty": "RSA", "n": number(key.public_numbers().n), "e": "AQAB"}


def number(value: int) -> str:
    raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def key_set(*keys: Any) -> bytes:
    return json.dumps({"keys": keys}).encode()


@pytest.mark.parametrize(
    ("member", "algorithm"),
    [
        (ED25519, "EdDSA"),
        ({**ED25519, "alg": "EdDSA"}, "EdDSA"),
        ({**ED25519, "alg": "Ed25519"}, "EdDSA"),
        (P256, "ES256"),
        (P521, "ES512"),
        (RSA2048, "RS256"),
        ({**RSA2048, "alg": "PS256"}, "PS256"),
        ({**ED25519, "use": "sig", "key_ops": ["verify"], "x5c": ["?"], "foo": 1}, "EdDSA"),
    ],
)
def test_each_key_is_bound_to_its_one_algorithm(member: dict[str, Any], algorithm: str) -> None:
    assert read_key(member).algorithm == algorithm


@pytest.mark.parametrize(
    "member",
    [
        *(None, 1, "x", [], {}, {"kty": "oct", "k": "AAAA"}, {"kty": "oct"}, {"kty": ["RSA"]}),
        *({**ED25519, name: "AAAA"} for name in ("d", "p", "q", "k", "oth")),
        OKPAlgorithm.to_jwk(Ed25519PrivateKey.generate(), as_dict=True),
        RSAAlgorithm.to_jwk(RSA, as_dict=True),
        *({**ED25519, "use": use} for use in ("enc", "", None, ["sig"])),
        *({**ED25519, "key_ops": each} for each in ([], ["sign"], "verify", None, 1)),
        *({**ED25519, "crv": crv} for crv in ("X25519", "Ed448", "P-256", "", "None", "[]")),
        *({**ED25519, "x": x} for x in ("", "AAAA", "A" * 44, None, 1, "!!")),
        *({**ED25519, "alg": alg} for alg in ("HS256", "ES256", "none", "", None, ["EdDSA"])),
        {**P256, "y": P256["x"]},
        {**P256, "crv": "P-521"},
        {**P256, "crv": "secp256k1"},
        P384,
        *({**RSA2048, "alg": alg} for alg in ("RS512", "HS256", "RSA-OAEP")),
        {**RSA2048, "n": "AQAB"},
        {**RSA2048, "e": "AA"},
        {name: value for name, value in RSA2048.items() if name != "n"},
        rsa_of(1024),
    ],
)
def test_key_that_is_not_safe_is_refused(member: Any) -> None:
    with pytest.raises(KeyRefused):
        read_key(member)


PRIME = 2**255 - 19
D = -121665 * pow(121666, -1, PRIME) % PRIME


def add(p: tuple[int, int], q: tuple[int, int]) -> tuple[int, int]:
    """Add two points of the curve (RFC 8032, section 5.1)."""
    (x1, y1), (x2, y2) = p, q
    product = D * x1 * x2 * y1 * y2
    x = (x1 * y2 + x2 * y1) * pow(1 + product, -1, PRIME)
    y = (y1 * y2 + x1 * x2) * pow(1 - product, -1, PRIME)
    return x % PRIME, y % PRIME


@pytest.mark.parametrize("encoded", sorted(SMALL_ORDER), ids=bytes.hex)
@pytest.mark.parametrize("sign", [0, 0x80])
def test_point_of_small_order_is_refused(encoded: bytes, sign: int) -> None:
    y = int.from_bytes(encoded, "little") % PRIME
    square = (y * y - 1) * pow(D * y * y + 1, -1, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if x * x % PRIME != square:
        x = x * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    point = (x, y)
    for _ in range(3):
        point = add(point, point)
    assert point == (0, 1), "eight times the point is the neutral element"
    raw = encoded[:31] + bytes([encoded[31] | sign])
    with pytest.raises(KeyRefused):
        read_key({"kty": "OKP", "crv": "Ed25519", "x": urlsafe_b64encode(raw).decode()[:43]})


def test_bad_keys_are_left_out_and_good_ones_kept() -> None:
    keys = read_key_set(
        key_set(
            {**ED25519, "kid": "good"},
            {**P256, "kid": "also good"},
            {**RSA2048, "kid": "twice"},
            {**ED25519, "kid": "twice"},
            {"kty": "oct", "k": "AAAA", "kid": "symmetric"},
            {**P384, "kid": "curve"},
            "nonsense",
        )
    )
    assert {name: key.algorithm for name, key in keys.keys.items()} == {
        "good": "EdDSA",
        "also good": "ES256",
    }


def test_key_without_an_id_is_kept() -> None:
    assert list(read_key_set(key_set(ED25519)).keys) == [""]
    assert list(read_key_set(key_set({**ED25519, "kid": 5})).keys) == [""]


def test_set_may_be_empty_or_without_a_safe_key() -> None:
    assert read_key_set(key_set()) == Published({}, ())
    refused = read_key_set(key_set({"kty": "oct", "k": "AAAA"}, {**P384, "kid": "a"}))
    assert refused.keys == {}
    assert refused.refused == (
        'kid "": a private or symmetric key',
        'kid "a": the type "EC P-384" is not supported',
    )


def test_reason_for_a_refused_key_names_it() -> None:
    keys = [{**ED25519, "kid": "twice"}, {**P256, "kid": "twice"}]
    keys += [{**RSA2048, "kid": f"\x1b{number}", "alg": "RS512"} for number in range(9)]
    published = read_key_set(key_set(*keys))
    assert published.keys == {}
    assert published.refused[:3] == (
        'kid "twice": the kid is not unique',
        'kid "twice": the kid is not unique',
        r'kid "\u001b0": alg "RS512" is not supported for this type, RS256 or PS256 is',
    )
    assert len(published.refused) == 11
    assert published.refused_in_short.count("; ") == SHOWN_REFUSALS
    assert published.refused_in_short.endswith("; and 6 more")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"<html></html>", b"{}", b"[]", b"null", b'{"keys": {}}', b'{"keys": null}'),
        *(b'{"keys": [], "keys": []}', b'{"keys": [NaN]}', b"[" * 10_000, b"\xff"),
    ],
)
def test_other_content_than_a_key_set_is_refused(content: bytes) -> None:
    with pytest.raises(FetchFailed):
        read_key_set(content)
