"""Finding the route of a request: by path first, by verb second.

Starlette's router takes the first route that fits both. A path that fits two families would then
belong to one of them for GET and to the other for POST, and `Allow` would name the verbs of a
single route.
"""

import re
from collections.abc import Iterable
from urllib.parse import unquote

from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from todo_api.errors import MethodNotAllowed, NotFound
from todo_api.http.tracing import name_route


class _Path:
    """A path and its routes by verb."""

    def __init__(self, regex: re.Pattern[str]) -> None:
        self.regex = regex
        self.routes: dict[str, Route] = {}

    @property
    def allow(self) -> str:
        """The value of `Allow` (RFC 9110, section 10.2.1)."""
        implied = {"HEAD", "OPTIONS"} if "GET" in self.routes else {"OPTIONS"}
        return ", ".join(sorted({*self.routes, *implied}))


class PathTable:
    """All paths, in order: the first that fits is the one, whatever the verb.

    OPTIONS answers with `Allow` alone; a CORS preflight has been answered before.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        paths: dict[str, _Path] = {}
        for route in routes:
            if isinstance(route, Route):
                path = paths.setdefault(route.path, _Path(route.path_regex))
                path.routes.update(dict.fromkeys((route.methods or set()) - {"HEAD"}, route))
        self._paths = list(paths.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the path, and serve the verb."""
        path, scope["path_params"] = self._find(scope["raw_path"].decode("latin-1"))
        route = path.routes.get(scope["method"])
        if route is not None:
            scope["route"] = route
            name_route(scope, route.path)
            await route.app(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            answer = Response(status_code=204, headers={"Allow": path.allow})
            await answer(scope, receive, send)
        else:
            raise MethodNotAllowed(path.allow)

    def _find(self, requested: str) -> tuple[_Path, dict[str, str]]:
        """Find a path and its parameters.

        In the path as it was sent: an encoded slash is part of an id, not the end of it. Dot
        segments fit none: no client sends them as an id.
        """
        if "/./" not in requested and "/../" not in requested:
            for path in self._paths:
                if match := path.regex.fullmatch(requested):
                    return path, {name: unquote(value) for name, value in match.groupdict().items()}
        raise NotFound
