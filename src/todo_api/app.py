"""The one place where the parts meet."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from todo_api.auth.key_set import KeySet
from todo_api.auth.owner import Authenticator
from todo_api.auth.tokens import Expected, Key, Keys, Verifier
from todo_api.database.database import Database
from todo_api.http.answers import Errors
from todo_api.http.cors import CORS
from todo_api.http.envelope import Envelope
from todo_api.http.limits import Limits
from todo_api.http.pages import add_documents, health_routes
from todo_api.http.paths import PathTable
from todo_api.settings import Settings, origin_of
from todo_api.tasks.owned_tasks import OwnedTasks
from todo_api.tasks.routes import task_routes


class Application(FastAPI):
    """FastAPI with the layers that this service needs, and no others.

    FastAPI's own (five between the server and a route) cost 20 µs a request, measured, and do
    nothing here: our routes use none of its exit stacks, and our errors are answered below CORS.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """Return the layers around the routes, the outermost first."""
        settings: Settings = self.state.settings
        limits = Limits(
            PathTable(self.router.routes),
            in_flight=settings.max_in_flight,
            seconds=settings.request_timeout,
        )
        http = Envelope(CORS(Errors(limits), origins=settings.cors_origins))

        async def stack(scope: Scope, receive: Receive, send: Send) -> None:
            await (http if scope["type"] == "http" else self.router)(scope, receive, send)

        return stack


def create_app(settings: Settings, database_url: str) -> FastAPI:
    """Build the application. It connects when it starts, not before."""
    database = Database(database_url, settings)
    verifier = Verifier(signing_keys(settings))
    key_set = KeySet(settings.jwks_url, verifier) if settings.jwks_url else None
    authenticator = Authenticator(verifier, key_set)
    app = Application(
        title="todo-api",
        summary="A multi-user to-do list: every user sees his own tasks and nothing else.",
        version="1",
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        lifespan=_lifespan(database, key_set),
    )
    app.state.settings = settings
    app.router.routes += task_routes(authenticator, partial(OwnedTasks, database=database))
    app.router.routes += health_routes(partial(_not_ready, database, key_set))
    add_documents(app)
    return app


async def _not_ready(database: Database, key_set: KeySet | None) -> str | None:
    """Say why requests cannot be served, if so."""
    if not await database.is_ready():
        return "The database does not answer"
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


def _lifespan(
    database: Database, key_set: KeySet | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await database.open()
            stack.push_async_callback(database.close)
            if key_set is not None:
                await stack.enter_async_context(key_set.kept_fresh())
            yield

    return lifespan
