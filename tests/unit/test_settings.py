"""Settings: typed, checked at start, one line that names the variable and never its value."""

from pathlib import Path
from typing import Any

import pytest

from todo_api.app import signing_keys
from todo_api.auth.tokens import Expected
from todo_api.development import with_secret
from todo_api.errors import StartupError
from todo_api.settings import Settings, origin_of, variables

SECRET = "s" * 32
DATABASE = "postgresql://u:hunter2@db.example/x"


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in variables():
        monkeypatch.delenv(name, raising=False)


def load(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings.load()


def test_defaults_are_development_mode() -> None:
    settings = Settings.load()
    assert settings.development
    assert (settings.host, settings.port, settings.workers) == ("127.0.0.1", 8000, 1)
    assert settings.data_dir == Path(".data")
    assert settings.cors_origins == ("http://localhost:3000",)
    assert settings.row_security is True
    assert settings.auto_migrate is True
    assert settings.jwks_url is None


@pytest.mark.parametrize("name", ["DATABASE_URL", "NEON_DATABASE_URL", "NEON_DB_URL"])
def test_database_url_has_three_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = load(monkeypatch, BETTER_AUTH_SECRET=SECRET, **{name: DATABASE})
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == DATABASE
    assert "hunter2" not in repr(settings)
    assert SECRET not in repr(settings)


def test_origins_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "https://a.example, http://localhost:3000/ ,https://b.example:443"
    assert load(monkeypatch, FRONTEND_URL=given).cors_origins == (
        *("https://a.example", "http://localhost:3000", "https://b.example"),
    )
    assert load(monkeypatch, CORS_ORIGINS="https://c.example").cors_origins == (
        "https://c.example",
    )


def test_flags_win_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("PORT=1\nWORKERS=5\nHOST=::1\n")
    monkeypatch.setenv("PORT", "2")
    monkeypatch.setenv("WORKERS", "6")
    settings = Settings.load(port=3, host="")
    assert (settings.port, settings.workers, settings.host) == (3, 6, "::1")


def test_words_may_have_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, LOG_LEVEL="INFO", LOG_FORMAT="Json", ROW_SECURITY="OFF")
    assert (settings.log_level, settings.log_format, settings.row_security) == (
        *("info", "json", False),
    )


def test_host_loses_its_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, HOST="[::1]", METRICS_HOST="[::]")
    assert (settings.host, settings.metrics_host) == ("::1", "::")


def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, DATABASE_URL="", BETTER_AUTH_SECRET="").development


def test_published_keys_are_found_from_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, BETTER_AUTH_URL="https://app.example/")
    assert settings.jwks_url == "https://app.example/api/auth/jwks"
    assert not settings.development
    settings = load(monkeypatch, BETTER_AUTH_JWKS_URL="https://keys.example/jwks")
    assert settings.jwks_url == "https://keys.example/jwks"


@pytest.mark.parametrize(
    ("base_url", "key_set"),
    [
        ("https://app.example", "https://app.example/api/auth/jwks"),
        ("https://app.example:443//", "https://app.example/api/auth/jwks"),
        ("https://app.example/api/auth", "https://app.example/api/auth/jwks"),
        ("https://app.example/api/auth/", "https://app.example/api/auth/jwks"),
        ("https://App.Example/auth", "https://app.example/auth/jwks"),
        ("http://localhost:3000/a/b", "http://localhost:3000/a/b/jwks"),
    ],
)
def test_path_of_the_url_is_taken_as_better_auth_takes_it(
    monkeypatch: pytest.MonkeyPatch, base_url: str, key_set: str
) -> None:
    settings = load(monkeypatch, BETTER_AUTH_URL=base_url)
    assert settings.jwks_url == key_set
    expected = signing_keys(settings).published_expects
    origin = "/".join(key_set.split("/")[:3])
    assert expected == Expected(issuer=origin, audience=origin)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('DATABASE_URL="postgresql://hunter2\n', "line 1: cannot be parsed"),
        ("PORT=1\n\n# note\nDATABASE_URL: hunter2\n", "line 4: cannot be parsed"),
        ('A="hunter2" hunter2\n', "line 1: cannot be parsed"),
        ("PORT=1\r\nset DATABASE_URL=hunter2\r\n", "line 2: cannot be parsed"),
        ("=hunter2\n", "line 1: cannot be parsed"),
        ("export DATABASE_URL\n", "line 1: has no `=`"),
        (
            'A="hunter2\nDATABASE_URL=hunter2\nB="\n',
            "line 1: the quote that opens here also takes in DATABASE_URL",
        ),
        (
            "DATABASE_URL=hunter2\n\n\nDATABASE_URL=\n",
            "line 4: DATABASE_URL is already set on line 1",
        ),
        (
            "\nDATABASE_URL=${hunter2}\n",
            "line 2: DATABASE_URL refers with ${...} to a variable that is not set",
        ),
        (b"A=b\nDATABASE_URL=hunter2\xff\n", "line 2: must be UTF-8 text"),
        ("DATABASE_URL=hunter2".encode("utf-16"), "line 1: must be UTF-8 text"),
    ],
)
def test_line_of_the_file_that_cannot_be_used_stops_the_program(
    text: str | bytes, said: str
) -> None:
    """It would count as not set, and the program would serve another database."""
    Path(".env").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(StartupError) as caught:
        Settings.load()
    assert str(caught.value).startswith(f".env {said}")
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_file_that_cannot_be_read_stops_the_program(tmp_path: Path) -> None:
    file = Path(".env")
    file.mkdir()
    with pytest.raises(StartupError, match=r"^\.env: cannot be read \(Is a directory\)$"):
        Settings.load()
    file.rmdir()
    file.symlink_to(tmp_path / "missing")
    with pytest.raises(StartupError, match=r"^\.env: links to a file that does not exist$"):
        Settings.load()


