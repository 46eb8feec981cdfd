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

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel, Field
from starlette.responses import HTMLResponse, Response

from todo_api.errors import NotReady
from todo_api.http.answers import json_answer
from todo_api.http.openapi import error_responses
from todo_api.http.routing import ServiceRoute

ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
"""Swagger UI's files in the package fastapi-offline."""


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


def document_router(app: FastAPI) -> APIRouter:
    """Return `/openapi.json` and `/docs`, which loads nothing from another host."""
    router = APIRouter(route_class=ServiceRoute, include_in_schema=False)
    page, policy = _documentation_page(app.title)

    @cache  # made for the first request, so that a start does not wait for it
    def document() -> bytes:
        return json.dumps(app.openapi()).encode()

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return json_answer(document())

    @router.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    for file in ASSETS:
        router.get(f"/docs/{file}")(_asset(_folder() / file))
    return router


def _asset(path: Path) -> Callable[[], Awaitable[Response]]:
    content, media_type = path.read_bytes(), guess_type(path.name)[0]

    async def asset() -> Response:
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
