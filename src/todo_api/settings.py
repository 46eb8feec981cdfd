"""Every setting, read from the environment and `.env`, checked once at start, and frozen.

`.env.example` lists all variables and their defaults. A wrong value stops the program with one line
that names the variable and never shows the value.
"""

import unicodedata
from collections.abc import Mapping
from importlib.util import find_spec
from ipaddress import ip_address
from os import environ
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    AnyHttpUrl,
    BeforeValidator,
    Field,
    IPvAnyNetwork,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from todo_api import env_file
from todo_api.errors import StartupError

MINIMUM_SECRET_BYTES = 32
"""RFC 7518, section 3.2: an HS256 key is at least as long as the hash."""

RATE_SECONDS = 60.0
"""Rate limits are quotas per minute."""


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only be this machine."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def origin_of(address: str) -> str:
    """Return the origin of an http(s) address as a browser spells it (RFC 6454, section 6.2)."""
    url = AnyHttpUrl(address)
    origin = AnyHttpUrl.build(scheme=url.scheme, host=url.host or "", port=url.port)
    return str(origin).rstrip("/")


def _wrong(sentence: str, variable: str | None = None) -> PydanticCustomError:
    """Return the error for a wrong value; `variable` is for checks of several fields."""
    return PydanticCustomError("setting", sentence, {"variable": variable})


def _split(value: object) -> object:
    """Split a comma-separated text; the default is a tuple already."""
    if not isinstance(value, str):
        return value
    items = [item.strip() for item in value.split(",") if item.strip()]
    if not items:
        raise _wrong("must name at least one")
    return items


def _invisible_end(text: str) -> str | None:
    """Say which end of a text is white space or another character that nobody sees, if one is."""
    for verb, character in (("begins", text[:1]), ("ends", text[-1:])):
        if character and (character.isspace() or unicodedata.category(character)[0] in "CZ"):
            return f"{verb} with white space (U+{ord(character):04X})"
    return None


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _without_brackets(host: str) -> str:
    return host.removeprefix("[").removesuffix("]")


def _database_url(value: SecretStr) -> SecretStr:
    # Not PostgresDsn: it refuses addresses that libpq takes, such as one of a socket.
    if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise _wrong("must start with postgresql:// or postgres://")
    return value


def _shared_secret(value: SecretStr) -> SecretStr:
    secret = value.get_secret_value().strip()
    if len(secret.encode()) < MINIMUM_SECRET_BYTES:
        raise _wrong(f"must be at least {MINIMUM_SECRET_BYTES} bytes")
    if secret.startswith(("{", "[", "-----BEGIN")):
        raise _wrong("must be the secret itself, not a key set, a JWK or a PEM key")
    return value


def _web_address(address: str) -> AnyHttpUrl:
    url = AnyHttpUrl(address)
    if ".." in (url.host or ""):
        raise _wrong("must have a host name without an empty part")
    return url


def _issuer_address(address: str) -> str:
    url = _web_address(address)
    if url.username is not None or url.password is not None:
        raise _wrong("must be an http(s) address without credentials")
    if url.scheme != "https" and not is_loopback(url.host or ""):
        raise _wrong("must be https, except on loopback")
    return str(url).rstrip("/")


def _better_auth_url(address: str) -> str:
    issuer = _issuer_address(address)
    if "?" in issuer or "#" in issuer:
        raise _wrong("must be without a query and a fragment, like Better Auth's baseURL")
    return issuer


def _origin(address: str) -> str:
    if address == "*":
        raise _wrong("must name each origin, because * would let every site call the API")
    origin = origin_of(address)
    if str(_web_address(address)) != f"{origin}/":
        raise _wrong("must be origins such as https://app.example.com, without a path")
    return origin


def _opentelemetry(wanted: bool) -> bool:
    if wanted and not _can_export():
        raise _wrong("needs `pip install 'fastapi[opentelemetry]'`")
    return wanted


def _can_export() -> bool:
    """Tell whether the packages of the extra `opentelemetry` are installed."""
    needed = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    try:
        return all(find_spec(name) for name in needed)
    except ModuleNotFoundError:  # a package above it
        return False


DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
SharedSecret = Annotated[SecretStr, AfterValidator(_shared_secret)]
BetterAuthUrl = Annotated[str, AfterValidator(_better_auth_url)]
IssuerAddress = Annotated[str, AfterValidator(_issuer_address)]
Origin = Annotated[str, AfterValidator(_origin)]
Host = Annotated[str, AfterValidator(_without_brackets)]
Quota = Annotated[int, Field(ge=0, le=1_000_000)]
Seconds = Annotated[float, Field(gt=0, le=60)]
AnyCase = BeforeValidator(_lower)
CommaSeparated = BeforeValidator(_split)


class _EnvFile(DotEnvSettingsSource):
    """Reads `.env` strictly."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        names = {name.lower() for name in variables()}
        given = env_file.read(Path(".env"), names, environ)
        return {name.lower(): value for name, value in given.items() if value}


class Settings(BaseSettings):
    """The program's configuration; `Settings.load()` makes one."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
    )

    database_url: DatabaseUrl | None = Field(
        default=None,
        validation_alias=AliasChoices("DATABASE_URL", "NEON_DATABASE_URL", "NEON_DB_URL"),
    )
    data_dir: Path = Path(".data")

    better_auth_url: BetterAuthUrl | None = None
    better_auth_secret: SharedSecret | None = None
    better_auth_jwks_url: IssuerAddress | None = None
    better_auth_issuer: str | None = None
    better_auth_audience: str | None = None

    cors_origins: Annotated[tuple[Origin, ...], NoDecode, CommaSeparated] = Field(
        default=("http://localhost:3000",),
        min_length=1,
        validation_alias=AliasChoices("CORS_ORIGINS", "FRONTEND_URL"),
    )
    host: Host = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=256)
    keep_alive_timeout: int = Field(default=75, ge=1, le=3600)
    auto_migrate: bool = True
    row_security: bool = True
    log_level: Annotated[Literal["debug", "info", "warning", "error"], AnyCase] = "info"
    log_format: Annotated[Literal["console", "json"], AnyCase] | None = None

    pool_size: int = Field(default=10, ge=1, le=1000)
    pool_timeout: Seconds = 3.0
    connect_timeout: Seconds = 10.0
    statement_timeout: Seconds = 5.0
    lock_timeout: Seconds = 2.0
    prepared_statements: bool = True
    request_timeout: float = Field(default=30.0, gt=0, le=600)
    max_in_flight: int = Field(default=100, ge=1, le=100_000)
    rate_limit: Quota = 0
    rate_limit_store: Annotated[Literal["memory", "postgresql"], AnyCase] = "memory"
    rate_limit_failures: Quota = 0
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], NoDecode, CommaSeparated] = ()
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    metrics_host: Host = "127.0.0.1"
    opentelemetry: Annotated[bool, AfterValidator(_opentelemetry)] = False
    log_key: SecretStr | None = None
    shutdown_timeout: int = Field(default=25, ge=1, le=600)

    _has_own_secret: bool = PrivateAttr(default=False)

    LISTS: ClassVar = {"cors_origins", "trusted_proxies"}
    """Fields of which each item is stripped."""
    SECRETS: ClassVar = {"better_auth_secret", "log_key"}
    """Fields whose white space counts, because another program may have it too."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of settings, the one that wins first."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, _EnvFile(settings_cls)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Return the settings of the environment and `.env`; an override wins if it has a value.

        Raises `StartupError` with one line for the first wrong variable.
        """
        given = {name: value for name, value in overrides.items() if value not in {None, ""}}
        try:
            return cls(**given)
        except ValidationError as error:
            raise StartupError(_first_line(error)) from None

    def with_own_secret(self, secret: SecretStr) -> Self:
        """Return settings of development mode with a secret that was made on this machine."""
        settings = self.model_copy(update={"better_auth_secret": secret})
        settings._has_own_secret = True  # noqa: SLF001  an object of this class
        return settings

    @property
    def development(self) -> bool:
        """Whether neither a database nor a key is configured, so both are made on this machine."""
        return self._has_own_secret or not (
            self.database_url or self.better_auth_url or self.better_auth_secret
        )

    def require_keys(self) -> None:
        """Raise `StartupError` if no token could be verified. A migration needs no key."""
        if not (self.development or self.better_auth_url or self.better_auth_secret):
            raise StartupError(
                "BETTER_AUTH_URL: set it, or BETTER_AUTH_SECRET, so that tokens can be verified"
            )

    def warnings(self) -> list[str]:
        """Return a line for each setting that is probably not meant so."""
        found = []
        for field in sorted(self.SECRETS):
            secret: SecretStr | None = getattr(self, field)
            if secret and (end := _invisible_end(secret.get_secret_value())):
                found.append(f"{_label(field)}: {end}; remove it, unless the other side has it too")
        if self.database_url is None and self._serves_others:
            found.append(
                f"{_label('database_url')}: not set or empty, so the embedded database in "
                f"DATA_DIR is served; set it in production"
            )
        return found

    @property
    def _serves_others(self) -> bool:
        """Whether tokens come from another machine, or may come from there."""
        if self.better_auth_url and not is_loopback(AnyHttpUrl(self.better_auth_url).host or ""):
            return True
        return self.better_auth_secret is not None and not self.development

    @property
    def jwks_url(self) -> str | None:
        """The address of the published keys, or None if only the shared secret is used.

        Better Auth answers under the path of its `baseURL`, and without one under `/api/auth`.
        """
        if self.better_auth_jwks_url or not self.better_auth_url:
            return self.better_auth_jwks_url
        has_path = self.better_auth_url != origin_of(self.better_auth_url)
        return f"{self.better_auth_url}{'' if has_path else '/api/auth'}/jwks"

    @field_validator("*", mode="before")
    @classmethod
    def _no_invisible_ends(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and info.field_name not in cls.LISTS | cls.SECRETS:
            end = _invisible_end(value)
            if end:
                raise _wrong(f"{end}; remove it")
        return value

    @property
    def publishes_own_keys(self) -> bool:
        """Whether the key set comes from the same origin as the tokens."""
        if self.better_auth_url is None:
            return False
        published_by = self.better_auth_jwks_url or self.better_auth_url
        return origin_of(published_by) == origin_of(self.better_auth_url)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.better_auth_jwks_url and not self.better_auth_url:
            raise _wrong(
                "must be set beside BETTER_AUTH_JWKS_URL, "
                "because tokens are checked against its origin",
                variable="BETTER_AUTH_URL",
            )
        if self.development and not is_loopback(self.host):
            raise _wrong(
                "must be a loopback address in development mode; "
                "set BETTER_AUTH_URL or BETTER_AUTH_SECRET to serve others",
                variable="HOST",
            )
        return self


def variables() -> dict[str, Any]:
    """Return the default of every variable that is read, aliases included."""
    return {
        variable: Settings.model_fields[field].default
        for field in Settings.model_fields
        for variable in _variables_of(field)
    }


def _variables_of(field: str) -> list[str]:
    """Return the variables that set a field, the documented one first."""
    alias = Settings.model_fields[field].validation_alias
    return list(map(str, alias.choices)) if isinstance(alias, AliasChoices) else [field.upper()]


_SENTENCES = {
    "ip_any_network": "must be addresses or networks such as 10.0.0.0/8",
    "too_short": "must name at least one",
    "url_parsing": "must be an http(s) address",
    "url_scheme": "must be an http(s) address",
}
"""What we say for an error of pydantic, by its type, if its own sentence is not plain."""


def _first_line(error: ValidationError) -> str:
    """Return the first error as `VARIABLE: sentence`, without the value."""
    first = error.errors(include_url=False, include_input=False)[0]
    variable = first.get("ctx", {}).get("variable") or _label(str(first["loc"][0]))
    return f"{variable}: {_SENTENCES.get(first['type'], first['msg'])}"


def _label(name: str) -> str:
    """Return the variables of the field that has this name, or that one of them has."""
    for field in Settings.model_fields:
        first, *others = _variables_of(field)
        if name in {field, first, *others}:
            return f"{first} (or {', '.join(others)})" if others else first
    return name
