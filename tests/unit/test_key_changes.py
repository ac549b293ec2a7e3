"""Passphrases and recipients come and go; whatever interrupts that, the old or the new one opens the repository."""

from __future__ import annotations

from typing import Any

import pytest

from infra import key_changes
from infra.at_hand import AtHand
from infra.key_changes import open_current
from infra.key_objects import openers
from infra.key_report import look_at_keys
from infra.keys import create_ring, open_keyring
from infra.recipients import show_recipient
from infra.ring import ring_name
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Body
from pipeline.errors import ConfigError, ObjectConflict, StoreError
from pipeline.moments import show
from pipeline.objects import MemoryBody
from tests.changing import (
    BOTH,
    CLOCK,
    NAME,
    NEW,
    OLD,
    PRIVATE,
    PUBLIC,
    Change,
    KilledError,
    content,
    current,
    make_cheap,
    opened,
    opens,
    repository,
    rings,
    write,
)
from tests.keys import SYSTEM_ID, chain, read
from tests.stores import Faulty


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


# -- what each does


async def test_one_more_passphrase_opens_what_is_there() -> None:
    stores = await repository()
    written = await write(stores, await opened(stores, OLD, writer=True), b"before")
    done = await key_changes.add(await current(stores), CLOCK, passphrase=NEW)
    assert (done.number, done.stored, done.away) == (2, ("a", "b"), {})
    for passphrase in (OLD, NEW):
        assert read(chain(await opened(stores, passphrase)), NAME, written) == b"before"
    assert [await rings(store) for store in stores] == [[ring_name(1), ring_name(2)]] * 2


async def test_a_recipient_reads_with_a_private_key_alone() -> None:
    stores = await repository()
    written = await write(stores, await opened(stores, OLD, writer=True), b"before")
    await key_changes.add(await current(stores), CLOCK, recipient=PUBLIC, label="safe in Bern")
    keys = await open_keyring(stores[0], SYSTEM_ID, AtHand(identity=PRIVATE), clock=CLOCK)
    assert read(chain(keys), NAME, written) == b"before"
    report = await look_at_keys(stores, SYSTEM_ID, AtHand(identity=PRIVATE))
    assert report.newest is not None
    assert report.newest.recipients == {PUBLIC: "safe in Bern"}
    assert (report.identity_opens, report.passphrase_opens, report.problems) == (True, False, [])
    assert report.data_keys == {1: 1}
    assert f"recipient    {show_recipient(PUBLIC)}  safe in Bern (at hand)" in "\n".join(report.lines())
    assert report.rings[0].created.endswith("Z")
    assert report.result()["rings"][0]["created"] == report.rings[0].created.replace("Z", "+00:00")
    assert report.rings[0].created.replace("T", " ").replace("Z", " UTC") in report.lines()[1]
    with pytest.raises(ConfigError, match="opens the key ring already"):
        await key_changes.add(await current(stores), CLOCK, recipient=PUBLIC)


@pytest.mark.parametrize("label", [" ", "x" * 101, "two\nlines"])
async def test_labels_are_for_people(label: str) -> None:
    with pytest.raises(ConfigError, match="a label is"):
        await key_changes.add(await current(await repository()), CLOCK, recipient=PUBLIC, label=label)


async def test_rotate_puts_a_new_passphrase_in_the_place_of_the_old() -> None:
    stores = await repository()
    written = await write(stores, await opened(stores, OLD, writer=True), b"before")
    await key_changes.add(await current(stores), CLOCK, recipient=PUBLIC, label="safe")
    done = await key_changes.rotate(await current(stores), CLOCK, NEW)
    assert (done.front.passphrases, done.front.recipients) == (1, {PUBLIC: "safe"})
    assert read(chain(await opened(stores, NEW)), NAME, written) == b"before"
    with pytest.raises(ConfigError, match="BACKUP_ENCRYPTION_PASSWORD does not open the key ring keys/ring-00000003"):
        await opened(stores, OLD)
    # Who has changed it elsewhere learns what to do here, first thing.
    for refused in (opened(stores, OLD), current(stores, OLD)):
        with pytest.raises(ConfigError) as caught:
            await refused
        assert caught.value.fact.startswith(
            f"the passphrase was changed when keys/ring-00000003 was made ({show(CLOCK.now())}): "
        )
        assert caught.value.fact.endswith(" in a, only the one before, keys/ring-00000002")
        assert ": put the new one into the settings (BACKUP_ENCRYPTION_PASSWORD or its _FILE)," in caught.value.hint
    # Of two at hand, the one that did open it; and whose place nobody has taken was removed.
    with pytest.raises(
        ConfigError, match=r"^the passphrase was changed .* BACKUP_ENCRYPTION_PASSWORD does not open the"
    ):
        await open_keyring(stores[0], SYSTEM_ID, AtHand(OLD, bytes(range(32))), clock=CLOCK)
    # No other passphrase is told so; and whatever is the matter with the ring before, it explains nothing.
    for wrong in ("a mistyped one", OLD):
        with pytest.raises(ConfigError) as caught:
            await opened(stores, wrong)
        assert caught.value.fact.startswith("BACKUP_ENCRYPTION_PASSWORD does not open the key ring keys/ring-00000003")
        assert "it is not the right one for this repository" in caught.value.hint
        for store in stores:
            await store.delete([ring_name(2)])
            await store.put(ring_name(2), MemoryBody([b"damaged"]))
    for store in stores:
        await store.delete([ring_name(2)])
    # The first ring is there: that is why a leak needs a new repository key.
    old = MemoryStore("what somebody has kept")
    await old.put(ring_name(1), await stores[0].get(ring_name(1)))
    assert await opens(old, AtHand(OLD))


