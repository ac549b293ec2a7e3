"""Names and sizes of what a listing shows, in little memory: a million WAL objects take four megabytes, not hundreds.

Nearly all names of a repository end in a number that counts on (segments, parts of a backup, objects of an index), so
what is kept of them is one number in an array that all names with the same beginning share. The rest are few.
"""

from __future__ import annotations

from array import array

from pipeline.objects import MAX_PLAIN

#: Digits of the number at the end of a segment's or a part's name.
_DIGITS = 8
#: Numbers that an array is made for: 16 TB of parts of 16 MiB; and how far a number may be behind the greatest so far.
#: A name that goes beyond is kept as a name: whoever can write to a store could make arrays of any length.
_MOST, _STEP = 1 << 20, 1 << 12
#: No object is larger (``pipeline.objects``), so that its size and one more fit an array's member.
_LARGEST = (1 << 32) - 2
assert MAX_PLAIN <= _LARGEST
_NOTHING: array[int] = array("I")


class Sizes:
    """Name → size of the object in bytes. Names may come in any order."""

    def __init__(self) -> None:
        #: What the names begin with → size and one more of each number; 0: no such name.
        self._arrays: dict[str, array[int]] = {}
        self._others: dict[str, int] = {}
        self.count = 0

    def add(self, name: str, size: int) -> None:
        """Remember; a second time changes the size."""
        if self.find(name) is None:
            self.count += 1
        split = _split(name)
        if split is None or not 0 <= size <= _LARGEST:
            self._others[name] = size
            return
        start, number = split
        sizes = self._arrays.get(start, _NOTHING)
        if number >= len(sizes) + _STEP:
            self._others[name] = size
            return
        if sizes is _NOTHING:
            sizes = self._arrays[start] = array("I")
        if number >= len(sizes):
            sizes.extend([0] * (number + 1 - len(sizes)))
        sizes[number] = size + 1

    def find(self, name: str) -> int | None:
        """Its size; None if there is no such name."""
        split = _split(name)
        if split is not None:
            sizes = self._arrays.get(split[0])
            if sizes is not None and split[1] < len(sizes) and sizes[split[1]]:
                return sizes[split[1]] - 1
        return self._others.get(name)


def _split(name: str) -> tuple[str, int] | None:
    """``base/b/data/base/00000012`` → its beginning and 12; segments count in hexadecimal. None: kept as it is."""
    start, digits = name[:-_DIGITS], name[-_DIGITS:]
    if not digits.isascii():
        return None
    if start.startswith("wal/") and set(digits) <= _HEX:
        number = int(digits, 16)
    elif start.startswith("base/") and digits.isdecimal():
        number = int(digits)
    else:
        return None
    return (start, number) if len(digits) == _DIGITS and number < _MOST else None


_HEX = frozenset("0123456789ABCDEF")
