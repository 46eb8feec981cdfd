"""`make soak`: clients send requests while random faults hit the program and its database.

The program runs two workers, on its own durable PostgreSQL behind a proxy. The clients record every
answer in a ledger, and repeat writes with a key until they have an answer. One follower for each
user keeps a copy of the tasks. At the end, the test compares ledger and copies with the database.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from soak.calls import DEADLINE, KEPT, OWN, REPEATED, SHAPE, Connections
from soak.clients import Client
from soak.comparison import STORED, compared, none_of, rows
from soak.faults import SESSIONS, Copies, Faults
from soak.followers import Follower
from soak.ledger import Fate, Ledger
from soak.verdict import Check, say, verdict
from soak.watch import Watch
from support.network import Network
from support.own_postgres import OwnPostgres
from support.service import SECRET

USERS = ("ada", "grace", "user/42", "Zoë")
CLIENTS = 3
"""Clients per user."""

WORKERS, POOL = 2, 4
VARIABLES = {
    "BETTER_AUTH_SECRET": SECRET,
    "WORKERS": str(WORKERS),
    "POOL_SIZE": str(POOL),
    "POOL_TIMEOUT": "1",
    "CONNECT_TIMEOUT": "1",
    "STATEMENT_TIMEOUT": "1",
    "LOCK_TIMEOUT": "0.5",
    "REQUEST_TIMEOUT": "6",
    "LOG_LEVEL": "warning",
}
SECONDS_TO_ANSWER = 7.0
"""REQUEST_TIMEOUT, and one second more for a busy machine."""

SECONDS_TO_END = SECONDS_TO_ANSWER + 3
"""Time for the requests in flight, and for the end of the workers."""

SECONDS_TO_RECOVER = 10.0
SECONDS_OF_CALM = 5.0
DESCRIPTORS = 100
"""The most open files of a worker: its own, its pool's and those of all clients."""

MEMORY = 5e6
"""Bytes per minute. A young process still grows, because it fills its caches."""


@dataclass
class Soak:
    """All parts of a run."""

    postgres: OwnPostgres
    url: str
    copies: Copies
    faults: Faults
    ledger: Ledger
    clients: list[Client]
    followers: list[Follower]
    watch: Watch
    recovered: float = 0.0

    async def run(self, seconds: float) -> None:
        """Cause faults for this time, wait for the recovery, and then watch without faults."""
        await self.copies.start()
        stopped = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self.watch.run())
            for client in self.clients:
                tasks.create_task(client.run(stopped.is_set))
            for follower in self.followers:
                tasks.create_task(follower.run(stopped.is_set))
            end = time.monotonic() + seconds
            await self.faults.run(lambda: time.monotonic() > end)
            await self._recover()
            self.ledger.calm = True
            await asyncio.sleep(min(SECONDS_OF_CALM, seconds / 4))
            stopped.set()
            watching.cancel()
        for follower in self.followers:
            await follower.finish(SECONDS_TO_RECOVER)

    async def _recover(self) -> None:
        """Wait until each client has two new answers. The first may be to an older request."""
        began, goals = time.monotonic(), [client.successes + 2 for client in self.clients]
        while any(
            client.successes < goal for client, goal in zip(self.clients, goals, strict=True)
        ):
            await asyncio.sleep(0.01)
            if time.monotonic() > began + SECONDS_TO_RECOVER:
                self.ledger.violated(RECOVERY, f"not within {SECONDS_TO_RECOVER:.0f} s")
                return
        self.recovered = time.monotonic() - began


RECOVERY = "the program recovers by itself after the last fault"


