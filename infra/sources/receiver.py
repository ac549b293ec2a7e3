"""The stream source: WAL over the replication protocol, from wherever the primary is, into the open WAL in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from infra.settings import Settings
from pipeline.contracts import Buffer, Clock
from pipeline.durable import Durable
from pipeline.events import Event, Notice
from pipeline.lineage import Lineage
from pipeline.openwal import OpenWal
from pipeline.resume import GoOn
from pipeline.wal import Lsn, WalFile

#: Seconds that a server that shuts down is held up at most by what is not durable.
GRACE = 10.0


class Receiver:
    """A ``pipeline.contracts.Source`` of whole segments and of histories; the open end is in the ``OpenWal``."""

    name = "stream"

    def __init__(
        self,
        settings: Settings,
        *,
        system_id: str,
        segment_size: int,
        wal: OpenWal,
        resume: Callable[[Lineage], Awaitable[GoOn | None]],
        make_durable: Callable[[Lsn], Durable],
        clock: Clock,
        notify: Callable[[Notice], None],
        grace: float = GRACE,
    ) -> None:
        """``resume``: where the repository ends on that lineage; asked once, at the first connect.

        ``make_durable``: called once, with the position where the stream begins. ``grace``: see ``GRACE``.
        """
        #: Whether commits wait for us; polled, so it may be seconds old.
        self.synchronous = False
        #: None until the first connect.
        self.durable: Durable | None = None
        #: The server's timeline and where it came from. None until the first connect.
        self.lineage: Lineage | None = None

    @property
    def received(self) -> Lsn:
        """End of what has arrived."""
        raise NotImplementedError

    @property
    def current(self) -> Lsn:
        """End of the server's WAL, as far as it has told."""
        raise NotImplementedError

    async def run(self) -> None:
        """Connect, receive, connect again, until cancelled."""
        raise NotImplementedError

    async def events(self) -> AsyncIterator[Event]:
        """What is ready. See ``pipeline.contracts.Source``."""
        raise NotImplementedError
        yield

    async def ready(self, event: Event) -> None:
        """Before ``read``: have the bytes in memory again, from the server, if ``stored_somewhere`` let them go."""
        raise NotImplementedError

    def read(self, event: Event) -> Buffer:
        """The bytes of a segment or a history; no copy. See ``pipeline.contracts.Source``."""
        raise NotImplementedError

    async def done(self, event: Event) -> None:
        """Durable at every required destination. See ``pipeline.contracts.Source``."""
        raise NotImplementedError

    def stored_somewhere(self, event: Event) -> None:
        """The object is durable somewhere, though not everywhere: its memory is given back. Idempotent."""
        raise NotImplementedError

    def stored(self, destination: str, file: WalFile, start: int, end: int) -> bool:
        """Bytes ``[start, end)`` (positions) of that segment, or tail of it, are durable there.

        Tells ``durable``, as far as they belong to the server's lineage (bytes that an old primary wrote behind a fork
        do not, and must never be acknowledged to the new one). Returns whether that took the destination further.
        """
        raise NotImplementedError

    def report_soon(self) -> None:
        """``durable`` has moved: the server is told at once, not within the second."""
        raise NotImplementedError
