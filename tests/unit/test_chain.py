"""The whole chain: round trips, and what a reader must enforce although somebody may write to the bucket."""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.compress import CODECS
from handlers.encrypt import CIPHERS
from infra.keys import Policy
from pipeline.chain import Expected
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import MAGIC, MAX_PLAIN, TRAILER_SIZE
from tests.keys import SYSTEM_ID, chain, cut, encrypting_keys, plain_keys, read, stored

KEYS = encrypting_keys()
PLAIN = plain_keys()
NAME = "wal/0000000100000000/000000010000000000000001"
OTHER = "wal/0000000100000000/000000010000000000000002"
MIB = 1 << 20
DATA = random.Random(5).randbytes(MIB + MIB // 2) * 2
PAIRS = [*((codec, "none") for codec in CODECS), *(("zstd", c) for c in CIPHERS), *(("none", c) for c in CIPHERS)]
SECRET = [cipher for cipher in CIPHERS if cipher != "none"]


def keys_for(cipher: str) -> Any:
    return PLAIN if cipher == "none" else KEYS


def resealed(content: bytes) -> bytes:
    """The same bytes with a checksum that fits: what somebody makes who knows the format and no key."""
    return content[:-TRAILER_SIZE] + hashlib.sha256(content[:-TRAILER_SIZE]).digest()


def with_header(content: bytes, **change: Any) -> bytes:
    """The object with another header, and a checksum that fits."""
    end = 12 + int.from_bytes(content[8:12], "big")
    text = json.dumps({**json.loads(content[12:end]), **change}, separators=(",", ":")).encode()
    return resealed(MAGIC + len(text).to_bytes(4, "big") + text + content[end:])


@pytest.mark.parametrize(("codec", "cipher"), PAIRS)
@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB, 2 * MIB + 1, 3 * MIB])
def test_round_trip(codec: str, cipher: str, size: int) -> None:
    chosen = chain(keys_for(cipher), codec, cipher)
    assert read(chosen, NAME, stored(chosen, NAME, DATA[:size])) == DATA[:size]


