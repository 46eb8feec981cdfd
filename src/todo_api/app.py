"""The one place where the parts meet."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from todo_api.auth.owner import Authenticator
from todo_api.auth.tokens import Expected, Key, Keys, Verifier
from todo_api.database.database import Database
from todo_api.errors import ApiError
from todo_api.http.answers import UnexpectedErrors, answer_error, answer_http_exception
from todo_api.http.cors import CORS
from todo_api.http.envelope import Envelope
from todo_api.http.pages import add_documents, add_health
from todo_api.http.paths import PathTable
from todo_api.settings import Settings
from todo_api.tasks.owned_tasks import OwnedTasks
from todo_api.tasks.routes import task_routes


def create_app(settings: Settings, database_url: str) -> FastAPI:
    """Build the application. It connects when it starts, not before."""
    database = Database(database_url, settings)
    authenticator = Authenticator(Verifier(signing_keys(settings)))
    app = FastAPI(
        title="todo-api",
        summary="A multi-user to-do list: every user sees his own tasks and nothing else.",
        version="1",
        openapi_url=None,
        redirect_slashes=False,
        lifespan=_lifespan(database),
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
    )


def _lifespan(database: Database) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await database.open()
        try:
            yield
        finally:
            await database.close()

    return lifespan
