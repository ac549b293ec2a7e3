"""Which destinations can be read from now."""

from __future__ import annotations

from dataclasses import replace

from infra.cli.verb import say
from infra.wiring import Site
from pipeline.catalog import REPOSITORY
from pipeline.errors import StoreError


async def answering(site: Site) -> Site:
    """The site without the destinations that do not answer, which may be why there is a restore at all.

    Left in, they would be asked for every file at the end of the WAL, and "not there" would never be certain.
    """
    kept, errors = [], []
    for url, destination, store in zip(site.settings.destinations, site.destinations, site.stores, strict=True):
        try:
            await store.head(REPOSITORY)
        except StoreError as error:
            errors.append(error)
            say(f"{store.name} is left out: {error.fact}. What only it has cannot be restored")
        else:
            kept.append((url, destination, store))
    if not kept:
        raise errors[0]
    urls, destinations, stores = (tuple(parts) for parts in zip(*kept, strict=True))
    settings = site.settings.model_copy(update={"destinations": urls, "required": ()})
    return replace(site, settings=settings, destinations=destinations, stores=stores)
