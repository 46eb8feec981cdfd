"""Properties of all responses, and HTTP rules for all routes."""

import json
from itertools import product
from typing import Any

import httpx2
import pytest

from support.listening import listening
from support.problems import problem
from support.service import ORIGIN, Service, bearer
from todo_api.tasks.owned_tasks import OwnedTasks

ALLOW = {
    "/api/tasks": "GET, HEAD, OPTIONS, POST",
    "/api/alice/tasks": "GET, HEAD, OPTIONS, POST",
    "/api/tasks/1": "DELETE, GET, HEAD, OPTIONS, PATCH, PUT",
    "/api/alice/tasks/1": "DELETE, GET, HEAD, OPTIONS, PATCH, PUT",
    "/api/tasks/1/complete": "OPTIONS, PATCH",
    "/api/alice/tasks/1/complete": "OPTIONS, PATCH",
    "/api/tasks/1/status": "OPTIONS, PATCH",
    "/api/alice/tasks/1/status": "OPTIONS, PATCH",
    "/api/account": "DELETE, OPTIONS",
    "/api/alice/account": "DELETE, OPTIONS",
    "/health": "GET, HEAD, OPTIONS",
    "/": "GET, HEAD, OPTIONS",
    "/docs": "GET, HEAD, OPTIONS",
    "/docs/files/0/site.css": "GET, HEAD, OPTIONS",
    "/openapi.json": "GET, HEAD, OPTIONS",
}


@pytest.mark.parametrize(("path", "allow"), ALLOW.items())
async def test_wrong_method_gets_405_with_allow_before_authentication(
    service: Service, path: str, allow: str
) -> None:
    for verb in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "FOO", "CONNECT"):
        if verb in allow:
            continue
        response = await service.request(verb, path)
        assert response.status_code == 405
        assert response.headers["allow"] == allow
        if verb != "HEAD":
            assert response.json() == problem("method_not_allowed", "Method not allowed")
    options = await service.request("OPTIONS", path)
    assert (options.status_code, options.headers["allow"], options.content) == (204, allow, b"")


UNKNOWN_PATHS = [
    *("/api", "/api/", "/tasks", "/api/tasks/", "/api/tasks/1/", "/api/tasks/1/complete/"),
    *("/api/alice/tasks/", "//api/tasks", "/api//tasks"),
    *("/API/tasks", "/health/", "/redoc", "/docs/", "/metrics", "/api/alice", "/api/tasks/1/x"),
    *("/docs/nothing.js", "/docs/files", "/docs/files/", "/docs/files/0", "/docs/tokens/demo"),
    *("/index.html", "/api/tasks%0A", "/health%0A", "/api%2Ftasks", "/api/tasks%2F1"),
]


async def test_unknown_path_gets_404_before_authentication(
    service: Service, subtests: pytest.Subtests
) -> None:
    for path, verb in product(UNKNOWN_PATHS, ("GET", "POST", "DELETE")):
        with subtests.test(f"{verb} {path}"):
            response = await service.request(verb, path)
            hint = ". Leave out the slash at the end of the path" if path.endswith("/") else ""
            expected = problem("not_found", f"Not found{hint}")
            assert (response.status_code, response.json()) == (404, expected)
            assert "location" not in response.headers


async def test_path_that_fits_both_families_is_token_scoped(service: Service) -> None:
    """`/api/tasks/tasks` is the task with the id `tasks`, with any method."""
    response = await service.request("GET", "/api/tasks/tasks", "tasks")
    assert (response.status_code, response.json()["error"]) == (400, "Invalid task ID")
    post = await service.request("POST", "/api/tasks/tasks", "tasks", json={"title": "x"})
    assert post.status_code == 405
    assert post.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, PATCH, PUT"


async def test_head_answers_like_get_without_the_body(service: Service) -> None:
    task = await service.create("alice")
    paths = ["/api/tasks", "/api/alice/tasks", f"/api/tasks/{task['id']}", "/api/tasks/999"]
    for path in [*paths, "/", "/health", "/livez", "/readyz", "/docs", "/openapi.json", "/none"]:
        get = await service.request("GET", path, "alice")
        head = await service.request("HEAD", path, "alice")
        assert (head.status_code, head.content) == (get.status_code, b"")
        for name in ("content-length", "content-type", "cache-control"):
            assert head.headers[name] == get.headers[name]
    assert (await service.request("HEAD", "/api/tasks")).status_code == 401


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/health", {"status": "healthy"}),
        ("/livez", {"status": "ok"}),
        ("/readyz", {"status": "ready"}),
    ],
)
async def test_health_check_needs_neither_token_nor_query(
    service: Service, path: str, body: object
) -> None:
    response = await service.request("GET", path)
    assert (response.status_code, response.json()) == (200, body)
    assert service.wire.round_trips == 0


async def test_errors_come_in_a_fixed_order(service: Service) -> None:
    """401 comes first, then 403, then 400, 413 and 415, then 404."""
    bad: dict[str, Any] = {"content": b"{", "headers": {"Content-Type": "text/plain"}}
    assert (await service.request("POST", "/api/alice/tasks", **bad)).status_code == 401
    assert (await service.request("POST", "/api/alice/tasks", "bob", **bad)).status_code == 403
    assert (await service.request("POST", "/api/alice/tasks", "alice", **bad)).status_code == 415
    for path in ("/api/tasks/999", "/api/alice/tasks/999"):
        for content, status in ((b"{", 400), (b" " * 200_000, 413), (b'{"title":"x"}', 404)):
            headers = {"Content-Type": "application/json"}
            response = await service.request("PUT", path, "alice", content=content, headers=headers)
            assert response.status_code == status
            stranger = await service.request("PUT", path, content=content, headers=headers)
            assert stranger.status_code == 401