async def test_rotate_needs_a_passphrase_to_replace_and_a_new_one() -> None:
    stores = await repository()
    with pytest.raises(ConfigError, match="the new passphrase opens the key ring already"):
        await key_changes.rotate(await current(stores), CLOCK, OLD)
    await key_changes.add(await current(stores), CLOCK, recipient=PUBLIC)
    with pytest.raises(ConfigError, match="BACKUP_ENCRYPTION_PASSWORD is not set"):
        await key_changes.rotate(await current(stores, "", PRIVATE), CLOCK, NEW)
    with pytest.raises(ConfigError, match="does not open keys/ring-00000002, only WALSHIP_IDENTITY_FILE does"):
        await key_changes.rotate(await current(stores, "mistyped", PRIVATE), CLOCK, NEW)
    assert await rings(stores[0]) == [ring_name(1), ring_name(2)]


async def test_remove_leaves_a_proven_opener() -> None:
    stores = await repository()
    with pytest.raises(ConfigError, match="it is the only one that opens keys/ring-00000001"):
        await key_changes.remove(await current(stores), CLOCK, passphrase=OLD)
    with pytest.raises(ConfigError, match="that passphrase does not open"):
        await key_changes.remove(await current(stores), CLOCK, passphrase=NEW)
    with pytest.raises(ConfigError, match="that recipient does not open"):
        await key_changes.remove(await current(stores), CLOCK, recipient=PUBLIC)
    await key_changes.add(await current(stores), CLOCK, recipient=PUBLIC, label="safe")
    # The recipient would remain, and nobody here has proved that its private key exists.
    with pytest.raises(ConfigError, match="nothing that is at hand here would open the new key ring"):
        await key_changes.remove(await current(stores), CLOCK, passphrase=OLD)
    assert await rings(stores[0]) == [ring_name(1), ring_name(2)]
    done = await key_changes.remove(await current(stores, OLD, PRIVATE), CLOCK, passphrase=OLD)
    with pytest.raises(ConfigError, match=r"^the passphrase was removed when keys/ring-0000000\d was made") as caught:
        await opened(stores, OLD)
    assert f"the private key of {show_recipient(PUBLIC)}" in caught.value.hint
    assert ": put one of those into the settings, here and" in caught.value.hint
    assert (done.front.passphrases, [*done.front.recipients]) == (0, [PUBLIC])
    assert not await opens(stores[0], AtHand(OLD))
    await key_changes.add(await current(stores, "", PRIVATE), CLOCK, passphrase=NEW)
    done = await key_changes.remove(await current(stores, NEW), CLOCK, recipient=PUBLIC)
    assert openers(done.front) == "a passphrase"
    assert not any(wrap.get("kind") == "label" for wrap in done.front.wraps)


@pytest.mark.parametrize(("lost", "at_hand"), [("passphrase", AtHand(identity=PRIVATE)), ("identity", AtHand(NEW))])
async def test_one_secret_is_lost_and_another_is_at_hand(lost: str, at_hand: AtHand) -> None:
    stores = await repository()
    await key_changes.add(await current(stores), CLOCK, recipient=PUBLIC)
    await key_changes.rotate(await current(stores), CLOCK, NEW)
    written = await write(stores, await opened(stores, NEW, writer=True), b"text")
    now = await open_current(stores, SYSTEM_ID, at_hand)
    assert read(chain(await open_keyring(stores[0], SYSTEM_ID, at_hand, clock=CLOCK)), NAME, written) == b"text"
    if lost == "identity":
        await key_changes.remove(now, CLOCK, recipient=PUBLIC)
        assert not await opens(stores[0], AtHand(identity=PRIVATE))
    else:
        await key_changes.add(now, CLOCK, passphrase="a third, which is known")
        assert await opens(stores[0], AtHand("a third, which is known"))


