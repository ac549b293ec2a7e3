"""Page checksums: which pages of a relation file are damaged. For backups that read the files themselves.

The checksum is PostgreSQL's own (source: ``src/include/storage/checksum_impl.h``): 32 sums of FNV-1a kind run side by
side over the words of a page, and are mixed with the page's number. numpy runs them over many pages at once: the pages
of 1 GB take it 0.3 seconds where they are looked at by 2 MB, and a single one takes it as long as fifty.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Generic, TypeVar

from pipeline.contracts import Buffer
from pipeline.wal import Lsn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE = 8192

_File = TypeVar("_File")

#: Pages that are summed together: what is worked on stays in the processor's cache.
_TOGETHER = 256
#: Less than that are a few, and wait for those of other files.
FEW = 64
_MANY = 128
_PRIME = 16777619
_OFFSETS = (
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
)  # fmt: skip


def bad_pages(data: Buffer, first: int, start: Lsn) -> list[int]:
    """Numbers of the pages whose checksum is wrong. ``first``: number of the first one, within its relation's fork.

    ``data`` is whole pages, little-endian. What was written behind ``start``, where the backup began, is left out: it
    may be half written, and is replayed from the WAL. So are pages that were never used.
    """
    import numpy as np

    numbers = np.arange(first, first + len(data) // PAGE, dtype="u4")
    return [first + place for place in _wrong(data, numbers, start)]


class Few(Generic[_File]):
    """Gathers the pages of small files, and checks them together."""

    def __init__(self, start: Lsn) -> None:
        self._start = start
        self._room = memoryview(bytearray(_MANY * PAGE))
        self._whose: list[tuple[_File, int]] = []

    def add(self, data: Buffer, first: int, file: _File) -> list[tuple[_File, int]]:
        """At most ``FEW`` whole pages, which are copied. Gives the bad ones of those that were checked meanwhile."""
        count = len(data) // PAGE
        bad = self.check() if len(self._whose) + count > _MANY else []
        at = len(self._whose) * PAGE
        self._room[at : at + len(data)] = data
        self._whose += [(file, number) for number in range(first, first + count)]
        return bad

    def check(self) -> list[tuple[_File, int]]:
        """The bad ones of all that wait: file and number."""
        import numpy as np

        whose, self._whose = self._whose, []
        if not whose:
            return []
        numbers = np.array([number for _, number in whose], "u4")
        return [whose[place] for place in _wrong(self._room[: len(whose) * PAGE], numbers, self._start)]


def _wrong(data: Buffer, numbers: NDArray[np.uint32], start: Lsn) -> list[int]:
    """Where in ``data`` they are, in pages."""
    import numpy as np

    pages = np.frombuffer(data, "<u4").reshape(-1, PAGE // 4)
    lsns = (pages[:, 0].astype("u8") << np.uint64(32)) | pages[:, 1]
    stored = pages[:, 2] & np.uint32(0xFFFF)
    used = (pages[:, 3] >> np.uint32(16)) != 0  # pd_upper
    sums = np.concatenate([_sums(pages[at : at + _TOGETHER]) for at in range(0, len(pages), _TOGETHER)])
    wanted = (sums ^ numbers) % np.uint32(65535) + np.uint32(1)
    bad = used & (lsns < np.uint64(start)) & (wanted != stored)
    return [int(place) for place in bad.nonzero()[0]]


def _sums(pages: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The mixed sums of each page, before its number comes in."""
    import numpy as np

    rows = pages.reshape(len(pages), -1, len(_OFFSETS))
    offsets, prime, shift = _constants()
    mixed = rows[:, 0] ^ offsets
    mixed[:, 2] ^= pages[:, 2] & np.uint32(0xFFFF)  # the checksum itself counts as zero
    sums = np.empty_like(mixed)
    for number in range(1, rows.shape[1] + 2):
        np.multiply(mixed, prime, out=sums)
        np.right_shift(mixed, shift, out=mixed)
        if number < rows.shape[1]:
            np.bitwise_xor(sums, mixed, out=sums)
            np.bitwise_xor(sums, rows[:, number], out=mixed)
        else:
            np.bitwise_xor(sums, mixed, out=mixed)  # two rounds with zeros
    np.multiply(mixed, prime, out=sums)
    np.right_shift(mixed, shift, out=mixed)
    np.bitwise_xor(sums, mixed, out=sums)
    result: NDArray[np.uint32] = np.bitwise_xor.reduce(sums, axis=1)
    return result


@functools.cache
def _constants() -> tuple[NDArray[np.uint32], np.uint32, np.uint32]:
    import numpy as np

    return np.array(_OFFSETS, "u4"), np.uint32(_PRIME), np.uint32(17)
