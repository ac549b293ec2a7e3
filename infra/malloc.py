"""What the allocator of the C library does with large blocks. A thing of the whole process: for its main program."""

from __future__ import annotations

import ctypes

#: Blocks of at least so many bytes are the kernel's: segments, stored objects. Not less: a compressor's own memory is
#: 1 to 4 MiB, and to get it anew from the kernel for each tail made commits wait half as long again.
LARGE = 8 << 20

#: What a heap may keep for those who code or decode: they ask for the same sizes below ``LARGE`` again and again.
KEPT = 3 * LARGE

#: For whoever reads files and compresses them by 16 MiB: zstd asks for room for the worst case, which is a little more,
#: and then again for what came out. As blocks of the kernel they cost a page fault for each page, a thirtieth of all
#: the time of a backup; kept, they cost memory that a process which gets its bytes from a server has not to spare.
PARTS, PARTS_KEPT = 17 << 20, 48 << 20

#: ``M_MMAP_THRESHOLD``, ``M_TRIM_THRESHOLD`` and ``M_ARENA_MAX`` of glibc's ``malloc.h``.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8


def give_back_large_blocks(*, large: int = LARGE, keep: int = 0, one_heap: bool = False) -> None:
    """Have large blocks returned to the system as soon as they are freed. Does nothing where that is not glibc.

    ``large``: bytes from which on a block is that. ``keep``: bytes that each heap may hold free at its end, for work
    that asks for the same sizes again and again. ``one_heap``: threads that begin later share one, and what it keeps:
    a tenth less memory for a backup, and where nothing but the processor limits it, 3 % more time.

    glibc puts blocks of up to 32 MiB on its heaps once it has seen such a one freed (``mallopt(3)``, "dynamic mmap
    threshold"), and a heap shrinks from its end only. With segments and objects in several threads that kept 40 MB more
    than was in use, and 80 MB in a restore that feeds WAL.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, large)
        if keep:
            mallopt(_TRIM_THRESHOLD, keep)
        if one_heap:
            mallopt(_ARENA_MAX, 1)
