"""Development mode: without a configured database and key, both are made, for loopback only."""

import os
import secrets
import shlex
import time
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp

import jwt
from pydantic import SecretStr

from todo_api.errors import StartupError
from todo_api.settings import MINIMUM_SECRET_BYTES, Settings

USER = "demo"
"""The user whose token the start-up message shows."""

USERS = (USER, "alice")
"""The users whose tokens the page `/docs` offers. Two, to see that each has their own tasks."""

LIFETIME = 86_400
"""How long a token of these users is valid, in seconds."""


def with_secret(settings: Settings) -> Settings:
    """Return the settings; in development mode they get the secret stored under `DATA_DIR`."""
    if not settings.development or settings.better_auth_secret is not None:
        return settings
    secret = SecretStr(_stored_secret(settings.data_dir / "development-secret"))
    return settings.with_own_secret(secret)


def token(settings: Settings, user: str, *, lifetime: float, email: str | None = None) -> str:
    """Return a token for `user`, signed with the shared secret and valid for `lifetime` seconds.

    Raises `StartupError` if no secret is configured.
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


def curl_example(settings: Settings, address: str) -> str:
    """Return a `curl` command line that creates a task."""
    bearer = f"Authorization: Bearer {token(settings, USER, lifetime=LIFETIME)}"
    return shlex.join(
        [
            *("curl", f"{address}/api/tasks"),
            *("-H", bearer),
            *("-H", "Content-Type: application/json"),
            *("-d", '{"title": "Buy groceries"}'),
        ]
    )


def _stored_secret(file: Path) -> str:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _create(file, secrets.token_urlsafe(48))
        secret = file.read_text()
    except OSError as error:
        raise StartupError(f"DATA_DIR: cannot keep a secret there ({error.strerror})") from error
    if len(secret) < MINIMUM_SECRET_BYTES:
        raise StartupError(f"DATA_DIR: the file {file.name} there is damaged; delete it")
    return secret


def _create(file: Path, text: str) -> None:
    """Create a file with its whole text at once, unless another process is faster."""
    descriptor, name = mkstemp(dir=file.parent)  # readable by its owner alone
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        with suppress(FileExistsError):
            file.hardlink_to(draft)
    finally:
        draft.unlink()
