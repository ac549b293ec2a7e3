"""The trailer: made, verified, held back, and checked without any key."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.checksum import Checksum, check_stored
from pipeline.errors import IntegrityError
from pipeline.objects import Header
from tests.keys import chain, cut, encrypting_keys, plain_keys, stored

HEADER = Header("wal/x", "7")


@given(frames=st.binary(max_size=300), sizes=st.lists(st.integers(0, 70), max_size=12))
def test_round_trip_however_it_is_cut(frames: bytes, sizes: list[int]) -> None:
    content = b"".join(bytes(p) for p in Checksum().forward(HEADER, cut(frames, sizes)))
    assert content == frames + hashlib.sha256(HEADER.encoded() + frames).digest()
    assert b"".join(bytes(p) for p in Checksum().backward(HEADER, cut(content, sizes))) == frames


@pytest.mark.parametrize("size", [0, 1, 31])
def test_an_object_shorter_than_its_trailer(size: int) -> None:
    with pytest.raises(IntegrityError, match="wal/x is cut: it ends before its checksum"):
        list(Checksum().backward(HEADER, [bytes(size)]))


def test_check_without_a_key() -> None:
    name = "wal/0000000100000000/000000010000000000000001"
    content = stored(chain(encrypting_keys(), "zstd", "aes-256-gcm"), name, b"text" * 50_000)
    for sizes in ([], [5], [100, 1, 1, 33, 7], [len(content) - 3]):
        header, digest = check_stored(name, cut(content, sizes))
        assert digest == hashlib.sha256(content[:-32]).hexdigest()
        assert (header.name, header.plain_size, header.cipher) == (name, 200_000, "aes-256-gcm")


def test_check_notices_every_flipped_byte_and_every_cut() -> None:
    content = stored(chain(plain_keys()), "wal/x", b"text")
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(IntegrityError):
            check_stored("wal/x", [bytes(flipped)])
        with pytest.raises(IntegrityError):
            check_stored("wal/x", [content[:place]])
    with pytest.raises(IntegrityError):
        check_stored("wal/x", [content, b"\0"])


def test_check_notices_an_object_under_another_name() -> None:
    content = stored(chain(plain_keys()), "wal/x", b"text")
    with pytest.raises(IntegrityError, match="wal/y holds an object named wal/x"):
        check_stored("wal/y", [content])
