"""``walship copy``: the two ends of it, what is to be copied, and what makes the target a repository.

The target needs no repository. One that is begun by a copy gets its ``repository.json`` last of all, so that what is
half copied is found by nobody; the next run goes on with it. See docs/decisions/0017.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from handlers.body import joined
from handlers.copy import Copied, Means, Trouble, copy, estimate
from handlers.difference import Wanted
from handlers.fetch import Fetcher, read_catalog
from infra.clock import SystemClock
from infra.held import held
from infra.keys import open_keys
from infra.monitoring.log import log_notice
from infra.pace import Pace
from infra.repository import Destination, RepositoryFacts, clusters, find, read_facts
from infra.settings import Settings
from infra.storage import display_name, is_past, make_folder, open_store
from infra.storage.memory import MemoryStore
from infra.storage.rooted import Rooted
from infra.whereabouts import endpoint_of
from infra.wiring import Listeners, Site, make_chain
from pipeline.backup import BackupInfo
from pipeline.backup_chain import chain_of
from pipeline.catalog import REPOSITORY, Catalog
from pipeline.contracts import Clock, Store
from pipeline.errors import ConfigError, IntegrityError, ObjectMissing, RecoveryError, StoreError, WalshipError
from pipeline.objects import MemoryBody
from pipeline.wal import WalFile, WalKind
from pipeline.wal_needs import wal_needs

#: Folders of a repository that a copy takes along; ``lease/`` and ``use/`` say who is at work at one place.
_COPIED = ("keys/", "wal/", "conflict/", "tail/", "base/", "pin/", "log/")
_OF_ONE_PLACE = ("lease/", "use/", "verified/")


@dataclass(frozen=True, slots=True)
class Ends:
    """Where it is copied from and to, both opened."""

    facts: RepositoryFacts
    #: Rooted at the cluster's folder; the first is compared, the others serve what it has damaged.
    sources: tuple[Store, ...]
    target: Store
    #: Where the cluster's folder lies at the target.
    root: Store
    #: None: there is no repository of the cluster yet.
    there: RepositoryFacts | None
    #: The sources alone, opened with what is at hand; or why that cannot be: a whole copy needs no key.
    site: Site | WalshipError
    clock: Clock
    #: What people should know before it begins.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """What of the repository, and in words how far a copy of that goes."""

    wanted: Wanted
    backup: str = ""
    words: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What a copy did, beside what ``Copied`` says."""

    copied: Copied
    #: It made the repository at the target.
    made: bool = False
    #: Folders at the source that were left out.
    left_out: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def url_of(settings: Settings, word: str) -> str:
    """The URL that is meant: one of the settings, by URL or name, or any other. Raises ConfigError."""
    for url in settings.destinations:
        if word in (url, display_name(url)):
            return url
    if "://" in word:
        return word
    names = ", ".join(display_name(url) for url in settings.destinations) or "none is set"
    raise ConfigError(
        f"{word} is no destination",
        hint=f"a destination is file:///folder or s3://bucket/prefix?endpoint=…; those of the settings: {names}",
    )


@asynccontextmanager
async def open_ends(
    settings: Settings, sources: Sequence[str], target: str, *, cluster: str = "", existing: bool = False, dry: bool
) -> AsyncIterator[Ends]:
    """Open both ends, and refuse what can only be a mistake. Raises ConfigError, IntegrityError, StoreError.

    ``existing``: the target must be a repository already. ``dry``: nothing is made.
    """
    urls, to = [url_of(settings, word) for word in sources], url_of(settings, target)
    for url in urls:
        _refuse_overlap(url, to)
    clock = SystemClock()
    async with AsyncExitStack() as stack:

        def opened(url: str) -> Store:
            store = open_store(url, settings, clock=clock)
            stack.push_async_callback(store.close)
            return store

        origins = tuple(Destination(opened(url), required=True, past=is_past(url)) for url in urls)
        facts = await find(origins[:1], cluster)
        absent = _is_absent(to)
        if not (absent and (dry or existing)):
            make_folder(to)
        root = MemoryStore(display_name(to)) if absent and (dry or existing) else opened(to)
        there = await _existing(root, facts)
        if there is None and existing:
            raise ConfigError(
                f"there is no repository of cluster {facts.system_id} at {root.name}, and --existing asks for one",
                hint="is the disk mounted? the first copy goes without --existing",
            )
        stores = tuple(Rooted(origin.root, facts.system_id) for origin in origins)
        for other in stores[1:]:
            await read_facts(origins[stores.index(other)].root, facts.system_id)  # ObjectMissing: of no use here
        notes = [f"cluster {other} is there as well" for other in await clusters(root) if other != facts.system_id]
        end = Rooted(root, facts.system_id)
        if remark := await _refuse_other_rings(stores[0], end):
            notes.append(remark)
        site = await _site(settings, facts, origins, stores, clock)
        yield Ends(facts, stores, end, root, there, site, clock, tuple(notes))


