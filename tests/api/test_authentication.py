"""Invalid credentials over HTTP: all get the same 401, without a database query."""

import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from support.problems import problem
from support.publisher import Publisher, SigningKey
from support.service import SECRET, Service, running_service, token
from todo_api.auth.tokens import Expected, Key, Keys, Verifier
from todo_api.errors import InvalidToken

RSA = rsa.generate_private_key(65537, 2048)
P256 = ec.generate_private_key(ec.SECP256R1())
P521 = ec.generate_private_key(ec.SECP521R1())


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    async with Publisher() as publisher:
        yield publisher


@pytest.fixture
async def both(
    database_url: str, short_folder: Path, publisher: Publisher
) -> AsyncIterator[Service]:
    """The service with a shared secret and with published keys."""
    async with running_service(
        database_url, short_folder, better_auth_url=publisher.url
    ) as service:
        assert (await ask(service, publisher.token("alice"))).status_code == 200
        yield service


async def ask(service: Service, credentials: str, verb: str = "GET") -> Any:
    value = credentials if credentials.lower().startswith("bearer") else f"Bearer {credentials}"
    return await service.request(
        verb, "/api/tasks", headers={"Authorization": value}, json={"title": "x"}
    )


async def refused(service: Service, credentials: str) -> None:
    """Check that a read and a write with these credentials get the usual 401, without a query."""
    for verb in ("GET", "POST"):
        answer = await ask(service, credentials, verb)
        assert answer.status_code == 401, credentials[:200]
        code = answer.json()["code"]
        is_missing = answer.headers["www-authenticate"] == "Bearer"
        assert code in ({"token_missing"} if is_missing else {"token_invalid", "token_expired"})
        assert answer.json() == problem(code, "A valid bearer token is required")
        assert service.wire.round_trips == 0


