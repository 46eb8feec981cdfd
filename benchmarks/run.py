"""`make bench`: put the same load on each server in turn, and write five tables."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import comparison
import data
import features
import large_list
import psutil
import psycopg
import rate
import workers
from load import LOCUST
from measuring import Bench

from todo_api.database import migrations
from todo_api.database.embedded import EmbeddedPostgres

REPORT = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

`make bench` writes this page. Each number is the median of {rounds} rounds of {seconds:.0f} s for\
 each server and
operation. The servers take turns. {generator} makes the load. Load generator, server and database\
 share
one machine with {cores} cores. Of {rows:,} users, {users} send requests. All servers use the same\
 embedded
PostgreSQL, without fsync. The code is in `benchmarks/`.

The second to fourth tables are from an earlier day, before the schema had versions. *Same
guarantee* in them is Fastify with row security and a check for erased accounts. The last table is
of one round, from a later day than the first.
"""
# Delete the last paragraph after the next complete run, because all tables are new then.


def make_room(folder: Path) -> None:
    """Raise `max_connections`, because all servers keep their connections and 100 are too few."""
    with (
        EmbeddedPostgres.start(folder, durable=False) as postgres,
        psycopg.connect(postgres.url, autocommit=True) as connection,
    ):
        connection.execute("ALTER SYSTEM SET max_connections = 200")


@contextmanager
def prepared(rounds: int, seconds: float) -> Iterator[Bench]:
    """Start PostgreSQL, migrate it, and write the tokens."""
    with TemporaryDirectory(prefix="todo-api-bench-") as name:
        folder = Path(name)
        make_room(folder / "postgres")
        tokens = folder / "tokens"
        data.write_tokens(tokens)
        with EmbeddedPostgres.start(folder / "postgres", durable=False) as postgres:
            migrations.migrate(postgres.url)
            pid = (folder / "postgres" / "data" / "postmaster.pid").read_text().split()[0]
            yield Bench(postgres.url, psutil.Process(int(pid)), tokens, rounds, seconds)


def main() -> None:
    """Measure and print the tables. A complete run also writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument(
        "--only", action="append", choices=comparison.NAMES, help="compare only this server"
    )
    tables: dict[str, Callable[[Bench], str]] = {
        "comparison": lambda bench: comparison.section(bench, options.only),
        "rate": rate.section,
        "workers": workers.section,
        "list": large_list.section,
        "features": features.section,
    }
    parser.add_argument("--table", action="append", choices=tables, help="print only this table")
    parser.add_argument("--report", type=Path, default=REPORT, help="file for all tables")
    options = parser.parse_args()
    generator = "wrk" if shutil.which("wrk") else "locust"
    if generator == "locust" and not LOCUST.exists():
        sys.exit("wrk and locust are missing. Start this with `make bench`: it installs locust")
    chosen = options.table or (["comparison"] if options.only else tables)
    introduction = INTRODUCTION.format(
        rounds=options.rounds,
        seconds=options.seconds,
        users=data.USERS,
        rows=data.ROWS_OF_USERS,
        generator=generator,
        cores=os.cpu_count(),
    )
    parts = [introduction]
    with prepared(options.rounds, options.seconds) as bench:
        for name in chosen:
            parts.append(tables[name](bench) + "\n")
            print(parts[-1], flush=True)
    if set(chosen) == set(tables) and not options.only:
        options.report.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
