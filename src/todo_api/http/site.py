"""The pages for people, and their files. Each is made when it is first asked for.

`static/` has our pages. The viewer of the OpenAPI document is Swagger UI, from a package.
"""

import json
import re
from functools import cache, cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from fastapi import FastAPI

from todo_api.errors import NotFound
from todo_api.http.content import KEEP, Content

OURS = Path(__file__).parent / "static"
SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")

HTML = "text/html; charset=utf-8"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The media types of files. Other files of the folder have no address."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""Nothing inline, and no other host. Swagger UI's style sheet has its pictures as `data:`."""


class Site:
    """The contents of the fixed addresses. `users` are those that `/docs` offers to be."""

    def __init__(self, app: FastAPI, users: str) -> None:
        self._app = app
        self._texts = {"title": app.title, "summary": str(app.summary), "users": users}

    @cached_property
    def home(self) -> Content:
        """What the service is, for people."""
        return _page("home.html", self._texts)

    @cached_property
    def summary(self) -> Content:
        """What the service is, for programs."""
        links = {"docs": "/docs", "openapi": "/openapi.json", "health": "/health"}
        return _json({"name": self._app.title, "summary": self._app.summary, **links})

    @cached_property
    def docs(self) -> Content:
        """The page to read about the API and to try it."""
        return _page("docs.html", self._texts)

    @cached_property
    def document(self) -> Content:
        """The OpenAPI document."""
        return _json(self._app.openapi())


def file_of(digest: str, name: str) -> Content:
    """Return the file with this name and this content. Raises `NotFound` if there is none."""
    content = _files().get(name)
    if content is None or content.digest != digest:
        raise NotFound
    return content


def _json(value: dict[str, Any]) -> Content:
    return Content(json.dumps(value).encode(), "application/json")


def _page(name: str, texts: dict[str, str]) -> Content:
    """Return a page, with these texts and the addresses of its files."""
    values = {key: escape(text) for key, text in texts.items()}
    for file, content in _files().items():
        values[re.sub("[-.]", "_", file)] = f"/docs/files/{content.digest}/{file}"
    body = Template((OURS / name).read_text("utf-8")).substitute(values)
    return Content(body.encode(), HTML, {"Content-Security-Policy": POLICY})


@cache
def _files() -> dict[str, Content]:
    """Return the files of the pages by their names: ours, and Swagger UI's."""
    paths = [*OURS.iterdir(), *(_swagger_ui() / name for name in SWAGGER_UI)]
    return {
        path.name: Content(path.read_bytes(), MEDIA_TYPES[path.suffix], cache_control=KEEP)
        for path in paths
        if path.suffix in MEDIA_TYPES
    }


def _swagger_ui() -> Path:
    """Return the folder of Swagger UI's files, without an import of their package."""
    package = find_spec("fastapi_offline")
    if package is None or package.origin is None:
        raise RuntimeError("the package fastapi-offline is not installed")
    return Path(package.origin).parent / "static"
