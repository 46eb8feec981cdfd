"""The comparison of the ledger, and of the followers' copies, with the database."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import psycopg
from psycopg.rows import dict_row

from soak.ledger import NEVER_STORED, Fate, Ledger
from soak.verdict import Check

Row = dict[str, Any]

STORED = """
SELECT id, user_id, title, description, status = 'complete' AS completed,
    to_char(updated_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS updated_at, version
FROM tasks
"""

LOST = "every acknowledged task is stored"
TWICE = "each task is stored only once"
KEYED_ONCE = "a creation with a key is stored once, however often it was sent"
BACK = "deleted tasks are gone"
REFUSED = "refused tasks are not stored"
REFUSED_TEXT = "refused changes are not stored"
WHOLE = "a batch is stored as a whole or not at all"
ALIEN = "every stored task comes from a request"
LATEST = "each task has the value of its last acknowledged write"
COPIES = "the followers' copies equal the database"


def rows(url: str, query: str) -> list[Row]:
    """Return the rows that a query selects."""
    with psycopg.connect(url, row_factory=dict_row) as sql:
        return sql.execute(query).fetchall()


def compared(
    ledger: Ledger, stored: Sequence[Row], copies: Mapping[str, Mapping[int, Row]]
) -> Iterator[Check]:
    """Compare the whole ledger, and the copy of each user, with the stored tasks."""
    times = Counter(str(row["title"]) for row in stored)
    yield from _compared_titles(ledger, times)
    yield from _compared_values(ledger, stored)
    differences = [
        difference
        for user, copy in copies.items()
        for difference in _differences(user, copy, stored)
    ]
    yield none_of(COPIES, differences, stored)


def _compared_titles(ledger: Ledger, times: Counter[str]) -> Iterator[Check]:
    """Compare which tasks are stored, and how often."""
    acknowledged = [title for title, fate in ledger.titles.items() if fate is Fate.DONE]
    lost = [
        title
        for title in acknowledged
        if not times[title] and not ledger.tasks[title].may_be_deleted
    ]
    yield none_of(LOST, lost, acknowledged)
    yield none_of(TWICE, [each for each in times if times[each] > 1], times)
    keyed = [title for title in acknowledged if title in ledger.keyed]
    wrong = [
        title
        for title in keyed
        if times[title] != 1 and not (times[title] == 0 and ledger.tasks[title].may_be_deleted)
    ]
    yield none_of(KEYED_ONCE, wrong, keyed)
    back = [title for title, task in ledger.tasks.items() if task.is_deleted and times[title]]
    yield none_of(BACK, back, ledger.tasks)
    refused = [title for title, fate in ledger.titles.items() if fate in NEVER_STORED]
    yield none_of(REFUSED, [title for title in refused if times[title]], refused)
    unknown = [
        titles
        for titles in ledger.batches
        if any(ledger.titles[title] is Fate.UNKNOWN for title in titles)
    ]
    torn = [
        ", ".join(titles)
        for titles in unknown
        if 0 < sum(times[title] > 0 for title in titles) < len(titles)
    ]
    yield none_of(WHOLE, torn, unknown)
    alien = [title for title in times if title not in ledger.titles]
    yield none_of(ALIEN, alien, times)


def _compared_values(ledger: Ledger, stored: Sequence[Row]) -> Iterator[Check]:
    """Compare what the stored tasks contain."""
    refused = [text for text, it in ledger.texts.items() if it.fate in NEVER_STORED]
    descriptions = {row["description"] for row in stored}
    yield none_of(REFUSED_TEXT, [text for text in refused if text in descriptions], refused)
    wrong = [
        contradiction
        for row in stored
        if (task := ledger.tasks.get(str(row["title"])))
        if (contradiction := task.contradiction(row))
    ]
    yield none_of(LATEST, wrong, stored)


def _differences(user: str, copy: Mapping[int, Row], stored: Sequence[Row]) -> Iterator[str]:
    """Return how the copy of a user's tasks differs from the stored ones."""
    by_id = {row["id"]: row for row in stored if row["user_id"] == user}
    for number in copy.keys() - by_id.keys():
        yield f"{user} has task {number}, which is not stored"
    for number in by_id.keys() - copy.keys():
        yield f"{user} does not have task {number}"
    for number in by_id.keys() & copy.keys():
        row, shown = by_id[number], copy[number]
        if wrong := [name for name in row if row[name] != shown[name]]:
            yield f"{user} has another {', '.join(wrong)} of task {number}"


def none_of(promise: str, wrong: list[str], among: Sized) -> Check:
    """Return a check that passes if the list is empty."""
    examples = f": {'; '.join(wrong[:3])}" if wrong else ""
    return Check(promise, f"{len(wrong)} of {len(among):,}{examples}", not wrong)
