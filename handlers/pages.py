"""Page checksums: which pages of a relation file are damaged. For backups that read the files themselves.

The checksum is PostgreSQL's own (source: ``src/include/storage/checksum_impl.h``): 32 sums of FNV-1a kind run side by
side over the words of a page, and are mixed with the page's number. numpy runs them over many pages at once; the pages
of 1 GB take it about a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.contracts import Buffer
from pipeline.wal import Lsn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGE = 8192

#: Pages that are summed together: what is worked on stays in the processor's cache.
_TOGETHER = 256
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

    pages = np.frombuffer(data, "<u4").reshape(-1, PAGE // 4)
    lsns = (pages[:, 0].astype("u8") << np.uint64(32)) | pages[:, 1]
    stored = pages[:, 2] & np.uint32(0xFFFF)
    used = (pages[:, 3] >> np.uint32(16)) != 0  # pd_upper
    numbers = np.arange(first, first + len(pages), dtype="u4")
    sums = np.concatenate([_sums(pages[at : at + _TOGETHER]) for at in range(0, len(pages), _TOGETHER)])
    wanted = (sums ^ numbers) % np.uint32(65535) + np.uint32(1)
    bad = used & (lsns < np.uint64(start)) & (wanted != stored)
    return [int(number) for number in numbers[bad]]


def _sums(pages: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The mixed sums of each page, before its number comes in."""
    import numpy as np

    rows = pages.reshape(len(pages), -1, len(_OFFSETS))
    sums = np.empty((len(pages), len(_OFFSETS)), "u4")
    sums[:] = np.array(_OFFSETS, "u4")
    mixed = np.empty_like(sums)
    first = rows[:, 0].copy()
    first[:, 2] &= np.uint32(0xFFFF0000)  # the checksum itself counts as zero
    for number in range(rows.shape[1] + 2):
        if number == 0:
            np.bitwise_xor(sums, first, out=mixed)
        elif number < rows.shape[1]:
            np.bitwise_xor(sums, rows[:, number], out=mixed)
        else:
            mixed, sums = sums, mixed  # two rounds with zeros
        np.multiply(mixed, np.uint32(_PRIME), out=sums)
        np.right_shift(mixed, np.uint32(17), out=mixed)
        np.bitwise_xor(sums, mixed, out=sums)
    result: NDArray[np.uint32] = np.bitwise_xor.reduce(sums, axis=1)
    return result
