"""One line per fact on stderr: of a command a sentence; of the service key=value on a terminal, JSON elsewhere."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any, TypeAlias, assert_never

import structlog

from pipeline.events import (
    Acknowledged,
    BackupReady,
    DeleteRefused,
    DestinationCaughtUp,
    DestinationFailed,
    DestinationFilling,
    DestinationHampered,
    Event,
    EventFailed,
    FileRefused,
    FileSetAside,
    GapClosed,
    GapOpened,
    Notice,
    ObjectStored,
    OperationEnded,
    SourcesDiffer,
    StreamLost,
    StreamStarted,
    SyncDegraded,
    SyncRestored,
    TailsRemoved,
    TimelineLeft,
    WalMoved,
    WatchingHampered,
)

#: What stores and files give rise to.
_Shipping: TypeAlias = (
    DestinationFailed
    | DestinationCaughtUp
    | DestinationHampered
    | DeleteRefused
    | Acknowledged
    | EventFailed
    | FileRefused
    | FileSetAside
    | WatchingHampered
    | OperationEnded
)

#: What the stream gives rise to.
_Streaming: TypeAlias = (
    GapOpened | GapClosed | SourcesDiffer | StreamStarted | StreamLost | TimelineLeft | SyncDegraded | SyncRestored
)


#: Most characters of one value of a line.
_MOST = 10_000
#: Where a fact would stand that has been told already.
_AGAIN = "as said above"
#: What a line about a destination may hold, and say no more than its error: who served instead follows from that.
_NO_MORE = {"level", "event", "error", "hint", "destination", "served_by"}
#: What this command has told so far, see ``shortened``: of which destination, and what.
_told: set[tuple[Any, Any]] = set()


def configure(*, plain: bool = False) -> None:
    """Set up logging for this process: everything from INFO on.

    ``plain``: for a command that a person waits for, ``warning: destination failed (destination …): why; hint: what``.
    """
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    last: list[Any]
    _told.clear()
    if plain:
        last = [_on_one_line, _once, _plain]
    elif sys.stderr.isatty():
        last = [stamp, _on_one_line, structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ)]
    else:
        last = [stamp, structlog.processors.JSONRenderer()]
    _take_over()
    structlog.configure(
        processors=[structlog.processors.add_log_level, _without_empty_hint, _within_bounds, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def shortened(line: str) -> str:
    """A line for people without what this command has told of a destination already; what follows from it stays.

    A destination that is away is noticed by whoever wants something of it: the reason is told once, with its hint.
    """
    for destination, fact in _told:
        if destination in line:
            line = re.sub(f": {re.escape(fact)}(?=[.;,]|$)", f": {_AGAIN}", line)
    return line


def _once(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    known = event.get("destination"), event.get("error")
    if not all(known):
        return event
    if known not in _told:
        _told.add(known)
    elif event.keys() <= _NO_MORE:
        raise structlog.DropEvent
    else:
        event["error"] = _AGAIN
        event.pop("hint", None)
    return event


def _without_empty_hint(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if event.get("hint") == "":
        del event["hint"]
    return event


def _within_bounds(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A server, a store or a stored object may have said megabytes; the end of a traceback says what it was."""
    for key, value in event.items():
        if isinstance(value, str) and len(value) > _MOST:
            event[key] = f"…{value[-_MOST:]}" if key == "exception" else f"{value[:_MOST]}…"
    return event


