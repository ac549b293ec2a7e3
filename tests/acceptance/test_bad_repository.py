"""A repository that was damaged, exchanged or emptied behind our back: the right message, the right exit code, no harm.

Every test works on a copy of a good repository. What "nothing was lost" means here: the target directory is untouched
when a restore is refused, and what is still good is still served.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from infra.postgres.processes import give, run_as
from pipeline.catalog import wal_key
from pipeline.objects import Header, read_header
from pipeline.wal import Lsn, WalFile
from tests.acceptance.conftest import Copy
from tests.rig import PASSPHRASE


def target(copy: Copy) -> Path:
    folder = copy.local.parent / "target"
    folder.mkdir(mode=0o700)
    give(folder, run_as())
    return folder


def refused(copy: Copy, code: int, *words: str, **changed: str) -> str:
    """Run a restore that has to be refused before anything is touched; its words."""
    folder = target(copy)
    said: str = copy.run("restore", "--target-dir", str(folder), *words, expect=code, **changed).stderr
    assert list(folder.iterdir()) == [], "a refused restore has touched its target"
    return said


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_a_good_repository_verifies(copy: Copy) -> None:
    result = json.loads(copy.run("verify", "--json").stdout)
    assert result["ok"]
    assert result["objects"] > 5
    assert [b["usable"] for b in result["backups"]] == [True]


@pytest.mark.parametrize("place", ["magic", "header", "frames", "trailer"])
def test_one_flipped_bit_in_a_segment_is_found_and_not_replayed(copy: Copy, place: str) -> None:
    path = copy.segments()[-1]
    _, frames = read_header(path.name, path.read_bytes())
    flip(path, {"magic": 2, "header": 40, "frames": frames + 100, "trailer": -5}[place])
    done = copy.run("verify", expect=12)
    assert f"{path.name}" in done.stdout
    assert "1 objects are damaged or missing" in done.stderr
    assert path.name in refused(copy, 12)


def test_one_flipped_bit_in_a_part_stops_the_restore_and_no_server_can_start(copy: Copy) -> None:
    path = copy.parts()[0]
    flip(path, path.stat().st_size // 2)
    assert path.name in copy.run("verify", expect=12).stdout
    folder = target(copy)
    done = copy.run("restore", "--target-dir", str(folder), expect=12)
    assert "data/base/00000001" in done.stderr
    assert not (folder / "global/pg_control").exists(), "PostgreSQL refuses to start without it"


def test_a_damaged_object_is_served_by_the_other_destination(copy: Copy) -> None:
    for path in (copy.parts()[0], copy.segments()[-1]):
        flip(path, path.stat().st_size // 2)
    both = f"file://{copy.local},file://{copy.shipped.local}"
    environment = copy.rig.environment(WALSHIP_DESTINATIONS=both)
    folder = target(copy)
    done = copy.rig.run("restore", "--target-dir", str(folder), environment=environment)
    assert f"file://{copy.shipped.local} served" in done.stderr
    assert (folder / "global/pg_control").exists()


def test_a_destination_that_is_not_asked_is_not_in_the_way(copy: Copy) -> None:
    """--from comes before anything is opened: a damaged key ring elsewhere says nothing of the one that is read."""
    for path in copy.local.rglob("*"):
        if path.is_file() and (path.name == "repository.json" or "ring" in path.name):
            path.write_bytes(b"damaged")
    good = copy.shipped.local
    changed = {"WALSHIP_DESTINATIONS": f"file://{copy.local},file://{good}", "WALSHIP_REQUIRED": f"file://{copy.local}"}
    folder = target(copy)
    words = ("restore", "--target-dir", str(folder), "--from", f"file://{good}", "--dry-run")
    done = copy.rig.run(*words, environment=copy.rig.environment(**changed))
    assert f"from file://{good}\n" in done.stdout
    assert "--from file:///nowhere is no destination" in refused_source(copy, folder)


def refused_source(copy: Copy, folder: Path) -> str:
    said: str = copy.run("restore", "--target-dir", str(folder), "--from", "file:///nowhere", expect=2).stderr
    return said


def test_a_hole_is_refused_with_what_can_be_reached(copy: Copy) -> None:
    gone = copy.segments()[-2]
    gone.unlink()
    said = refused(copy, 13)
    assert f"segment {gone.name} is missing: the latest state cannot be reached" in said
    assert "hint: the newest that can be reached is" in said
    assert f"1 segments, {gone.name} to {gone.name}" in copy.run("verify", expect=12).stdout
    assert gone.name in copy.run("list").stdout


def test_wal_missing_inside_the_backup_makes_it_unusable(copy: Copy) -> None:
    info = json.loads(copy.run("list", "--json").stdout)["backups"][0]
    needed = WalFile.segment(1, Lsn.parse(info["start_lsn"]), 1 << 20)
    copy.object(wal_key(needed)).unlink()
    said = refused(copy, 13, "--immediate")
    assert f"segment {needed} is missing, and backup {info['name']} cannot become consistent" in said
    assert "it cannot become consistent" in copy.run("verify", expect=12).stdout


def test_a_target_before_the_first_backup_is_refused(copy: Copy) -> None:
    said = refused(copy, 13, "--to-time", "2020-01-01 00:00:00Z")
    assert "lies before the end of the first backup" in said
    assert "hint: the earliest that can be reached is" in said


def test_targets_behind_the_last_wal_are_refused(copy: Copy) -> None:
    assert "lies in the future; the last transaction that is stored ended at" in refused(
        copy, 13, "--to-time", "2099-01-01 00:00:00Z"
    )
    folder = copy.local.parent / "target"
    folder.rmdir()
    assert "lies behind the stored WAL" in refused(copy, 13, "--to-lsn", "FF/0")
    folder.rmdir()
    assert "is not in the stored WAL" in refused(copy, 13, "--to-name", "never_made")
    folder.rmdir()
    assert "is not in the stored WAL" in refused(copy, 13, "--to-xid", "4000000")


def test_a_wrong_passphrase_opens_nothing(copy: Copy) -> None:
    for words in (["list"], ["verify"], ["push"], ["restore", "--target-dir", str(target(copy))]):
        done = copy.run(*words, expect=2, BACKUP_ENCRYPTION_PASSWORD="wrong")
        assert "BACKUP_ENCRYPTION_PASSWORD does not open the key ring keys/ring-00000001" in done.stderr
        assert PASSPHRASE not in done.stderr
        assert "hint:" in done.stderr


def test_no_passphrase_for_an_encrypted_repository(copy: Copy) -> None:
    done = copy.run("list", expect=2, BACKUP_ENCRYPTION_PASSWORD="", BACKUP_ENCRYPTION_ENABLED="false")
    assert "is encrypted, and BACKUP_ENCRYPTION_PASSWORD is empty" in done.stderr


def test_a_lost_data_key_is_named(copy: Copy) -> None:
    for path in (copy.root / "keys").glob("data-*"):
        path.unlink()
    assert "data key" in copy.run("verify", expect=12).stdout
    assert "data key" in refused(copy, 12)


def test_a_segment_of_another_name_in_its_place(copy: Copy) -> None:
    first, last = copy.segments()[0], copy.segments()[-1]
    shutil.copy(first, last)
    assert f"holds an object named wal/{first.parent.name}/{first.name}" in refused(copy, 12)
    assert last.name in copy.run("verify", expect=12).stdout


def test_a_plain_segment_in_the_place_of_an_encrypted_one(copy: Copy) -> None:
    """Somebody who may write to the bucket, and has no key, plants a segment of his own."""
    planted = copy.segments()[-1]
    plain_repository(copy, planted)
    said = refused(copy, 12)
    assert "is stored unencrypted, and this repository encrypts such objects" in said
    assert "--allow-unencrypted" in said
    assert planted.name in copy.run("verify", expect=12).stdout


@pytest.mark.parametrize(
    ("backup", "fact"),
    [("f" * 32, f"belongs to the base backup {'f' * 32}"), ("", "is not the one that")],
    ids=["another id", "the same id"],
)
def test_a_part_of_another_backup_in_its_place(copy: Copy, backup: str, fact: str) -> None:
    """The same cluster, the same name, keys that are good: backup_info tells; verify looks at the backup's id first."""
    part = copy.parts()[0]
    header, _ = read_header(part.name, part.read_bytes())
    planted = encrypted_again(copy, part, backup=backup or header.backup)
    assert planted.name == header.name
    folder = target(copy)
    done = copy.run("restore", "--target-dir", str(folder), expect=12)
    assert f"{header.name} is not the one that" in done.stderr
    assert not (folder / "global/pg_control").exists()
    assert f"{header.name} {fact}" in copy.run("verify", expect=12).stdout


