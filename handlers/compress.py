"""Compress: the first station of every object, and its way back.

The codec is written into the header; ``backward`` obeys the header, so a repository may hold objects of every codec.
A stored stream is exactly one frame (one gzip member): nothing may follow it, and nothing may be missing. Backward, no
more than the header's ``plain_size`` is ever allocated, whatever the stream would expand to.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeAlias

import lz4.frame  # type: ignore[import-untyped]  # has neither stubs nor a py.typed

from pipeline.contracts import Buffer
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import Header

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

#: Bytes of plaintext handed on at a time.
PIECE = 1 << 20
#: Bytes of plaintext that come back at a time: what zstd's decompressor makes of 32, 64 and 256 KiB. With
#: less, threads hand over to each other more often; more is not in the processor's cache any more when it is written.
_PLAIN_PIECE = 352 << 10
#: Bytes given to a decompressor at a time; they all copy what they could not use yet, so less is faster.
_BITE = 1 << 17
#: zstd's window is at most 8 MiB, by the format: what RFC 8878 asks every decoder to support, and a bound on memory.
ZSTD_WINDOW_LOG = 23
#: ``ZSTD_c_blockSplitterLevel`` of zstd 1.5.7 (``zstd.h``, experimental parameter 20), and its word for "off". Looking
#: for better places to cut blocks at takes a sixth of the time of level 3 and gains nothing: WAL comes out 0.3 %
#: larger, tables the same, because both are alike from page to page.
_BLOCK_SPLITTER, _NO_SPLITTING = 1017, 1
#: Level of what is in a hurry, at most: of WAL, zstd's 1 takes half the time of 3 and makes a tenth more.
_HURRIED_LEVEL = 1
#: Up to this level speed is what people choose.
_FAST_LEVELS = 5
#: zlib's number for "gzip header and trailer, 32 KiB window". The header's time is 0: equal input makes equal output.
_GZIP = 16 + zlib.MAX_WBITS

#: zstd compresses up to this much in one call if it has it in one piece: a tenth faster than in pieces, which it copies
#: into its window first. The price is memory for the compressed bytes of one segment or part.
_ONE_CALL = 16 << 20

#: Level, size of all input, input in pieces → compressed pieces.
_Compressor: TypeAlias = Callable[[int, int, Iterator[Buffer]], Iterator[Buffer]]


class Decompressor(Protocol):
    """What zstd's and lz4's decompressors are; gzip's is made into one here."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes | None: ...
    def decompress(self, data: Buffer, max_length: int = -1) -> bytes: ...


class Compress:
    """The stage. ``level`` is the codec's own scale; None is the codec's default (zstd 3, lz4 0, gzip 6).

    ``hurried`` tells of an object's name whether somebody waits for it, and it does not stay: then speed comes first.
    """

    def __init__(
        self, codec: str, level: int | None = None, *, hurried: Callable[[str], bool] = lambda _: False
    ) -> None:
        if codec not in CODECS:
            raise ConfigError(f"there is no codec {codec!r}", hint=f"choose one of {', '.join(CODECS)}")
        default, lowest, highest = _LEVELS[codec]
        if level is not None and not lowest <= level <= highest:
            raise ConfigError(f"{codec} has no level {level}", hint=f"choose one from {lowest} to {highest}")
        self._codec = codec
        self._level = default if level is None else level
        self._hurried = hurried

    def describe(self, header: Header) -> Header:
        return replace(header, codec=self._codec)

    def forward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        level = min(self._level, _HURRIED_LEVEL) if self._hurried(header.name) else self._level
        return _COMPRESSORS[header.codec](level, header.plain_size, iter(pieces))

    def backward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        if header.codec not in CODECS:
            raise IntegrityError(
                f"{header.name} is compressed with the unknown codec {header.codec!r}",
                hint=f"this walship knows {', '.join(CODECS)}; a newer one may know more",
            )
        if header.codec == "none":
            return _bounded(header, pieces)
        return _expand(header, _DECOMPRESSORS[header.codec](), pieces)


def _cut(pieces: Iterable[Buffer], size: int) -> Iterator[Buffer]:
    """The same bytes in pieces of at most ``size``, without copying them."""
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), size):
            yield view[start : start + size]


def _zstd(level: int, plain_size: int, pieces: Iterator[Buffer]) -> Iterator[Buffer]:
    options: dict[int, int] = {zstd.CompressionParameter.compression_level: level}
    if level <= _FAST_LEVELS and _can_leave_blocks():
        options[_BLOCK_SPLITTER] = _NO_SPLITTING
    if level > 19:
        options[zstd.CompressionParameter.window_log] = ZSTD_WINDOW_LOG  # these levels would take up to 128 MiB
    compressor = zstd.ZstdCompressor(options=options)
    compressor.set_pledged_input_size(plain_size)  # tables no larger than a small object needs
    first = next(pieces, b"")
    if len(first) == plain_size <= _ONE_CALL:
        yield compressor.compress(first, compressor.FLUSH_FRAME)
        return
    for piece in _cut(chain((first,), pieces), PIECE):
        if out := compressor.compress(piece):
            yield out
    yield compressor.flush()


