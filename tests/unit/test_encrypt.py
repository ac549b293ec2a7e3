"""The framing of all five ciphers: round trips, and everything that somebody may do to the chunks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.encrypt import CHUNK, CIPHERS, Encrypt
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import Header
from tests.keys import cut, encrypting_keys

SECRET = [cipher for cipher in CIPHERS if cipher != "none"]
EDGES = (0, 1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 16)
DATA = random.Random(3).randbytes(3 * CHUNK)
KEYS = encrypting_keys()
DOES_NOT_OPEN = "wal/x does not decrypt"


def overhead(cipher: str) -> int:
    return 48 if cipher.endswith("cbc") else 16


def seal(cipher: str, *pieces: bytes) -> tuple[Header, bytes]:
    stage = Encrypt(KEYS, lambda _name: cipher)
    header = stage.describe(Header("wal/x", "7"))
    return header, b"".join(bytes(p) for p in stage.forward(header, pieces))


def unseal(header: Header, content: bytes, *sizes: int) -> bytes:
    stage = Encrypt(KEYS, lambda _name: "none")
    return b"".join(bytes(p) for p in stage.backward(header, cut(content, sizes)))


def chunks(cipher: str, content: bytes) -> list[bytes]:
    step = CHUNK + overhead(cipher)
    return [content[start : start + step] for start in range(0, len(content), step)]


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("cipher", SECRET)
def test_round_trip_at_the_edges_of_chunks(cipher: str, size: int) -> None:
    header, content = seal(cipher, DATA[:size])
    assert header.cipher == cipher
    assert len(bytes.fromhex(header.salt)) == 32
    assert header.key == KEYS.current().id
    count = max(1, -(-size // CHUNK))
    pad = 16 - size % 16 if cipher.endswith("cbc") else 0
    if cipher.endswith("cbc"):
        assert len(content) == size + (count - 1) * 48 + pad + 32
    else:
        assert len(content) == size + count * 16
    assert unseal(header, content) == DATA[:size]
    assert unseal(header, content, CHUNK, 17, 1, 0, 5) == DATA[:size]


@given(
    cipher=st.sampled_from(SECRET),
    plain=st.binary(max_size=3000),
    before=st.lists(st.integers(0, 400), max_size=8),
    after=st.lists(st.integers(0, 400), max_size=8),
)
def test_the_way_bytes_are_cut_does_not_matter(cipher: str, plain: bytes, before: list[int], after: list[int]) -> None:
    header, content = seal(cipher, *cut(plain, before))
    assert unseal(header, content, *after) == plain


@pytest.mark.parametrize("cipher", SECRET)
def test_pieces_across_chunks(cipher: str) -> None:
    header, content = seal(cipher, DATA[:10], DATA[10 : CHUNK + 30], DATA[CHUNK + 30 :])
    assert unseal(header, content, 3, 2 * CHUNK) == DATA


@pytest.mark.parametrize("cipher", SECRET)
def test_no_two_objects_share_bytes(cipher: str) -> None:
    first, second = seal(cipher, b"x" * 64), seal(cipher, b"x" * 64)
    assert first[0].salt != second[0].salt
    assert first[1][:16] != second[1][:16]


@pytest.mark.parametrize("cipher", SECRET)
def test_missing_swapped_doubled_and_added_chunks_do_not_open(cipher: str) -> None:
    header, content = seal(cipher, DATA[: 2 * CHUNK + 100])
    one, two, three = chunks(cipher, content)
    whole = seal(cipher, DATA[:CHUNK])
    for wrong in (
        [one, two],  # the last is missing, cut at a chunk's edge
        [one],
        [],
        [two, three],
        [one, three],
        [two, one, three],
        [one, one, three],
        [one, two, two, three],
        [one, two, three, three],
        [one, two, three[:-1]],
        [one, two, three[:10]],
        [one, two, three + b"\0"],
        [one, two[:-1], three],
        [one, two, whole[1]],  # a last chunk of another object
    ):
        with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
            unseal(header, b"".join(wrong))


@pytest.mark.parametrize("cipher", SECRET)
def test_an_empty_last_chunk_behind_others_is_refused_although_it_is_authentic(cipher: str) -> None:
    stage = Encrypt(KEYS, lambda _name: cipher)
    header = stage.describe(Header("wal/x", "7"))
    sealer = stage._sealer(header)
    out = memoryview(bytearray(CHUNK + 48))
    first = bytes(out[: sealer.seal(bytes(12), DATA[:CHUNK], out)])
    last = bytes(out[: sealer.seal(bytes(10) + b"\1\1", b"", out)])
    with pytest.raises(IntegrityError, match="chunk 1 holds 0 bytes"):
        unseal(header, first + last)


@pytest.mark.parametrize("cipher", SECRET)
def test_every_flipped_bit_is_noticed(cipher: str) -> None:
    header, content = seal(cipher, b"some text of the WAL")
    for bit in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError, match=DOES_NOT_OPEN):
            unseal(header, bytes(flipped))


@pytest.mark.parametrize("cipher", SECRET)
def test_nothing_unauthenticated_is_handed_on(cipher: str) -> None:
    header, content = seal(cipher, DATA)
    damaged = bytearray(content)
    damaged[CHUNK + overhead(cipher) + 5] ^= 1  # in the second chunk
    stage = Encrypt(KEYS, lambda _name: "none")
    handed: list[bytes] = []
    with pytest.raises(IntegrityError, match="chunk 1"):
        handed.extend(bytes(piece) for piece in stage.backward(header, [bytes(damaged)]))
    assert b"".join(handed) == DATA[:CHUNK]


@pytest.mark.parametrize("cipher", SECRET)
@pytest.mark.parametrize(
    "change",
    [
        {"name": "wal/y"},
        {"system_id": "8"},
        {"codec": "zstd"},
        {"plain_size": 1},
        {"created": "2026"},
        {"backup": "b"},
        {"fingerprint": "f"},
        {"salt": "00" * 32},
        {"raw": b'{"other":"bytes"}'},
    ],
)
def test_a_changed_header_opens_nothing(cipher: str, change: dict[str, str]) -> None:
    header, content = seal(cipher, b"text")
    with pytest.raises(IntegrityError, match="does not decrypt"):
        unseal(replace(header, **change), content)  # type: ignore[arg-type]  # mypy sees one type for all members


def test_another_cipher_of_the_same_shape_opens_nothing() -> None:
    header, content = seal("aes-256-gcm", b"text")
    with pytest.raises(IntegrityError, match="does not decrypt"):
        unseal(replace(header, cipher="chacha20-poly1305"), content)


@pytest.mark.parametrize("salt", ["", "00", "0" * 63, "0 " * 32, "zz" * 32, "AA" * 32])
def test_a_salt_that_is_none_is_refused(salt: str) -> None:
    header, content = seal("aes-256-gcm", b"text")
    with pytest.raises(IntegrityError, match="wal/x has a salt that is not 32 bytes"):
        unseal(replace(header, salt=salt), content)


def test_an_unknown_cipher_is_refused_by_name() -> None:
    with pytest.raises(IntegrityError, match="wal/x is encrypted with the unknown cipher 'rot13'"):
        unseal(Header("wal/x", "7", cipher="rot13"), b"")
    with pytest.raises(ConfigError, match="there is no cipher 'rot13'"):
        seal("rot13", b"")


def test_a_key_that_is_not_there() -> None:
    header, content = seal("aes-256-gcm", b"text")
    with pytest.raises(IntegrityError, match=f"the data key {'0' * 32} is not known here"):
        unseal(replace(header, key="0" * 32), content)


def test_plain_objects_pass_and_name_no_key() -> None:
    header, content = seal("none", b"te", b"xt")
    assert (header.cipher, header.key, header.salt, content) == ("none", "", "", b"text")
    assert unseal(header, content) == b"text"
    with pytest.raises(IntegrityError, match="names a key all the same"):
        unseal(replace(header, key="0" * 32), content)


def test_the_random_source_can_be_given() -> None:
    stage = Encrypt(KEYS, lambda _name: "aes-256-gcm", random=lambda size: b"\7" * size)
    assert stage.describe(Header("wal/x", "7")).salt == "07" * 32
