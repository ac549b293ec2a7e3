"""One line per fact on stderr: an event name and key=value; JSON when stderr is not a terminal."""

from __future__ import annotations

import logging
import sys
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


def configure() -> None:
    """Set up logging for this process: everything from INFO on."""
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


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