async def _site(
    settings: Settings,
    facts: RepositoryFacts,
    destinations: tuple[Destination, ...],
    stores: tuple[Store, ...],
    clock: Clock,
) -> Site | WalshipError:
    try:
        keys = await open_keys(stores, settings, facts.system_id, clock, writer=False, allow_unencrypted=False)
    except (ConfigError, IntegrityError) as error:
        return error
    chain = make_chain(settings, keys, facts.system_id)
    fetch = Fetcher(stores, chain, facts.system_id, refresh=lambda: keys.refresh_from(stores))
    return Site(settings, facts, destinations, stores, keys, chain, fetch, clock, Listeners(log_notice))


def with_target(ends: Ends) -> Site | None:
    """Where the record of the copy goes: both ends. None if no key is at hand to make one with."""
    if isinstance(ends.site, WalshipError):
        return None
    return replace(ends.site, stores=(*ends.sources, ends.target))


async def _existing(root: Store, facts: RepositoryFacts) -> RepositoryFacts | None:
    try:
        there = await read_facts(root, facts.system_id)
    except ObjectMissing:
        return None
    if there.segment_size != facts.segment_size:
        raise ConfigError(
            f"the repository at {root.name} has segments of {there.segment_size} bytes, the source of"
            f" {facts.segment_size}: they were made apart",
            hint="copy to another destination, or to a prefix of its own",
        )
    return there


async def _refuse_other_rings(source: Store, target: Store) -> str:
    """Key rings of one number that differ were made apart: what is copied could not be read beside what is there.

    Returns what people should know. Raises ConfigError, StoreError.
    """
    ours = {entry.key async for entry in source.list("keys/ring-")}
    theirs = {entry.key async for entry in target.list("keys/ring-")}
    for name in sorted(ours & theirs):
        if joined(await source.get(name)) != joined(await target.get(name)):
            raise ConfigError(
                f"{name} differs between {source.name} and {target.name}: the repositories were made apart",
                hint="copy to another destination, or to a prefix of its own. Nothing was copied",
            )
    if theirs and not ours:
        raise ConfigError(
            f"the repository at {target.name} is encrypted, and that at {source.name} is not: they were made apart",
            hint="copy to another destination, or to a prefix of its own. Nothing was copied",
        )
    if theirs and max(theirs) > max(ours):
        return (
            f"{max(theirs)} at {target.name} is newer than {max(ours)} at {source.name}, and counts there: if it has"
            " another repository key, what the source encrypts under the former one from then on cannot be read there"
            " until `walship key accept` has taken the data key"
        )
    return ""


