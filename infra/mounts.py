"""Which file system a folder is on, and whether this kernel knows of all who write there."""

from __future__ import annotations

import os
from pathlib import Path

#: Kept by this kernel alone. Of all others, another host may write the same file, or the host of a virtual machine.
_OURS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay")
_MOUNTS = Path("/proc/self/mountinfo")


def is_ours_alone(folder: Path) -> bool:
    """Whether nobody can write there without this kernel knowing; False where that cannot be found out."""
    return file_system(folder) in _OURS


def file_system(folder: Path) -> str:
    """Its type, as the kernel names it; empty where that cannot be found out. The one mounted last counts."""
    real, best, kind = os.path.realpath(folder), "", ""
    try:
        lines = _MOUNTS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""  # not Linux
    for line in lines:
        before, _, behind = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not behind:
            continue
        # \040 is a space; other letters than ASCII's stand there as they are.
        point = fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        point = os.fsdecode(point.encode("latin-1"))
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, behind.split(" ")[0]
    return kind
