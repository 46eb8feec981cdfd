"""Development mode: no database and no key configured, so both are made, on loopback alone."""

import os
import secrets
import shlex
import time
from pathlib import Path

import jwt
from pydantic import SecretStr

from todo_api.errors import StartupError
from todo_api.settings import MINIMUM_SECRET_BYTES, Settings

USER = "demo"
"""Whose token the start-up message shows."""


def with_secret(settings: Settings) -> Settings:
    """Return the settings, in development mode with the secret kept under `DATA_DIR`."""
    if not settings.development:
        return settings
    secret = SecretStr(_kept_secret(settings.data_dir / "development-secret"))
    return settings.model_copy(update={"better_auth_secret": secret})


def token(settings: Settings, user: str, *, lifetime: float, email: str | None = None) -> str:
    """Return a token for `user` that is good for `lifetime` seconds, signed with the secret.

    Raises `StartupError` where there is none.
    """
    if settings.better_auth_secret is None:
        raise StartupError("BETTER_AUTH_SECRET: must be set to sign a token")
    now = int(time.time())
    claims = {
        "sub": user,
        "email": email,
        "iat": now,
        "exp": now + int(lifetime),
        "iss": settings.better_auth_issuer,
        "aud": settings.better_auth_audience,
    }
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, settings.better_auth_secret.get_secret_value(), "HS256")


def example(settings: Settings, address: str) -> str:
    """Return a `curl` line that creates a task, ready to paste."""
    bearer = f"Authorization: Bearer {token(settings, USER, lifetime=86_400)}"
    return shlex.join(
        [
            *("curl", f"{address}/api/tasks"),
            *("-H", bearer),
            *("-H", "Content-Type: application/json"),
            *("-d", '{"title": "Buy groceries"}'),
        ]
    )


def _kept_secret(file: Path) -> str:
    """Read the secret, or make it once: of several processes that start together, one wins."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            draft = file.with_name(f"{file.name}.{os.getpid()}")
            descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_urlsafe(48))
            try:
                os.link(draft, file)
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        secret = file.read_text()
    except OSError as error:
        raise StartupError(f"DATA_DIR: cannot keep a secret there ({error.strerror})") from error
    if len(secret) < MINIMUM_SECRET_BYTES:
        raise StartupError(f"DATA_DIR: the file {file.name} there is damaged; delete it")
    return secret
