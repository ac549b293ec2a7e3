"""Round trips of every codec, and what a stream must not be."""

from __future__ import annotations

import gzip
import random
import sys
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import lz4.frame  # type: ignore[import-untyped]  # has neither stubs nor a py.typed
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.compress import CODECS, PIECE, ZSTD_WINDOW_LOG, Compress
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import Header
from tests.keys import cut

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

SQUEEZED = [codec for codec in CODECS if codec != "none"]
EDGES = (0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 77)
ODD = random.Random(7).randbytes(PIECE // 2) + b"walship" * (PIECE // 2)


def header(codec: str, size: int) -> Header:
    return Header("wal/x", "7", codec=codec, plain_size=size)


def squeeze(codec: str, plain: bytes, level: int | None = None) -> bytes:
    stage = Compress(codec, level)
    return b"".join(bytes(p) for p in stage.forward(stage.describe(header("none", len(plain))), [plain]))


def expand(codec: str, content: bytes, size: int) -> bytes:
    return b"".join(bytes(p) for p in Compress("none").backward(header(codec, size), [content]))


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("codec", CODECS)
def test_round_trip_at_the_edges_of_pieces(codec: str, size: int) -> None:
    plain = (ODD * 2)[:size]
    assert expand(codec, squeeze(codec, plain), size) == plain


@pytest.mark.parametrize("codec", CODECS)
def test_plaintext_in_several_pieces_and_larger_than_one_call(codec: str) -> None:
    plain = ODD * 18
    stage = Compress(codec)
    pieces = stage.forward(stage.describe(header("none", len(plain))), cut(plain, [7, 0, PIECE + 3]))
    assert expand(codec, b"".join(bytes(p) for p in pieces), len(plain)) == plain


@given(plain=st.binary(max_size=5000), codec=st.sampled_from(CODECS), sizes=st.lists(st.integers(0, 300), max_size=20))
def test_the_way_a_stream_is_cut_does_not_matter(plain: bytes, codec: str, sizes: list[int]) -> None:
    pieces = cut(squeeze(codec, plain), sizes)
    assert b"".join(bytes(p) for p in Compress("zstd").backward(header(codec, len(plain)), pieces)) == plain


@pytest.mark.parametrize(("codec", "level"), [("zstd", -7), ("zstd", 22), ("lz4", 12), ("gzip", 0), ("gzip", 9)])
def test_levels(codec: str, level: int) -> None:
    plain = ODD[: 1 << 18]
    assert expand(codec, squeeze(codec, plain, level), len(plain)) == plain


@pytest.mark.parametrize("codec", SQUEEZED)
def test_equal_plaintext_makes_equal_bytes(codec: str) -> None:
    assert squeeze(codec, ODD) == squeeze(codec, ODD)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [0, 1, 5000, 3 * PIECE])
def test_the_claimed_size_is_exact(codec: str, size: int) -> None:
    content = squeeze(codec, bytes(size))
    with pytest.raises(IntegrityError, match=r"wal/x (expands to|holds)"):
        expand(codec, content, size + 1)
    if size:
        with pytest.raises(IntegrityError, match=r"more than"):
            expand(codec, content, size - 1)


@pytest.mark.parametrize("codec", SQUEEZED)
def test_a_bomb_is_refused_before_it_expands(codec: str) -> None:
    bomb = squeeze(codec, bytes(64 * PIECE))
    tracemalloc.start()
    with pytest.raises(IntegrityError, match="expands to more than the 1000 bytes its header claims"):
        expand(codec, bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * PIECE


@pytest.mark.parametrize("codec", SQUEEZED)
@pytest.mark.parametrize("more", [b"\0", b"garbage", "a second frame"])
def test_nothing_may_follow_the_stream(codec: str, more: bytes | str) -> None:
    content = squeeze(codec, b"text")
    tail = squeeze(codec, b"") if isinstance(more, str) else more
    for pieces in ([content + tail], [content, tail]):
        with pytest.raises(IntegrityError, match=f"wal/x has bytes behind the end of its {codec} stream"):
            list(Compress("none").backward(header(codec, 4), pieces))


@pytest.mark.parametrize("codec", SQUEEZED)
def test_a_cut_stream_is_refused_wherever_it_is_cut(codec: str) -> None:
    content = squeeze(codec, b"text " * 20)
    for end in range(len(content)):
        with pytest.raises(IntegrityError, match="wal/x"):
            expand(codec, content[:end], 100)


@pytest.mark.parametrize("codec", SQUEEZED)
def test_what_is_no_stream_is_refused(codec: str) -> None:
    with pytest.raises(IntegrityError, match=f"wal/x is not valid {codec}"):
        expand(codec, b"this is no compressed stream at all, is it?", 100)


def test_a_zstd_window_beyond_the_format_is_refused() -> None:
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: 1,
        zstd.CompressionParameter.window_log: ZSTD_WINDOW_LOG + 1,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    compressor = zstd.ZstdCompressor(options=options)
    content = compressor.compress(bytes(100)) + compressor.flush()
    with pytest.raises(IntegrityError, match="not valid zstd"):
        expand("zstd", content, 100)


def test_other_programs_read_the_streams() -> None:
    assert gzip.decompress(squeeze("gzip", ODD)) == ODD
    assert lz4.frame.decompress(squeeze("lz4", ODD)) == ODD
    assert zstd.decompress(squeeze("zstd", ODD)) == ODD


def test_gzip_streams_of_others_are_read() -> None:
    other = zlib.compressobj(9, zlib.DEFLATED, 31)
    assert expand("gzip", other.compress(b"text") + other.flush(), 4) == b"text"


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(IntegrityError, match="wal/x is compressed with the unknown codec 'brotli'"):
        expand("brotli", b"", 0)
    with pytest.raises(ConfigError, match="there is no codec 'brotli'"):
        Compress("brotli")


def test_an_impossible_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="zstd has no level 23"):
        Compress("zstd", 23)