def main() -> int:
    """Run the test, and print the verdict."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="how long faults occur")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="the same seed repeats the faults"
    )
    parser.add_argument("--counts-alone", action="store_true", help="do not judge measured values")
    options = parser.parse_args()
    say(f"seed {options.seed}, {options.minutes:g} minutes")
    checks = asyncio.run(soaked(60 * options.minutes, options.seed))
    return verdict(checks, measured=not options.counts_alone)


async def soaked(seconds: float, seed: int) -> list[Check]:
    """Start all parts, run them, and return the checks."""
    ledger, connections = Ledger(), Connections(SECONDS_TO_ANSWER)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="todo-api-soak-")))
        postgres = await asyncio.to_thread(OwnPostgres, folder)
        stack.callback(postgres.stop)
        url = postgres.at("migrated")
        network = await stack.enter_async_context(Network(url))
        copies = stack.enter_context(
            closing(Copies(folder, connections, DATABASE_URL=network.url, **VARIABLES))
        )
        stack.push_async_callback(connections.close)
        clients = [
            Client(f"{user} {number}", user, connections, ledger, f"{seed} {user} {number}")
            for user in USERS
            for number in range(CLIENTS)
        ]
        faults = Faults(postgres, url, network, copies, seed)
        followers = [Follower(user, connections, ledger, f"{seed} {user}") for user in USERS]
        watch = Watch(copies.workers)
        soak = Soak(postgres, url, copies, faults, ledger, clients, followers, watch)
        await soak.run(seconds)
        sessions = len(rows(url, SESSIONS))
        await copies.stop()
        tell(soak)
        shown = {follower.user: follower.copy for follower in followers}
        return [*compared(ledger, rows(url, STORED), shown), *promised(soak), *held(soak, sessions)]


def tell(soak: Soak) -> None:
    """Print the faults, the outcomes and the times."""
    say("\nfaults:      " + ", ".join(f"{what} {n}x" for what, n in soak.faults.counts.items()))
    seconds, name = soak.faults.longest
    say(f"longest:     {name}, {seconds:.1f} s")
    fates = soak.ledger.fates
    say("operations:  " + ", ".join(f"{fates[fate]:,} {fate.value}" for fate in Fate))
    events = sorted(soak.ledger.events.items())
    say("events:      " + ", ".join(f"{n:,} {what}" for what, n in events))
    say(f"slowest:     {soak.ledger.slowest:.1f} s")
    say(f"recovered:   {soak.recovered:.1f} s after the last fault\n")


def promised(soak: Soak) -> Iterator[Check]:
    """Check the answers that the clients got."""
    ledger = soak.ledger
    asked = range(ledger.fates.total())
    for promise in (KEPT, REPEATED, OWN, SHAPE):
        yield none_of(promise, ledger.violations.get(promise, []), asked)
    for promise, among in ((DEADLINE, asked), (RECOVERY, soak.clients)):
        yield replace(none_of(promise, ledger.violations.get(promise, []), among), kind="measured")
    yield Check(
        "requests succeed after the recovery",
        f"{ledger.done_in_calm:,} succeeded",
        ledger.done_in_calm > 0,
    )
    yield Check(
        "no request fails after the recovery",
        f"{ledger.failed_in_calm:,} failed",
        ledger.failed_in_calm == 0,
        "measured",
    )


def held(soak: Soak, sessions: int) -> Iterator[Check]:
    """Check the program's logs, resources and exit codes."""
    complaints = soak.copies.complaints()
    yield Check("the log has no unexpected error", "; ".join(complaints) or "none", not complaints)
    codes = soak.copies.exit_codes
    yield Check(
        "every copy shuts down gracefully",
        f"exit codes {dict(Counter(codes))}",
        not any(codes),
    )
    yield Check(
        f"every copy shuts down within {SECONDS_TO_END:.0f} s",
        f"{soak.copies.slowest_end:.1f} s at most",
        soak.copies.slowest_end < SECONDS_TO_END,
        "measured",
    )
    most = WORKERS * POOL
    yield Check(f"the program holds at most {most} sessions", f"{sessions}", sessions <= most)
    descriptors = soak.watch.most_descriptors
    yield Check(
        f"a worker has at most {DESCRIPTORS} open files",
        f"{descriptors} at most",
        descriptors <= DESCRIPTORS,
    )
    if slopes := soak.watch.slopes():
        yield Check(
            f"memory grows by less than {MEMORY / 1e6:.0f} MB a minute",
            f"{max(slopes) / 1e6:.1f} MB at most, of {len(slopes)} workers",
            max(slopes) < MEMORY,
            "measured",
        )


if __name__ == "__main__":
    sys.exit(main())
