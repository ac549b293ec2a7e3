"""docs/rescue.py brings a cluster back with cryptography and zstandard alone: full, incremental, WAL and its open end.

Beside them only tar and PostgreSQL's own programs are used, as the script says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import make_folder
from tests.rig import PASSPHRASE, Rig
from tests.servers import NEWEST

_SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "rescue.py"
#: Runs the script with what is in a folder, and nothing else that was installed: neither walship nor another library.
_ALONE = """
import runpy, sys
folder, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.path.append(folder)
for absent in ("infra", "pipeline", "backports.zstd", "blake3"):
    try:
        __import__(absent)
    except ImportError:
        continue
    raise SystemExit(f"{absent} is there")
try:
    runpy.run_path(script, run_name="__main__")
finally:
    places = {name.partition(".")[0]: getattr(module, "__file__", "") for name, module in sys.modules.items()}
    theirs = {name for name, place in places.items() if folder in str(place)}
    assert theirs == {"cryptography", "zstandard", "_cffi_backend"}, theirs
"""
#: What a restore adds to what is in the backup, or changes of it.
_OF_A_RESTORE = {"recovery.signal", "postgresql.auto.conf", "postgresql.conf", "backup_manifest"}


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder with the two libraries, and the binding that one of them is made with."""
    for name in ("cryptography", "zstandard", "_cffi_backend"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        origin = Path(spec.origin)
        found = origin.parent if origin.name == "__init__.py" else origin
        (tmp_path / found.name).symlink_to(found)
    return tmp_path


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_folder("walship-r-")
    yield made
    shutil.rmtree(made)


class Rescue:
    """The script on a copy of what is stored."""

    def __init__(self, libraries: Path, repository: Path) -> None:
        self.libraries, self.repository = libraries, repository

    def run(self, *words: str | Path) -> str:
        command = [sys.executable, "-I", "-S", "-c", _ALONE, self.libraries, _SCRIPT, self.repository, *words]
        environment = {"PATH": os.environ["PATH"], "BACKUP_ENCRYPTION_PASSWORD": PASSPHRASE}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def unpack(self, backup: str, target: Path) -> None:
        tar = target.with_suffix(".tar")
        self.run("archive", backup, "base", tar)
        subprocess.run(["tar", "-xf", tar, "-C", target, "--same-owner"], check=True)
        self.run("get", f"base/{backup}/backup_manifest", target / "backup_manifest")
        give(target, run_as())


def files(folder: Path) -> dict[str, bytes]:
    """All that a backup and a restore of it must have in common."""
    found = (path for path in folder.rglob("*") if path.is_file() and "pgsql_tmp.walship" not in path.parts)
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in found if path.name not in _OF_A_RESTORE
    }  # fmt: skip


def test_a_cluster_comes_back_without_walship(libraries: Path, folder: Path) -> None:
    settings = {"summarize_wal": "on", "autovacuum": "off"}
    store = folder / "store"
    with Rig(folder, NEWEST, [f"file://{store}"], sources="stream", server_settings=settings) as rig:
        rig.server.start()
        rig.run("init")
        service = rig.serve()
        rig.sql("create table t as select n, md5(n::text) filler from generate_series(1, 20000) n")
        full = rig.json("backup")["name"]
        rig.sql("update t set filler = 'changed' where n % 500 = 0")
        incremental = rig.json("backup", "--incremental")["name"]
        rig.json("switch")
        rig.sql("insert into t values (0, 'in the segment that was never finished')")
        rig.caught_up()
        rows = rig.sql("select count(*), md5(string_agg(filler, ',' order by n)) from t")
        restored = rig.target("restored")
        rig.run("restore", "--target-dir", str(restored), "--backup", full, "--immediate")
        rig.server.kill9()
        rig.stop(service)

        rescue = Rescue(libraries, store)
        said = rescue.run("list")
        assert f"builds on {full}" in said
        folders = [rig.target("unpacked") for _ in range(2)]
        for backup, target in zip((full, incremental), folders, strict=True):
            rescue.unpack(backup, target)
        laid, unpacked = files(restored), files(folders[0])
        assert len(unpacked) > 500
        assert unpacked.items() <= laid.items(), "what walship restores is what the script finds"

        result, wal = rig.folder / "result", rig.folder / "wal"
        rig.server.run("pg_combinebackup", *map(str, folders), "-o", str(result), "--no-sync")
        rig.server.run("pg_verifybackup", "-n", str(result))
        assert "bytes from tails" in rescue.run("wal", wal)
        give(wal, run_as())
        (result / "recovery.signal").touch()
        server = rig.adopt(result)
        server.configure({"restore_command": f"cp {wal}/%f %p", "archive_mode": "off"})
        server.start()
        rig.wait(lambda: server.query("select pg_is_in_recovery()") == [(False,)], "it is promoted")
        assert server.query("select count(*), md5(string_agg(filler, ',' order by n)) from t") == rows
