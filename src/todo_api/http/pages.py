"""The public pages beside the API: health, the OpenAPI document, and Swagger UI to read it."""

import json
from base64 import b64encode
from collections.abc import Awaitable, Callable
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path
from re import DOTALL, search
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from todo_api.errors import ServiceUnavailable
from todo_api.http.answers import Error, json_answer

ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
"""Swagger UI's files in the package fastapi-offline."""


class Health(BaseModel):
    """The state of the service, in one word."""

    status: str


class PublicRoute(APIRoute):
    """A documented route without authentication, whose endpoint gets only the request."""

    def __init__(
        self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **options: Any
    ) -> None:
        name = endpoint.__name__
        super().__init__(
            path, endpoint, operation_id=name, response_model=Health, tags=["health"], **options
        )
        self.app = self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response = await self.endpoint(Request(scope, receive))
        await response(scope, receive, send)


def health_routes(not_ready: Callable[[], Awaitable[str | None]]) -> list[PublicRoute]:
    """Return `/health`, `/livez` and `/readyz`; `not_ready` gives the reason for a 503."""

    async def health(_: Request) -> Response:
        """Report that the service runs."""
        return json_answer(b'{"status": "healthy"}')

    async def livez(_: Request) -> Response:
        """Report that the process lives, whatever the database does."""
        return json_answer(b'{"status": "ok"}')

    async def readyz(_: Request) -> Response:
        """Report whether requests can be served, and if not, why."""
        if problem := await not_ready():
            raise ServiceUnavailable(problem)
        return json_answer(b'{"status": "ready"}')

    return [
        PublicRoute("/health", health),
        PublicRoute("/livez", livez),
        PublicRoute("/readyz", readyz, responses={503: {"model": Error}}),
    ]


def add_documents(app: FastAPI) -> None:
    """Add `/openapi.json` and `/docs`, which loads nothing from another host."""
    page, policy = _documentation_page(app.title)

    @cache  # built at the first request, so that the start does not wait for it
    def document() -> bytes:
        return json.dumps(app.openapi()).encode()

    async def openapi(_: Request) -> Response:
        return json_answer(document())

    async def docs(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    app.add_route("/openapi.json", openapi, include_in_schema=False)
    app.add_route("/docs", docs, include_in_schema=False)
    for file in ASSETS:
        app.add_route(f"/docs/{file}", _asset(_folder() / file), include_in_schema=False)


def _asset(path: Path) -> Callable[[Request], Awaitable[Response]]:
    content, media_type = path.read_bytes(), guess_type(path.name)[0]

    async def asset(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return asset


def _documentation_page(title: str) -> tuple[bytes, str]:
    """Return Swagger UI's page, and a policy that allows only its own inline script."""
    page = bytes(
        get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=title,
            swagger_js_url="/docs/swagger-ui-bundle.js",
            swagger_css_url="/docs/swagger-ui.css",
            swagger_favicon_url="/docs/favicon.png",
        ).body
    )
    script = search(rb"<script>(.*?)</script>", page, DOTALL)
    if script is None:
        raise RuntimeError("FastAPI's documentation page has changed: no inline script")
    digest = b64encode(sha256(script[1]).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self' "
        "'unsafe-inline'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; "
        "base-uri 'none'; form-action 'none'"
    )
    return page, policy


def _folder() -> Path:
    """Return the folder of Swagger UI's files, without an import of their package."""
    package = find_spec("fastapi_offline")
    if package is None or package.origin is None:
        raise RuntimeError("the package fastapi-offline is not installed")
    return Path(package.origin).parent / "static"