def test_an_object_of_another_cluster_in_its_place(copy: Copy) -> None:
    """One segment of the same name, whole and readable, that a clone with another identifier has written."""
    segment = copy.segments()[-1]
    other = str(int(copy.shipped.system_id) + 1)
    planted = encrypted_again(copy, segment, system_id=other)
    fact = f"{planted.name} belongs to the cluster {other}, not to {copy.shipped.system_id}"
    assert fact in copy.run("verify", expect=12).stdout
    assert fact in refused(copy, 12)


def test_a_missing_backup_info_means_no_backup(copy: Copy) -> None:
    copy.object(f"base/{copy.shipped.backup}/backup_info").unlink()
    assert "holds no complete base backup" in refused(copy, 13)
    assert json.loads(copy.run("list", "--json").stdout)["backups"] == []


def test_a_missing_part_is_named_before_and_while_restoring(copy: Copy) -> None:
    gone = copy.parts()[-1]
    gone.unlink()
    assert "NOT USABLE" in copy.run("verify", expect=12).stdout
    folder = target(copy)
    done = copy.run("restore", "--target-dir", str(folder), expect=12)
    assert f"data/base/{gone.name}" in done.stderr
    assert not (folder / "global/pg_control").exists()


def plain_repository(copy: Copy, planted: Path) -> None:
    """Put a walship object with the same name and cluster, made without any key, where ``planted`` is."""
    from datetime import UTC, datetime

    from handlers.checksum import Checksum
    from handlers.compress import Compress
    from handlers.encrypt import Encrypt
    from infra.keys import Policy, RepositoryKeys
    from pipeline.chain import Chain

    system_id = copy.shipped.system_id
    keys = RepositoryKeys(system_id, None, Policy(wal=False, base=False), store=None, allow_unencrypted=True)
    chain = Chain([Compress("none"), Encrypt(keys, lambda _: "none"), Checksum()], keys, system_id)
    name = f"wal/{planted.parent.name}/{planted.name}"
    pieces = chain.encode(name, bytes(1 << 20), created=datetime.now(UTC))
    planted.write_bytes(b"".join(bytes(piece) for piece in pieces))