def test_file_may_have_all_that_dotenv_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_OUTSIDE", "7")
    Path(".env").write_text(
        "\ufeff# first\n\nexport PORT = 80${FROM_OUTSIDE}\nOTHER='a\nb=c'\nOTHER=d\n"
        "workers=${N:-3}\n"
        "LOG_LEVEL=\nlog_format='json' # note\nPASSWORD=${not set}\nPOOL_SIZE=${workers}"
    )
    settings = Settings.load()
    assert (settings.port, settings.workers, settings.pool_size) == (807, 3, 3)
    assert (settings.log_level, settings.log_format) == ("info", "json")


@pytest.mark.parametrize("in_file", ["DATABASE_URL", "NEON_DATABASE_URL", "NEON_DB_URL"])
@pytest.mark.parametrize("name", ["DATABASE_URL", "NEON_DATABASE_URL", "NEON_DB_URL"])
def test_environment_wins_whichever_name_it_has(
    monkeypatch: pytest.MonkeyPatch, name: str, in_file: str
) -> None:
    Path(".env").write_text(f"{in_file}=postgresql://file/x\nBETTER_AUTH_SECRET={SECRET}\n")
    settings = load(monkeypatch, **{name: DATABASE})
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == DATABASE


STRINGS = [
    name
    for name, default in variables().items()
    if name
    not in {"CORS_ORIGINS", "FRONTEND_URL", "TRUSTED_PROXIES", "BETTER_AUTH_SECRET", "LOG_KEY"}
]


@pytest.mark.parametrize("name", STRINGS)
@pytest.mark.parametrize(
    ("value", "end"),
    [
        ("hunter2\n", "ends with white space (U+000A); remove it"),
        ("\u00a0hunter2", "begins with white space (U+00A0); remove it"),
        ("https://hunter2.example\u200b", "ends with white space (U+200B); remove it"),
        ("\t", "begins with white space (U+0009); remove it"),
    ],
)
def test_white_space_at_an_end_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, end: str
) -> None:
    with pytest.raises(StartupError) as caught:
        load(monkeypatch, **{name: value})
    said = str(caught.value)
    assert name in said.partition(": ")[0]
    assert said.endswith(f": {end}")


