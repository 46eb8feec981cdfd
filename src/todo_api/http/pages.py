"""The public pages beside the API: home, health, the OpenAPI document, and the docs to read it."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from todo_api.errors import NotFound, NotReady
from todo_api.http.answers import json_answer
from todo_api.http.content import KEEP, Content
from todo_api.http.negotiation import prefers_html
from todo_api.http.openapi import error_responses
from todo_api.http.routing import ServiceRoute
from todo_api.settings import is_loopback

OURS = Path(__file__).parent / "site"
"""The folder of our pages and their files."""

HTML = "text/html; charset=utf-8"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""Nothing inline and nothing from another host. Swagger UI's style sheet has pictures as `data:`."""


class Health(BaseModel):
    """The state of the service, in one word."""

    status: str = Field(
        description="`healthy`, `ok` or `ready`, as the path asks.", examples=["healthy"]
    )


def health_router(not_ready: Callable[[], Awaitable[str | None]]) -> APIRouter:
    """Return `/health`, `/livez` and `/readyz`; `not_ready` says why not, or None."""
    router = APIRouter(route_class=ServiceRoute, tags=["health"])

    def documented(name: str, state: str, *errors: int) -> dict[str, Any]:
        example = {"content": {"application/json": {"example": {"status": state}}}}
        return {
            "operation_id": name,
            "response_model": Health,
            "response_description": f"The state is `{state}`.",
            "responses": {200: example, **error_responses(400, *errors)},
        }

    @router.get("/health", summary="Say that the service runs", **documented("health", "healthy"))
    async def health() -> Response:
        """Answer without a look at anything else."""
        return json_answer(b'{"status": "healthy"}')

    @router.get("/livez", summary="Say that the process lives", **documented("livez", "ok"))
    async def livez() -> Response:
        """Answer without a look at anything else: for a probe that restarts the process."""
        return json_answer(b'{"status": "ok"}')

    @router.get(
        "/readyz",
        summary="Say whether requests can be served",
        **documented("readyz", "ready", 503),
    )
    async def readyz() -> Response:
        """Answer 503 with the reason if the database or the signing keys cannot be used."""
        if problem := await not_ready():
            raise NotReady(problem)
        return json_answer(b'{"status": "ready"}')

    return router


def document_router(app: FastAPI, ready_tokens: Mapping[str, Callable[[], str]]) -> APIRouter:
    """Return `/`, `/openapi.json` and `/docs` with its files, all without another host.

    `ready_tokens` makes the tokens that the page offers to the developer, each for one user. In
    production it is empty, and the route that gives them does not exist.
    """
    router = APIRouter(route_class=ServiceRoute, include_in_schema=False)
    users = " ".join(ready_tokens)

    # All of this is made for the first request, so that a start does not wait for it.
    @cache
    def page(name: str) -> Content:
        return _page(name, title=app.title, summary=str(app.summary), users=users)

    @cache
    def json_content(make: Callable[[], dict[str, Any]]) -> Content:
        return Content(json.dumps(make()).encode(), "application/json")

    def start() -> dict[str, Any]:
        links = {"docs": "/docs", "openapi": "/openapi.json", "health": "/health"}
        return {"name": app.title, "summary": app.summary, **links}

    @router.get("/")
    async def home(request: Request) -> Response:
        content = page("home.html") if prefers_html(request) else json_content(start)
        answer = await content.answer(request)
        answer.headers["Vary"] = "Accept, Accept-Encoding"
        return answer

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        return await json_content(app.openapi).answer(request)

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        return await page("docs.html").answer(request)

    @router.get("/docs/files/{digest}/{name}")
    async def file(request: Request) -> Response:
        asked = request.path_params
        content = _files().get(asked["name"])
        if content is None or content.digest != asked["digest"]:
            raise NotFound
        return await content.answer(request)

    if ready_tokens:

        @router.get("/docs/tokens/{user}")
        async def token(request: Request) -> Response:
            make = ready_tokens.get(request.path_params["user"])
            # A page of another site can name its own host for this address (DNS rebinding).
            if make is None or not is_loopback(request.url.hostname or ""):
                raise NotFound
            return json_answer(json.dumps({"token": make()}).encode())

    return router


def _page(name: str, **texts: str) -> Content:
    """Return one of our pages, with these texts and the addresses of its files."""
    addresses = {
        re.sub("[-.]", "_", file): f"/docs/files/{content.digest}/{file}"
        for file, content in _files().items()
    }
    template = Template((OURS / name).read_text("utf-8"))
    body = template.substitute(addresses, **{key: escape(text) for key, text in texts.items()})
    return Content(body.encode(), HTML, {"Content-Security-Policy": POLICY})


@cache
def _files() -> dict[str, Content]:
    """Return the files of the pages by their names: ours, and those of Swagger UI."""
    ours = [path for path in OURS.iterdir() if path.suffix in MEDIA_TYPES]
    theirs = [_swagger_ui() / name for name in ("swagger-ui-bundle.js", "swagger-ui.css")]
    return {
        path.name: Content(path.read_bytes(), MEDIA_TYPES[path.suffix], cache_control=KEEP)
        for path in [*ours, *theirs]
    }


def _swagger_ui() -> Path:
    """Return the folder of Swagger UI's files, without an import of their package."""
    package = find_spec("fastapi_offline")
    if package is None or package.origin is None:
        raise RuntimeError("the package fastapi-offline is not installed")
    return Path(package.origin).parent / "static"