def encrypted_again(copy: Copy, planted: Path, *, system_id: str = "", backup: str = "") -> Header:
    """Encode the object at ``planted`` anew, with keys of the repository, for another cluster or backup."""
    import asyncio
    from datetime import UTC, datetime

    from handlers.body import joined
    from handlers.checksum import Checksum
    from handlers.compress import Compress
    from handlers.encrypt import Encrypt
    from infra.clock import SystemClock
    from infra.keys import RepositoryKeys, open_keyring
    from infra.storage.local import LocalStore
    from pipeline.chain import Chain, Expected

    mine = copy.shipped.system_id

    async def open_keys(*, writer: bool) -> RepositoryKeys:
        return await open_keyring(LocalStore(copy.root), mine, PASSPHRASE, writer=writer, clock=SystemClock())

    def chain(keys: RepositoryKeys, cluster: str) -> Chain:
        return Chain([Compress("zstd"), Encrypt(keys, lambda _: "aes-256-gcm"), Checksum()], keys, cluster)

    content = planted.read_bytes()
    was, _ = read_header(planted.name, content)
    expected = Expected(was.name, mine, None)
    _, plain = chain(asyncio.run(open_keys(writer=False)), mine).decode(expected, [content])
    keys = asyncio.run(open_keys(writer=True))
    assert keys.key_object
    copy.object(keys.key_object[0]).write_bytes(joined(keys.key_object[1]))
    pieces = chain(keys, system_id or mine).encode(was.name, plain, backup=backup, created=datetime.now(UTC))
    planted.write_bytes(b"".join(bytes(piece) for piece in pieces))
    return read_header(planted.name, planted.read_bytes())[0]
