"""The public routes beside the API: health, the OpenAPI document, and the pages for people."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from todo_api.errors import NotFound, NotReady
from todo_api.http.answers import json_answer
from todo_api.http.negotiation import prefers_html
from todo_api.http.openapi import error_responses
from todo_api.http.routing import Reads, ServiceRoute
from todo_api.http.site import Site, file_of
from todo_api.settings import is_loopback

ReadyTokens = Mapping[str, Callable[[], str]]
"""What makes the tokens that the page `/docs` offers to a developer, by user."""


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


def _from_path(name: str) -> Reads:
    async def read(request: Request) -> str:
        text: str = request.path_params[name]
        return text

    return Reads(read)


def document_router(app: FastAPI, ready_tokens: ReadyTokens) -> APIRouter:
    """Return `/`, `/openapi.json` and `/docs` with its files. They load no other host's files."""
    router = APIRouter(route_class=ServiceRoute, include_in_schema=False)
    site = Site(app, users=" ".join(ready_tokens))

    @router.get("/")
    async def home(request: Request) -> Response:
        content = site.home if prefers_html(request) else site.summary
        answer = await content.answer(request)
        answer.headers["Vary"] = "Accept, Accept-Encoding"
        return answer

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        return await site.document.answer(request)

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        return await site.docs.answer(request)

    @router.get("/docs/files/{digest}/{name}")
    async def file(
        request: Request,
        digest: Annotated[str, _from_path("digest")],
        name: Annotated[str, _from_path("name")],
    ) -> Response:
        return await file_of(digest, name).answer(request)

    return router


def ready_token_router(ready_tokens: ReadyTokens) -> APIRouter:
    """Return the route that gives a developer a token of one of these users."""
    router = APIRouter(route_class=ServiceRoute, include_in_schema=False)

    @router.get("/docs/tokens/{user}")
    async def token(request: Request, user: Annotated[str, _from_path("user")]) -> Response:
        # A page of another site can lead its own host name to this address (DNS rebinding).
        if user not in ready_tokens or not is_loopback(request.url.hostname or ""):
            raise NotFound
        return json_answer(json.dumps({"token": ready_tokens[user]()}).encode())

    return router
