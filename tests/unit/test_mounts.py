"""Which file system a folder is on: as /proc/self/mountinfo tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import mounts


@pytest.mark.parametrize("name", ["plain", "a b", "dépôt", "數據庫", "back\\slash", "\udcff"])
def test_the_mount_point_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not found would leave the file system of ``/``: a lease would be believed where it says nothing."""
    point = str(tmp_path.resolve() / name)
    shown = point.replace("\\", "\\134").replace(" ", "\\040")  # as the kernel writes it
    table = tmp_path / "mountinfo"
    table.write_text(
        f"29 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 29 0:40 / {shown} rw - fuse.sshfs host: rw\n",
        "utf-8",
        "surrogateescape",
    )
    monkeypatch.setattr(mounts, "_MOUNTS", table)
    assert mounts.file_system(Path(point, "spool")) == "fuse.sshfs"
    assert not mounts.is_ours_alone(Path(point, "spool"))
    assert mounts.is_ours_alone(Path(f"{point}2"))
