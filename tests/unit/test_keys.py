"""The keys of a repository in a store: made, found, refused, and handed to a restored server."""

from __future__ import annotations

import functools
import json
import os

import pytest

from infra.keys import Policy, RepositoryKeys, create_ring, new_ring, open_keyring
from infra.ring import Ring, fresh_ring, make_data_key, ring_name, seal_ring
from infra.storage.memory import MemoryStore
from pipeline.catalog import data_key_name
from pipeline.errors import ConfigError, IntegrityError, ObjectConflict, StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.keys import NOW, SYSTEM_ID, chain, plain_keys, read, stored

PASSPHRASE = "correct horse"
BOTH = Policy(wal=True, base=True)
NEITHER = Policy(wal=False, base=False)
CLOCK = FastClock()
NAME = "wal/0000000100000000/000000010000000000000001"
MISSING = "0" * 32


async def open_(store: MemoryStore, passphrase: str = PASSPHRASE, *, writer: bool = False) -> RepositoryKeys:
    return await open_keyring(store, SYSTEM_ID, passphrase, writer=writer, clock=CLOCK)


async def content(store: MemoryStore, key: str) -> bytes:
    return b"".join((await store.get(key)).chunks())


async def put(store: MemoryStore, key: str, value: bytes) -> None:
    await store.put(key, MemoryBody([value]), replace=True)


@functools.cache
def ring_object() -> bytes:
    """A ring that opens quickly: its scrypt is cheap, as the wrap says."""
    sealed = seal_ring(fresh_ring(SYSTEM_ID, BOTH), [PASSPHRASE], [], NOW, scrypt_n=1024)
    return stored(chain(plain_keys(), "none"), ring_name(1), sealed)


async def encrypted(store: MemoryStore | None = None) -> MemoryStore:
    store = store or MemoryStore("bucket")
    await put(store, ring_name(1), ring_object())
    return store


async def test_what_one_process_writes_another_reads() -> None:
    store = await encrypted()
    writer = await open_(store, writer=True)
    assert writer.encrypted
    assert writer.policy == BOTH
    assert writer.key_object is not None
    await store.put(*writer.key_object)
    sealed = stored(chain(writer, "zstd", "aes-256-gcm"), NAME, b"text")

    reader = await open_(store)
    assert read(chain(reader), NAME, sealed) == b"text"
    assert reader.find(writer.current().id) == writer.current()
    assert reader.fingerprint(NAME, b"text") == writer.fingerprint(NAME, b"text")
    with pytest.raises(ConfigError, match="for reading only"):
        reader.current()
    assert read(chain(writer), NAME, sealed) == b"text"  # a writer knows its own key without reading any


async def test_every_writer_has_a_key_of_its_own_and_refresh_finds_it() -> None:
    store = await encrypted()
    reader = await open_(store)
    first, second = await open_(store, writer=True), await open_(store, writer=True)
    assert first.current() != second.current()
    assert second.key_object is not None
    await store.put(*second.key_object)
    with pytest.raises(IntegrityError, match=f"the data key {second.current().id} is not known here") as error:
        reader.find(second.current().id)
    assert data_key_name(second.current().id) in error.value.hint
    assert "keys/ring-00000001" in error.value.hint
    await reader.refresh()
    assert reader.find(second.current().id) == second.current()
    await first.refresh()
    assert first.find(second.current().id) == second.current()


async def test_a_key_that_is_missing_or_damaged_here_is_taken_from_elsewhere() -> None:
    store, other = await encrypted(), MemoryStore("other")
    writer = await open_(store, writer=True)
    assert writer.key_object is not None
    name, body = writer.key_object
    await other.put(name, body)
    whole = await content(other, name)
    await put(store, name, whole[:300] + b"X" + whole[301:])
    reader = await open_(store)
    with pytest.raises(IntegrityError, match=name):
        reader.find(writer.current().id)
    await reader.refresh(other)
    assert reader.find(writer.current().id) == writer.current()


