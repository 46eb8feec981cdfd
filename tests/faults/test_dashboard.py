"""The dashboard in deploy/grafana.json: its queries find what the program's metrics have."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import promql_parser
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import AggregateExpr, Call, Expr, MatchOp, MatrixSelector, VectorSelector

from support.http import LOCAL
from support.program import find_unused_port, serving
from support.service import SECRET, bearer
from support.waiting import wait_for

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana.json").read_text())
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]
NAMES = [f"{panel['title']}: {target['legendFormat']}" for panel, target in TARGETS]
OF_SCRAPER = {"job": "todo-api", "instance": "localhost:9090"}
"""The labels that Prometheus adds to each series that it scrapes."""

Series = dict[str, str]


class Scraped:
    """What a scrape of the program finds."""

    def __init__(self, text: str) -> None:
        self.series: defaultdict[str, list[Series]] = defaultdict(list)
        """The labels of each series, by the name of its samples."""
        self.counted: set[str] = set()
        """The names of samples that only grow."""
        self.families: set[str] = set()
        for family in text_string_to_metric_families(text):
            self.families.add(family.name)
            for sample in family.samples:
                self.series[sample.name].append({**sample.labels, **OF_SCRAPER})
                if family.type in {"counter", "histogram"}:
                    self.counted.add(sample.name)

    def found_by(self, selector: VectorSelector) -> list[Series]:
        """Return the series that a selector selects."""
        return [
            series
            for series in self.series[selector.name or ""]
            if all(_fits(each, series) for each in selector.matchers.matchers)
        ]


def _fits(matcher: promql_parser.Matcher, series: Series) -> bool:
    assert matcher.name in series, f"no series has the label {matcher.name}"
    value = series[matcher.name]
    if matcher.op in (MatchOp.Equal, MatchOp.NotEqual):
        is_equal = value == matcher.value
    else:
        is_equal = re.fullmatch(matcher.value, value) is not None
    return is_equal == (matcher.op in (MatchOp.Equal, MatchOp.Re))


@pytest.fixture(scope="module")
def scraped(
    database_url_of_module: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scraped]:
    """What the program counts after requests that succeed, are refused, and fail."""
    port = find_unused_port()
    variables = {
        "DATABASE_URL": database_url_of_module,
        "BETTER_AUTH_SECRET": SECRET,
        "METRICS_PORT": str(port),
        "LOCK_TIMEOUT": "0.1",
    }
    with (
        serving(tmp_path_factory.mktemp("dashboard"), **variables) as program,
        httpx2.Client(base_url=program.address, **LOCAL) as client,
    ):
        alice = bearer("alice")
        assert client.get("/api/tasks", headers=alice).status_code == 200
        assert client.get("/api/tasks/changes", headers=alice).status_code == 200
        assert client.get("/api/tasks").status_code == 401
        with psycopg.connect(database_url_of_module) as holder:
            holder.execute("LOCK TABLE users, tasks")
            assert client.get("/api/tasks", headers=alice).status_code == 503

        def text() -> str:
            return httpx2.get(f"http://127.0.0.1:{port}/metrics", **LOCAL).text

        wait_for(lambda: 'status="503"' in text())  # an answer is counted when it has been sent
        yield Scraped(text())
        assert program.stop() == 0


def parsed(query: str) -> Expr:
    """Parse a query as Prometheus gets it from Grafana."""
    query = query.replace("$__rate_interval", "1m").replace("$job", OF_SCRAPER["job"])
    assert "$" not in query
    expression: Expr = promql_parser.parse(query)
    return expression


def parts(expression: Expr) -> list[Expr]:
    """Return an expression and all that it contains, from the outside to the inside."""
    found: list[Expr] = []
    promql_parser.walk(expression, found.append)
    return found


def selectors(expression: Expr) -> list[VectorSelector]:
    return [each for each in parts(expression) if isinstance(each, VectorSelector)]


def labels(scraped: Scraped, expression: Expr) -> set[str]:
    """Return the labels of the series that an expression is computed from."""
    return {
        label
        for selector in selectors(expression)
        for series in scraped.found_by(selector)
        for label in series
    }


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=NAMES)
def test_query_finds_series_of_the_program(
    panel: dict[str, Any], target: dict[str, Any], scraped: Scraped
) -> None:
    found = selectors(parsed(target["expr"]))
    assert found
    for selector in found:
        assert scraped.found_by(selector), f"{panel['title']}: nothing is {selector}"
        assert "job" in {each.name for each in selector.matchers.matchers}


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=NAMES)
def test_query_keeps_the_labels_that_it_needs(
    panel: dict[str, Any], target: dict[str, Any], scraped: Scraped
) -> None:
    expression = parsed(target["expr"])
    kept: list[set[str]] = []
    for each in parts(expression):
        if isinstance(each, AggregateExpr):
            kept.append(set(each.modifier.labels) if each.modifier else set())
            assert kept[-1] <= labels(scraped, each.expr), panel["title"]
        if isinstance(each, Call) and each.func.name == "histogram_quantile":
            _, buckets = each.args
            assert isinstance(buckets, AggregateExpr)
            assert buckets.modifier is not None
            assert "le" in buckets.modifier.labels
            assert "le" in labels(scraped, buckets)
    assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == kept[0] - {"le"}


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=NAMES)
def test_query_takes_rates_of_what_only_grows(
    panel: dict[str, Any], target: dict[str, Any], scraped: Scraped
) -> None:
    expression = parsed(target["expr"])
    rated = [
        each.args[0]
        for each in parts(expression)
        if isinstance(each, Call) and each.func.name == "rate"
    ]
    assert all(isinstance(each, MatrixSelector) for each in rated)
    names = {each.vector_selector.name for each in rated}
    assert names == {each.name for each in selectors(expression)} & scraped.counted, panel["title"]


def test_dashboard_shows_every_metric_of_ours(scraped: Scraped) -> None:
    queries = " ".join(target["expr"] for _, target in TARGETS)
    for family in scraped.families:
        assert not family.startswith("todo_api_") or family in queries


def test_docs_list_every_metric(scraped: Scraped) -> None:
    for family in scraped.families:
        if family.startswith("todo_api_"):
            assert re.search(rf"`{family}(_total)?`", OPERATIONS), family
        else:
            assert f"`{family.split('_')[0]}_*`" in OPERATIONS


def test_dashboard_can_be_imported() -> None:
    """Grafana asks for the data source, and places each panel where no other one is."""
    (source,) = DASHBOARD["__inputs"]
    assert source["name"] == "DS_PROMETHEUS"
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"uid": "([^"]+)"', text)) == {"todo-api", "${DS_PROMETHEUS}"}
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        assert x + width <= 24
        area = {(x + right, y + down) for right in range(width) for down in range(height)}
        assert not area & taken
        taken |= area
    (variable,) = DASHBOARD["templating"]["list"]
    assert variable["name"] == "job"