def _on_one_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What a server or a store has answered may have several, or command the terminal; a traceback, which nobody
    foresaw, stays as it is.
    """
    for key, value in event.items():
        if isinstance(value, str) and key != "exception" and not value.isprintable():
            event[key] = "".join(each if each.isprintable() else repr(each)[1:-1] for each in value)
    return event


class _Forward(logging.Handler):
    """Warnings of libraries, as lines like all others."""

    def emit(self, record: logging.LogRecord) -> None:
        more = {}
        if record.exc_info and record.exc_info[1] is not None:  # nobody foresaw it: where it was is what helps
            more["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        line = structlog.get_logger().bind(source=record.name, said=record.getMessage(), **more)
        (line.error if record.levelno >= logging.ERROR else line.warning)("library")


def _take_over() -> None:
    """Without a handler of ours, Python would print what libraries tell, with tracebacks, in a form of its own."""
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Forward)]:
        root.removeHandler(old)
    root.addHandler(_Forward(logging.WARNING))


def _plain(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    level, name, hint = event.pop("level"), event.pop("event").replace("_", " "), event.pop("hint", "")
    why = ": ".join(str(event.pop(key)) for key in ("said", "error") if event.get(key))
    what = f" {event.pop('what')}" if "what" in event else ""
    told = ", ".join(
        f"{key.replace('_', ' ')} {_words(value)}" for key, value in event.items() if value not in ("", [])
    )
    line = f"{level}: {name}{what}" + (f" ({told})" if told else "") + (f": {why}" if why else "")
    return f"{line}; hint: {hint}" if hint else line


def _words(value: object) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def log_notice(notice: Notice) -> None:
    """What the pipeline tells its listeners, as log lines; but for what comes all the time, which is for metrics.

    A notice that is added and forgotten here is an error of types.
    """
    match notice:
        case ObjectStored() | WalMoved():
            pass
        case DestinationFilling():
            left = {"objects": notice.objects, "bytes": notice.size}
            level = "info" if notice.objects else "debug"
            getattr(structlog.get_logger(), level)("destination_filling", destination=notice.destination, **left)
        case TailsRemoved():
            structlog.get_logger().debug("tails_removed", destination=notice.destination, count=notice.count)
        case (
            GapOpened()
            | GapClosed()
            | SourcesDiffer()
            | StreamStarted()
            | StreamLost()
            | TimelineLeft()
            | SyncDegraded()
            | SyncRestored()
        ):
            _log_streaming(notice)
        case _:
            _log_shipping(notice)


def _log_shipping(notice: _Shipping) -> None:
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
        case DeleteRefused():
            log.warning("delete_refused", destination=notice.destination, error=notice.fact, hint=notice.hint)
        case Acknowledged():
            # Of two sources each is told of its own copy of a segment: without its name that reads as done twice.
            log.info("shipped", what=_subject(notice.event), source=notice.event.source)
        case EventFailed():
            source = notice.event.source
            log.error("not_shipped", what=_subject(notice.event), source=source, error=notice.fact, hint=notice.hint)
        case FileRefused():
            log.error("refused", path=notice.path, error=notice.fact, hint=notice.hint)
        case FileSetAside():
            log.error("set_aside", what=notice.file.name, object=notice.name, error=notice.fact, hint=notice.hint)
        case WatchingHampered():
            log.warning("watching_hampered", source=notice.source, error=notice.fact, hint=notice.hint)
        case OperationEnded(error=""):
            log.info("scheduled_done", verb=notice.verb, next=str(notice.next))
        case OperationEnded():
            log.error("scheduled_failed", verb=notice.verb, error=notice.error, hint=notice.hint, next=str(notice.next))
        case _:
            assert_never(notice)


def _log_streaming(notice: _Streaming) -> None:
    log = structlog.get_logger()
    match notice:
        case GapOpened():
            log.error("gap_opened", first=notice.first.name, last=notice.last.name, hint=notice.hint)
        case GapClosed():
            log.info("gap_closed", what=notice.file.name)
        case SourcesDiffer():
            log.error("sources_differ", error=notice.fact, hint=notice.hint)
        case StreamStarted(changed=True):
            log.info("commits_wait" if notice.synchronous else "commits_do_not_wait", server=notice.server)
        case StreamStarted():
            log.info(
                "stream_started",
                server=notice.server,
                timeline=notice.timeline,
                lsn=str(notice.lsn),
                synchronous=notice.synchronous,
            )
        case StreamLost():
            log.warning("stream_lost", error=notice.fact, hint=notice.hint, retry_in=notice.retry_in)
        case TimelineLeft():
            _log_timeline_left(notice)
        case SyncDegraded():
            log.error("sync_degraded", destination=notice.destination, error=notice.fact)
        case SyncRestored():
            log.info("sync_restored", destination=notice.destination)
        case _:
            assert_never(notice)


def _log_timeline_left(notice: TimelineLeft) -> None:
    """Loud only where something that was stored, and perhaps acknowledged, is not on the new timeline."""
    log = structlog.get_logger()
    where = {"timeline": notice.timeline, "fork": str(notice.fork), "stored": str(notice.stored)}
    if notice.stored > notice.fork:
        log.warning(
            "timeline_left",
            **where,
            error=f"{notice.stored - notice.fork} bytes of timeline {notice.timeline} are stored behind the fork;"
            " commits in them are not on the new timeline",
            hint=f"they are kept: restore --timeline {notice.timeline} brings them back",
        )
    else:
        log.info("timeline_left", **where)


def _subject(event: Event) -> str:
    return event.folder if isinstance(event, BackupReady) else event.file.name
