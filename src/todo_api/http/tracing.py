"""What FastAPI's own OpenTelemetry support tells of a request: its route, never its path or query.

A path may hold a user's id, and a query whatever a client puts there, a token included.
"""

import os

from opentelemetry import trace
from starlette.types import Scope

EXPORT_SECONDS = "1"
"""How long an export may take: the last one is waited for at the end of the program."""


def set_defaults() -> None:
    """Name the service, and do not wait long for a collector, unless the environment says more."""
    os.environ.setdefault("OTEL_SERVICE_NAME", "todo-api")
    os.environ.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", EXPORT_SECONDS)


def hide_target(scope: Scope) -> None:
    """Take the path and the query out of the span, if the request has one."""
    if scope.get("fastapi.telemetry"):
        trace.get_current_span().set_attribute("url.path", "none")
        if scope["query_string"]:
            trace.get_current_span().set_attribute("url.query", "REDACTED")


def name_route(scope: Scope, template: str) -> None:
    """Name the span by the route's template, as FastAPI's router would."""
    if telemetry := scope.get("fastapi.telemetry"):
        telemetry.route = template
        trace.get_current_span().set_attribute("url.path", template)
        trace.get_current_span().update_name(f"{telemetry.span_method} {template}")
