"""What a FastAPI developer adds to the application works, or is refused with a reason."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from support.listening import listening
from support.service import Service, bearer, running_service
from todo_api.app import Application, create_app
from todo_api.errors import StartupError, TaskNotFound
from todo_api.http.routing import PrivateRoute, ServiceRoute
from todo_api.settings import Settings
from todo_api.tasks.routes import bearer as bearer_scheme


@pytest.fixture
async def extended(
    database_url: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Application], None]], Any]:
    """Start the service after something was added to its application."""

    @asynccontextmanager
    async def start(extend: Callable[[Application], None]) -> AsyncIterator[Service]:
        def create(*arguments: Any) -> Application:
            app = create_app(*arguments)
            extend(app)
            return app

        monkeypatch.setattr("support.service.create_app", create)
        async with running_service(database_url, short_folder) as service:
            yield service

    return start


def application() -> Application:
    return create_app(Settings.model_construct(), "postgresql://")


async def ask(service: Service, path: str, method: str = "GET", **options: Any) -> httpx2.Response:
    return await service.client.request(method, path, **options)


async def test_added_route_is_served_and_documented(extended: Any) -> None:
    def extend(app: Application) -> None:
        @app.get("/hello/{name}")
        async def hello(name: str, times: int = 1) -> dict[str, str]:
            return {"hello": name * times}

    async with extended(extend) as service:
        answer = await ask(service, "/hello/you", params={"times": 2})
        assert (answer.status_code, answer.json()) == (200, {"hello": "youyou"})
        assert answer.headers["x-request-id"]
        assert "/hello/{name}" in (await ask(service, "/openapi.json")).json()["paths"]
        assert (await ask(service, "/hello/you", "HEAD")).status_code == 200
        wrong = await ask(service, "/hello/you", "POST")
        assert (wrong.status_code, wrong.json()["error"]) == (405, "Method Not Allowed")


async def test_added_route_answers_errors_in_the_one_shape(extended: Any) -> None:
    def extend(app: Application) -> None:
        @app.get("/teapot")
        async def teapot() -> None:
            raise HTTPException(418, "I am a teapot", {"X-Tea": "green"})

        @app.get("/number")
        async def number(value: int) -> int:
            return value

        @app.get("/fault")
        async def fault() -> None:
            raise RuntimeError("not for the client")

    async with extended(extend) as service:
        teapot = await ask(service, "/teapot")
        assert (teapot.status_code, teapot.json()["error"]) == (418, "I am a teapot")
        assert teapot.headers["x-tea"] == "green"
        number = await ask(service, "/number", params={"value": "x"})
        assert number.status_code == 400
        assert list(number.json()["fields"]) == ["value"]
        fault = await ask(service, "/fault")
        assert (fault.status_code, fault.json()["error"]) == (500, "Internal server error")


async def test_method_can_be_added_to_a_path_of_the_service(extended: Any) -> None:
    def extend(app: Application) -> None:
        @app.put("/api/tasks")
        async def replace() -> str:
            return "replaced"

    async with extended(extend) as service:
        assert (await ask(service, "/api/tasks", "PUT")).json() == "replaced"
        assert (await ask(service, "/api/tasks", "PATCH")).status_code == 405
        assert (await ask(service, "/api/tasks")).status_code == 401


async def test_included_router_and_its_dependencies_work(extended: Any) -> None:
    async def who() -> str:
        return "somebody"

    router = APIRouter(prefix="/more")

    @router.get("/who")
    async def show(name: Annotated[str, Depends(who)]) -> str:
        return name

    def extend(app: Application) -> None:
        app.include_router(router, prefix="/v2")
        app.dependency_overrides[who] = lambda: "somebody else"

    async with extended(extend) as service:
        assert (await ask(service, "/v2/more/who")).json() == "somebody else"
        assert "/v2/more/who" in (await ask(service, "/openapi.json")).json()["paths"]


async def test_router_of_private_routes_can_be_included_under_a_prefix(extended: Any) -> None:
    def extend(app: Application) -> None:
        router = APIRouter(route_class=PrivateRoute)

        @router.get("/tasks/{user_id}/mine")  # noqa: FAST003  the route itself reads it
        async def mine(tasks: Any) -> Response:
            return PlainTextResponse(tasks.owner.id)

        app.include_router(router, prefix="/v2")

    async with extended(extend) as service:
        assert (await ask(service, "/v2/tasks/alice/mine")).status_code == 401
        alice = await ask(service, "/v2/tasks/alice/mine", headers=bearer("alice"))
        assert (alice.status_code, alice.text) == (200, "alice")
        bob = await ask(service, "/v2/tasks/alice/mine", headers=bearer("bob"))
        assert bob.status_code == 403


async def test_middleware_may_send_a_request_to_another_application_too(extended: Any) -> None:
    """Its routes are the same, and its keys are not."""
    other = application()

    async def drop(_: Message) -> None:
        pass

    class Twice:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await other(dict(scope), receive, drop)
            await self.app(scope, receive, send)

    async with extended(lambda app: app.add_middleware(Twice)) as service:
        answer = await ask(service, "/api/tasks", headers=bearer("alice"))
        assert (answer.status_code, answer.json()) == (200, [])


async def test_middleware_may_leave_out_what_it_does_not_know(extended: Any) -> None:
    class Plain:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            known = {name: value for name, value in scope.items() if name != "todo_api"}
            await self.app(known, receive, send)

    async with extended(lambda app: app.add_middleware(Plain)) as service:
        alice = await service.client.get("/api/tasks", headers=bearer("alice"))
        assert (alice.status_code, alice.json()) == (200, [])
        assert (await service.client.get("/api/tasks")).status_code == 401


async def test_mounted_application_is_served(extended: Any) -> None:
    async def page(request: Request) -> Response:
        return PlainTextResponse(request.url.path)

    def extend(app: Application) -> None:
        app.mount("/files", Mount("", routes=[Route("/{name}", page)]))

    async with extended(extend) as service:
        answer = await ask(service, "/files/a")
        assert (answer.status_code, answer.text) == (200, "/files/a")
        missing = await ask(service, "/file")
        assert (missing.status_code, missing.json()["error"]) == (404, "Not found")


async def test_mount_at_the_root_takes_no_method_of_the_service(extended: Any) -> None:
    def extend(app: Application) -> None:
        app.mount("", FastAPI())

    async with extended(extend) as service:
        assert (await ask(service, "/livez", "PATCH")).status_code == 405
        assert (await ask(service, "/api/tasks")).status_code == 401


async def test_mount_cannot_reach_routes_by_another_spelling_of_their_path(extended: Any) -> None:
    def extend(app: Application) -> None:
        app.mount("/files", FastAPI())

    async with extended(extend) as service:
        task = await service.create("alice")
        for path in (f"/api/tasks%2F{task['id']}", f"/api%2Ftasks/{task['id']}"):
            answer = await ask(service, path, headers=bearer("alice"))
            assert answer.status_code == 404, path


async def test_middleware_sees_every_answer(extended: Any) -> None:
    def extend(app: Application) -> None:
        @app.middleware("http")
        async def mark(
            request: Request, call_next: Callable[[Request], Awaitable[Response]]
        ) -> Response:
            if "refuse" in request.headers:
                raise HTTPException(403, "refused by the middleware")
            answer = await call_next(request)
            answer.headers["x-seen"] = str(answer.status_code)
            return answer

    async with extended(extend) as service:
        task = await service.create("alice")
        path = f"/api/tasks/{task['id']}"
        shown = await ask(service, path, headers=bearer("alice"))
        assert (shown.json(), shown.headers["x-seen"]) == (task, "200")
        assert (await ask(service, path)).headers["x-seen"] == "401"
        refused = await ask(service, path, headers={**bearer("alice"), "Refuse": "1"})
        assert refused.status_code == 403
        assert refused.json()["error"] == "refused by the middleware"


async def test_exception_handler_answers_in_place_of_the_service(extended: Any) -> None:
    def extend(app: Application) -> None:
        @app.exception_handler(TaskNotFound)
        async def nothing_here(_: Request, __: Exception) -> Response:
            return PlainTextResponse("nothing here", 404)

        @app.exception_handler(405)
        def not_so(_: Request, __: Exception) -> Response:
            return PlainTextResponse("not so", 405)

    async with extended(extend) as service:
        missing = await ask(service, "/api/tasks/1", headers=bearer("alice"))
        assert (missing.status_code, missing.text) == (404, "nothing here")
        assert (await ask(service, "/api/tasks", "PATCH")).text == "not so"
        assert (await ask(service, "/nowhere")).json()["error"] == "Not found"


@pytest.mark.parametrize("key", [500, Exception, RuntimeError])
async def test_handler_of_internal_errors_answers_no_other_error(
    extended: Any, key: int | type[Exception]
) -> None:
    def extend(app: Application) -> None:
        @app.exception_handler(key)
        async def sorry(_: Request, __: Exception) -> Response:
            return PlainTextResponse("sorry", 500)

        @app.get("/fault")
        async def fault() -> None:
            raise RuntimeError("not for the client")

    async with extended(extend) as service:
        fault = await ask(service, "/fault")
        assert (fault.status_code, fault.text) == (500, "sorry")
        assert (await ask(service, "/nowhere")).status_code == 404
        assert (await ask(service, "/api/tasks")).status_code == 401
        invalid = await ask(service, "/api/tasks?status=x", headers=bearer("alice"))
        assert (invalid.status_code, invalid.json()["code"]) == (400, "invalid_parameter")


async def test_handler_can_raise_http_exception(
    extended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def get(*_: object) -> bytes:
        raise HTTPException(402, "Pay first")

    monkeypatch.setattr("todo_api.tasks.owned_tasks.OwnedTasks.get", get)
    async with extended(lambda _: None) as service:
        answer = await ask(service, "/api/tasks/1", headers=bearer("alice"))
        assert (answer.status_code, answer.json()["error"]) == (402, "Pay first")


async def test_streamed_answer_leaves_the_server_to_others(database_url: str) -> None:
    """Starlette listens for the client to leave while it streams."""
    async with listening(database_url) as service:
        app: Application = service._running.config.loaded_app

        async def parts() -> AsyncIterator[bytes]:
            yield b"first "
            others = [await service.request("GET", "/livez") for _ in range(3)]
            yield b" ".join(each.content for each in others)

        @app.post("/stream")
        async def stream() -> Response:
            return StreamingResponse(parts())

        answer = await service.client.post("/stream", content=b"body")
        assert answer.text == "first " + " ".join(['{"status": "ok"}'] * 3)


def test_override_of_the_token_is_refused() -> None:
    with pytest.raises(TypeError, match="todo-api token USER"):
        application().dependency_overrides[bearer_scheme] = lambda: "alice"
    with pytest.raises(TypeError, match="todo-api token USER"):
        application().dependency_overrides.update({bearer_scheme: lambda: "alice"})
    with pytest.raises(TypeError, match="todo-api token USER"):
        application().dependency_overrides = {bearer_scheme: lambda: "alice"}


def test_websocket_route_is_refused_when_the_application_is_built() -> None:
    app = application()

    @app.websocket("/ws")
    async def talk(_: WebSocket) -> None: ...

    with pytest.raises(StartupError, match="does not speak WebSocket"):
        app.build_middleware_stack()


def test_startup_handler_is_refused_when_the_application_is_built() -> None:
    app = application()
    app.router.add_event_handler("startup", lambda: None)
    with pytest.raises(StartupError, match="extend the lifespan"):
        app.build_middleware_stack()


def test_dependency_of_the_application_is_refused_when_it_is_built() -> None:
    app = application()
    app.router.dependencies.append(Depends(lambda: None))
    with pytest.raises(StartupError, match="use add_middleware"):
        app.build_middleware_stack()


@pytest.mark.parametrize("path", ["/livez", "/api/tasks/{task}", "/api/{user}/tasks/{task}"])
def test_route_that_would_never_be_called_is_refused_when_the_application_is_built(
    path: str,
) -> None:
    app = application()
    router = APIRouter()
    router.add_api_route(path, lambda: None)
    app.include_router(router)
    with pytest.raises(StartupError, match=r"GET /.*: todo-api has a route for this"):
        app.build_middleware_stack()


def test_routes_cannot_be_appended_where_they_would_be_lost() -> None:
    with pytest.raises(AttributeError, match="append"):
        application().routes.append(Route("/x", lambda _: PlainTextResponse("x")))  # type: ignore[attr-defined]  # mypy sees it, too


def test_parameter_that_nothing_reads_is_refused() -> None:
    router = APIRouter(route_class=ServiceRoute)
    with pytest.raises(TypeError, match=r"annotate it with Reads\(...\)"):

        @router.get("/x")
        async def show(name: str) -> Response:
            return PlainTextResponse(name)


def test_dependency_of_a_route_of_the_service_is_refused() -> None:
    router = APIRouter(route_class=ServiceRoute, dependencies=[Depends(lambda: None)])
    with pytest.raises(TypeError, match="does not run dependencies"):

        @router.get("/x")
        async def show() -> Response:
            return PlainTextResponse("x")
