"""Which destinations are read from: those that are wanted, and answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from handlers.feed import turns_beside
from handlers.fetch import Fetcher
from infra.cli.verb import say
from infra.restore import Repository
from infra.settings import Settings
from infra.storage import display_name
from infra.storage.as_of import as_it_was
from infra.wiring import Site
from pipeline.catalog import REPOSITORY
from pipeline.errors import ConfigError, StoreError
from pipeline.moments import parse_time, time_remark


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
    kept, errors = [], []
    for url, destination, store in zip(site.settings.destinations, site.destinations, site.stores, strict=True):
        try:
            await store.head(REPOSITORY)
        except StoreError as error:
            errors.append(error)
            tell(f"{store.name} is left out: {error.fact}. What only it has cannot be restored")
        else:
            kept.append((url, destination, store))
    if not kept:
        raise errors[0]
    urls, destinations, stores = (tuple(parts) for parts in zip(*kept, strict=True))
    settings = site.settings.model_copy(update={"destinations": urls, "required": ()})
    return replace(site, settings=settings, destinations=destinations, stores=stores)


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