@functools.cache
def _can_leave_blocks() -> bool:
    """Whether this zstd has the parameter. It is an experimental one: another series may mean another thing by it."""
    if not (1, 5, 7) <= zstd.zstd_version_info < (1, 6):
        return False
    try:
        zstd.ZstdCompressor(options={_BLOCK_SPLITTER: _NO_SPLITTING})
    except (ValueError, zstd.ZstdError):
        return False
    return True


def _lz4(level: int, plain_size: int, pieces: Iterator[Buffer]) -> Iterator[Buffer]:
    compressor = lz4.frame.LZ4FrameCompressor(compression_level=level, block_size=lz4.frame.BLOCKSIZE_MAX1MB)
    yield compressor.begin(source_size=plain_size)
    for piece in _cut(pieces, PIECE):
        if out := compressor.compress(piece):
            yield out
    yield compressor.flush()


def _gzip(level: int, _plain_size: int, pieces: Iterator[Buffer]) -> Iterator[Buffer]:
    compressor = zlib.compressobj(level, zlib.DEFLATED, _GZIP)
    for piece in _cut(pieces, PIECE):
        if out := compressor.compress(piece):
            yield out
    yield compressor.flush()


def _none(_level: int, _plain_size: int, pieces: Iterator[Buffer]) -> Iterator[Buffer]:
    return pieces


class _Gunzip:
    """zlib's decompressor with the manners of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(_GZIP)
        self.eof = False
        self.needs_input = True
        self.unused_data: bytes | None = None

    def decompress(self, data: Buffer, max_length: int = -1) -> bytes:
        rest = self._inner.unconsumed_tail
        out = self._inner.decompress(rest + bytes(data) if rest else data, max_length)
        self.eof = self._inner.eof
        self.unused_data = self._inner.unused_data
        # With all input taken there may still be output inside zlib: ask again until an answer is not full.
        self.needs_input = not self._inner.unconsumed_tail and len(out) < max_length
        return out


def _unzstd() -> Decompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})


def _unlz4() -> Decompressor:
    decompressor: Decompressor = lz4.frame.LZ4FrameDecompressor()
    return decompressor


def _expand(header: Header, decompressor: Decompressor, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    """Exactly one frame → its plaintext, never more than ``plain_size`` + 1 byte in all."""
    left = header.plain_size
    ended = False
    for bite in _cut(pieces, _BITE):
        if ended:
            raise IntegrityError(f"{header.name} has bytes behind the end of its {header.codec} stream")
        data: Buffer = bite
        more = True
        while more:
            try:
                # One byte more than there may be: a stream that goes on is told from one that ends here.
                out = decompressor.decompress(data, min(_PLAIN_PIECE, left + 1))
            except (zstd.ZstdError, zlib.error, RuntimeError) as error:  # lz4 raises bare RuntimeErrors
                raise IntegrityError(f"{header.name} is not valid {header.codec}: {error}") from None
            if len(out) > left:
                raise IntegrityError(
                    f"{header.name} expands to more than the {header.plain_size} bytes its header claims"
                )
            left -= len(out)
            if out:
                yield out
            ended = decompressor.eof
            more = not (ended or decompressor.needs_input)
            data = b""
        if ended and decompressor.unused_data:
            raise IntegrityError(f"{header.name} has bytes behind the end of its {header.codec} stream")
    if not ended:
        raise IntegrityError(f"{header.name} is cut: its {header.codec} stream does not end")
    if left:
        raise IntegrityError(f"{header.name} expands to {left} bytes less than the {header.plain_size} it claims")


def _bounded(header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    left = header.plain_size
    for piece in pieces:
        left -= len(piece)
        if left < 0:
            raise IntegrityError(f"{header.name} holds more than the {header.plain_size} bytes its header claims")
        yield piece
    if left:
        raise IntegrityError(f"{header.name} holds {left} bytes less than the {header.plain_size} it claims")


_COMPRESSORS: dict[str, _Compressor] = {"zstd": _zstd, "lz4": _lz4, "gzip": _gzip, "none": _none}
_DECOMPRESSORS: dict[str, Callable[[], Decompressor]] = {"zstd": _unzstd, "lz4": _unlz4, "gzip": _Gunzip}
#: Default, lowest and highest level of each codec.
_LEVELS = {"zstd": (3, -7, 22), "lz4": (0, -10, 12), "gzip": (6, 0, 9), "none": (0, 0, 0)}
#: Every codec of format 1.
CODECS = tuple(_COMPRESSORS)