async def test_the_ring_is_created_once() -> None:
    store = MemoryStore()
    await create_ring(store, SYSTEM_ID, PASSPHRASE, BOTH, CLOCK)
    with pytest.raises(ObjectConflict):
        await create_ring(store, SYSTEM_ID, "another", NEITHER, CLOCK)
    assert (await open_(store)).policy == BOTH


async def test_one_ring_for_several_destinations() -> None:
    name, body = await new_ring(SYSTEM_ID, PASSPHRASE, BOTH, CLOCK)
    first, second = MemoryStore(), MemoryStore()
    await first.put(name, body)
    await second.put(name, body)
    writer = await open_(first, writer=True)
    assert writer.key_object is not None
    await second.put(*writer.key_object)
    assert (await open_(second)).find(writer.current().id) == writer.current()


async def test_a_wrong_passphrase() -> None:
    store = await encrypted()
    with pytest.raises(ConfigError) as error:
        await open_(store, "wrong")
    assert error.value.fact == (
        f"BACKUP_ENCRYPTION_PASSWORD does not open the key ring keys/ring-00000001 of {SYSTEM_ID} in bucket"
    )
    assert error.value.hint == (
        "it is not the right one for this repository, which opens with a passphrase. Nobody has that?"
        ' docs/procedures.md, "Passphrase lost". If what is at hand is right, the ring was replaced: `walship key list`'
        " compares it with those at other destinations"
    )


async def test_what_a_line_of_env_may_have_cut_off_is_said_where_it_can_be() -> None:
    """Such lines are refused today: a repository may be older than that."""
    store = await encrypted()
    for wrong, said in (("hush hush #1", True), ("hush#hush", False), ("# hush", False)):
        with pytest.raises(ConfigError) as error:
            await open_(store, wrong)
        assert ("only what stands before the ` #` opens it. If what is at hand" in error.value.hint) is said
        assert "hush" not in f"{error.value.fact} {error.value.hint}"


async def test_no_passphrase() -> None:
    with pytest.raises(ConfigError, match="in bucket is encrypted, and BACKUP_ENCRYPTION_PASSWORD is empty"):
        await open_(await encrypted(), "")
    with pytest.raises(ConfigError, match="BACKUP_ENCRYPTION_PASSWORD is empty"):
        await create_ring(MemoryStore(), SYSTEM_ID, "", BOTH, CLOCK)


async def test_a_repository_without_a_ring() -> None:
    keys = await open_(MemoryStore(), "")
    assert not keys.encrypted
    assert keys.key_object is None
    assert keys.policy == NEITHER
    assert not keys.must_encrypt(NAME)
    assert read(chain(keys), NAME, stored(chain(keys), NAME, b"text")) == b"text"
    with pytest.raises(ConfigError, match="the repository has no key ring"):
        keys.current()
    with pytest.raises(IntegrityError, match="no key ring was opened"):
        keys.find(MISSING)
    await keys.refresh()


async def test_settings_and_repository_have_to_agree() -> None:
    wal_only = Policy(wal=True, base=False)
    with pytest.raises(ConfigError, match="the settings ask for encryption, and the repository has no key ring"):
        await open_keyring(MemoryStore(), SYSTEM_ID, PASSPHRASE, clock=CLOCK, wanted=wal_only)
    store = await encrypted()
    with pytest.raises(ConfigError, match="this repository encrypts base backups, and the settings do not"):
        await open_keyring(store, SYSTEM_ID, PASSPHRASE, clock=CLOCK, wanted=wal_only)
    await open_keyring(store, SYSTEM_ID, PASSPHRASE, clock=CLOCK, wanted=BOTH)
    await open_keyring(MemoryStore(), SYSTEM_ID, "", clock=CLOCK, wanted=NEITHER)
    with pytest.raises(ConfigError, match="BACKUP_ENCRYPTION_PASSWORD is set"):
        await open_keyring(MemoryStore(), SYSTEM_ID, PASSPHRASE, writer=True, clock=CLOCK, wanted=NEITHER)