def segment(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def hmac(publisher: Publisher, secret: str | bytes, **header: Any) -> str:
    """Return an HS256 token for alice, signed with a secret of the attacker."""
    algorithm = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    now = int(time.time())
    claims = {"sub": "alice", "exp": now + 60, "iss": publisher.url, "aud": publisher.url}
    signed = f"{segment({'alg': 'HS256', 'kid': 'first', **header})}.{segment(claims)}"
    raw = secret.encode() if isinstance(secret, str) else secret
    return f"{signed}.{segment(algorithm.sign(signed.encode(), raw))}"


def asymmetric(publisher: Publisher, key: Any, algorithm: str, **header: Any) -> str:
    now = int(time.time())
    claims = {"sub": "alice", "exp": now + 60, "iss": publisher.url, "aud": publisher.url}
    return jwt.encode(claims, key, algorithm, {"kid": "first", **header})


def each(name: str, values: Iterable[Any], forge: Callable[[Publisher, Any], str]) -> Any:
    """Return one named forgery per value."""

    def of(value: Any) -> Callable[[Publisher], str]:
        return lambda publisher: forge(publisher, value)

    return {f"{name} {value!r}": of(value) for value in values}


def with_header(publisher: Publisher, value: Any) -> str:
    """Return a valid token with another header."""
    return ".".join([segment(value), *publisher.token("alice").split(".")[1:]])


def with_subject(publisher: Publisher, value: Any) -> str:
    now = time.time()
    claims = {"sub": value, "exp": now + 60, "iss": publisher.url, "aud": publisher.url}
    return jwt.encode(claims, publisher.key.private, "EdDSA", {"kid": "first"})


def raw(publisher: Publisher, header: Any = None, payload: Any = None) -> str:
    """Sign any header and payload with the published key. Both may be bytes."""
    now = int(time.time())
    claims = {"sub": "alice", "exp": now + 60, "iss": publisher.url, "aud": publisher.url}
    first = {"alg": "EdDSA", "kid": "first"} if header is None else header
    text = f"{segment(first)}.{segment(claims if payload is None else payload)}"
    return f"{text}.{segment(publisher.key.private.sign(text.encode()))}"


def with_claim(publisher: Publisher, name: str, value: Any) -> str:
    now = int(time.time())
    claims = {"sub": "alice", "exp": now + 60, "iss": publisher.url, "aud": publisher.url}
    return raw(publisher, payload={**claims, name: value})


def doubled(publisher: Publisher) -> bytes:
    """Return a payload with two subjects."""
    now = int(time.time())
    claims = {"sub": "bob", "exp": now + 60, "iss": publisher.url, "aud": publisher.url}
    return b'{"sub": "alice", ' + json.dumps(claims).encode()[1:]


def malleable(publisher: Publisher) -> str:
    """Return a token whose signature has S plus the group order (RFC 8032, section 8.4)."""
    order = 2**252 + 27742317777372353535851937790883648493
    head, _, signature = publisher.token("alice").rpartition(".")
    decoded = urlsafe_b64decode(signature + "==")
    shifted = int.from_bytes(decoded[32:], "little") + order
    return f"{head}.{segment(decoded[:32] + shifted.to_bytes(32, 'little'))}"


FORGERIES: dict[str, Callable[[Publisher], str]] = {
    "A11 unsigned": lambda p: p.token("alice").rpartition(".")[0] + ".",
    "A11 alg none": lambda p: f"{segment({'alg': 'none'})}.{p.token('alice').split('.')[1]}.",
    **each(
        "A12 alg",
        ("nOnE", "NONE", "", " EdDSA", "eddsa", "Eddsa", None, 1, ["EdDSA"], {}),
        lambda p, value: with_header(p, {"alg": value, "kid": "first"}),
    ),
    "A13 alg missing": lambda p: with_header(p, {}),
    "A14 public key as secret, PEM": lambda p: hmac(
        p,
        p.key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ),
    "A15 raw public key as secret": lambda p: hmac(
        p, p.key.private.public_key().public_bytes_raw()
    ),
    "A15 x as secret": lambda p: hmac(p, p.keys[0]["x"]),
    "A15 hex as secret": lambda p: hmac(p, p.key.private.public_key().public_bytes_raw().hex()),
    "A16 JWK as secret": lambda p: hmac(p, json.dumps(p.keys[0])),
    "A16 key set as secret": lambda p: hmac(p, json.dumps({"keys": p.keys})),
    **each(
        "A17 secret",
        ("", " ", "secret", "first", SECRET.upper(), SECRET + " "),
        hmac,
    ),
    "A18 HS384": lambda p: asymmetric(p, SECRET * 2, "HS384"),
    "A18 HS512": lambda p: asymmetric(p, SECRET * 2, "HS512"),
    "A21 RS256": lambda p: asymmetric(p, RSA, "RS256"),
    "A21 PS256": lambda p: asymmetric(p, RSA, "PS256"),
    "A21 ES256": lambda p: asymmetric(p, P256, "ES256"),
    "A21 ES512": lambda p: asymmetric(p, P521, "ES512"),
    "A21 Ed448": lambda p: asymmetric(p, ed448.Ed448PrivateKey.generate(), "EdDSA"),
    "A23 another key of the same name": lambda p: p.token("alice", SigningKey("first")),
    "A24 key in the header": lambda p: asymmetric(
        p, (key := SigningKey("x")).private, "EdDSA", jwk=key.published
    ),
    "A25 jku": lambda p: asymmetric(
        p, SigningKey("x").private, "EdDSA", kid="x", jku=f"{p.url}/elsewhere"
    ),
    "A26 x5c": lambda p: asymmetric(p, SigningKey("x").private, "EdDSA", x5c=["AAAA"], x5t="AA"),
    **each(
        "A28 kid",
        ("../../etc/passwd", "' OR 1=1--", "\0", "x" * 5000, 1, None, ["first"]),
        lambda p, value: raw(p, {"alg": "EdDSA", "kid": value}),
    ),
    "A32 two subjects": lambda p: raw(p, payload=doubled(p)),
    **each(
        "A34 payload",
        (b"[]", b'"x"', b"1", b"null", b"x", b"", b"[" * 3000, "{}".encode("utf-16")),
        lambda p, value: raw(p, payload=value),
    ),
    **each(
        "A36 exp",
        (float("nan"), float("inf"), 10**400, 1e300),
        lambda p, value: with_claim(p, "exp", value),
    ),
    **each(
        "A38 exp",
        (None, "abc", True, [], {}, -1, 0),
        lambda p, value: with_claim(p, "exp", value),
    ),
    **each(
        "A41 iat",
        ("1", None, True, [], -1e300),
        lambda p, value: with_claim(p, "iat", value),
    ),
    "A55 malleable signature": malleable,
    "A27 unknown kid": lambda p: p.token("alice", SigningKey("made up")),
    "A29 crit": lambda p: asymmetric(p, p.key.private, "EdDSA", crit=["foo"], foo=1),
    "A30 typ": lambda p: asymmetric(p, p.key.private, "EdDSA", typ="logout+jwt"),
    "A37 expired": lambda p: p.token("alice", exp=int(time.time()) - 11),
    "A38 exp as string": lambda p: p.token("alice", exp=str(int(time.time()) + 60)),
    "A40 nbf in the future": lambda p: p.token("alice", nbf=int(time.time()) + 60),
    "A41 iat in the future": lambda p: p.token("alice", iat=int(time.time()) + 60),
    "A43 iss missing": lambda p: p.token("alice", iss=None),
    "A43 iss with a slash": lambda p: p.token("alice", iss=f"{p.url}/"),
    "A43 iss of another": lambda p: p.token("alice", iss="http://127.0.0.1"),
    "A44 aud of another": lambda p: p.token("alice", aud="https://other.example"),
    "A44 aud of mixed types": lambda p: p.token("alice", aud=[1, p.url]),
    **each(
        "A45 sub",
        (None, "", " ", 1, ["alice"], {}, "a\0b", "x" * 256),
        with_subject,
    ),
    "A45 sub missing": lambda p: jwt.encode(
        {"id": "alice", "email": "alice", "exp": time.time() + 60, "iss": p.url, "aud": p.url},
        p.key.private,
        "EdDSA",
        {"kid": "first"},
    ),
    **each(
        "A50",
        (".", "..", "...", "T.", ".T", "T.x", "T.x.y", "x.T", "x", "T=", "T T", "T,T"),
        lambda p, value: value.replace("T", p.token("alice")),
    ),
    "A51 JSON serialization": lambda p: json.dumps({"payload": p.token("alice").split(".")[1]}),
    "A52 encrypted": lambda _: ".".join(
        [segment({"alg": "dir", "enc": "A256GCM"}), "", "AAAA", "AAAA", "AAAA"]
    ),
    "A54 header of another token": lambda p: ".".join(
        [token("alice").split(".")[0], *p.token("alice").split(".")[1:]]
    ),
    "A10 9 KB": lambda _: "a" * 9_000,
    "A10 100 KB": lambda _: "a" * 100_000,
    "A10 5 MB": lambda _: "a" * 5_000_000,
    "A35 deep header": lambda p: with_header(p, b'{"a":' * 900),
}


async def test_service_refuses_every_forgery(
    both: Service, publisher: Publisher, subtests: pytest.Subtests
) -> None:
    for name, forge in FORGERIES.items():
        with subtests.test(name):
            fetched = publisher.requests
            await refused(both, forge(publisher))
            assert publisher.requests <= fetched + 1
            assert publisher.others == 0, "the service fetched an address from the token"
            assert (await ask(both, publisher.token("alice"))).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic dXNlcjpw",
        "Token x",
        "Digest",
        "Bearer\tTOKEN",
        "TOKEN",
        "Bearer TOKEN x",
        "Bearer,TOKEN",
        "BearerTOKEN",
    ],
)
async def test_service_refuses_other_authorization_headers(service: Service, value: str) -> None:
    answer = await service.request(
        "GET", "/api/tasks", headers={"Authorization": value.replace("TOKEN", token("alice"))}
    )
    assert answer.status_code == 401
    assert answer.json()["error"] == "A valid bearer token is required"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
