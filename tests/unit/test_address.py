"""The reason of a failed connection is found in libpq's text, and no address or secret is."""

import psycopg
import pytest

from todo_api.database.address import Refusal, conninfo, refusal

AT = 'connection to server at "db.internal" (10.0.0.7), port 5432 failed: '
SOCKET = 'connection to server on socket "/run/secret place/.s.PGSQL.5432" failed: '
PASSWORD = 'password authentication failed for user "u"'
HBA = 'no pg_hba.conf entry for host "10.0.0.9", user "u", database "x", no encryption'
FULL = "sorry, too many clients already"
RESERVED = 'remaining connection slots are reserved for roles with the "pg_use_reserved" attribute'
CERTIFICATE = "SSL error: certificate verify failed"
NO_TLS = "server does not support SSL, but SSL was required"
GERMAN = 'Datenbank "x" existiert nicht'
FRENCH = "désolé, trop de clients sont déjà connectés"

TWO_HOSTS = f"""connection failed: {AT}Connection refused
\tIs the server running on that host and accepting TCP/IP connections?
Multiple connection attempts failed. All failures were:
- host: 'db.internal', port: None: connection failed: {AT}Connection refused
- host: 'db.internal', port: None: connection failed: {AT}FATAL:  {FULL}"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"connection failed: {AT}FATAL:  {PASSWORD}", Refusal(PASSWORD, by_server=True)),
        (f"connection failed: {SOCKET}FATAL:  {FULL}", Refusal(FULL, by_server=True)),
        (f"connection failed: {AT}FATAL:  {HBA}", Refusal(HBA, by_server=True)),
        (f"connection failed: {AT}FATAL:  {GERMAN}", Refusal(GERMAN, by_server=True)),
        (f"connection failed: {AT}致命错误:  {GERMAN}", Refusal(GERMAN, by_server=True)),
        (f"connection failed: {AT}ВАЖНО:  {GERMAN}", Refusal(GERMAN, by_server=True)),
        (f"connection failed: {AT}{CERTIFICATE}", Refusal(CERTIFICATE)),
        (f"connection failed: {AT}{NO_TLS}", Refusal(NO_TLS)),
        # With TLS first, and then without: the first reason is the one to know.
        (
            f"connection failed: {AT}FATAL:  {PASSWORD}\n{AT}FATAL:  {HBA}",
            Refusal(f"{PASSWORD}; {HBA}", by_server=True),
        ),
        (TWO_HOSTS, Refusal(f"Connection refused; {FULL}", by_server=True)),
        (
            "failed to resolve host 'db.internal': [Errno -2] Name or service not known",
            Refusal("Name or service not known"),
        ),
        # A password with an unescaped slash.
        (
            'connection is bad: invalid integer value "hunter2" for connection option "port"',
            Refusal("invalid integer value … for connection option …"),
        ),
        ("something with db.internal", Refusal("cannot connect")),
        ("", Refusal("cannot connect")),
    ],
)
def test_reason_is_found_and_the_address_is_not(text: str, expected: Refusal) -> None:
    assert refusal(psycopg.OperationalError(text)) == expected
    for secret in ("db.internal", "10.0.0.7", "/run", "hunter2"):
        assert secret not in expected.reason


@pytest.mark.parametrize(
    ("reason", "is_full"),
    [
        (FULL, True),
        (RESERVED, True),
        ("remaining connection slots are reserved for non-replication superuser connections", True),
        ('too many connections for role "u"', True),
        ('too many connections for database "x"', True),
        ("no more connections allowed (max_client_conn)", True),
        ("Max client connections reached", True),
        (PASSWORD, False),
        (HBA, False),
        ("the database system is starting up", False),
        (FRENCH, False),  # its SQLSTATE is not to be had
    ],
)
def test_full_server_is_known_by_its_reason(reason: str, is_full: bool) -> None:
    assert refusal(psycopg.OperationalError(f"{AT}FATAL:  {reason}")).is_full == is_full
    assert not refusal(psycopg.OperationalError(f"{AT}{reason}")).is_full


def test_time_out_has_no_reason_but_the_time() -> None:
    assert refusal(TimeoutError()) == Refusal("no answer in time")
    assert refusal(psycopg.errors.ConnectionTimeout()) == Refusal("no answer in time")


def test_own_parameters_win_over_the_url_and_others_do_not() -> None:
    given = conninfo("postgresql://h/x?client_encoding=LATIN1&keepalives_idle=5")
    assert "client_encoding=UTF8" in given
    assert "keepalives_idle=5" in given
    assert "fallback_application_name=todo-api" in given