async def test_a_ring_that_was_removed_does_not_make_a_repository_plain() -> None:
    store = MemoryStore("bucket")
    with pytest.raises(ConfigError, match=f"the repository {SYSTEM_ID} in bucket has no key ring"):
        await open_(store)
    keys = await open_keyring(store, SYSTEM_ID, PASSPHRASE, clock=CLOCK, allow_unencrypted=True)
    assert not keys.encrypted


@pytest.mark.parametrize(
    ("name", "policy", "must"),
    [
        (NAME, Policy(wal=True, base=False), True),
        (NAME, Policy(wal=False, base=True), False),
        ("tail/0000/1", Policy(wal=True, base=False), True),
        ("wal/00000002.history", Policy(wal=True, base=False), True),
        ("base/b/backup_info", Policy(wal=True, base=False), False),
        ("base/b/backup_info", Policy(wal=False, base=True), True),
        ("keys/ring-00000001", BOTH, False),
        ("keys/data-x", BOTH, False),
        ("verified/0123456789abcdef", BOTH, False),
    ],
)
def test_what_has_to_be_encrypted(name: str, policy: Policy, must: bool) -> None:
    keys = RepositoryKeys(SYSTEM_ID, None, policy, store=None, allow_unencrypted=False)
    assert keys.must_encrypt(name) is must
    assert not RepositoryKeys(SYSTEM_ID, None, policy, store=None, allow_unencrypted=True).must_encrypt(name)


async def test_a_ring_put_in_the_place_of_ours_does_not_open() -> None:
    store, theirs = await encrypted(), MemoryStore()
    await create_ring(theirs, SYSTEM_ID, "theirs", NEITHER, CLOCK)
    for number in (1, 2):
        forged = await content(theirs, ring_name(1))
        if number == 2:
            plain = read(chain(plain_keys()), ring_name(1), forged)
            forged = stored(chain(plain_keys(), "none"), ring_name(2), plain)
        await put(store, ring_name(number), forged)
        with pytest.raises(ConfigError, match="does not open the key ring"):
            await open_(store)


async def test_a_damaged_ring_or_one_of_another_cluster_is_named() -> None:
    store = await encrypted()
    whole = await content(store, ring_name(1))
    await put(store, ring_name(1), whole[:-50] + b"X" + whole[-49:])
    with pytest.raises(IntegrityError, match="keys/ring-00000001 is damaged"):
        await open_(store)
    other = MemoryStore()
    await create_ring(other, "8", PASSPHRASE, BOTH, CLOCK)
    await put(store, ring_name(1), await content(other, ring_name(1)))
    with pytest.raises(IntegrityError, match="keys/ring-00000001 belongs to the cluster 8"):
        await open_(store)


async def test_an_older_ring_put_back_is_noticed() -> None:
    store = await encrypted()
    ring = (await open_(store)).ring
    assert isinstance(ring, Ring)
    newer = fresh_ring(SYSTEM_ID, BOTH)
    later = type(newer)(2, SYSTEM_ID, BOTH, ring.writer_secret, ring.private_key)
    key, sealed = make_data_key(later, NOW)
    await put(store, data_key_name(key.id), stored(chain(plain_keys(), "none"), data_key_name(key.id), sealed))
    with pytest.raises(IntegrityError, match="made under keys/ring-00000002, and bucket has no ring newer") as error:
        await open_(store)
    assert "put back" in error.value.hint


async def test_objects_too_large_for_keys_are_not_read() -> None:
    store = await encrypted()
    await put(store, ring_name(2), bytes(2 << 20))
    with pytest.raises(IntegrityError, match="keys/ring-00000002 in bucket is 2097152 bytes"):
        await open_(store)


async def test_what_else_lies_under_keys_is_passed_over() -> None:
    store = await encrypted()
    for name in ("keys/README", "keys/ring-1", "keys/ring-00000002.tmp", "keys/data-xyz", "keys/old/ring-00000009"):
        await put(store, name, b"?")
    assert (await open_(store)).policy == BOTH


