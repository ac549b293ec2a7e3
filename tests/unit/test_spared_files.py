"""``--delta`` where the backup has no configuration, as on Debian: what people have put there stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from handlers.increment import apply
from handlers.target_dir import look
from tests.laying import cluster, store
from tests.parts import Shelf
from tests.unit.test_delta import lay, see

_THEIRS = ("pg_hba.conf", "pg_ident.conf", "postgresql.conf")


def put(directory: Path) -> None:
    for name in _THEIRS:
        (directory / name).write_text(f"# {name} of theirs\n")


def there(directory: Path) -> list[str]:
    return [name for name in _THEIRS if (directory / name).exists()]


async def test_configuration_that_the_backup_has_none_of_stays(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    del files["postgresql.conf"]
    info = await store(shelf, {"base": files})
    await lay(shelf, info, see(info, directory))
    put(directory)
    (directory / "base/1/postgresql.conf").touch()  # elsewhere it is a file as any other
    laid = await lay(shelf, info, see(info, directory))
    assert (laid.spared, laid.removed) == (_THEIRS, 1)
    assert [(directory / name).read_text() for name in _THEIRS] == [f"# {name} of theirs\n" for name in _THEIRS]
    (directory / "pg_hba.conf").unlink()
    (directory / "pg_hba.conf").symlink_to(tmp_path / "elsewhere")
    laid = await lay(shelf, info, see(info, directory))
    assert laid.spared == _THEIRS[1:], "no link stays"
    laid = await lay(shelf, info, look(info, directory, {}, force=True, wal_margin=0))
    assert (laid.spared, there(directory)) == ((), [])


@pytest.mark.parametrize("force", [False, True])
async def test_what_the_backup_has_is_the_backups(tmp_path: Path, force: bool) -> None:
    """And with ``--force`` it may be another cluster's, whose rules would let in whom nobody expects."""
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, see(info, directory))
    put(directory)
    laid = await lay(shelf, info, see(info, directory, force=force))
    assert laid.spared == (() if force else _THEIRS[:2])
    assert (directory / "postgresql.conf").read_bytes() == files["postgresql.conf"]


async def test_without_a_manifest_nobody_knows_what_the_backup_has(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files}, algorithm=None)
    await lay(shelf, info, see(info, directory))
    put(directory)
    assert (await lay(shelf, info, see(info, directory))).spared == ()
    assert (directory / "postgresql.conf").read_bytes() == files["postgresql.conf"]


def test_an_incremental_backup_that_is_laid_over_leaves_it_too(tmp_path: Path) -> None:
    stage, target = tmp_path / "stage", tmp_path / "data"
    for folder in (stage, target):
        folder.mkdir()
    put(target)
    (target / "dropped").touch()
    (stage / "pg_hba.conf").write_text("# of the backup\n")
    apply(stage, target, None, spare=frozenset(), leave=frozenset(_THEIRS))
    assert there(target) == [*_THEIRS]
    assert (target / "pg_hba.conf").read_text() == "# of the backup\n"
    assert not (target / "dropped").exists()
