"""Everything on docs/typescript.md runs: its commands, its files, in Node and in a browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from support import browser, issuer, node
from support.http import LOCAL
from support.program import environment, serving
from support.requirements import need
from support.waiting import wait_for
from todo_api.http.openapi import error_classes

DOCS = Path(__file__).parents[2] / "docs"
SCENES = Path(__file__).parent / "page"
PAGE = (DOCS / "typescript.md").read_text()
FILES = re.findall(r"^```ts\n// (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
(JWKS,) = re.findall(r"^```sql\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
INSTALL, START, SETTINGS, SIGN_UP, TYPES = re.findall(
    r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE
)
PASSWORD = "a long password"


@dataclass(frozen=True)
class Project:
    """The page's files in a folder, and the addresses of this test in place of the page's."""

    folder: Path
    website: int
    service: int
    database: str

    def text(self, example: str) -> str:
        """Return an example of the page with the addresses of this test."""
        ports = example.replace("3000", str(self.website)).replace("8000", str(self.service))
        return ports.replace("postgresql://localhost/todo", f"'{self.database}'")

    def make(self) -> None:
        """Write the files of the page, and link the packages that it installs."""
        shutil.copytree(SCENES, self.folder, dirs_exist_ok=True)
        for path, content in FILES:
            file = self.folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.text(content))
        packages = self.folder / "node_modules"
        for source in (issuer.FOLDER / "node_modules", node.PACKAGES):
            # A scope, such as @types, has packages from both.
            for entry in [*source.glob("[!@]*"), *source.glob("@*/*")]:
                link = packages / entry.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(entry.resolve())
        (packages / ".bin").unlink()
        (packages / ".bin").mkdir()
        for source in (issuer.FOLDER / "node_modules", node.PACKAGES):
            for program in (source / ".bin").iterdir():
                link = packages / ".bin" / program.name
                if not link.exists():
                    link.symlink_to(program.resolve())
        (self.folder / "package.json").write_text('{"type": "module"}')

    def run(self, commands: str, **variables: str) -> str:
        """Run commands of the page, which must succeed, and return what they print."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.text(commands)],
            cwd=self.folder,
            env=environment(npm_config_offline="true", BETTER_AUTH_TELEMETRY="0", **variables),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def serving(self, command: str) -> Iterator[None]:
        """Run the page's server, and end it afterwards."""
        log = (self.folder / "website.log").open("w")
        process = subprocess.Popen(
            command.split(),
            cwd=self.folder,
            env=environment(**self.variables),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for(lambda: browser.taken(self.website) or process.poll() is not None)
            assert process.poll() is None, (self.folder / "website.log").read_text()
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.close()

    @property
    def variables(self) -> dict[str, str]:
        """The variables of the page's own programs."""
        return {"DATABASE_URL": self.database, "BETTER_AUTH_SECRET": issuer.SECRET}


def ports() -> tuple[int, int]:
    """Return two ports where nobody listens."""
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, empty_database_url_of_module: str
) -> Iterator[Project]:
    """Return the page's files, with everything that the page starts running."""
    need(issuer.missing() or node.missing())
    folder = tmp_path_factory.mktemp("todo")
    made = Project(folder, *ports(), empty_database_url_of_module)
    made.make()
    migrate, serve = START.replace("$(openssl rand -hex 32)", f"'{issuer.SECRET}'").rsplit("\n", 2)[
        :2
    ]
    made.run(migrate)
    exported = re.findall(r"^export (\w+)=(.*)$", SETTINGS, re.MULTILINE)
    assert SETTINGS.splitlines()[len(exported) :] == ["make run"]
    settings = {name: made.text(value).strip("'") for name, value in exported}
    arguments = ("--port", str(made.service))
    with made.serving(serve), serving(folder, *arguments, **settings):
        made.run(TYPES)
        yield made


@pytest.fixture(scope="module")
def seen(project: Project) -> dict[str, Any]:
    """Return what each scene of `use.ts` has seen, with a user who is signed in."""
    with signed_up(project, "ada@example.com") as client:
        cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    printed = project.run(f"npx tsx use.ts '{cookie}'", **project.variables)
    scenes: dict[str, Any] = json.loads(printed)
    return scenes


@contextmanager
def signed_up(project: Project, email: str) -> Iterator[httpx2.Client]:
    """Sign a user up, and yield a client of Better Auth with their cookies."""
    website = f"http://localhost:{project.website}"
    user = {"email": email, "password": PASSWORD, "name": "Ada"}
    with httpx2.Client(base_url=website, headers={"Origin": website}, **LOCAL) as client:
        assert client.post("/api/auth/sign-up/email", json=user).status_code == 200
        yield client


def test_page_leads_from_an_empty_folder_to_a_first_answer(project: Project) -> None:
    assert project.run(SIGN_UP.replace("ada@", "first@")).endswith("[]")


def test_every_file_compiles(project: Project) -> None:
    project.run("npx tsc --project tsconfig.json")


