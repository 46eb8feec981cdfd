"""Every setting, typed, checked once at start, frozen, and passed in: nothing is read at import.

Names and defaults are the environment's; `.env.example` lists them all. A wrong value stops the
program with one line that names the variable and never shows the value.
"""

import re
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from todo_api.errors import StartupError

MINIMUM_SECRET_BYTES = 32
"""RFC 7518, section 3.2: an HS256 key is at least as long as the hash."""


RATE_SECONDS = 60.0
"""Rate limits are quotas per minute."""


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only be this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
"""A host name as a browser sends it: in lower case, and in punycode where it has other letters."""


def _web_address(value: str) -> SplitResult:
    """Split an http(s) address; `ValueError` where it is none, without its text."""
    try:
        url = urlsplit(value)
        host, _ = url.hostname or "", url.port
        if ":" in host:
            ip_address(host)
    except ValueError:
        raise ValueError("must be an http(s) address") from None
    if url.scheme not in {"http", "https"} or url.username is not None:
        raise ValueError("must be an http(s) address without credentials")
    if ":" not in host and not _HOST.fullmatch(host):
        raise ValueError("must have a plain host name (punycode for other letters)")
    return url


def origin_of(value: str) -> str:
    """Return the origin of an address as a browser spells it (RFC 6454, section 6.2)."""
    url = _web_address(value)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    default_port = {"http": 80, "https": 443}[url.scheme]
    port = "" if url.port in {None, default_port} else f":{url.port}"
    return f"{url.scheme}://{host}{port}"


