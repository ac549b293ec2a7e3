from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from handlers.body import SPILL_AT, FileBody, collect, joined
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody

MIB = 1 << 20


def test_pieces_are_copied_because_stages_reuse_their_buffers() -> None:
    def stage() -> Iterator[memoryview]:
        buffer = bytearray(4)
        for letter in b"abc":
            buffer[:] = bytes([letter]) * 4
            yield memoryview(buffer)

    body = collect(stage())
    assert body.size == 12
    assert joined(body) == b"aaaabbbbcccc"
    assert joined(body) == b"aaaabbbbcccc"


def test_nothing_is_a_body_too() -> None:
    assert collect(()).size == 0
    assert joined(collect((b"",))) == b""


@pytest.mark.parametrize(("extra", "kind"), [(0, MemoryBody), (1, FileBody)])
def test_what_is_large_spills_to_a_file_without_a_name(extra: int, kind: type) -> None:
    pieces = [bytes([number]) * MIB for number in range(SPILL_AT // MIB)] + [b"!" * extra]
    body = collect(pieces)
    assert isinstance(body, kind)
    assert body.size == SPILL_AT + extra
    for _ in range(2):
        assert joined(body) == b"".join(pieces)
    both = zip(body.chunks(), body.chunks(), strict=True)  # two readers at once
    assert all(one == other for one, other in both)
    body.close()
    body.close()


def test_a_spilled_body_leaves_nothing_behind(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    body = collect(b"x" * MIB for _ in range(65))
    assert os.listdir(str(tmp_path)) == []  # noqa: PTH208 - one line
    body.close()


def test_no_room_for_a_spilled_body_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("tempfile.tempdir", f"{tmp_path}/not-there")
    with pytest.raises(StoreError, match=r"cannot be kept in .*not-there") as raised:
        collect(b"x" * MIB for _ in range(65))
    assert "TMPDIR" in raised.value.hint


def test_an_error_of_the_stages_comes_through() -> None:
    def stage() -> Iterator[bytes]:
        for _ in range(66):
            yield b"x" * MIB
        raise StoreError("the source broke")

    with pytest.raises(StoreError, match="the source broke"):
        collect(stage())
