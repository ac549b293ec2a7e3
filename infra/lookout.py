"""What the service knows of how things stand, for the status page: the same record that ``walship status`` makes.

Nothing is read because somebody asks. The repository is listed by ``infra.survey``, which tells of each listing; the
server and the spool are looked at every few seconds; positions and lags are those of the metrics, of this moment. What
is asked for is put together from that.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

from handlers.fetch import Fetcher
from handlers.upload import Uploader
from infra.done import Done
from infra.holdings import Holding, together
from infra.postgres.kept import Kept
from infra.recoverable import Moments, Recoverable, read_moments, recoverable
from infra.settings import Settings
from infra.standing import DestinationStatus, Planned, Status, brief, judge_absent, stopped_by
from infra.status import GRACE, Outside, destination_status, look_outside, places_of_backups, status_of
from infra.whereabouts import Exposed, exposed
from infra.wiring import Site
from pipeline.contracts import Buffer, Clock, Fetched
from pipeline.errors import WalshipError
from pipeline.events import DestinationFailed, Notice, StreamLost, StreamStarted
from pipeline.moments import in_json
from pipeline.objects import MAX_PLAIN
from pipeline.tail import Stitched
from pipeline.wal import Lsn, WalFile

T = TypeVar("T")

#: Seconds between looks at the server and the spool, and between samples of the lag.
SAMPLE_EVERY = 10.0
#: Shortest pause between looks.
_SHORTEST = 1.0
#: Samples that are kept: those of an hour.
SAMPLES = 360
#: Seconds between looks at where the destinations are, which asks the resolver: a disk is mounted, an address moves.
WHERE_EVERY = 300.0
#: Looks, and listings, that may fail to come before what they told counts as not known any more.
_MISSED = 4


class Measured(Protocol):
    """The metrics, as far as they are read here. NaN: not known."""

    def lag_seconds(self, destination: str) -> float: ...
    def lag_bytes(self, destination: str) -> float: ...
    def end(self) -> float: ...
    def durable(self, destination: str) -> float: ...


class Lookout:
    """One for the life of the service. ``run`` while a repository is open; ``waits`` says why none is."""

    def __init__(self, settings: Settings, measured: Measured, *, kept: Kept, clock: Clock) -> None:
        self._settings = settings
        self._kept = kept
        self._measured = measured
        self._clock = clock
        self._waits = "the service is starting"
        self._site: Site | None = None
        self._uploader: Uploader | None = None
        self._outside: Outside | None = None
        self._looked = -math.inf
        #: destination → its last listing, what it meant beside the server of that time, and when it was, in monotonic
        #: seconds.
        self._listings: dict[str, tuple[Holding, DestinationStatus, float]] = {}
        self._fresh = asyncio.Event()
        #: The stream began or ended: the server is worth a look.
        self._changed = asyncio.Event()
        self._listed: datetime | None = None
        self._stored: Recoverable | None = None
        self._done: Mapping[str, Done] = {}
        self._unread: tuple[str, ...] = ()
        self._exposed: Exposed | None = None
        self._moments: Moments = {}
        #: destination → what it answered when it last refused something, and what to do about that.
        self._refused: dict[str, tuple[str, str]] = {}
        self._samples: deque[tuple[int, dict[str, float | None]]] = deque(maxlen=SAMPLES)
        #: Who knows the schedule.
        self.planned: Callable[[], tuple[Planned, ...]] = tuple
        #: Given to ``--cluster`` of a restore, where it has to be.
        self.cluster = ""

    def heard(self, notice: Notice) -> None:
        """A listener of the pipeline."""
        if isinstance(notice, DestinationFailed):
            self._refused[notice.destination] = (brief(notice.fact), notice.hint)
        elif isinstance(notice, StreamStarted | StreamLost):
            self._changed.set()

    def listed(self, holding: Holding) -> None:
        """A destination was listed, or did not answer. Told by ``infra.survey``."""
        server = self._outside.server if self._outside else None
        self._listings[holding.name] = holding, destination_status(holding, server), self._clock.monotonic()
        self._listed = self._clock.now()
        self._fresh.set()

    def done(self, found: Mapping[str, Done]) -> None:
        """What records say was done. Told by ``infra.survey``."""
        self._done = found

    def waits(self, why: str) -> None:
        """No repository is open, and nothing is shipped, because of that."""
        self._waits, self._site, self._uploader, self._outside = brief(why), None, None, None

    async def run(self, site: Site, uploader: Uploader) -> None:
        """Look, until cancelled."""
        self._site, self._uploader, self._waits = site, uploader, ""
        self._listings = {}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._look_outside(site))
                group.create_task(self._look_where())
                group.create_task(self._sample())
                group.create_task(self._find_stretches(site))
        finally:
            self.waits("the service is stopping")

    async def _look_outside(self, site: Site) -> None:
        while True:
            self._changed.clear()
            self._outside, self._looked = await look_outside(site, self._kept), self._clock.monotonic()
            await self._clock.sleep(_SHORTEST)
            with suppress(TimeoutError):
                async with asyncio.timeout(SAMPLE_EVERY - _SHORTEST):
                    await self._changed.wait()

    async def _look_where(self) -> None:
        while True:
            self._exposed = await asyncio.to_thread(exposed, self._settings)
            await self._clock.sleep(WHERE_EVERY)

    async def _sample(self) -> None:
        while True:
            self._samples.append((int(self._clock.now().timestamp()), self._lags()))
            await self._clock.sleep(SAMPLE_EVERY)

    async def _find_stretches(self, site: Site) -> None:
        """Which times can be restored, at each listing."""
        while True:
            await self._fresh.wait()
            self._fresh.clear()
            listings = {store.name: self._listings.get(store.name) for store in site.stores}
            there = {name: listing[0] for name, listing in listings.items() if listing and not listing[0].error}
            if not there:
                self._unread = ("no destination answers",)
                continue
            if not site.keys.reads:
                self._unread = ()
                continue  # what can be restored, nobody can tell here: the status says so
            holdings = [*there.values()]
            catalog = together(holdings)
            fetch = Fetcher([s for s in site.stores if s.name in there], site.chain, site.facts.system_id)
            opened = self._until(holdings) is None
            reading = read_moments(catalog, _FromThread(fetch), self._moments, opened=opened)
            try:
                # It goes through whole segments, and the service's loop has commits to answer.
                self._unread = tuple(map(brief, await asyncio.to_thread(asyncio.run, reading)))
            except WalshipError as error:
                self._unread = (brief(error.fact),)
            self._stored = recoverable(catalog, places_of_backups(holdings), until=None, moments=self._moments)

    def _lags(self) -> dict[str, float | None]:
        names = (store.name for store in self._site.stores) if self._site else ()
        return {name: _known(self._measured.lag_seconds(name)) for name in names}

    def _until(self, holdings: Sequence[Holding]) -> datetime | None:
        """What was written up to then is stored somewhere, by what the metrics say now."""
        lags = [_known(self._measured.lag_seconds(holding.name)) for holding in holdings if not holding.error]
        least = min((lag for lag in lags if lag is not None), default=None)
        return None if least is None else self._clock.now() - timedelta(seconds=least)

    def status(self) -> Status | None:
        """Everything, as it is known at this moment; None if no repository is open, or nothing was looked at yet."""
        site, outside = self._site, self._outside
        if site is None or outside is None or len(self._listings) < len(site.stores):
            return None
        places = tuple(self._place(site, self._listings[store.name][1]) for store in site.stores)
        status = status_of(site, outside, places, service_words=f"running: version {version('walship')}")
        stored = self._stored and _going_on(self._stored, self._until([h for h, _, _ in self._listings.values()]))
        return replace(
            status,
            now=self._clock.now(),
            current_lsn=self._current(status.current_lsn),
            most_on_the_way=None,
            recoverable=stored,
            last_drill=self._done.get("drill", Done()).success,
            last_verify=self._done.get("verify", Done()).success,
            failed_drill=self._done.get("drill", Done()).failing,
            failed_verify=self._done.get("verify", Done()).failing,
            schedule=self.planned(),
            exposed=self._exposed,
            unknown=(*self._unread, *self._stale()),
        )

    def _current(self, seen: str | None) -> str | None:
        """The stream tells each second where the server is; a look, each few seconds."""
        told = _known(self._measured.end())
        return seen if seen is None or told is None else str(max(Lsn.parse(seen), Lsn(int(told))))

    def _stale(self) -> Iterator[str]:
        """What was not looked at for so long that nobody knows how it is by now."""
        now = self._clock.monotonic()
        if now - self._looked > _MISSED * SAMPLE_EVERY:
            yield f"the server was last looked at {now - self._looked:.0f} s ago"
        for name, (_, _, when) in self._listings.items():
            if now - when > _MISSED * self._settings.survey_interval + 60:
                yield f"{name} was last listed {now - when:.0f} s ago"

    def _place(self, site: Site, place: DestinationStatus) -> DestinationStatus:
        """The listing, and what was told since."""
        outlets = self._uploader.outlets if self._uploader else ()
        outlet = next((outlet for outlet in outlets if outlet.name == place.name), None)
        if not place.error and outlet is not None and outlet.down:
            why, hint = self._refused.get(place.name, ("it takes nothing", ""))
            return replace(place, error=why, hint=hint)
        if outlet is not None and (backlog := outlet.backlog) is not None:
            lacks = f"{backlog.objects} objects ({backlog.size >> 20} MB) that others have are not there yet"
            place = replace(place, lacks=lacks)
        seconds, missing = _known(self._measured.lag_seconds(place.name)), _known(self._measured.lag_bytes(place.name))
        durable, listed = _known(self._measured.durable(place.name)), place.durable_lsn
        if durable is not None and not place.missing and (listed is None or durable > Lsn.parse(listed)):
            tail = int(durable) % site.facts.segment_size  # what lies before is finished
            place = replace(place, durable_lsn=str(Lsn(int(durable))), tail_bytes=tail)
        late = ""
        if seconds is not None and seconds > self._patience(site) and not place.error:
            late = f"what was written {seconds:.0f} s ago is not there yet"
        return replace(
            place,
            lag_seconds=seconds,
            lag_bytes=place.lag_bytes if missing is None else int(missing),
            late=late,
        )

    def _patience(self, site: Site) -> float:
        """Seconds after which what was written is late."""
        if "stream" in site.settings.sources:
            return site.settings.tail_interval + GRACE
        server = self._outside.server if self._outside else None
        ends = server.archive_timeout if server else 0
        return (2 * ends if ends else math.inf) + 60.0

    def api(self) -> bytes:
        """``/api/status``, as JSON."""
        status = self.status()
        if status is None:
            state, sentence = judge_absent(self._waits)
            members: dict[str, Any] = {"healthy": False, "state": state, "sentence": sentence, "reasons": [sentence]}
        else:
            members = status.result()
        names = [store.name for store in self._site.stores] if self._site else []
        members |= {
            "version": version("walship"),
            "listed": self._listed,
            "now": self._clock.now(),
            "cluster_option": self.cluster,
            "lag_history": {
                "destinations": names,
                "samples": [[moment, *(_short(lags.get(name)) for name in names)] for moment, lags in self._samples],
            },
        }
        return json.dumps(members, default=in_json, separators=(",", ":")).encode()

    def not_ready(self) -> str:
        """Why it does not ship; empty if it does."""
        if self._site is None:
            return self._waits
        status = self.status()
        if status is None:
            return "the destinations are being looked at for the first time"
        return "; ".join([*stopped_by(status), *status.unknown])


class _FromThread:
    """A ``Fetch`` for another loop in another thread: what it fetches with belongs to this one."""

    def __init__(self, fetch: Fetcher) -> None:
        self._fetch = fetch
        self._loop = asyncio.get_running_loop()

    async def __call__(self, name: str, *, backup: str | None = "", most: int = MAX_PLAIN) -> Fetched:
        return await self._there(self._fetch(name, backup=backup, most=most))

    async def stream(
        self, name: str, use: Callable[[Iterator[Buffer]], None], *, backup: str | None = "", most: int = MAX_PLAIN
    ) -> None:
        await self._there(self._fetch.stream(name, use, backup=backup, most=most))

    async def into(
        self,
        name: str,
        use: Callable[[Iterator[Buffer]], None],
        *,
        digest: str,
        backup: str | None = "",
        most: int = MAX_PLAIN,
    ) -> None:
        await self._there(self._fetch.into(name, use, digest=digest, backup=backup, most=most))

    async def tail(self, file: WalFile, segment_size: int, *, lenient: bool = False) -> Stitched | None:
        return await self._there(self._fetch.tail(file, segment_size, lenient=lenient))

    async def _there(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


def _going_on(stored: Recoverable, until: datetime | None) -> Recoverable:
    """The open stretch ends with what is known now."""
    stretches = tuple(
        replace(each, ends=max(until, each.begins)) if each.ended_by == "open" and until is not None else each
        for each in stored.stretches
    )
    return replace(stored, stretches=stretches)


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _short(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
