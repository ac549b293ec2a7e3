"""The keys of a destination: it has to be readable without the others."""

from __future__ import annotations

from collections.abc import Sequence

from handlers.verify_objects import Inspector, Place, Wanted
from pipeline.catalog import data_key_name

RING = "keys/ring-"


async def check_keys(place: Place, inspector: Inspector) -> None:
    """Read all of them: they are few, small, and what everything hangs on."""
    async with inspector.crew() as begin:
        async for entry in inspector.listing(place, "keys/"):
            if entry.key.startswith((RING, data_key_name(""))):
                await begin(inspector.read(place, Wanted(entry.key), entry))


def compare_keys(places: Sequence[Place], inspector: Inspector) -> None:
    """Each destination has the key rings that any has, and the data keys of its own objects; all of them the same."""
    tally = inspector.tally
    for name in sorted(tally.keys):
        there = tally.keys[name]
        first, digest = next(iter(there.items()))
        for place in places:
            if there.get(place.name, digest) != digest:
                tally.fault(place, Wanted(name), "conflict", f"{name} differs from the one at {first}")
            elif place.name not in there and name.startswith(RING):
                fact = f"{name} is missing, and nothing that is encrypted there can be read without another destination"
                _lack(place, inspector, name, fact)
    for place in places:
        for key_id, user in sorted(place.memory.keys.items()):
            name = data_key_name(key_id)
            if place.name not in tally.keys.get(name, {}):
                _lack(place, inspector, name, f"{name} is missing, and {user} for one cannot be read without it")


def _lack(place: Place, inspector: Inspector, name: str, fact: str) -> None:
    """A key that is not there. One that is there and damaged was told of already, and one that did not answer."""
    told = {(fault.destination, fault.name) for fault in inspector.tally.faults}
    if not told & {(place.name, name), (place.name, "keys/")}:
        inspector.tally.fault(place, Wanted(name), "missing", fact)