@pytest.mark.parametrize("sent", ["abc", "A-Z_0.9", "x" * 128])
async def test_service_keeps_a_valid_request_id(service: Service, sent: str) -> None:
    for path in ("/health", "/none", "/api/tasks"):
        response = await service.request("GET", path, headers={"X-Request-ID": sent})
        assert response.headers["x-request-id"] == sent


@pytest.mark.parametrize(
    "sent", ["", "a b", "x" * 129, "a\tb", "<x>", "é".encode().decode("latin-1")]
)
async def test_service_replaces_an_invalid_request_id(service: Service, sent: str) -> None:
    headers = [("X-Request-ID", sent.encode("latin-1"))]
    response = await service.request("GET", "/health", headers=headers)  # type: ignore[arg-type]
    assert response.headers["x-request-id"] != sent
    assert len(response.headers["x-request-id"]) == 32


async def test_errors_of_every_layer_carry_cors_headers(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a secret detail")

    origin = {"Origin": ORIGIN}
    cases = [
        ("GET", "/health", {}, 200),
        ("GET", "/none", {}, 404),
        ("POST", "/health", {}, 405),
        ("GET", "/api/tasks", {}, 401),
        ("GET", "/api/bob/tasks", bearer("alice"), 403),
        ("GET", "/api/tasks/x", bearer("alice"), 400),
        ("GET", "/api/tasks/1", bearer("alice"), 404),
    ]
    for verb, path, headers, status in cases:
        response = await service.request(verb, path, headers={**origin, **headers})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-ID" in response.headers["access-control-expose-headers"]
    monkeypatch.setattr(OwnedTasks, "list", fail)
    response = await service.request("GET", "/api/tasks", "alice", headers=origin)
    assert (response.status_code, response.json()) == (
        500,
        problem("internal_error", "Internal server error"),
    )
    assert response.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize("origin", ["http://localhost:3001", "null", "https://localhost:3000", ""])
async def test_unlisted_origin_does_not_get_cors_headers(service: Service, origin: str) -> None:
    response = await service.request("GET", "/health", headers={"Origin": origin})
    assert "access-control-allow-origin" not in response.headers


async def test_preflight_allows_the_requests_of_the_front_end(service: Service) -> None:
    for verb in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        response = await service.request(
            "OPTIONS",
            "/api/tasks/1",
            headers={
                "Origin": ORIGIN,
                "Access-Control-Request-Method": verb,
                "Access-Control-Request-Headers": "authorization, content-type",
            },
        )
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert verb in response.headers["access-control-allow-methods"]
        assert "Authorization" in response.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    ("origin", "verb", "headers", "what"),
    [
        ("https://evil.example", "GET", "authorization", "origin"),
        (ORIGIN, "TRACE", "authorization", "method"),
        (ORIGIN, "GET", "x-evil", "headers"),
    ],
)
async def test_refused_preflight_has_the_error_shape(
    service: Service, origin: str, verb: str, headers: str, what: str
) -> None:
    response = await service.request(
        "OPTIONS",
        "/api/tasks",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": verb,
            "Access-Control-Request-Headers": headers,
        },
    )
    assert (response.status_code, response.json()) == (
        400,
        problem("cors_refused", f"Disallowed CORS {what}"),
    )
    assert ("access-control-allow-origin" in response.headers) is (origin == ORIGIN)


async def test_openapi_document_describes_the_contract(service: Service) -> None:
    document = (await service.request("GET", "/openapi.json")).json()
    operations = {
        operation["operationId"]: operation
        for path, item in document["paths"].items()
        for operation in item.values()
        if path.startswith("/api")
    }
    verbs = (
        "list_{}tasks",
        "create_{}task",
        "run_{}batch",
        "list_{}changes",
        "get_{}task",
        "change_{}task",
        "delete_{}task",
        "complete_{}task",
        "set_{}task_status",
        "patch_{}task",
        "delete_{}account",
    )
    assert set(operations) == {name.format(family) for name in verbs for family in ("", "user_")}
    for operation in operations.values():
        assert operation["security"] == [{"bearer": []}]
        refusal = operation["responses"].get("422")
        assert refusal in (None, {"$ref": "#/components/responses/IdempotencyKeyReused"})
    text = json.dumps(document)
    assert "ValidationError" not in text


async def test_response_headers_forbid_caching_and_sniffing(service: Service) -> None:
    response = await service.request("GET", "/api/tasks", "alice")
    assert response.headers["cache-control"] == "private, no-cache"
    created = await service.request("POST", "/api/tasks", "alice", json={"title": "x"})
    assert created.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("field", [(b"x-a", b"1\r\nset-cookie: a"), (b"x-a\nb", b"1")])
async def test_server_does_not_send_a_header_with_a_line_break(
    database_url: str, monkeypatch: pytest.MonkeyPatch, field: tuple[bytes, bytes]
) -> None:
    async with listening(database_url) as service:
        assert (await service.request("GET", "/livez")).status_code == 200
        monkeypatch.setattr("todo_api.http.envelope.COMMON_HEADERS", (field,))
        with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
            await service.request("GET", "/livez")
