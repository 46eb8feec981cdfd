"""The routes of the service: how a request finds its route, and how its parameters are read.

FastAPI documents these routes from the same signatures. Its own reading of requests is not used,
because it parses the body before it authenticates, converts types leniently, and costs as much as
the rest of a request (measured: 60 µs).
"""

import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from inspect import signature
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints
from urllib.parse import unquote

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Mount, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from todo_api.errors import MethodNotAllowed
from todo_api.http.tracing import name_route
from todo_api.request_context import Opener, RequestContext

Reader = Callable[[Request], Awaitable[Any]]


class Reads:
    """Says in a handler's annotation how the parameter is read.

    As in `TaskId = Annotated[int, Path(alias="id"), Reads(read_task_id)]`.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader


async def _read_request(request: Request) -> Request:
    return request


def _reader(endpoint: Callable[..., Any], name: str, annotation: Any) -> Reader:
    """Return how one parameter of a handler is read. Raises `TypeError` if nothing says so."""
    if annotation is Request:
        return _read_request
    if get_origin(annotation) is Annotated:
        for each in get_args(annotation):
            if isinstance(each, Reads):
                return each.reader
    raise TypeError(
        f"{endpoint.__name__}({name}): annotate it with Reads(...), which says how it is read. "
        "Routes of this class do not run dependencies (docs/adr/0005-routes-read-themselves.md)"
    )


class ServiceRoute(APIRoute):
    """A route that reads its own requests. Its handler gets what its annotations name."""

    handler_arguments: ClassVar[int] = 0
    """How many arguments of the handler come from the route and not from the request."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        if self.dependencies:
            raise TypeError(
                f"{endpoint.__name__}: this route does not run dependencies; use add_middleware, "
                "or read what the handler needs with Annotated[..., Reads(...)]"
            )
        hints = get_type_hints(endpoint, include_extras=True)
        names = list(signature(endpoint).parameters)[self.handler_arguments :]
        self._readers = [_reader(endpoint, name, hints[name]) for name in names]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request, in place of FastAPI's."""
        return self.respond

    async def respond(self, request: Request) -> Response:
        """Read the parameters in the order of the handler's signature, and call it."""
        return await self._call(request)

    async def _call(self, request: Request, *given: object) -> Response:
        arguments = [await reader(request) for reader in self._readers]
        response: Response = await self.endpoint(*given, *arguments)
        return response


class PrivateRoute(ServiceRoute):
    """A route that answers 401 and 403 before it reads anything.

    The first argument of its handler is what the application opens for the token's owner
    (`RequestContext.open`). A handler can reach nothing else.
    """

    handler_arguments = 1

    async def respond(self, request: Request) -> Response:
        """Authenticate, then read and call as any route does."""
        context = RequestContext.of(request.scope)
        opened = await context.open(context, request.path_params.get("user_id"))
        return await self._call(request, opened)


class _Path:
    """A path and its routes by method."""

    def __init__(self, regex: re.Pattern[str]) -> None:
        self.regex = regex
        self.routes: dict[str, ServiceRoute] = {}

    @property
    def allow(self) -> str:
        """The value of `Allow` (RFC 9110, section 10.2.1)."""
        implied = {"HEAD", "OPTIONS"} if "GET" in self.routes else {"OPTIONS"}
        return ", ".join(sorted({*self.routes, *implied}))


class PathTable:
    """Finds a request's route by path first and by method second.

    Starlette's router takes the first route that fits both. A path that fits two families would
    belong to one of them for GET and to the other for POST, and `Allow` would name the methods of
    a single route. Paths that are not ours go to FastAPI's own router.
    """

    def __init__(
        self, routes: Iterable[ServiceRoute], router: Router, fallback: ASGIApp, opener: Opener
    ) -> None:
        self._router = router
        self._fallback = fallback
        self._open = opener
        paths: dict[str, _Path] = {}
        for route in routes:
            path = paths.setdefault(route.path, _Path(route.path_regex))
            path.routes.update(dict.fromkeys(route.methods or (), route))
        self._paths = list(paths.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request. A CORS preflight was answered before."""
        # Here and not earlier, because a middleware may send the request to another application.
        RequestContext.of(scope).open = self._open
        path, parameters = self._find(scope["raw_path"].decode("latin-1"))
        route = path.routes.get(scope["method"]) if path else None
        if route is not None:
            scope["path_params"] = parameters
            RequestContext.of(scope).route = route.path
            name_route(scope, route.path)
            response = await route.respond(Request(scope, receive))
            await response(scope, receive, send)
        elif path is None or self._is_added(scope):
            await self._serve_added(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            response = Response(status_code=204, headers={"Allow": path.allow})
            await response(scope, receive, send)
        else:
            raise MethodNotAllowed(scope["method"], path.allow)

    def _find(self, requested: str) -> tuple[_Path | None, dict[str, str]]:
        """Return a path of ours and its parameters, if one matches.

        Matching uses the path as it was sent, so an encoded slash is part of an id. Dot segments
        match nothing, because no client sends them as an id.
        """
        if "/./" not in requested and "/../" not in requested:
            for path in self._paths:
                if match := path.regex.fullmatch(requested):
                    return path, {name: unquote(value) for name, value in match.groupdict().items()}
        return None, {}

    async def _serve_added(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._fallback(scope, receive, send)
        finally:
            RequestContext.of(scope).route = getattr(scope.get("route"), "path", None)

    def _is_added(self, scope: Scope) -> bool:
        """Tell whether somebody has added this method to a path of ours. A mount adds none."""
        routes = [each for each in self._router.routes if not isinstance(each, Mount)]
        return any(route.matches(scope)[0] is Match.FULL for route in routes)