async def test_more_passphrases_than_a_reader_tries_are_refused() -> None:
    stores = await repository("a")
    for number in range(2):
        await key_changes.add(await current(stores), CLOCK, passphrase=f"passphrase {number}")
    now = await current(stores)
    now.front = type(now.front)(now.front.number, SYSTEM_ID, "", now.front.public_key, (*now.front.wraps[:1] * 300,))
    with pytest.raises(ConfigError, match="no reader would open it"):
        await key_changes.add(now, CLOCK, recipient=PUBLIC)


async def test_a_recipient_whose_key_is_no_point_of_the_curve() -> None:
    with pytest.raises(ConfigError, match="nobody has its private key"):
        await key_changes.add(await current(await repository()), CLOCK, recipient=bytes(32))


async def test_without_a_ring_there_is_nothing_to_change() -> None:
    store = Faulty(MemoryStore("a"))
    with pytest.raises(StoreError, match=r"a has no repository\.json"):
        await current([store])
    await store.put(REPOSITORY, MemoryBody([b"{}"]))
    with pytest.raises(ConfigError, match="has no key ring: nothing in it is encrypted"):
        await current([store])


# -- several destinations, several people


async def test_a_destination_that_is_away_is_told_and_gets_the_rings_with_the_next_change() -> None:
    stores = await repository()
    stores[0].down = dict.fromkeys(("put", "get", "list"), StoreError("a is away", passing=True))
    done = await key_changes.rotate(await current(stores), CLOCK, NEW)
    assert (done.stored, done.away) == (("b",), {"a": "a is away"})
    stores[0].down = {}
    assert await rings(stores[0]) == [ring_name(1)]
    # The highest ring of any destination counts, whichever is read first.
    assert (await opened(stores, NEW)).ring is not None
    report = await look_at_keys(stores, SYSTEM_ID, AtHand(NEW))
    (problem,) = report.problems
    assert problem.startswith("a lacks keys/ring-00000002: keys/ring-00000001 is its newest ring")
    await key_changes.add(await current(stores, NEW), CLOCK, recipient=PUBLIC)
    assert await rings(stores[0]) == [ring_name(1), ring_name(2), ring_name(3)]
    for number in (2, 3):
        assert await content(stores[0], ring_name(number)) == await content(stores[1], ring_name(number))


async def test_of_two_at_once_one_wins_and_the_other_is_told() -> None:
    stores = await repository()
    first, second = await current(stores), await current(stores[::-1])
    await key_changes.rotate(first, CLOCK, NEW)
    with pytest.raises(ConfigError, match="keys/ring-00000002 is at a already, and nothing of yours was stored"):
        await key_changes.rotate(second, CLOCK, "the other one's choice")
    assert await opens(stores[1], AtHand(NEW))
    assert [await rings(store) for store in stores] == [[ring_name(1), ring_name(2)]] * 2


async def test_a_store_that_overwrites_is_noticed() -> None:
    class Careless(MemoryStore):
        async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: Any = None) -> None:
            other = self._objects.pop("to come", None)
            await super().put(key, body, replace=replace or True, keep_until=keep_until)
            if other is not None:
                self._objects[key] = other

    store = Careless("careless")
    await create_ring(store, SYSTEM_ID, OLD, BOTH, CLOCK)
    await store.put(REPOSITORY, MemoryBody([b"{}"]))
    now = await open_current([store], SYSTEM_ID, AtHand(OLD))
    store._objects["to come"] = (b"somebody's ring", CLOCK.now())
    with pytest.raises(ConfigError, match="somebody else has changed the keys at this moment"):
        await key_changes.rotate(now, CLOCK, NEW)


async def test_rings_of_one_number_that_differ_are_told_and_made_one_by_the_next_change() -> None:
    stores = await repository()
    apart = [[stores[0]], [stores[1]]]
    for passphrase, alone in zip((NEW, "another"), apart, strict=True):
        await key_changes.add(await current(alone), CLOCK, passphrase=passphrase)
    report = await look_at_keys(stores, SYSTEM_ID, AtHand(OLD))
    assert any("keys/ring-00000002 at b is another one than at a" in problem for problem in report.problems)
    await key_changes.add(await current(stores), CLOCK, passphrase="third")
    assert await content(stores[0], ring_name(3)) == await content(stores[1], ring_name(3))


