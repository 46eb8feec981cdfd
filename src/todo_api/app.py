"""The one place where the parts meet."""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from hashlib import blake2b
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from todo_api.auth.key_set import KeySet
from todo_api.auth.owner import Authenticator
from todo_api.auth.rate_limits import RateLimits
from todo_api.auth.tokens import Expected, Key, Keys, Verifier
from todo_api.database.database import Database
from todo_api.http.answers import Errors
from todo_api.http.cors import CORS
from todo_api.http.envelope import Envelope
from todo_api.http.limits import Limits
from todo_api.http.observation import Observed, Observer, access_log
from todo_api.http.pages import add_documents, health_routes
from todo_api.http.paths import PathTable
from todo_api.http.tracing import hide_target
from todo_api.settings import Settings, origin_of
from todo_api.tasks.owned_tasks import KnownOwners, OwnedTasks
from todo_api.tasks.routes import task_routes

if TYPE_CHECKING:
    from todo_api.http.metrics import Metrics


class Application(FastAPI):
    """FastAPI with the layers that this service needs, and no others.

    FastAPI's own (five between the server and a route) cost 20 µs a request, measured, and do
    nothing here: our routes use none of its exit stacks, and our errors are answered below CORS.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """Return the layers around the routes, the outermost first."""
        settings: Settings = self.state.settings
        limits = self.state.limits = Limits(
            PathTable(self.router.routes),
            in_flight=settings.max_in_flight,
            wait=settings.pool_timeout,
            seconds=settings.request_timeout,
        )
        answers = CORS(Errors(limits), origins=settings.cors_origins)
        observers = _observers(settings)
        http = Envelope(Observed(answers, observers) if observers else answers)

        async def stack(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                hide_target(scope)
                await http(scope, receive, send)
            else:
                await self.router(scope, receive, send)

        return stack

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, without FastAPI's 422: what is wrong is 400 here."""
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        return document


def create_app(settings: Settings, database_url: str) -> FastAPI:
    """Build the application. It connects when it starts, not before."""
    database = Database(database_url, settings)
    verifier = Verifier(signing_keys(settings))
    key_set = KeySet(settings.jwks_url, verifier) if settings.jwks_url else None
    authenticator = Authenticator(verifier, RateLimits(settings), key_set)
    app = Application(
        title="todo-api",
        summary="A multi-user to-do list: every user sees their own tasks and nothing else.",
        version="1",
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
    app.state.settings = settings
    open_tasks = partial(OwnedTasks, database=database, known_owners=KnownOwners())
    app.router.routes += task_routes(authenticator, open_tasks)
    app.router.routes += health_routes(partial(_not_ready, database, key_set))
    add_documents(app)
    return app


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
    """Return what is to be told of each request."""
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
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
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


def _levels(app: FastAPI, database: Database, key_set: KeySet | None) -> dict[str, float]:
    """Return what the metrics show of the moment."""
    limits: Limits | None = getattr(app.state, "limits", None)
    return {
        "requests_in_flight": limits.in_flight if limits else 0,
        "key_set_age_seconds": key_set.age if key_set else math.nan,
        **database.pool.levels(),
    }
