"""Builds the application from its parts."""

import math
import re
from collections import UserDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from hashlib import blake2b
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from todo_api import development
from todo_api.auth.key_set import KeySet
from todo_api.auth.owner import Authenticator, Owner
from todo_api.auth.rate_limits import RateLimits
from todo_api.auth.tokens import LEEWAY, Expected, Key, Keys, Verifier
from todo_api.database.database import Database
from todo_api.errors import NotFound, StartupError
from todo_api.http.answers import Errors
from todo_api.http.cors import CORS
from todo_api.http.envelope import Envelope
from todo_api.http.limits import Limits
from todo_api.http.observation import Observed, Observer, access_log
from todo_api.http.openapi import INFORMATION, completed
from todo_api.http.pages import ReadyTokens, document_router, health_router, ready_token_router
from todo_api.http.routing import PathTable, ServiceRoute
from todo_api.http.tracing import hide_target
from todo_api.request_context import RequestContext
from todo_api.settings import Settings, origin_of
from todo_api.tasks.owned_tasks import KnownOwners, OwnedTasks
from todo_api.tasks.routes import bearer, task_router
from todo_api.tasks.waiting import Waiters

if TYPE_CHECKING:
    from todo_api.http.metrics import Metrics


class _Overrides(UserDict[Any, Any]):
    """FastAPI's `dependency_overrides`, without those that would do nothing."""

    def __setitem__(self, dependency: Any, override: Any) -> None:
        """Refuse what no route of the service would ever call."""
        if dependency is bearer:
            raise TypeError(
                "The routes of todo-api run no dependencies, so this override would do nothing. "
                "Sign a token for the user you want to be: `todo-api token USER`"
            )
        super().__setitem__(dependency, override)


