"""Pins of backups, set and removed at every destination: one at any of them counts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from datetime import datetime

from infra.expire import marks_of
from infra.expiry_look import read_pin
from infra.records import encoded, put_key
from infra.wiring import Site
from pipeline.catalog import info_key
from pipeline.contracts import Store
from pipeline.errors import ConfigError, IntegrityError, ObjectMissing, StoreError
from pipeline.pins import FOLDER, Pin, pin_key, pinned

#: Seconds between looks whether a deletion is over, or who made it gone.
_PAUSE = 1.0


async def pin(
    site: Site, backup: str, *, reason: str, until: datetime | None, tell: Callable[[str], None]
) -> tuple[Pin, list[str]]:
    """Pin a backup; an earlier pin is replaced. Returns it with the destinations that took it, one at least.

    Raises ConfigError for a backup that no destination lists and for an end that is over, StoreError if none takes it.
    """
    now = site.clock.now()
    if until is not None and until <= now:
        raise ConfigError(f"--until {until.isoformat()} is over already", hint="name a time to come, or leave it out")
    await _find(site, backup)
    made = Pin(backup, reason, until, socket.gethostname(), now)
    key = pin_key(backup)
    site.keys.write_under_known(now)
    body = await asyncio.to_thread(encoded, site, key, made.encode(), now)
    taken, errors = [], []
    for store in site.stores:
        try:
            await put_key(site, store)
            await store.put(key, body, replace=True)
        except StoreError as error:
            errors.append(error)
            tell(f"{store.name} did not take the pin; one at any destination counts: {error.fact}")
        else:
            taken.append(store.name)
    if not taken:
        raise errors[0]
    await _behind_deletion(site, backup, [store for store in site.stores if store.name in taken], tell)
    return made, taken


async def _behind_deletion(site: Site, backup: str, stores: list[Store], tell: Callable[[str], None]) -> None:
    """Whoever began to delete it may have looked for pins before ours was there. Raises as ``_find`` does."""
    marks = marks_of(site)
    marks.only(stores)
    try:
        await marks.look(backup)
        if who := marks.word(backup, going=True):
            tell(f"waiting, for it may be being deleted: by {who}")
        while marks.word(backup, going=True):
            await _find(site, backup)
            await site.clock.sleep(_PAUSE)
            await marks.look(backup)
    except StoreError as error:
        tell(f"whether somebody has begun to delete it is not known: {error.fact}; look with walship list")
    await _find(site, backup)


async def unpin(site: Site, backup: str) -> list[Pin]:
    """Remove the pins of a backup everywhere, and return them. ConfigError if there was none.

    StoreError if a destination does not answer: the pin there goes on counting.
    """
    found: list[Pin] = []
    there = False
    for store in site.stores:
        try:
            was = await read_pin(site, store, backup)
        except IntegrityError:
            there = True
        else:
            there = there or was is not None
            found += [was] if was is not None and was not in found else []
    if not there:
        raise ConfigError(f"backup {backup} is not pinned", hint="`walship list` shows pins and what they are for")
    for _ in range(2):  # where the service fills a destination, it may just have copied one
        for store in site.stores:
            await store.delete([pin_key(backup)])
    return found


async def _find(site: Site, backup: str) -> None:
    """Raises ConfigError if no destination lists the backup, StoreError if one cannot tell."""
    errors: list[StoreError] = []
    for store in site.stores:
        try:
            await store.head(info_key(backup))
        except ObjectMissing:
            continue
        except StoreError as error:
            errors.append(error)
        else:
            return
    if errors:
        raise errors[0]
    raise ConfigError(f"there is no backup {backup}", hint="`walship list` shows them")


async def pins_of(site: Site, *, tell: Callable[[str], None]) -> dict[str, list[str]]:
    """Backup → its pins that still count, in words. For people: what cannot be read is told, and counts."""
    found: dict[str, list[str]] = {}
    for store in site.stores:
        try:
            names = [name async for entry in store.list(FOLDER) if (name := pinned(entry.key))]
            for name in names:
                try:
                    made = await read_pin(site, store, name)
                    words = made.words if made is not None and made.holds(site.clock.now()) else ""
                except IntegrityError as error:
                    tell(f"{store.name}: {error.fact}")
                    words = "pinned, by a pin that cannot be read"
                if words and words not in found.setdefault(name, []):
                    found[name].append(words)
        except StoreError as error:
            tell(f"{store.name} does not tell what is pinned: {error.fact}")
    return found