def test_page_installs_the_versions_that_the_tests_use() -> None:
    pinned: dict[str, str] = {}
    for folder in (issuer.FOLDER, node.FOLDER):
        package = json.loads((folder / "package.json").read_text())
        pinned |= package.get("dependencies", {}) | package["devDependencies"]
    installed = dict(re.findall(r"(@?[\w/-]+)@([\d.]+)", INSTALL))
    assert len(installed) == 8
    assert installed == {name: pinned[name] for name in installed}


def test_typescript_is_only_on_pages_whose_typescript_is_tested() -> None:
    assert len(FILES) == PAGE.count("```ts")
    pages = {page.name for page in DOCS.rglob("*.md") if "```ts" in page.read_text()}
    assert pages == {"api.md", "typescript.md"}


def test_added_plugin_needs_the_migration_of_the_page(
    project: Project, tmp_path: Path, empty_database_url: str
) -> None:
    """Another tool runs the SQL, and then Better Auth finds nothing to do."""
    other = Project(tmp_path, project.website, project.service, empty_database_url)
    other.make()
    plugin = "  plugins: [jwt()],\n"
    file = tmp_path / "lib" / "auth.ts"
    with_plugin = file.read_text()
    file.write_text(with_plugin.replace(plugin, ""))
    without = other.run("npx tsx migrate.ts", **other.variables)
    assert 'create table "user"' in without
    assert "jwks" not in without
    file.write_text(with_plugin)
    with psycopg.connect(empty_database_url, autocommit=True) as sql:
        sql.execute(JWKS.encode())
    assert other.run("npx tsx migrate.ts", **other.variables) == ";\n"
    with psycopg.connect(empty_database_url, autocommit=True) as sql:
        sql.execute("DROP TABLE jwks")
    assert other.run("npx tsx migrate.ts", **other.variables) == JWKS


def test_requests_at_the_same_time_share_a_token(seen: dict[str, Any]) -> None:
    assert seen["at the same time"] == {"tokens": 1, "requests": 6}


def test_token_is_renewed_before_it_expires(seen: dict[str, Any]) -> None:
    assert seen["about to expire"] == {"tokens": 2, "requests": 4}


def test_expired_token_is_renewed_once(seen: dict[str, Any]) -> None:
    """The body is sent again. A token that is expired again is an error."""
    assert seen["expired"] == {"tokens": 2, "requests": 2, "title": "once"}
    assert seen["always expired"] == {"tokens": 2, "requests": 2, "todo": "sign in"}


def test_refused_token_is_not_renewed(seen: dict[str, Any]) -> None:
    assert seen["refused"] == {"tokens": 1, "requests": 1, "todo": "sign in"}


def test_server_reads_the_tasks_of_the_user_of_a_request(seen: dict[str, Any]) -> None:
    titles, stranger = seen["server"]
    assert "open" in titles
    assert "done" not in titles
    assert stranger == "UNAUTHORIZED"


def test_errors_say_what_to_do(seen: dict[str, Any]) -> None:
    renamed, stale, blank, silence = seen["rename"]
    assert renamed["title"] == "second"
    assert stale["todo"] == "reload"
    assert (blank["todo"], blank["fields"]) == ("correct", {"title": "Title cannot be empty"})
    assert silence["todo"] == "try again"
    codes = re.findall(r'case "(\w+)":', dict(FILES)["lib/errors.ts"])
    assert set(codes) <= {each.code for each in error_classes()}


def test_route_of_next_js_publishes_the_keys(seen: dict[str, Any]) -> None:
    assert seen["route"] == 1


def test_deleted_user_leaves_no_tasks(project: Project) -> None:
    api = f"http://localhost:{project.service}/api/tasks"
    with (
        signed_up(project, "eve@example.com") as client,
        psycopg.connect(project.database, autocommit=True) as sql,
    ):
        bearer = {"Authorization": f"Bearer {client.get('/api/auth/token').json()['token']}"}
        owner = client.post(api, headers=bearer, json={"title": "left"}).json()["user_id"]
        stored = "SELECT title FROM tasks WHERE user_id = %s"
        assert sql.execute(stored, (owner,)).fetchall() == [("left",)]
        deletion = client.post("/api/auth/delete-user", json={"password": PASSWORD})
        assert deletion.status_code == 200
        assert sql.execute(stored, (owner,)).fetchall() == []
        assert sql.execute('SELECT FROM "user" WHERE id = %s', (owner,)).fetchall() == []


IN_THE_BROWSER = """async ({ email, password }) => {
    await page.authClient.signUp.email({ email, password, name: "Bob" });
    const { data } = await page.tasks.POST("/api/tasks", { body: { title: "from a page" } });
    const listed = await page.tasks.GET("/api/tasks");
    return [data.title, listed.data.length];
}"""


async def test_browser_signs_up_and_creates_a_task(project: Project) -> None:
    """The page is on Better Auth's origin, and the service is on another one."""
    need(browser.missing())
    project.run(
        "npx esbuild lib/browser.ts --bundle --format=iife --global-name=page --outfile=page.js"
    )
    async with browser.running() as chromium:
        page = await chromium.new_page()
        await page.goto(f"http://localhost:{project.website}/api/auth/ok")
        await page.add_script_tag(path=project.folder / "page.js")
        user = {"email": "bob@example.com", "password": PASSWORD}
        assert await page.evaluate(IN_THE_BROWSER, user) == ["from a page", 1]
