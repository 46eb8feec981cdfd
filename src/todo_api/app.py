"""The one place where the parts meet."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from todo_api.auth.key_set import KeySet
from todo_api.auth.owner import Authenticator
from todo_api.auth.tokens import Expected, Key, Keys, Verifier
from todo_api.database.database import Database
from todo_api.errors import ApiError
from todo_api.http.answers import UnexpectedErrors, answer_error, answer_http_exception
from todo_api.http.cors import CORS
from todo_api.http.envelope import Envelope
from todo_api.http.pages import add_documents, add_health
from todo_api.http.paths import PathTable
from todo_api.settings import Settings, origin_of
from todo_api.tasks.owned_tasks import OwnedTasks
from todo_api.tasks.routes import task_routes


def create_app(settings: Settings, database_url: str) -> FastAPI:
    """Build the application. It connects when it starts, not before."""
    database = Database(database_url, settings)
    verifier = Verifier(signing_keys(settings))
    key_set = KeySet(settings.jwks_url, verifier) if settings.jwks_url else None
    authenticator = Authenticator(verifier, key_set)
    app = FastAPI(
        title="todo-api",
        summary="A multi-user to-do list: every user sees his own tasks and nothing else.",
        version="1",
        openapi_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(database, key_set),
        middleware=[
            Middleware(Envelope),
            Middleware(CORS, origins=settings.cors_origins),
            Middleware(UnexpectedErrors),
        ],
        exception_handlers={ApiError: answer_error, HTTPException: answer_http_exception},
    )
    app.router.routes += task_routes(authenticator, partial(OwnedTasks, database=database))
    add_health(app, database.is_ready)
    add_documents(app)
    app.router.routes.insert(0, PathTable(app.router.routes))
    return app


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
