"""Published keys: rotation, outages and hostile answers, tested over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from support.certificates import signed_by_private_authority
from support.problems import problem
from support.publisher import Mode, Publisher, SigningKey
from support.service import SECRET, Service, running_service
from support.waiting import LIMIT, until
from todo_api.auth import issuer, key_set


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    async with Publisher() as publisher:
        yield publisher


@pytest.fixture
async def published(
    database_url: str, short_folder: Path, publisher: Publisher
) -> AsyncIterator[Service]:
    """The service with published keys only."""
    keys = {"better_auth_url": publisher.url, "better_auth_secret": None}
    times = {"pool_timeout": LIMIT, "request_timeout": LIMIT}
    async with running_service(
        database_url, short_folder, **keys, **times, max_in_flight=1000
    ) as service:
        yield service


async def status(service: Service, token: str) -> int:
    response = await service.request(
        "GET", "/api/tasks", headers={"Authorization": f"Bearer {token}"}
    )
    if response.status_code == 503:
        assert response.headers["retry-after"]
        assert service.wire.round_trips == 0
    return response.status_code


async def test_service_fetches_the_keys_once(published: Service, publisher: Publisher) -> None:
    for user in ("alice", "bob", "alice"):
        assert await status(published, publisher.token(user)) == 200
    assert publisher.requests == 1


async def test_rotated_key_works_on_its_first_request(
    published: Service, publisher: Publisher
) -> None:
    old = publisher.key
    assert await status(published, publisher.token("alice")) == 200
    publisher.rotate("second")
    assert await status(published, publisher.token("alice")) == 200
    assert await status(published, publisher.token("alice", old)) == 200
    assert publisher.requests == 2


async def test_a_thousand_requests_with_a_new_key_cost_one_fetch(
    published: Service, publisher: Publisher
) -> None:
    assert await status(published, publisher.token("alice")) == 200
    publisher.rotate("second")
    headers = {"Authorization": f"Bearer {publisher.token('alice')}"}
    answers = await asyncio.gather(
        *(published.client.get("/api/tasks", headers=headers) for _ in range(1000))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert publisher.requests == 2


async def test_thousands_of_unknown_keys_cost_one_fetch(
    published: Service, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each window, and here the window does not end."""
    monkeypatch.setattr(key_set, "WINDOW_SECONDS", float("inf"))
    assert await status(published, publisher.token("alice")) == 200
    forger = SigningKey("x")
    for number in range(2_000):
        forger.name = f"made up {number}"
        token = publisher.token("alice", forger)
        if number < 100:
            assert await status(published, token) == 401
        else:
            headers = {"Authorization": f"Bearer {token}"}
            assert (await published.client.get("/api/tasks", headers=headers)).status_code == 401
    assert publisher.requests == 2


async def test_service_fetches_again_in_the_next_window(
    published: Service, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in (publisher.token("alice"), publisher.token("alice", SigningKey("made up"))):
        await status(published, token)
    assert publisher.requests == 2
    publisher.rotate("second")
    assert await status(published, publisher.token("alice")) == 401
    monkeypatch.setattr(key_set, "WINDOW_SECONDS", 0.0)
    assert await status(published, publisher.token("alice")) == 200


async def test_service_keeps_the_last_good_keys_during_an_outage(
    published: Service, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_set, "WINDOW_SECONDS", 0.0)
    monkeypatch.setattr(issuer, "MAXIMUM_SECONDS", 0.3)
    assert await status(published, publisher.token("alice")) == 200
    modes: list[Mode] = ["error", "html", "redirect", "large", "endless", "drip", "hang"]
    for mode in modes:
        publisher.mode = mode
        asked = publisher.requests
        assert await status(published, publisher.token("alice", SigningKey("made up"))) == 401
        assert publisher.requests > asked, mode
        assert await status(published, publisher.token("bob")) == 200, mode
    await publisher.stop()
    assert await status(published, publisher.token("carol")) == 200
    assert publisher.others == 0, "the service followed a redirect"
    await publisher.start()


async def test_compressed_set_is_decoded(
    database_url: str, short_folder: Path, publisher: Publisher
) -> None:
    """Some servers compress although we ask them not to."""
    publisher.encoding = "gzip"
    async with running_service(
        database_url, short_folder, better_auth_url=publisher.url
    ) as service:
        assert await status(service, publisher.token("alice")) == 200


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ("br", 'the answer has the Content-Encoding "br", not gzip'),
        ("not gzip", "the answer is said to be gzip and is not"),
        ("cut", "the gzip of the answer is cut off"),
        ("bomb", f"the answer is over {issuer.MAXIMUM_BYTES} bytes"),
    ],
)
async def test_encoding_that_is_not_understood_is_named(
    publisher: Publisher, encoding: Any, reason: str
) -> None:
    publisher.encoding = encoding
    with pytest.raises(issuer.FetchFailed) as caught:
        await issuer.fetch(f"{publisher.url}/api/auth/jwks")
    assert str(caught.value) == reason


