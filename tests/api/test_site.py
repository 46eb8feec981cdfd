"""The pages for people: what they may load, and how their files are cached and compressed."""

import gzip
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from support.problems import problem
from support.service import ORIGIN, SECRET, Service, settings
from todo_api.app import create_app
from todo_api.development import USERS
from todo_api.http.content import Content
from todo_api.settings import Settings

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
PLAIN = {"Accept-Encoding": "identity"}
KEPT = "public, max-age=31536000, immutable"


async def addresses(service: Service) -> list[str]:
    """Return everything that the two pages load or link to."""
    found = set()
    for path in ("/", "/docs"):
        page = await service.request("GET", path, headers={"Accept": BROWSER})
        found |= {*re.findall(r'(?:src|href)="([^"]*)"', page.text)}
    return sorted(found)


async def files(service: Service) -> list[str]:
    """Return the addresses of the pages' files."""
    return [each for each in await addresses(service) if each.startswith("/docs/files/")]


async def test_pages_load_and_link_only_what_this_service_has(service: Service) -> None:
    found = await addresses(service)
    assert {each.rpartition("/")[2] for each in found} == {
        *("", "docs", "docs.js", "health", "icon.svg", "openapi.json", "site.css"),
        *("swagger-ui-bundle.js", "swagger-ui.css"),
    }
    for address in found:
        assert re.match(r"/(?!/)", address)
        assert (await service.request("GET", address)).status_code == 200


