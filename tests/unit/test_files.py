"""Files of tasks: every task comes back as it was, and no line is read in two ways."""

import csv
import io
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from todo_api.auth.owner import Owner
from todo_api.errors import StartupError
from todo_api.http.body import MAXIMUM_BYTES
from todo_api.settings import Settings
from todo_api.tasks import files
from todo_api.tasks.fields import BY_NAME
from todo_api.tasks.files import Format
from todo_api.tasks.transfer import Source, Transfer

FORMS: list[Format] = ["jsonl", "csv"]
HEADER = b"title,description,completed\r\n"


def task(**members: Any) -> bytes:
    """Return the JSON text of a task as the service makes it."""
    example = {name: field.example for name, field in BY_NAME.items()}
    return json.dumps({**example, **members}, ensure_ascii=False).encode()


def written(form: Format, *tasks: bytes) -> bytes:
    file = io.BytesIO()
    assert len(list(files.write(tasks, file, form))) == len(tasks)
    return file.getvalue()


def members(file: bytes, form: Format) -> list[dict[str, Any]]:
    return [line.members for line in files.read(io.BytesIO(file), form)]


def refused(file: bytes, form: Format) -> str:
    with pytest.raises(StartupError) as caught:
        members(file, form)
    message = str(caught.value)
    assert message.endswith("; nothing was imported")
    assert message.isprintable()
    return message.removesuffix("; nothing was imported")


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
odd_texts = st.text("'=+-@\t\r\n,;\" \uff1da😀\u2028", max_size=8)


@given(title=texts | odd_texts, description=st.none() | texts | odd_texts, done=st.booleans())
@example(title="'", description="", done=True)
@example(title="'=1", description="=1", done=False)
def test_csv_gives_back_every_text(title: str, description: str | None, done: bool) -> None:
    file = written("csv", task(title=title, description=description, completed=done), task())
    first, second = members(file, "csv")
    assert (first["title"], first.get("description")) == (title, description)
    assert first["completed"] is done
    assert second["title"] == BY_NAME["title"].example
    assert second["due_date"] == BY_NAME["due_date"].example


@given(texts | odd_texts)
def test_no_cell_of_csv_begins_a_formula(title: str) -> None:
    file = written("csv", task(title=title, user_id=title)).decode("utf-8-sig")
    for cell in list(csv.reader(io.StringIO(file, newline="")))[1]:
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))


@given(texts | odd_texts)
def test_json_lines_are_the_tasks_of_the_api(title: str) -> None:
    one = task(title=title)
    assert written("jsonl", one, one) == one + b"\n" + one + b"\n"
    assert members(one + b"\n" + one, "jsonl") == [json.loads(one)] * 2


def test_csv_is_for_spreadsheets() -> None:
    one = task(title='a "b"\nc', priority=None)
    header, row = written("csv", one).decode().split("\r\n", 1)
    assert header == "\ufeff" + ",".join(json.loads(one))
    assert row.startswith(
        '42,exajExYu2kLr8vQpW3mTz6NcB1dHs5Ga,"a ""b""\nc","Oat milk, bread",incomplete,false,,'
    )
    assert row.endswith(",2026-11-21T12:34:56.123456Z,7\r\n")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_ends_of_lines_and_the_mark_do_not_matter(mark: bytes, end: bytes) -> None:
    lines = mark + b"title,completed" + end + end + b"a,TRUE" + end + b"b,False" + end + end
    assert members(lines, "csv") == [
        {"title": "a", "completed": True},
        {"title": "b", "completed": False},
    ]
    lines = mark + b'{"title": "a"}' + end + end + b' {"title": "b"}' + end
    assert members(lines, "jsonl") == [{"title": "a"}, {"title": "b"}]