# -- interrupted


CHANGES: dict[str, tuple[Change, list[AtHand]]] = {
    "add": (lambda now: key_changes.add(now, CLOCK, passphrase=NEW), [AtHand(OLD)]),
    "rotate": (lambda now: key_changes.rotate(now, CLOCK, NEW), [AtHand(OLD), AtHand(NEW)]),
    "remove": (lambda now: key_changes.remove(now, CLOCK, passphrase=OLD), [AtHand(OLD), AtHand(identity=PRIVATE)]),
    "replace": (lambda now: key_changes.replace_key(now, CLOCK, [NEW], {}, print), [AtHand(OLD), AtHand(NEW)]),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_killed_at_any_step_it_opens_with_the_old_or_the_new_secret(kind: str, after: bool) -> None:
    change, secrets = CHANGES[kind]
    steps = await _steps(change)
    assert len(steps) >= 4
    for place, operation, number in steps:
        stores, written = await _ready()
        now = await current(stores, OLD, PRIVATE)
        _begin(stores)
        death: Any = KilledError()
        (stores[place].lose if after else stores[place].fail)[operation, number] = death
        dead = False
        try:
            await change(now)
        except* KilledError:
            dead = True
        assert dead
        _begin(stores)
        # At each destination by itself, whatever is left of the others.
        for store in stores:
            opening = [secret for secret in secrets if await opens(store, secret)]
            assert opening, (operation, number)
            keys = await open_keyring(store, SYSTEM_ID, opening[0], clock=CLOCK)
            assert read(chain(keys), NAME, written) == b"before"
        # And another change makes them the same.
        for secret in (AtHand(NEW), *secrets):
            if await _opens_newest(stores, secret):
                await key_changes.add(await open_current(stores, SYSTEM_ID, secret), CLOCK, passphrase="to be sure")
                break
        assert await rings(stores[0]) == await rings(stores[1])
        assert (await open_keyring(stores[0], SYSTEM_ID, "to be sure", clock=CLOCK)).encrypted


async def _ready() -> tuple[list[Faulty], bytes]:
    """A repository that a passphrase and a recipient open, and an object in it."""
    stores = await repository()
    await key_changes.add(await current(stores), CLOCK, recipient=PUBLIC)
    return stores, await write(stores, await opened(stores, OLD, writer=True), b"before")


def _begin(stores: list[Faulty]) -> None:
    for store in stores:
        store.fail, store.lose = {}, {}
        store.calls.clear()


async def _steps(change: Change) -> list[tuple[int, str, int]]:
    """Every call of a store that the change makes: destination, operation, and which one of these."""
    stores, _ = await _ready()
    now = await current(stores, OLD, PRIVATE)
    _begin(stores)
    await change(now)
    found = []
    for place, store in enumerate(stores):
        for operation in dict.fromkeys(operation for operation, _ in store.calls):
            found += [(place, operation, number) for number in range(1, store.count(operation) + 1)]
    return found


async def _opens_newest(stores: list[Faulty], secret: AtHand) -> bool:
    try:
        await open_current(stores, SYSTEM_ID, secret)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("kind", CHANGES)
async def test_an_answer_that_got_lost_is_no_conflict_with_oneself(kind: str) -> None:
    """As a patient store does: it says the same again."""

    class Again(MemoryStore):
        async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: Any = None) -> None:
            await super().put(key, body, replace=replace, keep_until=keep_until)
            await super().put(key, body, replace=replace, keep_until=keep_until)

    stores = [Faulty(Again(name)) for name in "ab"]
    first = await repository()
    await key_changes.add(await current(first), CLOCK, recipient=PUBLIC)
    for store, other in zip(stores, first, strict=True):
        async for entry in other.list(""):
            try:
                await store.put(entry.key, await other.get(entry.key))
            except ObjectConflict:
                continue
    done = await CHANGES[kind][0](await current(stores, OLD, PRIVATE))
    assert done.stored == ("a", "b")


async def test_a_process_that_runs_notices_a_newer_ring() -> None:
    stores = await repository()
    running = await opened(stores, OLD, writer=True)
    await running.refresh(stores[0])
    assert running.superseded() == ""
    await key_changes.rotate(await current(stores), CLOCK, NEW)
    await running.refresh(stores[0])
    assert running.superseded().startswith("keys/ring-00000002 is there: the keys of the repository were changed")