async def test_scheme_is_case_insensitive(service: Service, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {token('alice')}"}
    assert (await service.request("GET", "/api/tasks", headers=headers)).status_code == 200


async def test_challenge_says_whether_a_token_was_sent(service: Service) -> None:
    nothing = await service.request("GET", "/api/tasks")
    assert nothing.headers["www-authenticate"] == "Bearer"
    wrong = await ask(service, "x.y.z")
    assert wrong.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert nothing.json()["code"] == "token_missing"
    assert wrong.json()["code"] == "token_invalid"


async def test_service_refuses_two_authorization_headers(service: Service) -> None:
    good, bad = f"Bearer {token('alice')}", "Bearer x.y.z"
    for pair in ((good, good), (good, bad), (bad, good)):
        answer = await service.request(
            "GET", "/api/tasks", headers=[("Authorization", each) for each in pair]
        )
        assert answer.status_code == 401


async def test_service_ignores_a_token_outside_the_authorization_header(service: Service) -> None:
    good = token("alice")
    answers = [
        await service.request("GET", f"/api/tasks?access_token={good}"),
        await service.request("GET", "/api/tasks", headers={"Cookie": f"token={good}"}),
        await service.request("POST", "/api/tasks", json={"title": "x", "access_token": good}),
    ]
    assert {answer.status_code for answer in answers} == {401}


async def test_service_with_one_kind_of_key_refuses_the_other_kind(
    database_url: str, short_folder: Path, service: Service, publisher: Publisher
) -> None:
    await refused(service, publisher.token("alice"))
    folder = short_folder / "x"
    folder.mkdir()
    async with running_service(
        database_url, folder, better_auth_url=publisher.url, better_auth_secret=None
    ) as published:
        await refused(published, token("alice"))
        assert (await ask(published, publisher.token("alice"))).status_code == 200


async def test_service_accepts_ed25519_as_a_name_for_eddsa(
    both: Service, publisher: Publisher
) -> None:
    good = publisher.token("alice").split(".")
    text = f"{segment({'alg': 'Ed25519', 'kid': 'first'})}.{good[1]}"
    signature = segment(publisher.key.private.sign(text.encode()))
    assert (await ask(both, f"{text}.{signature}")).status_code == 200


KEY = SigningKey("first")
KEYS = Keys(
    secret=Key("HS256", SECRET.encode()),
    published={"first": Key("EdDSA", KEY.private.public_key())},
    published_expects=Expected(),
)
GOOD = {
    "HS256": token("alice"),
    "EdDSA": jwt.encode(
        {"sub": "alice", "exp": int(time.time()) + 86_400}, KEY.private, "EdDSA", {"kid": "first"}
    ),
}


@pytest.mark.parametrize("good", GOOD.values(), ids=GOOD)
@hypothesis_settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.differing_executors]
)
@given(data=st.data())
def test_verifier_refuses_a_token_changed_at_any_byte(good: str, data: st.DataObject) -> None:
    verifier = Verifier(KEYS)
    assert verifier.verify(good, time.time()).subject == "alice"
    position = data.draw(st.integers(0, len(good) - 1))
    change = data.draw(st.sampled_from(["replace", "insert", "delete"]))
    end = position if change == "insert" else position + 1
    middle = "" if change == "delete" else chr(data.draw(st.integers(0, 255)))
    mutated = good[:position] + middle + good[end:]
    if mutated == good:
        return
    with pytest.raises(InvalidToken):
        verifier.verify(mutated, time.time())


async def test_only_a_token_that_is_right_otherwise_is_called_expired(service: Service) -> None:
    long_ago = int(time.time()) - 3600
    expired = token("alice", iat=long_ago - 60, exp=long_ago)
    answers = {
        name: (await ask(service, credentials)).json()["code"]
        for name, credentials in {
            "expired": expired,
            "expired and forged": expired[:-4] + "AAAA",
            "expired and of nobody": token("alice", sub="", iat=long_ago - 60, exp=long_ago),
            "expired and not valid yet": token("alice", exp=long_ago, nbf=int(time.time()) + 600),
        }.items()
    }
    assert answers.pop("expired") == "token_expired"
    assert set(answers.values()) == {"token_invalid"}
