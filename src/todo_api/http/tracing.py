"""FastAPI's OpenTelemetry support, restricted to the route of a request.

A span gets neither path nor query: a path may hold a user's id, and a query may hold a token.
"""

import os

from opentelemetry import trace
from starlette.types import Scope

EXPORT_SECONDS = "1"
"""Timeout of an export, short because the program waits for the last one when it stops."""


def set_defaults() -> None:
    """Set the service's name and the timeout of exports, unless the environment has them."""
    os.environ.setdefault("OTEL_SERVICE_NAME", "todo-api")
    os.environ.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", EXPORT_SECONDS)


def hide_target(scope: Scope) -> None:
    """Remove the path and the query from the request's span, if it has one."""
    if scope.get("fastapi.telemetry"):
        span = trace.get_current_span()
        span.set_attribute("url.path", "none")
        if scope["query_string"]:
            span.set_attribute("url.query", "REDACTED")


def name_route(scope: Scope, template: str) -> None:
    """Name the span by the route's template, as FastAPI's own router does."""
    if telemetry := scope.get("fastapi.telemetry"):
        telemetry.route = template
        span = trace.get_current_span()
        span.set_attribute("url.path", template)
        span.update_name(f"{telemetry.span_method} {template}")