async def test_private_authority_is_trusted_by_the_usual_variable(
    database_url: str, short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts for an issuer on this machine too, for which no proxy counts."""
    authority, tls = signed_by_private_authority(tmp_path, "127.0.0.1")
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    async with Publisher(tls) as publisher:
        with pytest.raises(issuer.FetchFailed) as caught:
            await issuer.fetch(f"{publisher.url}/api/auth/jwks")
        assert str(caught.value) == (
            "its certificate is not trusted (unable to get local issuer certificate); "
            "set SSL_CERT_FILE if its authority is private"
        )
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        async with running_service(
            database_url, short_folder, better_auth_url=publisher.url
        ) as service:
            assert await status(service, publisher.token("alice")) == 200


async def test_certificate_of_another_host_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, tls = signed_by_private_authority(tmp_path, "192.0.2.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    async with Publisher(tls) as publisher:
        with pytest.raises(issuer.FetchFailed) as caught:
            await issuer.fetch(f"{publisher.url}/api/auth/jwks")
    assert str(caught.value).startswith("its certificate is not trusted (IP address mismatch")
    assert "SSL_CERT_FILE" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:1/x", "no answer (Connection refused)"),
        ("https://host.invalid/x", "its host name is not known"),
        ("https://host.invalid/\x7f", "its address is not valid"),
    ],
)
async def test_failed_fetch_says_why(
    url: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(issuer.FetchFailed) as caught:
        await issuer.fetch(url)
    assert str(caught.value) == reason


async def test_server_that_does_not_speak_tls_is_named() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(issuer.FetchFailed, match=r"^TLS failed \("):
            await issuer.fetch(f"https://127.0.0.1:{port}")


async def test_file_of_authorities_that_cannot_be_read_is_named(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, reason in (("missing", "No such file or directory"), (__file__, "NO_CERTIFICATE")):
        monkeypatch.setenv("SSL_CERT_FILE", file)
        with pytest.raises(issuer.FetchFailed, match=reason) as caught:
            await issuer.fetch(publisher.url)
        assert str(caught.value).startswith("SSL_CERT_FILE or SSL_CERT_DIR: cannot be read (")


async def test_log_names_refused_keys_and_a_clock_that_differs(
    database_url: str,
    short_folder: Path,
    publisher: Publisher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each fetch tells the clock, and only a change of the refused keys is logged."""
    monkeypatch.setattr(key_set, "REFRESH_SECONDS", 0.01)
    publisher.clock_offset = -60
    publisher.keys = [{"kty": "EC", "crv": "P-384", "kid": "b"}]
    with capture_logs() as events:
        async with running_service(database_url, short_folder, better_auth_url=publisher.url):
            await until(lambda: publisher.requests > 2)
    reasons = [each["reasons"] for each in events if each["event"] == "keys refused"]
    assert reasons == ['kid "b": the type "EC P-384" is not supported']
    unusable = [each for each in events if each["event"] == "the key set has no usable key"]
    assert [each["log_level"] for each in unusable] == ["warning"]
    clocks = [each for each in events if each["event"] == "the issuer's clock differs from ours"]
    assert len(clocks) > 1
    assert {each["ahead_seconds"] for each in clocks} <= {-60, -59}


async def test_service_without_keys_answers_503_and_recovers(
    database_url: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_set, "FIRST_WINDOW_SECONDS", 0.0)
    async with Publisher() as publisher:
        await publisher.stop()
        async with running_service(
            database_url, short_folder, better_auth_url=publisher.url
        ) as service:
            assert await status(service, publisher.token("alice")) == 503
            assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200
            assert await status(service, "nonsense") == 401
            await publisher.start()
            assert await status(service, publisher.token("alice")) == 200


async def test_set_without_a_trusted_key_withdraws_all_keys(
    published: Service, publisher: Publisher
) -> None:
    assert await status(published, publisher.token("alice")) == 200
    publisher.keys = [{"kty": "oct", "k": "AAAA"}]
    assert await status(published, publisher.token("alice", SigningKey("made up"))) == 401
    assert await status(published, publisher.token("alice")) == 401


async def test_service_repeats_a_failed_fetch_without_a_request(
    database_url: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The background task must survive any error."""
    monkeypatch.setattr(key_set, "RETRY_SECONDS", 0.01)

    async def fail(_: str) -> None:
        raise ImportError

    monkeypatch.setattr(key_set, "fetch", fail)
    async with (
        Publisher() as publisher,
        running_service(database_url, short_folder, better_auth_url=publisher.url) as service,
    ):
        not_ready = await service.request("GET", "/readyz")
        assert not_ready.status_code == 503
        assert not_ready.json() == problem("not_ready", "No signing key could be loaded yet")
        assert publisher.requests == 0
        monkeypatch.setattr(key_set, "fetch", issuer.fetch)
        await until(lambda: publisher.requests > 0)
        assert await status(service, publisher.token("alice")) == 200
        assert (await service.request("GET", "/readyz")).status_code == 200


async def test_service_finds_a_key_that_is_newer_than_the_running_fetch(
    published: Service, publisher: Publisher
) -> None:
    assert await status(published, publisher.token("alice")) == 200
    publisher.hold = asyncio.Event()
    headers = {"Authorization": f"Bearer {publisher.token('alice', SigningKey('made up'))}"}
    asking = asyncio.create_task(published.client.get("/api/tasks", headers=headers))
    await until(lambda: publisher.requests == 2)
    publisher.rotate("second")
    headers = {"Authorization": f"Bearer {publisher.token('alice')}"}
    key_set.WINDOW_SECONDS, window = 0.0, key_set.WINDOW_SECONDS
    try:
        waiting = asyncio.create_task(published.client.get("/api/tasks", headers=headers))
        await asyncio.sleep(0)
        publisher.hold.set()
        assert (await waiting).status_code == 200
    finally:
        key_set.WINDOW_SECONDS = window
    assert (await asking).status_code == 401


async def test_service_fetches_local_keys_without_the_proxy(
    database_url: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Publisher() as proxy, Publisher() as publisher:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        async with running_service(
            database_url, short_folder, better_auth_url=publisher.url
        ) as service:
            assert await status(service, publisher.token("alice")) == 200
        assert (proxy.requests, proxy.others) == (0, 0)


async def test_withdrawn_key_stops_working_at_the_next_refresh(
    database_url: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes tokens with a cached signature. Production refreshes every five minutes."""
    assert key_set.REFRESH_SECONDS + issuer.MAXIMUM_SECONDS < 600
    monkeypatch.setattr(key_set, "REFRESH_SECONDS", 0.05)
    async with (
        Publisher() as publisher,
        running_service(database_url, short_folder, better_auth_url=publisher.url) as service,
    ):
        token = publisher.token("alice")
        assert await status(service, token) == 200
        publisher.rotate("second", keep=False)
        asked = publisher.requests
        await until(lambda: publisher.requests > asked + 1)
        assert await status(service, token) == 401
        assert await status(service, publisher.token("alice")) == 200


async def test_service_accepts_both_kinds_of_key_together(
    database_url: str, short_folder: Path, publisher: Publisher
) -> None:
    async with running_service(
        database_url, short_folder, better_auth_url=publisher.url
    ) as service:
        assert await status(service, publisher.token("alice")) == 200
        assert (await service.request("GET", "/api/tasks", "alice")).status_code == 200
        x = publisher.keys[0]["x"]
        for secret in (x, publisher.key.name, str(publisher.keys[0])):
            assert secret != SECRET
            assert await status(service, publisher.token("alice", SigningKey("first"))) == 401
