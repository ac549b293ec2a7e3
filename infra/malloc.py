"""What the allocator of the C library does with large blocks. A thing of the whole process: for its main program."""

from __future__ import annotations

import ctypes

#: Blocks of at least so many bytes are the kernel's: segments, stored objects. Not less: a compressor's own memory is
#: 1 to 4 MiB, and to get it anew from the kernel for each tail made commits wait half as long again.
LARGE = 8 << 20

#: ``M_MMAP_THRESHOLD`` of glibc's ``malloc.h``.
_MMAP_THRESHOLD = -3


def give_back_large_blocks() -> None:
    """Have large blocks returned to the system as soon as they are freed. Does nothing where that is not glibc.

    glibc puts blocks of up to 32 MiB on its heaps once it has seen such a one freed (``mallopt(3)``, "dynamic mmap
    threshold"), and a heap shrinks from its end only. With segments and objects in several threads that kept 40 MB more
    than was in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGE)