class Settings(BaseSettings):
    """The program's configuration. Make one with `Settings.load()`."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
    )

    database_url: SecretStr | None = Field(
        default=None,
        validation_alias=AliasChoices("DATABASE_URL", "NEON_DATABASE_URL", "NEON_DB_URL"),
    )
    data_dir: Path = Path(".data")

    better_auth_url: str | None = None
    better_auth_secret: SecretStr | None = None
    better_auth_jwks_url: str | None = None
    better_auth_issuer: str | None = None
    better_auth_audience: str | None = None

    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=("http://localhost:3000",),
        validation_alias=AliasChoices("CORS_ORIGINS", "FRONTEND_URL"),
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=256)
    auto_migrate: bool = True
    row_security: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] | None = None

    pool_size: int = Field(default=10, ge=1, le=1000)
    pool_timeout: float = Field(default=3.0, gt=0, le=60)
    connect_timeout: float = Field(default=10.0, gt=0, le=60)
    statement_timeout: float = Field(default=5.0, gt=0, le=60)
    lock_timeout: float = Field(default=2.0, gt=0, le=60)
    prepared_statements: bool = True
    request_timeout: float = Field(default=30.0, gt=0, le=600)
    max_in_flight: int = Field(default=100, ge=1, le=100_000)
    rate_limit: int = Field(default=0, ge=0, le=1_000_000)
    rate_limit_store: Literal["memory", "postgresql"] = "memory"
    rate_limit_failures: int = Field(default=0, ge=0, le=1_000_000)
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = ()
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    metrics_host: str = "127.0.0.1"
    opentelemetry: bool = False
    log_key: SecretStr | None = None
    shutdown_timeout: int = Field(default=25, ge=1, le=600)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the environment and `.env`; what is not None in `overrides` wins.

        Raises `StartupError` with one line for the first wrong variable.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        try:
            settings = cls(**given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise StartupError(f"{_variable(first['loc'])}: {_plain(first['msg'])}") from None
        except UnicodeDecodeError:
            raise StartupError(".env: must be UTF-8 text") from None
        settings._check_together()
        return settings

    @field_validator("database_url")
    @classmethod
    def _postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(
            ("postgresql://", "postgres://")
        ):
            raise ValueError("must start with postgresql:// or postgres://")
        return value

    @field_validator("better_auth_secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        secret = value.get_secret_value().strip()
        if len(secret.encode()) < MINIMUM_SECRET_BYTES:
            raise ValueError(f"must be at least {MINIMUM_SECRET_BYTES} bytes")
        if secret.startswith(("{", "[", "-----BEGIN")):
            raise ValueError("must be the secret itself, not a key set, a JWK or a PEM key")
        return value

    @field_validator("better_auth_url", "better_auth_jwks_url")
    @classmethod
    def _https(cls, value: str | None) -> str | None:
        if value is None:
            return None
        url = _web_address(value)
        if url.scheme != "https" and not is_loopback(url.hostname or ""):
            raise ValueError("must be https, except on loopback")
        return value.rstrip("/")

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _origins(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        items = [item.strip().rstrip("/") for item in value.split(",") if item.strip()]
        for item in items:
            if item == "*":
                raise ValueError("must name each origin: * would let every site call the API")
            if item.count("/") > len("//") or "?" in item or "#" in item:
                raise ValueError("must be origins such as https://app.example.com, without a path")
        if not items:
            raise ValueError("must name at least one origin")
        return tuple(origin_of(item) for item in items)

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _networks(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        items = [item.strip() for item in value.split(",") if item.strip()]
        for item in items:
            try:
                ip_network(item)
            except ValueError:
                raise ValueError("must be addresses or networks such as 10.0.0.0/8") from None
        return tuple(items)

    @field_validator("host", "metrics_host")
    @classmethod
    def _without_brackets(cls, value: str) -> str:
        return value.removeprefix("[").removesuffix("]")

    @field_validator("log_level", "log_format", "rate_limit_store", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @property
    def development(self) -> bool:
        """No database and no key configured: a private try-out on loopback."""
        return not (self.database_url or self.better_auth_url or self.better_auth_secret)

    @property
    def jwks_url(self) -> str | None:
        """Where the published keys are, or None where only the shared secret counts."""
        if self.better_auth_jwks_url or not self.better_auth_url:
            return self.better_auth_jwks_url
        return f"{self.better_auth_url}/api/auth/jwks"

    def _check_together(self) -> None:
        """Check what no single variable can tell."""
        if self.better_auth_jwks_url and not self.better_auth_url:
            raise StartupError(
                "BETTER_AUTH_URL: must be set beside BETTER_AUTH_JWKS_URL; "
                "tokens are checked against its origin"
            )
        if self.database_url and not (self.better_auth_url or self.better_auth_secret):
            raise StartupError(
                "BETTER_AUTH_URL: set it, or BETTER_AUTH_SECRET, so that tokens can be verified"
            )
        if self.opentelemetry and not _can_export():
            raise StartupError("OPENTELEMETRY: needs `pip install 'todo-api[opentelemetry]'`")
        if self.development and not is_loopback(self.host):
            raise StartupError(
                "HOST: must be a loopback address in development mode; "
                "set BETTER_AUTH_URL or BETTER_AUTH_SECRET to serve others"
            )


def _can_export() -> bool:
    """Tell whether the packages of the extra `opentelemetry` are installed."""
    needed = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    try:
        return all(find_spec(name) for name in needed)
    except ModuleNotFoundError:  # a package above it
        return False


def variables() -> dict[str, Any]:
    """Return every variable that is read, aliases included, with its field's default."""
    found: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        names = alias.choices if isinstance(alias, AliasChoices) else [name.upper()]
        found.update({str(each): field.default for each in names})
    return found


def _variable(location: tuple[int | str, ...]) -> str:
    """Name the variable of a validation error, and its other names: any of them may be set."""
    name = str(location[0]) if location else "settings"
    for field in Settings.model_fields.values():
        alias = field.validation_alias
        if isinstance(alias, AliasChoices) and name in alias.choices:
            first, *others = map(str, alias.choices)
            return f"{first} (or {', '.join(others)})"
    return name.upper()


def _plain(message: str) -> str:
    """Drop pydantic's prefix from a message of ours."""
    return message.removeprefix("Value error, ")
