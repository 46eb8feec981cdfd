"""A real Better Auth to get tokens from: the Node program in `tests/interop/issuer`, and its API.

    async with Issuer.start(empty_database_url) as issuer:
        session = await issuer.sign_up("ada@example.com", "a long password", "Ada")
        token = await issuer.token(session)

Better Auth takes some 100 ms of CPU for each password: sign up once and keep the session.
"""

import asyncio
import base64
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import httpx2

from support.http import LOCAL

FOLDER = Path(__file__).parents[1] / "interop" / "issuer"
SECRET = "the secret that Better Auth and the service share"

Algorithm: TypeAlias = Literal["EdDSA", "ES256", "ES512", "RS256", "PS256"]
JwksMode: TypeAlias = Literal["ok", "error", "html", "hang"]

_START_SECONDS = 30
_STOP_SECONDS = 5
_REDIRECT = "https://application.example/callback"
"""Where the OAuth provider sends the browser with its code. Nobody goes there."""


def missing() -> str | None:
    """Say in one sentence what is missing to run the issuer, or None."""
    if shutil.which("node") is None:
        return "The program `node` (20.11 or newer) is not on the PATH."
    if not (FOLDER / "node_modules" / ".build" / "client.js").exists():
        return "The packages are not installed: run `make .venv/issuer`."
    return None


@dataclass(frozen=True)
class Session:
    """A user who is signed in."""

    user_id: str
    token: str
    """The opaque session token, as Better Auth stores it."""
    signed_token: str
    """The same with its signature, `token.signature`: what the bearer plugin gives to a client."""
    cookies: Mapping[str, str]


@dataclass(frozen=True)
class ProviderTokens:
    """What Better Auth's OAuth provider gives to an application that the user signs in to."""

    access_token: str
    """A JWT (`typ: at+jwt`) when it was asked for a resource, else opaque."""
    id_token: str
    """A JWT for the application: its `aud` is the application's id."""