class Application(FastAPI):
    """FastAPI with the layers that this service needs around its own routes.

    FastAPI's own layers cost 20 µs a request (measured), so the service's routes do not pass
    through them. Routes, mounts, middleware and handlers that somebody adds work as in FastAPI.
    """

    def __init__(
        self,
        settings: Settings,
        authenticator: Authenticator,
        open_tasks: Callable[[Owner], OwnedTasks],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._settings = settings
        self._authenticator = authenticator
        self._open_tasks = open_tasks
        self._own_routes: list[BaseRoute] = []
        self.limits: Limits | None = None
        self.exception_handlers.clear()  # FastAPI's would answer in another shape
        self.router.default = _not_found

    def serve(self, router: APIRouter) -> None:
        """Serve the routes of a router of this service, ahead of all that is added later."""
        self._own_routes += router.routes

    @property
    def routes(self) -> tuple[BaseRoute, ...]:  # type: ignore[override]  # a list would lose appends
        """The service's own routes, and those that somebody has added."""
        return (*self._own_routes, *self.router.routes)

    @property  # type: ignore[override]  # a mapping like FastAPI's dict
    def dependency_overrides(self) -> MutableMapping[Any, Any]:
        """FastAPI's overrides, for routes that run dependencies."""
        return self._overrides

    @dependency_overrides.setter
    def dependency_overrides(self, overrides: Mapping[Any, Any]) -> None:
        self._overrides = _Overrides(overrides)

    def build_middleware_stack(self) -> ASGIApp:
        """Return the layers around the routes. Raises `StartupError` for what cannot work."""
        self._refuse_what_cannot_work()
        settings = self._settings
        own = [route for route in self._own_routes if isinstance(route, ServiceRoute)]
        routes = PathTable(own, self.router, AsyncExitStackMiddleware(self.router), self._open)
        self.limits = Limits(
            routes,
            in_flight=settings.max_in_flight,
            wait=settings.pool_timeout,
            seconds=settings.request_timeout,
        )
        app: ASGIApp = Errors(self.limits, self.exception_handlers)
        for middleware, arguments, options in reversed(self.user_middleware):
            app = middleware(app, *arguments, **options)
        if self.user_middleware:  # which may also raise
            app = Errors(app, self.exception_handlers)
        app = CORS(app, origins=settings.cors_origins)
        observers = _observers(settings)
        http = Envelope(Observed(app, observers) if observers else app)

        async def stack(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                hide_target(scope)
                await http(scope, receive, send)
            else:
                await self.router(scope, receive, send)

        return stack

    async def _open(self, context: RequestContext, named: str | None) -> OwnedTasks:
        """Return the tasks of the user who sent the request. Raises as `Authenticator.owner`."""
        return self._open_tasks(await self._authenticator.owner(context, named))

    def _refuse_what_cannot_work(self) -> None:
        added = list(iter_route_contexts(self.router.routes))
        if any(isinstance(each.original_route, WebSocketRoute) for each in added):
            raise StartupError(
                "WebSocket routes: the server of todo-api does not speak WebSocket "
                "(docs/adr/0007-strict-protocol.md); use an HTTP route"
            )
        if self.router.on_startup or self.router.on_shutdown:
            raise StartupError(
                "on_event: handlers of startup and shutdown do not run beside a lifespan; "
                "extend the lifespan in todo_api/app.py"
            )
        if self.router.dependencies:
            raise StartupError(
                "dependencies of the application: the routes of todo-api run no dependencies; "
                "use add_middleware"
            )
        if taken := _operations(self._own_routes) & _operations(added):
            method, path = min(taken)
            raise StartupError(
                f"{method} {path}: todo-api has a route for this and would never call yours; "
                "use another path"
            )

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, made once."""
        if self.openapi_schema is None:
            self.openapi_schema = completed(super().openapi())
        return self.openapi_schema


def _operations(routes: Iterable[Any]) -> set[tuple[str, str]]:
    """Return the methods and paths of routes, with `{}` for each parameter."""
    return {
        (method, re.sub("{.*?}", "{}", route.path))
        for route in routes
        for method in getattr(route, "methods", None) or ()
    }


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    del receive, send
    if scope["path"].endswith("/"):
        raise NotFound("Not found. Leave out the slash at the end of the path")
    raise NotFound


def create_app(settings: Settings, database_url: str) -> Application:
    """Build the application. It connects when it starts, not before."""
    database = Database(database_url, settings)
    verifier = Verifier(signing_keys(settings))
    key_set = KeySet(settings.jwks_url, verifier) if settings.jwks_url else None
    authenticator = Authenticator(verifier, RateLimits(settings), key_set)
    open_tasks = partial(
        OwnedTasks,
        database=database,
        known_owners=KnownOwners(),
        issuer_ahead=partial(_issuer_ahead, settings, key_set),
        waiters=Waiters(database.versions),
    )
    app = Application(
        settings,
        authenticator,
        open_tasks,
        **INFORMATION,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={
            "tracing": settings.opentelemetry,
            "metrics": settings.opentelemetry,
            "logs": False,
            "auto_configure": settings.opentelemetry,
        },
        lifespan=_lifespan(settings, database, key_set),
    )
    app.serve(task_router())
    app.serve(health_router(partial(_not_ready, database, key_set)))
    ready_tokens = _ready_tokens(settings)
    app.serve(document_router(app, ready_tokens))
    if ready_tokens:
        app.serve(ready_token_router(ready_tokens))
    return app


def _ready_tokens(settings: Settings) -> ReadyTokens:
    """Return what makes the tokens of the docs page, by user. There are none in production."""
    if not settings.development:
        return {}
    return {
        user: partial(development.token, settings, user, lifetime=development.LIFETIME)
        for user in development.USERS
    }


def _issuer_ahead(settings: Settings, key_set: KeySet | None) -> float:
    """Return the most seconds that the clock of the tokens' issuer can be ahead of ours.

    Only the key set tells the issuer's time, if the issuer publishes it itself.
    """
    if settings.development:
        return 0.0  # this machine signs the tokens
    if key_set is None or not settings.publishes_own_keys:
        return LEEWAY
    return key_set.issuer_ahead


async def _not_ready(database: Database, key_set: KeySet | None) -> str | None:
    """Say why requests cannot be served, if so."""
    if problem := await database.why_not_ready():
        return problem
    if key_set is not None and not key_set.is_loaded:
        return "No signing key could be loaded yet"
    return None


def signing_keys(settings: Settings) -> Keys:
    """Return the keys that the settings name."""
    secret = settings.better_auth_secret
    return Keys(
        secret=Key("HS256", secret.get_secret_value().encode()) if secret else None,
        secret_expects=Expected(settings.better_auth_issuer, settings.better_auth_audience),
        published_expects=_expected_of_published(settings),
    )


def _expected_of_published(settings: Settings) -> Expected | None:
    """Better Auth names the origin of its address as issuer and audience, unless told otherwise."""
    if settings.better_auth_url is None:
        return None
    origin = origin_of(settings.better_auth_url)
    return Expected(settings.better_auth_issuer or origin, settings.better_auth_audience or origin)


def _observers(settings: Settings) -> list[Observer]:
    """Return the functions to call after each request."""
    observers: list[Observer] = []
    if settings.log_level in {"debug", "info"}:
        key = settings.log_key.get_secret_value() if settings.log_key else token_hex()
        observers.append(access_log(key.encode()[: blake2b.MAX_KEY_SIZE]))
    if settings.metrics_port is not None:
        observers.append(_metrics().observe)
    return observers


def _metrics() -> "Metrics":
    from todo_api.http.metrics import metrics  # noqa: PLC0415  a start without them is faster

    return metrics()


def _lifespan(
    settings: Settings, database: Database, key_set: KeySet | None
) -> Callable[[Application], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: Application) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await database.open()
            stack.callback(database.close)
            if key_set is not None:
                await stack.enter_async_context(key_set.kept_fresh())
            if settings.metrics_port is not None:
                database.pool.on_wait = _metrics().waited
                levels = partial(_levels, app, database, key_set)
                await stack.enter_async_context(_metrics().kept_up(levels))
            yield

    return lifespan


def _levels(app: Application, database: Database, key_set: KeySet | None) -> dict[str, float]:
    """Return what the metrics show of the moment."""
    return {
        "requests_in_flight": app.limits.in_flight if app.limits else 0,
        "key_set_age_seconds": key_set.age if key_set else math.nan,
        **database.pool.levels(),
    }
