"""Another repository key: all that is stored stays readable, and former secrets read and write nothing that is new."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from handlers.outlet import Outlet
from handlers.verbatim import Parcel
from infra import key_changes
from infra.at_hand import AtHand
from infra.key_report import look_at_keys
from infra.keyring import KeyReplacedError, RepositoryKeys
from infra.ring import ring_name
from pipeline.catalog import REPOSITORY, data_key_name
from pipeline.contracts import Body
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.objects import MemoryBody, read_header
from tests.changing import (
    BOTH,
    CLOCK,
    NAME,
    NEW,
    OLD,
    PUBLIC,
    content,
    current,
    make_cheap,
    opened,
    repository,
    rings,
    write,
)
from tests.keys import SYSTEM_ID, chain, read, stored
from tests.stores import Faulty


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


# -- another repository key


async def test_a_new_repository_key_reads_all_and_shuts_out_the_former_secrets() -> None:
    stores = await repository()
    writer = await opened(stores, OLD, writer=True)
    before = await write(stores, writer, b"before")
    former = (await opened(stores, OLD)).ring
    assert former is not None
    done = await key_changes.replace_key(await current(stores), CLOCK, [NEW], {PUBLIC: "safe"}, print)
    assert done.number == 2
    # The service that runs goes on with its data key, which is listed.
    meanwhile = stored(chain(writer, "zstd", "aes-256-gcm"), NAME, b"meanwhile")
    later = await opened(stores, NEW, writer=True)
    after = await write(stores, later, b"after")
    reader = await opened(stores, NEW)
    for text, sealed in ((b"before", before), (b"meanwhile", meanwhile), (b"after", after)):
        assert read(chain(reader), NAME, sealed) == text
    assert reader.fingerprint(NAME, b"x") == writer.fingerprint(NAME, b"x")
    # Whoever has the former ring reads what was, and nothing that is new.
    thief = RepositoryKeys(SYSTEM_ID, former, BOTH, store=None, allow_unencrypted=False)
    await thief.refresh(stores[0])
    assert read(chain(thief), NAME, before) == b"before"
    with pytest.raises(IntegrityError):
        read(chain(thief), NAME, after)
    # Nor is anything taken that was made with the former writer secret from now on.
    thief._begin_writing(former, CLOCK.now())
    assert thief.key_object is not None
    await stores[0].put(*thief.key_object)
    await reader.refresh()
    with pytest.raises(IntegrityError, match="was not made by a writer of this repository"):
        read(chain(reader), NAME, stored(chain(thief, "zstd", "aes-256-gcm"), NAME, b"planted"))
    report = await look_at_keys(stores, SYSTEM_ID, AtHand(NEW))
    assert report.former == 1
    assert report.refused == report.acceptable == [thief.current().id]
    assert "a new repository key: in force" in "\n".join(report.lines())


async def test_a_data_key_that_is_damaged_is_told_and_can_be_accepted_once_it_is_mended() -> None:
    stores = await repository("a")
    writer = await opened(stores, OLD, writer=True)
    sealed = await write(stores, writer, b"text")
    name = data_key_name(writer.current().id)
    whole = await content(stores[0], name)
    await stores[0].put(name, MemoryBody([whole[:-40] + b"X" + whole[-39:]]), replace=True)
    said: list[str] = []
    await key_changes.replace_key(await current(stores), CLOCK, [NEW], {}, said.append)
    assert len(said) == 1
    assert said[0].startswith(f"1 data keys are damaged or were made by nobody of this repository, {name} for one")
    await stores[0].put(name, MemoryBody([whole]), replace=True)
    await key_changes.accept(await current(stores, NEW), CLOCK, writer.current().id)
    assert read(chain(await opened(stores, NEW)), NAME, sealed) == b"text"


async def test_a_second_new_key_keeps_the_first_one_readable() -> None:
    stores = await repository()
    texts, before = {}, ""
    for number, passphrase in enumerate((OLD, NEW, "third")):
        if before:
            await key_changes.replace_key(await current(stores, before), CLOCK, [passphrase], {}, print)
        before = passphrase
        texts[b"%d" % number] = await write(stores, await opened(stores, passphrase, writer=True), b"%d" % number)
    reader = await opened(stores, "third")
    assert all(read(chain(reader), NAME, sealed) == text for text, sealed in texts.items())


async def test_a_new_repository_key_needs_every_destination() -> None:
    stores = await repository()
    stores[1].down = {"list": StoreError("b is away", passing=True)}
    with pytest.raises(StoreError, match="b does not answer, and the data keys there have to be listed"):
        await key_changes.replace_key(await current(stores), CLOCK, [NEW], {}, print)
    assert await rings(stores[0]) == [ring_name(1)]


async def test_a_writer_that_began_before_and_stores_its_key_after_notices() -> None:
    stores = await repository()
    writer = await opened(stores, OLD, writer=True)
    await key_changes.replace_key(await current(stores), CLOCK, [NEW], {}, print)
    with pytest.raises(KeyReplacedError, match="the repository has a new key since keys/ring-00000002"):
        await write(stores, writer, b"text")


async def test_nothing_is_stored_under_a_data_key_that_will_not_count() -> None:
    stores = await repository("a")
    keys = await opened(stores, OLD, writer=True)
    await key_changes.replace_key(await current(stores), CLOCK, [NEW], {}, print)
    content = stored(chain(keys, "zstd", "aes-256-gcm"), NAME, b"text")
    parcel = Parcel(read_header(NAME, content)[0], MemoryBody([content]), content[-32:].hex())
    outlet = Outlet(stores[0], key_object=keys.key_object, confirm=keys.confirm)
    with pytest.raises(KeyReplacedError):
        await outlet.deliver(parcel)
    assert [entry.key async for entry in stores[0].list("wal/")] == []


async def test_a_writer_that_stores_its_key_just_before_the_ring_is_listed_by_a_second_ring() -> None:
    """He has looked for rings before ours was there, and we for keys before his was: we look once more."""
    stores = await repository()
    writer = await opened(stores, OLD, writer=True)

    class Meanwhile(Faulty):
        async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: Any = None) -> None:
            if key == ring_name(2) and writer.key_object is not None and self.name == "a":
                await self.store.put(*writer.key_object)
                await writer.confirm(self.store)
            await super().put(key, body, replace=replace, keep_until=keep_until)

    stores[0] = Meanwhile(stores[0].store)
    done = await key_changes.replace_key(await current(stores), CLOCK, [NEW], {}, print)
    assert done.number == 3
    sealed = stored(chain(writer, "zstd", "aes-256-gcm"), NAME, b"text")
    assert read(chain(await opened(stores, NEW)), NAME, sealed) == b"text"


async def test_a_data_key_that_was_missed_can_be_accepted() -> None:
    """The change of the key was killed before it had looked once more."""
    stores = await repository()
    writer = await opened(stores, OLD, writer=True)
    await key_changes.replace_key(await current(stores), CLOCK, [NEW], {}, print)
    assert writer.key_object is not None
    await stores[1].put(*writer.key_object)
    missed = writer.current().id
    report = await look_at_keys(stores, SYSTEM_ID, AtHand(NEW))
    assert report.acceptable == [missed]
    assert any(f"walship key accept {missed}" in problem for problem in report.problems)
    await key_changes.accept(await current(stores, NEW), CLOCK, missed)
    sealed = stored(chain(writer, "zstd", "aes-256-gcm"), NAME, b"text")
    assert read(chain(await opened(stores, NEW)), NAME, sealed) == b"text"
    with pytest.raises(ConfigError, match=f"{data_key_name('0' * 32)} is not there"):
        await key_changes.accept(await current(stores, NEW), CLOCK, "0" * 32)


# -- whichever ring is the newest, anywhere


async def test_nothing_is_written_under_a_key_that_was_replaced_elsewhere() -> None:
    stores = await repository()
    await key_changes.replace_key(await current(stores[1:]), CLOCK, [NEW], {}, print)
    assert await rings(stores[0]) == [ring_name(1)]
    with pytest.raises(ConfigError, match="BACKUP_ENCRYPTION_PASSWORD does not open the key ring keys/ring-00000002"):
        await opened(stores, OLD, writer=True)
    assert (await opened(stores, OLD)).reads, "what was stored can still be read"
    assert (await opened(stores, NEW, writer=True)).ring is not None


async def test_with_the_same_repository_key_an_older_ring_will_do() -> None:
    """The change was killed after the first destination: whoever has the old passphrase ships on."""
    stores = await repository()
    await key_changes.rotate(await current(stores[1:]), CLOCK, NEW)
    writer = await opened(stores, OLD, writer=True)
    sealed = await write(stores, writer, b"text")
    assert read(chain(await opened(stores, NEW)), NAME, sealed) == b"text"


async def test_where_the_newest_ring_is_missing_is_told_unless_the_repository_is_gone_there() -> None:
    """``walship run`` copies a ring, and nothing at all to where there is no repository."""
    stores = await repository()
    await key_changes.rotate(await current(stores[1:]), CLOCK, NEW)
    with structlog.testing.capture_logs() as told:
        await opened(stores, NEW)
    assert [(line["destination"], line["error"]) for line in told] == [
        ("a", "keys/ring-00000002 is missing there, which b has")
    ]
    await stores[0].delete([REPOSITORY, ring_name(1)])
    with structlog.testing.capture_logs() as told:
        await opened(stores, NEW)
    assert not told


async def test_a_ring_of_a_newer_form_is_refused_by_name() -> None:
    stores = await repository("a")
    newer = bytearray(await content(stores[0], ring_name(1)))
    newer[7] = 2
    await stores[0].put(ring_name(2), MemoryBody([bytes(newer)]))
    with pytest.raises(IntegrityError, match="keys/ring-00000002 is of format 2; this walship reads format 1"):
        await current(stores)
    with pytest.raises(IntegrityError, match="is of format 2"):
        await opened(stores, OLD)