@pytest.mark.parametrize("name", ["BETTER_AUTH_SECRET", "LOG_KEY"])
def test_white_space_of_a_secret_is_kept_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The other side may have it too."""
    settings = load(monkeypatch, **{name: f"{SECRET}\n", "DATA_DIR": "x"})
    assert getattr(settings, name.lower()).get_secret_value() == f"{SECRET}\n"
    said = f"{name}: ends with white space (U+000A); remove it, unless the other side has it too"
    assert said in settings.warnings()
    assert SECRET not in str(settings.warnings())


def test_white_space_in_a_list_separates(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, TRUSTED_PROXIES=" 10.0.0.0/8,\n::1\n")
    assert list(map(str, settings.trusted_proxies)) == ["10.0.0.0/8", "::1/128"]


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({}, False),
        ({"BETTER_AUTH_URL": "http://localhost:3000"}, False),
        ({"BETTER_AUTH_URL": "http://[::1]:3000/auth"}, False),
        ({"BETTER_AUTH_URL": "https://app.example"}, True),
        ({"BETTER_AUTH_SECRET": SECRET, "DATABASE_URL": ""}, True),
        ({"BETTER_AUTH_SECRET": SECRET, "DATABASE_URL": DATABASE}, False),
    ],
)
def test_keys_of_production_without_a_database_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], warned: bool
) -> None:
    said = load(monkeypatch, **environment).warnings()
    assert [line.startswith("DATABASE_URL (or") for line in said] == [True] * warned


def test_development_mode_keeps_its_name_with_a_secret_of_its_own() -> None:
    settings = with_secret(Settings.load())
    assert settings.better_auth_secret is not None
    assert settings.development
    assert settings.warnings() == []
    assert with_secret(settings) is settings


WRONG: list[tuple[str, dict[str, str]]] = [
    ("DATABASE_URL", {"DATABASE_URL": "mysql://u:hunter2@db/x", "BETTER_AUTH_SECRET": SECRET}),
    ("DATABASE_URL", {"NEON_DB_URL": "hunter2", "BETTER_AUTH_SECRET": SECRET}),
    ("BETTER_AUTH_SECRET", {"BETTER_AUTH_SECRET": "hunter2" * 4}),
    (
        "BETTER_AUTH_SECRET",
        {"BETTER_AUTH_SECRET": '{"keys": [{"kty": "hunter2", "x": "hunter2"}]}'},
    ),
    ("BETTER_AUTH_SECRET", {"BETTER_AUTH_SECRET": "-----BEGIN PUBLIC KEY-----\nhunter2hunter2"}),
    ("BETTER_AUTH_URL", {"BETTER_AUTH_URL": "http://app.example/hunter2"}),
    ("BETTER_AUTH_URL", {"BETTER_AUTH_URL": "https://u:hunter2@app.example"}),
    ("BETTER_AUTH_URL", {"BETTER_AUTH_URL": "hunter2"}),
    ("BETTER_AUTH_URL", {"BETTER_AUTH_URL": "https://app.example/?hunter2"}),
    ("BETTER_AUTH_URL", {"BETTER_AUTH_URL": "https://app.example/auth#hunter2"}),
    (
        "BETTER_AUTH_JWKS_URL",
        {"BETTER_AUTH_URL": "https://a.example", "BETTER_AUTH_JWKS_URL": "http://hunter2.example"},
    ),
    ("BETTER_AUTH_URL", {"BETTER_AUTH_JWKS_URL": "https://hunter2.example/jwks"}),
    ("HOST", {"HOST": "0.0.0.0"}),  # noqa: S104
    ("PORT", {"PORT": "hunter2"}),
    ("PORT", {"PORT": "65536"}),
    ("TRUSTED_PROXIES", {"TRUSTED_PROXIES": "10.0.0.0/8, hunter2"}),
    ("TRUSTED_PROXIES", {"TRUSTED_PROXIES": ","}),
    ("WORKERS", {"WORKERS": "0"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "*"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "https://a.example/hunter2"}),
    ("CORS_ORIGINS", {"FRONTEND_URL": "hunter2"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "http://localhost:hunter2"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "http://[hunter2]"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "http://a..hunter2"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "http://hunter2 x"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "https://a.example?hunter2"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "https://u:hunter2@a.example"}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": ","}),
    ("CORS_ORIGINS", {"CORS_ORIGINS": "https://a.example,*,https://hunter2.example"}),
    ("BETTER_AUTH_SECRET", {"BETTER_AUTH_SECRET": "hunter2\udcff" * 8}),
    ("STATEMENT_TIMEOUT", {"STATEMENT_TIMEOUT": "nan"}),
    ("BETTER_AUTH_URL", {"BETTER_AUTH_URL": "https://host:hunter2"}),
    ("BETTER_AUTH_URL", {"BETTER_AUTH_URL": "https://hunter2℀.com"}),
    ("LOG_LEVEL", {"LOG_LEVEL": "hunter2"}),
    ("LOG_FORMAT", {"LOG_FORMAT": "hunter2"}),
    ("ROW_SECURITY", {"ROW_SECURITY": "hunter2"}),
    ("STATEMENT_TIMEOUT", {"STATEMENT_TIMEOUT": "0"}),
]


@pytest.mark.parametrize(("name", "environment"), WRONG)
def test_wrong_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, environment: dict[str, Any]
) -> None:
    with pytest.raises(StartupError) as caught:
        load(monkeypatch, **environment)
    said = str(caught.value)
    assert said.startswith((f"{name}: ", f"{name} (or "))
    assert "\n" not in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"BETTER_AUTH_URL": "app.example"}, "BETTER_AUTH_URL: must be an http(s) address"),
        ({"BETTER_AUTH_URL": "ftp://app.example"}, "BETTER_AUTH_URL: must be an http(s) address"),
        ({"CORS_ORIGINS": ","}, "CORS_ORIGINS (or FRONTEND_URL): must name at least one"),
        (
            {"NEON_DB_URL": "x", "BETTER_AUTH_SECRET": SECRET},
            (
                "DATABASE_URL (or NEON_DATABASE_URL, NEON_DB_URL): "
                "must start with postgresql:// or postgres://"
            ),
        ),
        (
            {"BETTER_AUTH_JWKS_URL": "https://keys.example"},
            (
                "BETTER_AUTH_URL: must be set beside BETTER_AUTH_JWKS_URL, "
                "because tokens are checked against its origin"
            ),
        ),
        ({"PORT": "65536"}, "PORT: Input should be less than or equal to 65535"),
    ],
)
def test_line_is_the_variable_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], line: str
) -> None:
    with pytest.raises(StartupError) as caught:
        load(monkeypatch, **environment)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("https://App.Example/a/b?c", "https://app.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("https://app.example:443", "https://app.example"),
        ("http://[::1]:80/", "http://[::1]"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_origin_is_spelled_as_a_browser_does(address: str, origin: str) -> None:
    assert origin_of(address) == origin
