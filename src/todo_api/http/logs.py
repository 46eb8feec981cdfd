"""Logging: one line for each event, readable on a terminal and JSON elsewhere."""

import json
import logging
import sys
from contextlib import suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any

import structlog
from structlog.typing import Processor

from todo_api.settings import Settings

LONGEST_LINE = 65_536
"""Bytes of a line that are certainly written at once, so that workers do not mix their lines."""

_encode = json.JSONEncoder(default=repr).encode


def configure_logging(settings: Settings) -> None:
    """Send the log of the program and of its libraries to standard error."""
    log_format = settings.log_format or ("console" if sys.stderr.isatty() else "json")
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendered = _console() if log_format == "console" else _json()
    # structlog writes by itself: through `logging` a line costs 24 µs and not 10 (measured), and
    # each request writes one.
    structlog.configure(
        processors=[*shared, *rendered, _to_bytes],
        logger_factory=structlog.BytesLoggerFactory(_standard_error()),
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(TextIOWrapper(_standard_error(), "utf-8", "backslashreplace"))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    _configure_libraries(settings.log_level.upper(), handler)


class _StandardError(BufferedWriter):
    """Standard error without exceptions, because a log must not cost a request its answer.

    It keeps what a full disk or pipe did not take, and writes that before the next line.
    """

    def write(self, line: Any, /) -> int:
        with suppress(OSError):
            return super().write(line)
        return 0

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _standard_error() -> _StandardError:
    return _StandardError(FileIO(sys.stderr.fileno(), "wb", closefd=False), LONGEST_LINE)


def _console() -> list[Processor]:
    # The plain traceback has no local variables: they hold tokens and titles.
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(exception_formatter=plain, colors=sys.stderr.isatty())]


def _json() -> list[Processor]:
    # Without local variables: they hold tokens and titles.
    traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [
        structlog.processors.ExceptionRenderer(traceback),
        structlog.processors.JSONRenderer(lambda event, **_: _encode(event)),
    ]


def _to_bytes(_logger: object, _method: str, line: Any) -> bytes:
    encoded: bytes = line.encode(errors="backslashreplace")
    return encoded


def _configure_libraries(level: str, handler: logging.Handler) -> None:
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for noisy in ("uvicorn", "uvicorn.error", "alembic"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level)))
