"""One line per fact on stderr: an event name and key=value; from a service JSON when stderr is not a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from pipeline.events import (
    Acknowledged,
    BackupReady,
    DestinationCaughtUp,
    DestinationFailed,
    DestinationHampered,
    Event,
    EventFailed,
    FileRefused,
    Notice,
    WatchingHampered,
)


def configure(*, plain: bool = False) -> None:
    """Set up logging for this process: everything from INFO on.

    ``plain``: where stderr is no terminal, lines for people (``warning: event key='value'``) in the place of JSON.
    """
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    last: list[Any]
    if sys.stderr.isatty():
        last = [stamp, structlog.dev.ConsoleRenderer()]
    elif plain:
        last = [_plain]
    else:
        last = [stamp, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[structlog.processors.add_log_level, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _plain(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    level, name = event.pop("level"), event.pop("event")
    return " ".join([f"{level}: {name}", *(f"{key}={value!r}" for key, value in event.items() if value != "")])


def log_notice(notice: Notice) -> None:
    """What the pipeline tells its listeners, as log lines; but for ObjectStored, of which a backup has thousands."""
    log = structlog.get_logger()
    match notice:
        case DestinationFailed():
            log.error(
                "destination_failed",
                destination=notice.destination,
                object=notice.name,
                error=notice.fact,
                hint=notice.hint,
            )
        case DestinationCaughtUp():
            log.info("destination_caught_up", destination=notice.destination)
        case DestinationHampered():
            log.warning("destination_hampered", destination=notice.destination, error=notice.fact)
        case Acknowledged():
            log.info("shipped", what=_subject(notice.event))
        case EventFailed():
            log.error("not_shipped", what=_subject(notice.event), error=notice.fact, hint=notice.hint)
        case FileRefused():
            log.error("refused", path=notice.path, error=notice.fact, hint=notice.hint)
        case WatchingHampered():
            log.warning("watching_hampered", source=notice.source, error=notice.fact, hint=notice.hint)


def _subject(event: Event) -> str:
    return event.folder if isinstance(event, BackupReady) else event.file.name