class Failing(MemoryStore):
    """A store whose data keys cannot be fetched at the moment."""

    async def get(self, key: str, span: tuple[int, int] | None = None) -> MemoryBody:
        if key.startswith("keys/data-"):
            raise StoreError(f"{self.name} does not answer", passing=True)
        return MemoryBody((await super().get(key, span)).chunks())


async def test_a_store_that_fails_is_one_store_error() -> None:
    store = await encrypted(Failing("bucket"))
    for _ in range(3):
        await put(store, data_key_name(os.urandom(16).hex()), b"?")
    with pytest.raises(StoreError, match="bucket does not answer"):
        await open_(store)


async def test_restore_keys_read_without_the_passphrase() -> None:
    store = await encrypted()
    writer = await open_(store, writer=True)
    assert writer.key_object is not None
    await store.put(*writer.key_object)
    sealed = stored(chain(writer, "zstd", "aes-128-cbc"), NAME, b"text")
    await put(store, data_key_name(MISSING), b"damaged")

    document = (await open_(store)).restore_keys()
    restored = RepositoryKeys.from_restore_keys(document)
    assert read(chain(restored), NAME, sealed) == b"text"
    assert json.loads(document).keys() == {
        "walship_restore_keys", "system_id", "policy", "keys", "ring", "number", "identity",
    }  # fmt: skip
    assert json.loads(document)["ring"] == json.loads(document)["identity"] == ""
    assert restored.policy == BOTH
    with pytest.raises(IntegrityError, match="is stored unencrypted"):
        read(chain(restored), NAME, stored(chain(plain_keys()), NAME, b"text"))
    with pytest.raises(IntegrityError, match=f"the data key {MISSING} is not known here"):
        restored.find(MISSING)
    with pytest.raises(ConfigError):
        restored.current()
    plain = RepositoryKeys.from_restore_keys((await open_(MemoryStore(), "")).restore_keys())
    assert read(chain(plain), NAME, stored(chain(plain_keys()), NAME, b"text")) == b"text"


async def test_restore_keys_that_follow_open_what_is_written_later() -> None:
    store = await encrypted()
    reader = await open_(store)
    fixed = RepositoryKeys.from_restore_keys(reader.restore_keys())
    following = RepositoryKeys.from_restore_keys(reader.restore_keys(follow=True))
    writer = await open_(store, writer=True)
    assert writer.key_object is not None
    await store.put(*writer.key_object)
    sealed = stored(chain(writer, "zstd", "aes-256-gcm"), NAME, b"text")
    with pytest.raises(IntegrityError, match="is not known here"):
        read(chain(following), NAME, sealed)
    assert not await fixed.refresh_from([store])
    assert await following.refresh_from([Failing("away"), store])
    assert not await following.refresh_from([store]), "nothing new"
    assert read(chain(following), NAME, sealed) == b"text"
    assert following.policy == BOTH
    with pytest.raises(IntegrityError, match="is stored unencrypted"):
        read(chain(following), NAME, stored(chain(plain_keys()), NAME, b"text"))


async def test_a_changed_ring_among_restore_keys_is_noticed() -> None:
    document = json.loads((await open_(await encrypted())).restore_keys(follow=True))
    for changed in ({"identity": "00"}, {"identity": "00" * 32}, {"number": 2}, {"ring": "{}"}):
        with pytest.raises(IntegrityError, match="the file of restore keys"):
            RepositoryKeys.from_restore_keys(json.dumps(document | changed).encode())


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b'{"walship_restore_keys":2,"system_id":"7","policy":{"wal":true,"base":true},"keys":{},"ring":"","number":0,"identity":""}',
        b'{"walship_restore_keys":1,"system_id":"7","policy":{"wal":1,"base":true},"keys":{},"ring":"","number":0,"identity":""}',
        b'{"walship_restore_keys":1,"system_id":"7","policy":{"wal":true,"base":true},"keys":{"a":"00"},"ring":"","number":0,"identity":""}',
    ],
)
def test_restore_keys_that_are_none(document: bytes) -> None:
    with pytest.raises(IntegrityError, match="the file of restore keys"):
        RepositoryKeys.from_restore_keys(document)
