"""Which destinations are read from: those that are wanted, and answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from handlers.feed import turns_beside
from handlers.fetch import Fetcher
from infra.cli.verb import say
from infra.repository import ANSWER, Destination
from infra.restore import Repository
from infra.settings import Settings
from infra.storage import display_name
from infra.storage.as_of import as_it_was
from infra.wiring import Site
from pipeline.catalog import REPOSITORY
from pipeline.contracts import ObjectInfo
from pipeline.errors import ConfigError, IntegrityError, RecoveryError, StoreError
from pipeline.moments import parse_time, time_remark

T = TypeVar("T")


def narrowed(wanted: Settings, source: str) -> Settings:
    """The settings with the destination of ``--from`` alone, by URL or name.

    None of the others is even opened: what is damaged there must not be in the way.
    """
    if not source:
        return wanted
    chosen = tuple(url for url in wanted.destinations if source in (url, display_name(url)))
    if not chosen:
        names = ", ".join(display_name(url) for url in wanted.destinations)
        raise ConfigError(f"--from {source} is no destination", hint=f"the destinations are: {names}")
    return wanted.model_copy(update={"destinations": chosen, "required": ()})


async def as_of(wanted: Settings, time: str | None) -> Settings:
    """The settings with the destinations as they were at the time of ``--as-of``; None: as they are.

    Those that keep no versions are left out, and told. Raises ConfigError if all are.
    """
    if time is None:
        return wanted
    moment = parse_time(time, option="--as-of")
    if remark := time_remark(time, moment):
        say(remark)
    urls = await as_it_was(wanted.destinations, moment, wanted, tell=say)
    return wanted.model_copy(update={"destinations": urls, "required": ()})


async def answering(site: Site, *, tell: Callable[[str], None] = say) -> Site:
    """The site without the destinations that do not answer, which may be why there is a restore at all; each is told.

    Left in, they would be asked for every file at the end of the WAL, and "not there" would never be certain.
    """
    there, _ = await heard(site, lambda _: False, tell=tell)
    return there


async def heard(
    site: Site, suffices: Callable[[Destination], bool], *, tell: Callable[[str], None] = say
) -> tuple[Site, list[str]]:
    """As ``answering``, for whom some destinations suffice; with the names of those that were not waited for.

    Once one that ``suffices`` has answered, the others have ``ANSWER`` seconds; until then, all their patience.
    """
    tasks = [asyncio.create_task(store.head(REPOSITORY)) for store in site.stores]
    pairs = zip(tasks, site.destinations, strict=True)
    await _wait(tasks, {task for task, destination in pairs if suffices(destination)})
    kept, errors, silent = [], [], []
    each = zip(tasks, site.settings.destinations, site.destinations, site.stores, strict=True)
    for task, url, destination, store in each:
        error: BaseException | None = None
        if task.cancelled():
            silent.append(store.name)
            said = f"{store.name} has not answered for {ANSWER:g} seconds, and another destination has"
            error = StoreError(f"{said}; `walship check` says why")
        else:
            error = task.exception()
        if error is None:
            kept.append((url, destination, store))
        elif isinstance(error, StoreError):
            errors.append(error)
            tell(f"{store.name} is left out: {error.fact}. What only it has cannot be restored")
        else:
            raise error
    if not kept:
        raise errors[0]
    urls, destinations, stores = (tuple(parts) for parts in zip(*kept, strict=True))
    settings = site.settings.model_copy(update={"destinations": urls, "required": ()})
    return replace(site, settings=settings, destinations=destinations, stores=stores), silent


async def with_enough(site: Site, decide: Callable[[Site], Awaitable[T]], *, hurried: bool) -> T:
    """What ``decide`` makes of the destinations that answer; ``hurried``: soon, once a required one does.

    What was acknowledged is there, unless it was away itself while others stored. So who is left out is told, and only
    a plan that nobody carries out is made in a hurry. Where what is there is not enough, those that were silent may
    have what is lacking: they are asked again, and waited for. Raises what ``decide`` does.
    """
    there, silent = await heard(site, lambda destination: hurried and destination.required)
    try:
        return await decide(there)
    except (IntegrityError, RecoveryError, StoreError) as error:
        if not silent:
            raise
        say(f"{error.fact}. What is lacking may be at {', '.join(silent)}, which is asked again, and waited for")
        more = await answering(site)
        if not {store.name for store in more.stores} & set(silent):
            raise
    return await decide(more)


async def _wait(tasks: Sequence[asyncio.Task[ObjectInfo]], suffice: Collection[asyncio.Task[ObjectInfo]]) -> None:
    """Until all are done, or ``ANSWER`` seconds after one of ``suffice`` is well: then cancel those that are not."""
    waiting = set(tasks)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if waiting and any(task in suffice and task.exception() is None for task in done):
                await asyncio.wait(waiting, timeout=ANSWER)
                break
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def repository_of(site: Site, *, allow_unencrypted: bool) -> Repository:
    """The site as a restore reads it. What one destination did not serve is said to people."""
    turns = turns_beside()
    return Repository(
        settings=site.settings,
        urls=site.settings.destinations,
        stores=site.stores,
        system_id=site.facts.system_id,
        keys=site.keys,
        fetch=Fetcher(
            site.stores,
            site.chain,
            site.facts.system_id,
            notify=say,
            refresh=lambda: site.keys.refresh_from(site.stores),
            turns=turns,
        ),
        clock=site.clock,
        allow_unencrypted=allow_unencrypted,
        turns=turns,
    )