def test_a_line_has_the_number_at_which_it_begins() -> None:
    rows = files.read(io.BytesIO(HEADER + b'a,"1\n2\n3",\r\n\r\nb,,\r\n'), "csv")
    assert [(row.number, row.members["title"]) for row in rows] == [(2, "a"), (6, "b")]
    lines = files.read(io.BytesIO(b'\n{"title": "a"}\n\n{}'), "jsonl")
    assert [line.number for line in lines] == [2, 4]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"title;completed\r\n", "line 1: column 1 has no name of a field; begin with a line of"),
        (b"title,Buy milk\r\n", "line 1: column 2 has no name of a field"),
        (b"title,title\r\n", "line 1: column 2 has the name of an earlier one"),
        (b"\xff\xfet\0i\0t\0l\0e\0", "line 1: is UTF-16"),
        (b"\xfe\xff\0t\0i\0t\0l\0e", "line 1: is UTF-16"),
        (HEADER + b"caf\xe9,,\r\n", "line 2: is not UTF-8"),
        (HEADER + b"a,b\r\n", "line 2: has 2 cells, and the first line 3 names"),
        (HEADER + b"a,,,\r\n", "line 2: has 4 cells, and the first line 3 names"),
        (HEADER + b'a,"1\n2', "line 3: is not CSV with commas (unexpected end of data)"),
        (HEADER + b'a,"1"2,\r\n', "line 2: is not CSV with commas ("),
        (HEADER + b"a,,\rb,,\r\n", "line 2: is not CSV with commas ("),
        (HEADER + b'"' + b"x" * MAXIMUM_BYTES + b'",,\r\n', "line 2: has a task of more than"),
        (HEADER + b'"' + b"x\n" * MAXIMUM_BYTES + b'",,\r\n', "has a task of more than 131072 b"),
    ],
    ids=range(13),
)
def test_csv_that_is_refused(file: bytes, message: str) -> None:
    said = refused(file, "csv")
    assert message in said
    assert "milk" not in said


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"{}\n[]\n", "line 2: it must be a JSON object"),
        (b'{"title": "a"\n', "line 1: it is not valid JSON: "),
        (b'{"title": "a", "title": "b"}\n', "line 1: it is not valid JSON: duplicate member"),
        (b'{"title": NaN}\n', "line 1: it is not valid JSON: "),
        (b'{"title": "\xff"}\n', "line 1: it is not valid JSON: "),
        (b'\xff\xfe{\0"\0', "line 1: is UTF-16"),
        (b'{}\n{"title": "' + b"x" * MAXIMUM_BYTES, "line 2: has a task of more than 131072 bytes"),
        (b"title\r\na\r\n", "line 1: it is not valid JSON: "),
    ],
    ids=range(8),
)
def test_json_lines_that_are_refused(file: bytes, message: str) -> None:
    assert message in refused(file, "jsonl")


@pytest.mark.parametrize("form", FORMS)
def test_the_limit_is_for_each_task(form: Format) -> None:
    text = "x" * (MAXIMUM_BYTES // 2)
    file = written(form, *[task(description=text)] * 3)
    assert [each["description"] for each in members(file, form)] == [text] * 3


class Endless(io.BytesIO):
    """A file of one line without end."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert size > 0
        self.given += size
        return b"x" * size


@pytest.mark.parametrize("form", FORMS)
def test_a_long_line_is_not_read_to_its_end(form: Format) -> None:
    endless = Endless()
    with pytest.raises(StartupError, match="has a task of more than"):
        list(files.read(endless, form))
    assert endless.given <= MAXIMUM_BYTES + 1


@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode), st.sampled_from(FORMS))
@example(b'title\r\n"', "csv")
@example(b"\xef\xbb\xbf", "csv")
@example(b"\xef\xbb\xbf", "jsonl")
def test_any_bytes_are_read_or_refused(file: bytes, form: Format) -> None:
    with suppress(StartupError):
        members(file, form)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*BY_NAME, "other"]), values), st.sampled_from(["", "x"]))
@example({"title": "a", "user_id": [{}]}, "")
@example({"title": "a", "user_id": "ann", "id": 2**70, "created_at": "0001-01-01T00:00+23:00"}, "")
@example({"title": "a", "user_id": "ann", "id": "9" * 30, "created_at": "2026-01-01"}, "")
def test_any_object_is_checked_or_refused(task: dict[str, Any], title: str) -> None:
    line = json.dumps({"title": title, **task} if title else task).encode()
    moving = Transfer(Owner("ann", None, 0.0), "postgresql://", Settings.model_construct())
    with suppress(StartupError):
        assert moving.check_tasks(Source(io.BytesIO(line), "jsonl"), lambda _: None) == 1