async def test_policy_of_the_pages_allows_nothing_inline_and_no_other_host(
    service: Service,
) -> None:
    for path in ("/", "/docs"):
        page = await service.request("GET", path, headers={"Accept": BROWSER})
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = dict(
            each.strip().split(" ", 1)
            for each in page.headers["content-security-policy"].split(";")
        )
        assert policy == {
            **dict.fromkeys(("default-src", "frame-ancestors"), "'none'"),
            **dict.fromkeys(("base-uri", "form-action"), "'none'"),
            **dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"),
            "img-src": "'self' data:",
        }
        assert not re.search(r"<style|<script(?! src)|style=| on[a-z]+=|javascript:", page.text)


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json"])
async def test_content_of_a_fixed_address_is_asked_for_each_time(
    service: Service, path: str
) -> None:
    response = await service.request("GET", path)
    assert response.headers["cache-control"] == "no-cache"
    tag = response.headers["etag"]
    same = await service.request("GET", path, headers={"If-None-Match": f'"x", W/{tag}'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    other = await service.request("GET", path, headers={"If-None-Match": '"x"'})
    assert (other.status_code, other.content) == (200, response.content)


async def test_files_are_kept_for_a_year_under_the_digest_of_their_content(
    service: Service,
) -> None:
    found = await files(service)
    assert len(found) == 5
    for address in found:
        response = await service.request("GET", address, headers=PLAIN)
        assert response.headers["cache-control"] == KEPT
        digest = address.split("/")[3]
        assert response.headers["etag"] == f'"{digest}"'
        assert Content(response.content, "text/plain").digest == digest
        for wrong in ("0" * 32, digest.upper(), digest[:-1]):
            old = await service.request("GET", address.replace(digest, wrong))
            assert (old.status_code, old.json()) == (404, problem("not_found", "Not found"))
            assert old.headers["cache-control"] == "no-store"


async def test_address_of_a_file_does_not_reach_other_files(service: Service) -> None:
    (style,) = [each for each in await files(service) if each.endswith("site.css")]
    for name in ("docs.html", "home.html", "%2e%2e%2fsite.py", "..%2Fsite.py", "site.css%00"):
        response = await service.request("GET", style.replace("site.css", name))
        assert response.status_code == 404


async def test_files_are_compressed_for_clients_that_accept_it(service: Service) -> None:
    sent = 0
    for address in ["/docs", "/openapi.json", *await files(service)]:
        plain = await service.request("GET", address, headers=PLAIN)
        assert "content-encoding" not in plain.headers
        async with service.client.stream(
            "GET", address, headers={"Accept-Encoding": "br, gzip"}
        ) as response:
            raw = b"".join([part async for part in response.aiter_raw()])
        assert response.headers["content-encoding"] == "gzip"
        assert gzip.decompress(raw) == plain.content
        assert int(response.headers["content-length"]) == len(raw)
        assert response.headers["etag"] == plain.headers["etag"][:-1] + '-gzip"'
        assert response.headers["content-type"] == plain.headers["content-type"]
        for each in (plain, response):
            assert {"Accept-Encoding", "Origin"} <= {*each.headers["vary"].split(", ")}
        known = {"Accept-Encoding": "gzip", "If-None-Match": response.headers["etag"]}
        assert (await service.request("GET", address, headers=known)).status_code == 304
        plain_known = {**PLAIN, "If-None-Match": response.headers["etag"]}
        assert (await service.request("GET", address, headers=plain_known)).status_code == 200
        sent += len(raw)
    assert sent < 500_000


@pytest.mark.parametrize(
    ("accepted", "is_compressed"),
    [
        ("gzip", True),
        ("GZIP;q=0.5", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("*", True),
        ("gzip ; q=0.001", True),
        ("identity;q=0.5, gzip;q=0.5", True),
        ("identity;q=0, gzip", True),
        ("", False),
        ("identity", False),
        ("br", False),
        ("gzip;q=0", False),
        ("gzip;q=0.000, *", False),
        ("*;q=0", False),
        ("identity, gzip;q=0.5", False),
        ("gzip;q=2", False),
        ("gzip;q=x", False),
        ("xgzip, gzipped", False),
    ],
)
async def test_weights_decide_whether_an_answer_is_compressed(
    service: Service, accepted: str, is_compressed: bool
) -> None:
    response = await service.request("GET", "/docs", headers={"Accept-Encoding": accepted})
    assert (response.headers.get("content-encoding") == "gzip") is is_compressed


async def test_client_without_a_field_for_encodings_gets_plain_bytes(service: Service) -> None:
    request = service.client.build_request("GET", "/docs")
    del request.headers["accept-encoding"]
    response = await service.client.send(request)
    assert (response.status_code, "content-encoding" in response.headers) == (200, False)


async def test_content_is_compressed_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await service.request("GET", "/docs", headers={"Accept-Encoding": "gzip"})

    def compress(*_: object, **__: object) -> bytes:
        raise AssertionError("compressed again")

    monkeypatch.setattr(gzip, "compress", compress)
    again = await service.request("GET", "/docs", headers={"Accept-Encoding": "gzip"})
    assert again.content == first.content


@pytest.mark.parametrize(
    ("accepted", "is_page"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("TEXT/HTML;q=0.9, application/json;q=0.8", True),
        ("text/*", True),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        ("application/json, text/html", False),
        ("text/html;q=0.5, application/json", False),
        ("text/html;q=0", False),
        ("image/png", False),
    ],
)
async def test_home_is_a_page_for_browsers_and_json_for_programs(
    service: Service, accepted: str, is_page: bool
) -> None:
    response = await service.request("GET", "/", headers={"Accept": accepted})
    assert response.status_code == 200
    assert {"Accept", "Accept-Encoding", "Origin"} == {*response.headers["vary"].split(", ")}
    if is_page:
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        for link in ("/docs", "/openapi.json", "/health"):
            assert f'href="{link}"' in response.text
    else:
        assert response.headers["content-type"] == "application/json"
        assert response.json() == {
            "name": "todo-api",
            "summary": "A multi-user to-do list: every user sees their own tasks and nothing else.",
            "docs": "/docs",
            "openapi": "/openapi.json",
            "health": "/health",
        }


async def test_vary_names_each_field_once(service: Service) -> None:
    for path in ("/", "/docs", "/openapi.json"):
        for headers in ({}, {"Origin": ORIGIN}, {"Origin": "https://other.example"}):
            response = await service.request("GET", path, headers=headers)
            names = response.headers["vary"].split(", ")
            assert "Origin" in names
            assert len(names) == len({*names})


async def test_openapi_document_is_the_same_for_every_reader(service: Service) -> None:
    plain = await service.request("GET", "/openapi.json", headers=PLAIN)
    assert plain.headers["content-type"] == "application/json"
    app = create_app(Settings.model_construct(), "postgresql://")
    assert plain.json() == json.loads(json.dumps(app.openapi()))


@pytest.fixture
async def developer(database_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the service in development mode, on the same machine."""
    developing = settings().with_own_secret(SecretStr(SECRET))
    app = create_app(developing, database_url)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url="http://localhost:8000"
        ) as client,
    ):
        yield client


async def test_development_mode_gives_a_token_to_each_of_two_users(
    developer: httpx2.AsyncClient,
) -> None:
    assert len(set(USERS)) == 2
    page = await developer.get("/docs")
    assert f'data-users="{" ".join(USERS)}"' in page.text
    for user in USERS:
        answer = await developer.get(f"/docs/tokens/{user}")
        assert answer.headers["cache-control"] == "no-store"
        given = {"Authorization": f"Bearer {answer.json()['token']}"}
        assert (await developer.get(f"/api/{user}/tasks", headers=given)).status_code == 200
    assert (await developer.get("/docs/tokens/mallory")).status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            ("localhost", 200),
            ("localhost:8000", 200),
            ("127.0.0.1:8000", 200),
            ("[::1]:8000", 200),
        ),
        *(("attacker.example", 404), ("127.0.0.1.attacker.example:8000", 404), ("10.0.0.7", 404)),
    ],
)
async def test_development_mode_gives_tokens_only_under_a_name_of_this_machine(
    developer: httpx2.AsyncClient, host: str, status: int
) -> None:
    answer = await developer.get(f"/docs/tokens/{USERS[0]}", headers={"Host": host})
    assert answer.status_code == status
    assert ("token" in answer.json()) is (status == 200)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"host": "127.0.0.1"},
        {"better_auth_secret": None, "better_auth_url": "https://app.example.com"},
        {"better_auth_secret": None, "better_auth_url": "http://localhost:3000"},
    ],
    ids=["secret", "loopback", "published", "local issuer"],
)
async def test_production_never_gives_a_token(database_url: str, values: dict[str, Any]) -> None:
    app = create_app(settings(**values), database_url)
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app), base_url="http://localhost:8000"
    ) as client:
        assert 'data-users=""' in (await client.get("/docs")).text
        for user in (*USERS, ""):
            for verb in ("GET", "POST"):
                answer = await client.request(verb, f"/docs/tokens/{user}")
                assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert not [each for each in app.routes if "tokens" in getattr(each, "path", "")]