@given(
    pair=st.sampled_from(PAIRS),
    size=st.one_of(st.integers(0, 3000), st.integers(MIB - 40, MIB + 40), st.integers(2 * MIB - 40, 2 * MIB + 40)),
    sizes=st.lists(st.integers(0, MIB), max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_however_the_stored_bytes_arrive(pair: tuple[str, str], size: int, sizes: list[int]) -> None:
    chosen = chain(keys_for(pair[1]), *pair)
    content = stored(chosen, NAME, memoryview(DATA)[:size])
    header, plain = chosen.decode(Expected(NAME, SYSTEM_ID), cut(content, sizes))
    assert plain == DATA[:size]
    assert (header.codec, header.cipher, header.plain_size) == (*pair, size)


def test_one_byte_at_a_time() -> None:
    chosen = chain(KEYS, "zstd", "aes-256-cbc")
    content = stored(chosen, NAME, b"text" * 99)
    assert chosen.decode(Expected(NAME, SYSTEM_ID), cut(content, [1] * len(content)))[1] == b"text" * 99


def test_the_header_decides_how_an_object_is_read() -> None:
    content = stored(chain(KEYS, "lz4", "chacha20-poly1305"), NAME, b"text")
    assert read(chain(KEYS, "zstd", "aes-256-gcm"), NAME, content) == b"text"


def test_what_is_encrypted_shows_nothing_of_the_plaintext() -> None:
    for cipher in SECRET:
        content = stored(chain(KEYS, "none", cipher), NAME, b"SELECT * FROM customers" * 50)
        assert b"SELECT" not in content


@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_flipped_bit_is_noticed(cipher: str) -> None:
    chosen = chain(keys_for(cipher), "zstd", cipher)
    content = stored(chosen, NAME, b"text of a segment")
    for bit in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            read(chosen, NAME, bytes(flipped))


@pytest.mark.parametrize("cipher", SECRET)
def test_every_flipped_bit_of_an_encrypted_object_is_noticed_although_the_checksum_fits(cipher: str) -> None:
    chosen = chain(KEYS, "zstd", cipher)
    content = stored(chosen, NAME, b"text of a segment")
    for place in range(len(content) - TRAILER_SIZE):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(IntegrityError):
            read(chosen, NAME, resealed(bytes(flipped)))


@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_cut_and_every_addition_is_noticed(cipher: str) -> None:
    chosen = chain(keys_for(cipher), "zstd", cipher)
    content = stored(chosen, NAME, b"text of a segment")
    for end in range(len(content)):
        with pytest.raises(IntegrityError):
            read(chosen, NAME, content[:end])
    for more in (b"\0", content, content[-TRAILER_SIZE:]):
        with pytest.raises(IntegrityError):
            read(chosen, NAME, content + more)
        with pytest.raises(IntegrityError):
            read(chosen, NAME, resealed(content[:-TRAILER_SIZE] + more + bytes(TRAILER_SIZE)))


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_object_in_the_place_of_another_is_refused(cipher: str) -> None:
    chosen = chain(keys_for(cipher), "zstd", cipher)
    content = stored(chosen, OTHER, b"text")
    with pytest.raises(IntegrityError, match=f"{NAME} holds an object named {OTHER}"):
        read(chosen, NAME, content)


def test_an_object_that_was_renamed_inside_does_not_open() -> None:
    chosen = chain(KEYS, "zstd", "aes-256-gcm")
    forged = with_header(stored(chosen, OTHER, b"text"), name=NAME)
    with pytest.raises(IntegrityError, match=f"{NAME} does not decrypt"):
        read(chosen, NAME, forged)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_object_of_another_cluster_is_refused(cipher: str) -> None:
    content = stored(chain(keys_for(cipher), "zstd", cipher, "8"), NAME, b"text")
    with pytest.raises(IntegrityError, match=f"{NAME} belongs to the cluster 8, not to {SYSTEM_ID}"):
        read(chain(keys_for(cipher)), NAME, content)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_an_object_of_another_backup_is_refused(cipher: str) -> None:
    chosen = chain(keys_for(cipher), "zstd", cipher)
    name = "base/base_20260114_120000/data/base/00000001"
    content = stored(chosen, name, b"text", backup="aa")
    assert read(chosen, name, content, backup="aa") == b"text"
    assert read(chosen, name, content, backup=None) == b"text"
    with pytest.raises(IntegrityError, match="belongs to the base backup aa, not to bb"):
        read(chosen, name, content, backup="bb")
    with pytest.raises(IntegrityError, match=r"belongs to the base backup aa, not to \(none\)"):
        read(chosen, name, content)


def test_a_plain_object_in_an_encrypted_repository_is_refused() -> None:
    content = stored(chain(PLAIN), NAME, b"text")
    with pytest.raises(IntegrityError, match=f"{NAME} is stored unencrypted") as error:
        read(chain(KEYS), NAME, content)
    assert "--allow-unencrypted" in error.value.hint
    assert read(chain(encrypting_keys(allow_unencrypted=True)), NAME, content) == b"text"


def test_the_policy_tells_the_kinds_apart() -> None:
    keys = encrypting_keys(Policy(wal=False, base=True))
    assert read(chain(keys), NAME, stored(chain(PLAIN), NAME, b"text")) == b"text"
    part = "base/b/data/base/00000001"
    with pytest.raises(IntegrityError, match="is stored unencrypted"):
        read(chain(keys), part, stored(chain(PLAIN), part, b"text"))


def test_an_encrypted_object_without_a_ring() -> None:
    content = stored(chain(KEYS, "zstd", "aes-256-gcm"), NAME, b"text")
    with pytest.raises(IntegrityError, match="no key ring was opened"):
        read(chain(PLAIN), NAME, content)
    with pytest.raises(ConfigError, match="the repository has no key ring"):
        stored(chain(PLAIN, "zstd", "aes-256-gcm"), NAME, b"text")


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"plain_size": 0}, "more than"),
        ({"plain_size": 5}, "1 bytes less than the 5 it claims"),
        ({"plain_size": MAX_PLAIN}, "bytes less than"),
        ({"plain_size": MAX_PLAIN + 1}, "the format allows"),
        ({"codec": "none"}, "more than"),
        ({"codec": "lz4"}, "not valid lz4"),
        ({"codec": "brotli"}, "unknown codec 'brotli'"),
        ({"cipher": "rot13", "salt": "00" * 32}, "unknown cipher 'rot13'"),
        ({"key": "00" * 16}, "names a key all the same"),
    ],
)
def test_hostile_headers_of_plain_objects(change: dict[str, Any], fact: str) -> None:
    content = with_header(stored(chain(PLAIN), NAME, b"text"), **change)
    with pytest.raises(IntegrityError) as error:
        read(chain(PLAIN), NAME, content)
    assert fact in error.value.fact
    assert NAME in error.value.fact


def test_more_than_the_caller_can_hold_is_refused_unread() -> None:
    content = stored(chain(PLAIN), NAME, bytes(1000))
    with pytest.raises(IntegrityError, match="claims 1000 bytes of plaintext; at most 999 were expected"):
        chain(PLAIN).decode(Expected(NAME, SYSTEM_ID, most=999), [content])


def test_the_fingerprint_tells_same_from_other_and_needs_the_writer_secret() -> None:
    keys = KEYS
    assert keys.fingerprint(NAME, b"text") == keys.fingerprint(NAME, memoryview(b"text"))
    digests = {
        keys.fingerprint(NAME, b"text"),
        keys.fingerprint(OTHER, b"text"),
        keys.fingerprint(NAME, b"texT"),
        keys.fingerprint(NAME[:-1], NAME[-1:].encode() + b"text"),
        encrypting_keys().fingerprint(NAME, b"text"),
        PLAIN.fingerprint(NAME, b"text"),
    }
    assert len(digests) == 6
    assert {len(digest) for digest in digests} == {64}


def test_several_threads_share_one_chain() -> None:
    """The workers of the service do; a stage that kept a buffer of its own would mix objects up."""
    chosen = chain(KEYS, "zstd", "aes-256-gcm")

    def there_and_back(number: int) -> bool:
        plain = DATA[number * 1000 :]
        return read(chosen, NAME, stored(chosen, NAME, plain)) == plain

    with ThreadPoolExecutor(4) as workers:
        assert all(workers.map(there_and_back, range(12)))