async def select(ends: Ends, *, backup: str = "", wal: bool = False, backups: bool = False) -> Selection:
    """What is to be copied; nothing said: all. Single backups need a key, to see which WAL they need.

    Raises ConfigError without one, RecoveryError if there is no such backup.
    """
    if not (backup or backups):
        if wal:
            return Selection(
                Wanted(backups=lambda _: False, beside=True, sizes=True), words=("WAL, and no base backup",)
            )
        return Selection(Wanted(beside=True, sizes=True))
    if isinstance(ends.site, WalshipError):
        raise ends.site
    ends.site.keys.need_reading("walship copy --backup and --backups, which look which WAL a backup needs,")
    facts = ends.facts
    catalog = await read_catalog(ends.sources, ends.site.fetch, facts.system_id, segment_size=facts.segment_size)
    chosen = [*chain_of(catalog.backup(backup), {b.name: b for b in catalog.backups})] if backup else catalog.backups
    names = {info.name for info in chosen}
    if wal:
        needs, size = wal_needs(catalog, chosen, being_taken=False), catalog.segment_size

        def since(file: WalFile) -> bool:
            return file.kind is WalKind.HISTORY or needs.needs(file.timeline, file.start(size) // size)

        words = _words(chosen, "and all WAL since")
        return Selection(Wanted(since, names.__contains__, beside=True, sizes=True), backup, words)
    files = {file.name for info in chosen for file in _to_consistency(catalog, info)}
    wanted = Wanted(
        lambda file: file.kind is WalKind.HISTORY or file.name in files, names.__contains__, beside=False, sizes=True
    )
    words = _words(chosen, "and the WAL that it needs to become consistent, no more: --wal adds all since")
    return Selection(wanted, backup, words)


def _words(chosen: Sequence[BackupInfo], what: str) -> tuple[str, ...]:
    if not chosen:
        return ("there is no complete base backup",)
    last = chosen[-1]
    count = f", with the {len(chosen) - 1} before it" if len(chosen) > 1 else ""
    return (f"{last.name}{count}, {what}", f"  ended {last.stopped:%Y-%m-%d %H:%M:%S} UTC at LSN {last.stop_lsn}")


def _to_consistency(catalog: Catalog, info: BackupInfo) -> list[WalFile]:
    path = catalog.wal_path(catalog.lineage(info.timeline), info.start_lsn, info.stop_lsn)
    if path.missing is not None:
        raise RecoveryError(
            f"{info.name} cannot become consistent: segment {path.missing} is missing", hint="choose another backup"
        )
    return [*path.stored()]


async def lacking(ends: Ends, selection: Selection) -> Outcome:
    """What a copy would do, by listings alone."""
    found = await estimate(ends.sources[0], ends.target, selection.wanted)
    return Outcome(found, made=ends.there is None, left_out=await _left_out(ends.sources[0]), notes=[*ends.notes])


async def run(
    ends: Ends,
    selection: Selection,
    *,
    rate: int = 0,
    tell: Callable[[str], None],
    progress: Callable[[int], None] = lambda _: None,
    trouble: Callable[[Trouble], None] = lambda _: None,
) -> Outcome:
    """Copy. ``rate``: bytes a second, 0: as fast as it goes; ``progress`` and ``trouble``: see ``Means``."""
    outcome = Outcome(Copied(), left_out=await _left_out(ends.sources[0]), notes=[*ends.notes])
    if remark := await _try_target(ends):
        outcome.notes.append(remark)
    pace = Pace(rate) if rate else None

    async def before(size: int) -> None:
        if pace is not None and (seconds := pace.take(size)) > 0:
            await ends.clock.sleep(seconds)

    @asynccontextmanager
    async def hold(backup: str) -> AsyncIterator[str]:
        """At both: whoever expires at the target takes parts without a backup_info for what a crash has left."""
        mark = partial(held, clock=ends.clock, tell=tell)
        async with mark(ends.sources[:1], backup) as here, mark((ends.target,), backup) as there:
            yield here or there

    means = Means(
        system_id=ends.facts.system_id,
        hold=hold,
        before=before,
        progress=progress,
        trouble=trouble,
    )
    outcome.copied = await copy(ends.sources[:1], ends.target, selection.wanted, means, others=ends.sources[1:])
    if ends.there is None:
        await _make_repository(ends)
        outcome.made = True
    return outcome


async def _make_repository(ends: Ends) -> None:
    """The last object of a first copy: from now on the target is found. The very bytes, as all else."""
    content = joined(await ends.sources[0].get(REPOSITORY))
    body = MemoryBody([content])
    with suppress(StoreError):  # another copy or an init was faster: looked at below
        await ends.target.put(REPOSITORY, body)
    there = await read_facts(ends.root, ends.facts.system_id)
    if there.segment_size != ends.facts.segment_size:
        raise IntegrityError(f"{REPOSITORY} at {ends.target.name} is of another repository by now")


async def _try_target(ends: Ends) -> str:
    """Write one small object there: whether it may be, whether it is the source by another name, and what it heeds.

    Returns what people should know. Raises ConfigError, StoreError.
    """
    key = f"log/check-{secrets.token_hex(8)}"
    body = MemoryBody([secrets.token_bytes(64)])
    await ends.target.put(key, body)
    try:
        for source in ends.sources:
            with suppress(ObjectMissing):
                await source.head(key)
                raise _same(source.name, ends.target.name)
        abilities = await ends.target.probe(key, body)
    finally:
        with suppress(StoreError):  # it may keep all that it is given: the name says what it was
            await ends.target.delete([key])
    return "" if abilities.conditional_put else f"{ends.target.name}: {abilities.remark}"


async def _left_out(source: Store) -> tuple[str, ...]:
    """Folders that this walship knows nothing of."""
    found = [entry.key async for entry in source.list("", shallow=True)]
    known = (*_COPIED, *_OF_ONE_PLACE, REPOSITORY)
    return tuple(sorted(name for name in found if name not in known))


def _same(source: str, target: str) -> ConfigError:
    return ConfigError(f"{target} is {source}: nothing can be copied there", hint="name another destination with --to")


def _refuse_overlap(source: str, target: str) -> None:
    """One may not be, hold or lie in the other, however they are spelled. ConfigError."""
    one, other = urlsplit(source), urlsplit(target)
    if one.scheme != other.scheme:
        return
    shown = display_name(source), display_name(target)
    if one.scheme == "file":
        here, there = (Path(os.path.realpath(unquote(parts.path))) for parts in (one, other))
        same = here == there or (here.exists() and there.exists() and here.samefile(there))
        inside = here in there.parents or there in here.parents
    else:
        if one.netloc != other.netloc or _endpoint(source) != _endpoint(target):
            return  # one server by two addresses is found out by writing there: see ``_try_target``
        here_at, there_at = (f"/{unquote(parts.path).strip('/')}/".replace("//", "/") for parts in (one, other))
        same = here_at == there_at
        inside = here_at.startswith(there_at) or there_at.startswith(here_at)
    if same:
        raise _same(*shown)
    if inside:
        raise ConfigError(
            f"{shown[1]} and {shown[0]} lie one inside the other", hint="copy to a folder or prefix beside it"
        )


def _endpoint(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(endpoint_of(url))
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


def _is_absent(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "file" and not Path(unquote(parts.path)).exists()