class Issuer:
    """A running Better Auth. Made by `start`."""

    url: str
    """Its `baseURL`: what `BETTER_AUTH_URL` must be."""

    def __init__(self, url: str, path: str, client: httpx2.AsyncClient) -> None:
        self.url = f"{url}{path}"
        self._base = path or "/api/auth"
        self._client = client

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        database_url: str,
        *,
        secret: str = SECRET,
        host: str = "127.0.0.1",
        port: int = 0,
        trusted_origins: Sequence[str] = ("http://localhost:3000",),
        algorithm: Algorithm = "EdDSA",
        expiration_time: str = "15m",
        issuer: str | None = None,
        audience: str | None = None,
        user_ids: Literal["uuid", "serial"] | None = None,
        cookie_cache: Literal["secret", "key set"] | None = None,
        resources: Sequence[str] | None = None,
        api_url: str | None = None,
        delete_hook: Literal["beforeDelete", "afterDelete"] = "beforeDelete",
        folder: Path | None = None,
        path: str = "",
    ) -> AsyncIterator[Self]:
        """Run Better Auth on an empty database, or on one that it has used before.

        Args:
            database_url: PostgreSQL; on one used before, the users and the keys are still there.
            secret: Better Auth's `secret`.
            host: `127.0.0.1` or `localhost`, as `url` shall say it; it listens on 127.0.0.1.
            port: 0 takes a free one; give the old one to come back under the same `url`.
            trusted_origins: which other origins a browser may call it from.
            algorithm: of the keys that it makes. One that is already in the database goes on
                signing, whatever its algorithm, until `rotate_key`.
            expiration_time: of its JWTs, such as `15m` or `2s`.
            issuer: `iss`, in place of `url`.
            audience: `aud`, in place of `url`.
            user_ids: `uuid` or `serial` in place of 32 letters and digits.
            cookie_cache: what signs the JWT in the cookie `session_data`: the secret (HS256) or
                the key set. None: there is no such cookie. With it, whoever keeps the cookies
                of a session that has ended gets new tokens for five minutes more.
            resources: the addresses that the OAuth provider issues tokens for; None: no provider.
            api_url: our service. When a user is deleted, `DELETE {api_url}/api/account` is called.
            delete_hook: when it is called.
            path: of its `baseURL`, such as `/auth`.
            folder: files to serve at `/`, beside Better Auth's own client at `/client.js`.
        """
        config = {
            "databaseUrl": database_url,
            "secret": secret,
            "host": host,
            "port": port,
            "trustedOrigins": trusted_origins,
            "keyAlgorithm": algorithm,
            "expirationTime": expiration_time,
            "issuer": issuer,
            "audience": audience,
            "userIds": user_ids,
            "cookieCache": cookie_cache,
            "resources": resources,
            "apiUrl": api_url,
            "deleteHook": delete_hook,
            "path": path,
            "folder": None if folder is None else str(folder),
        }
        async with (
            _running(config) as url,
            # A browser sends the origin; without one, Better Auth refuses a POST with cookies.
            httpx2.AsyncClient(
                base_url=url, headers={"Origin": url}, **LOCAL | {"timeout": _START_SECONDS}
            ) as client,
        ):
            yield cls(url, path, client)

    async def sign_up(
        self, email: str, password: str, name: str, image: str | None = None
    ) -> Session:
        """Create a user. Better Auth then sends the verification e-mail; see below."""
        body = {"email": email, "password": password, "name": name}
        return await self._sign("up", body if image is None else {**body, "image": image})

    async def sign_in(self, email: str, password: str) -> Session:
        """Begin another session of a user."""
        return await self._sign("in", {"email": email, "password": password})

    async def token(self, session: Session) -> str:
        """Return a JWT for the service, fresh at every call."""
        answer = await self._send("GET", f"{self._base}/token", session)
        return str(answer.json()["token"])

    async def sign(self, **claims: object) -> str:
        """Return a JWT of any claims. Better Auth adds `exp`, `iss` and `aud` if not given."""
        return str((await self._control("sign", payload=claims))["token"])

    async def verification_token(self, email: str) -> str:
        """Return the HS256 token of the newest verification e-mail to this address."""
        return str((await self._control("verification-token", email=email))["token"])

    def session_cookie(self, session: Session) -> str:
        """Return the JWT in the session's cookie `session_data`. Needs `cookie_cache`."""
        # One that is too large for a cookie comes in numbered pieces.
        pieces = {
            int(name.rpartition(".")[2]): value
            for name, value in session.cookies.items()
            if name.startswith("better-auth.session_data.")
        }
        if pieces:
            return "".join(pieces[number] for number in sorted(pieces))
        return session.cookies["better-auth.session_data"]

    async def provider_tokens(
        self, session: Session, resource: str | None = None
    ) -> ProviderTokens:
        """Sign in to an application through the OAuth provider. Needs `resources`.

        Args:
            session: of the user who does.
            resource: one of `resources`, to be named in the access token's `aud`.
        """
        application = await self._control(
            "oauth-client", session, redirect_uris=[_REDIRECT], skip_consent=True
        )
        verifier = secrets.token_urlsafe(48)
        digest = hashlib.sha256(verifier.encode()).digest()
        asked = {
            "client_id": application["client_id"],
            "redirect_uri": _REDIRECT,
            **({} if resource is None else {"resource": resource}),
        }
        redirect = await self._send(
            "GET",
            f"{self._base}/oauth2/authorize",
            session,
            params={
                **asked,
                "response_type": "code",
                "scope": "openid profile email",
                "state": "state",
                "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
                "code_challenge_method": "S256",
            },
        )
        answer = await self._send(
            "POST",
            f"{self._base}/oauth2/token",
            data={
                **asked,
                "grant_type": "authorization_code",
                "code": parse_qs(urlsplit(redirect.headers["location"]).query)["code"][0],
                "code_verifier": verifier,
            },
            auth=(application["client_id"], application["client_secret"]),
        )
        tokens = answer.json()
        return ProviderTokens(tokens["access_token"], tokens["id_token"])

    async def delete_user(self, session: Session, password: str) -> httpx2.Response:
        """Delete the account, and return the answer, which may be a refusal by the hook."""
        return await self._request(
            "POST", f"{self._base}/delete-user", session, json={"password": password}
        )

    async def rotate_key(self) -> str:
        """Make a new key, which signs from now on, and return its `kid`. The old stay published."""
        return str((await self._control("rotate-key"))["kid"])

    async def withdraw_old_keys(self) -> int:
        """Publish only the newest key, and return how many are gone."""
        return int((await self._control("withdraw-old-keys"))["withdrawn"])

    async def jwks_requests(self) -> int:
        """Return how often the key set was asked for, since the start."""
        return int((await self._control("jwks-requests"))["requests"])

    async def fail_jwks(self, mode: JwksMode) -> None:
        """Answer the key set with a 500, with HTML or never; `ok` ends it."""
        await self._control("fail-jwks", mode=mode)

    async def _sign(self, direction: str, body: Mapping[str, str]) -> Session:
        answer = await self._send("POST", f"{self._base}/sign-{direction}/email", json=body)
        return Session(
            answer.json()["user"]["id"],
            answer.json()["token"],
            unquote(answer.headers["set-auth-token"]),
            dict(answer.cookies),
        )

    async def _control(
        self, name: str, session: Session | None = None, **body: object
    ) -> dict[str, Any]:
        answer = await self._send("POST", f"/test/{name}", session, json=body)
        result: dict[str, Any] = answer.json()
        return result

    async def _send(
        self, verb: str, path: str, session: Session | None = None, **options: Any
    ) -> httpx2.Response:
        """Send a request that must not fail."""
        answer = await self._request(verb, path, session, **options)
        assert answer.status_code < 400, f"{path}: {answer.status_code} {answer.text}"
        return answer

    async def _request(
        self, verb: str, path: str, session: Session | None = None, **options: Any
    ) -> httpx2.Response:
        cookies = {} if session is None else session.cookies
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
        answer = await self._client.request(
            verb, path, headers=headers if cookies else {}, **options
        )
        # Every session brings its own cookies.
        self._client.cookies.clear()
        return answer


@asynccontextmanager
async def _running(config: Mapping[str, Any]) -> AsyncIterator[str]:
    """Run the program, and yield its address. It ends with us however we do: its stdin closes."""
    process = await asyncio.create_subprocess_exec(
        "node",
        FOLDER / "server.mjs",
        json.dumps(config),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Nothing of the caller's: Better Auth reads many a variable, and so does Node.
        env={"PATH": os.environ["PATH"]},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            ready = (await process.stdout.readline()).decode().split()
        if ready[:1] != ["ready"]:
            raise RuntimeError("The issuer did not start; its own words are on stderr.")
        yield ready[1]
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
