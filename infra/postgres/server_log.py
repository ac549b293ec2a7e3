"""What a restored server says while it recovers: its log, in English, read as it grows."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.wal import Lsn

_REDO = re.compile(r"redo in progress, .* current LSN: ([0-9A-F]+/[0-9A-F]+)")
_RESTORED = re.compile(r'restored log file "([0-9A-F]{24})" from archive')
_STOPPED = re.compile(r"(recovery stopping (?:before|after) .*)")
_LAST = re.compile(r"last completed transaction was at log time (.*)")
_WAITING = re.compile(r"waiting for WAL to become available at ([0-9A-F]+/[0-9A-F]+)")
#: The first words of the process that recovers, after the configuration was read and all memory was had.
_LOOKS_AT_DATA = re.compile(r"database system was |starting .*recovery|entering standby mode")
#: Recovery pauses over it, for ever; where it lets no clients in it ends.
_PAUSED = "hot standby is not possible because of insufficient parameter settings"
_LOUD = re.compile(r"\b(?:FATAL|PANIC|ERROR):  ")
_DETAIL = re.compile(r"\bDETAIL:  (.*)")
#: Another server has the port: on its addresses, or in the socket's folder (not open: the lock is another user's).
PORT_TAKEN = re.compile(
    r"Address already in use|lock file \"[^\"]*\.s\.PGSQL\.\d+\.lock\" already exists"
    r"|could not open lock file \"[^\"]*\.s\.PGSQL\."
)
#: What clients are told while they wait; not why a server ended.
_NOISE = ("is starting up", "not yet accepting connections", "is shutting down")


class ServerLog:
    """Reads a server's log as it grows, from where it ends now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = path.stat().st_size if path.exists() else 0
        self._rest = ""
        self.lsn: Lsn | None = None
        self.segment = ""
        self.paused = False
        self.ready = False
        self.consistent = False
        #: Where a standby last asked in vain, and how often it did so there.
        self.waiting: Lsn | None = None
        self.waited = 0
        self.stopped_at = ""
        self.last_transaction = ""
        #: Lines that tell of errors.
        self.loud: list[str] = []
        self.last_line = ""
        #: Some address of the port belongs to another server.
        self.port_taken = False
        self.looked_at_data = False
        #: Which setting is lower than the old server's was, in the server's words.
        self.too_low = ""
        self._was_low = False
        self._was_loud = False

    def read(self) -> bool:
        """Take what is new. True if there was something."""
        with self.path.open("rb") as log:
            log.seek(self._position)
            new = log.read()
        self._position += len(new)
        *lines, self._rest = (self._rest + new.decode("utf-8", "replace")).split("\n")
        for line in lines:
            self._take(line)
        return bool(new)

    def _take(self, line: str) -> None:
        self.port_taken = self.port_taken or bool(PORT_TAKEN.search(line))
        self.looked_at_data = self.looked_at_data or bool(_LOOKS_AT_DATA.search(line))
        if match := _REDO.search(line):
            self.lsn = Lsn.parse(match[1])
        elif match := _WAITING.search(line):
            at = Lsn.parse(match[1])
            self.waited = self.waited + 1 if at == self.waiting else 1
            self.waiting = self.lsn = at
        elif match := _RESTORED.search(line):
            self.segment = match[1]
        elif match := _STOPPED.search(line):
            self.stopped_at = match[1]
        elif match := _LAST.search(line):
            self.last_transaction = match[1]
        elif "consistent recovery state reached" in line:
            self.consistent = True
        elif "pausing at the end of recovery" in line:
            self.paused = True
        elif "database system is ready to accept connections" in line:
            self.ready = True
        elif (match := _LOUD.search(line)) and not any(noise in line for noise in _NOISE):
            self.loud.append(line[match.start() :].strip())
        elif self._was_low and (match := _DETAIL.search(line)):
            self.too_low = match[1]
        elif self._was_loud and (match := _DETAIL.search(line)):
            self.loud[-1] += f" ({match[1]})"
        self._was_low = _PAUSED in line
        self._was_loud = bool(self.loud) and bool(_LOUD.search(line))
        self.last_line = line.strip() or self.last_line
