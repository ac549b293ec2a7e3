"""What is gone on without, and what is waited for, where a destination accepts connections and does not answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra import keys
from infra.cli import answering as module
from infra.cli.answering import answering, heard, with_enough
from infra.keys import open_keys
from infra.repository import Destination
from infra.settings import Settings
from infra.storage.memory import MemoryStore
from infra.storage.retry import Retrying
from infra.wiring import Site
from pipeline.catalog import REPOSITORY
from pipeline.errors import RecoveryError, StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.keys import SYSTEM_ID
from tests.sites import site_at
from tests.stores import Faulty
from tests.unit.test_passed_over import PASSPHRASE, RING, ring_object

#: Who waits for what hangs fails.
pytestmark = pytest.mark.timeout(30)

HANGS = 600.0
LATE = 0.3
NOT_MET = "segment 3 is missing"
SILENT = "bucket has not answered for 0.05 seconds, and another destination has; `walship check` says why"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (module, keys):
        monkeypatch.setattr(each, "ANSWER", 0.05)


async def there(name: str, delay: float = 0.0) -> Faulty:
    store = MemoryStore(name)
    await store.put(REPOSITORY, MemoryBody([b"{}"]))
    return Faulty(store, delay={"head": delay})


async def site(*stores: Faulty, required: str = "") -> Site:
    """``required``: the only one that is; empty: all are. With the patience of a command."""
    patient = [Retrying(store, FastClock()) for store in stores]
    made = await site_at(*patient)
    urls = tuple(f"file:///{store.name}" for store in stores)
    destinations = tuple(Destination(store, required in ("", store.name)) for store in patient)
    settings = made.settings.model_copy(update={"destinations": urls})
    return replace(made, settings=settings, destinations=destinations)


def names(found: Site) -> list[str]:
    return [store.name for store in found.stores]


def required(destination: Destination) -> bool:
    return destination.required


async def test_one_that_hangs_is_gone_on_without_and_told() -> None:
    said: list[str] = []
    hung, good = await there("bucket", HANGS), await there("folder")
    for stores in ((hung, good), (good, hung)):
        said.clear()
        found, silent = await heard(await site(*stores), required, tell=said.append)
        assert (names(found), silent) == (["folder"], ["bucket"])
        assert found.settings.destinations == ("file:///folder",)
        assert said == [f"bucket is left out: {SILENT}. What only it has cannot be restored"]


async def test_what_was_acknowledged_must_be_at_one_that_answers() -> None:
    """A restore without the only required destination may end too early; a look at what is there takes what it gets."""
    slow, optional = await there("bucket", LATE), await there("folder")
    made = await site(slow, optional, required="bucket")
    found, silent = await heard(made, required)
    assert (names(found), silent) == (["bucket", "folder"], [])
    found, silent = await heard(made, lambda _: True)
    assert (names(found), silent) == (["folder"], ["bucket"])


async def test_the_only_one_has_all_the_time_it_needs() -> None:
    slow = await there("bucket", LATE)
    found, silent = await heard(await site(slow), lambda _: True)
    assert (names(found), silent) == (["bucket"], [])
    down = await there("folder")
    down.down = {"head": StoreError("no")}
    assert names(await answering(await site(slow, down))) == ["bucket"]


async def test_a_plan_that_others_suffice_for_does_not_wait() -> None:
    async def decide(found: Site) -> list[str]:
        return names(found)

    assert await with_enough(await site(await there("bucket", HANGS), await there("folder")), decide, hurried=True) == [
        "folder"
    ]


async def test_a_restore_that_is_carried_out_waits_for_who_may_have_more(capsys: pytest.CaptureFixture[str]) -> None:
    async def decide(found: Site) -> list[str]:
        return names(found)

    made = await site(await there("bucket", 0.3), await there("folder"))
    assert await with_enough(made, decide, hurried=False) == ["bucket", "folder"]
    assert "is left out" not in capsys.readouterr().err


async def test_what_only_the_silent_one_has_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    async def decide(found: Site) -> list[str]:
        if "bucket" not in names(found):
            raise RecoveryError(NOT_MET)
        return names(found)

    made = await site(await there("bucket", LATE), await there("folder"))
    assert await with_enough(made, decide, hurried=True) == ["bucket", "folder"]
    told = capsys.readouterr().err
    assert f"bucket is left out: {SILENT}" in told
    assert f"{NOT_MET}. What is lacking may be at bucket, which is asked again, and waited for" in told


async def test_where_it_stays_silent_the_first_reason_counts(capsys: pytest.CaptureFixture[str]) -> None:
    async def decide(_: Site) -> None:
        raise RecoveryError(NOT_MET)

    hung = await there("bucket", LATE)
    hung.down = {"head": StoreError("bucket did not answer", passing=True)}
    with pytest.raises(RecoveryError, match=NOT_MET):
        await with_enough(await site(hung, await there("folder")), decide, hurried=True)
    assert hung.count("head") == 1 + 6, "asked again, with patience"
    assert "bucket is left out: bucket did not answer (6 attempts" in capsys.readouterr().err
    # Where nobody was silent, nobody is asked again.
    good = await there("folder")
    with pytest.raises(RecoveryError, match=NOT_MET):
        await with_enough(await site(good), decide, hurried=True)
    assert good.count("head") == 1


async def test_keys_are_not_sought_at_one_that_has_not_said_which_it_has() -> None:
    """They are when an object needs one that is not known; until then nobody waits for them."""
    stores = [MemoryStore("bucket"), MemoryStore("folder")]
    for store in stores:
        await store.put(RING, MemoryBody([ring_object()]))
    hung = Faulty(stores[0], delay={"list": HANGS})
    settings = Settings(_env_file=None, BACKUP_ENCRYPTION_PASSWORD=PASSPHRASE)
    opened = await open_keys(
        [Retrying(hung, FastClock()), stores[1]],
        settings,
        SYSTEM_ID,
        FastClock(),
        writer=False,
        allow_unencrypted=False,
    )
    assert opened.reads
    assert hung.count("list") == 1
