"""The file that lets a restored server fetch WAL by itself: all that it needs, and nothing from the environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from handlers.body import collect
from handlers.serve_wal import deliver
from infra.fetch_context import FetchContext
from infra.keys import RepositoryKeys
from infra.settings import Settings
from infra.storage.local import LocalStore
from pipeline.catalog import wal_key
from pipeline.errors import ConfigError, IntegrityError
from pipeline.lineage import Leg, Lineage, Stretch
from pipeline.wal import Lsn, WalFile
from tests.keys import NOW, SYSTEM_ID, chain, encrypting_keys
from tests.tails import lay

SIZE = 1 << 20
OLD, NEW = (WalFile.segment(timeline, 3 * SIZE, SIZE) for timeline in (1, 2))
FORK = Lsn(3 * SIZE + 1000)
LINEAGE = Lineage((Leg(1, Lsn(0), FORK), Leg(2, FORK, None)), SIZE)
#: Timeline 2's first segment was not there when the restore was planned.
PLANNED = (Stretch(1, 2, 4),)


async def stored(root: Path, name: str, plain: bytes, keys: RepositoryKeys) -> None:
    pieces = chain(keys, cipher="aes-256-gcm").encode(name, plain, created=NOW)
    await LocalStore(root / SYSTEM_ID).put(name, collect(pieces))


@pytest.fixture
async def context(tmp_path: Path) -> FetchContext:
    root = tmp_path / "repository"
    (root / SYSTEM_ID).mkdir(parents=True)
    keys = encrypting_keys()
    await stored(root, wal_key(OLD), b"\xaa" * SIZE, keys)
    await stored(root, "wal/00000002.history", b"1\t0/3003E8\twhy\n", keys)
    await stored(root, "wal/00000001000000000000000A", b"a name that nobody asks for", keys)
    made = FetchContext.of(Settings(), (f"file://{root}",), SYSTEM_ID, LINEAGE, PLANNED, keys)
    path = tmp_path / "context.json"
    path.write_bytes(made.encode())
    assert FetchContext.read(path) == made
    return FetchContext.read(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_it_serves_what_belongs_to_the_plan(
    context: FetchContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WALSHIP_WORKERS", "nonsense")
    target = tmp_path / "RECOVERYXLOG"
    async with context.open() as server:
        assert not await deliver(server, NEW.name, target)
        assert not await deliver(server, OLD.next(SIZE).name, target)
        assert not await deliver(server, "00000003.history", target)
        assert not await deliver(server, "nonsense", target)
        assert not target.exists()
        assert await deliver(server, OLD.name, target)
        assert target.read_bytes() == b"\xaa" * 1000 + bytes(SIZE - 1000), "nothing of what is behind the fork"
        assert await deliver(server, "00000002.history", target)
        assert target.read_bytes() == b"1\t0/3003E8\twhy\n"
    assert names(tmp_path) == ["RECOVERYXLOG", "context.json", "repository"]


async def test_what_was_planned_and_is_gone_is_an_error_and_not_absent(context: FetchContext, tmp_path: Path) -> None:
    """Absent would end recovery there and promote without all that follows."""
    gone = WalFile.segment(1, 2 * SIZE, SIZE)
    async with context.open() as server:
        with pytest.raises(IntegrityError, match=f"segment {gone} was there when the restore was planned, and is gone"):
            await deliver(server, gone.name, tmp_path / "x")
        assert not await deliver(server, WalFile.segment(1, SIZE, SIZE).name, tmp_path / "x")
        assert not await deliver(server, NEW.name, tmp_path / "x")


async def test_it_joins_tails_as_they_are_when_they_are_asked_for(tmp_path: Path) -> None:
    """Each run of ``fetch-wal`` is a new process, and knows what was planned from the file only."""
    root, path, target = tmp_path / "repository", tmp_path / "context.json", tmp_path / "RECOVERYXLOG"
    (root / SYSTEM_ID).mkdir(parents=True)
    store, keys = LocalStore(root / SYSTEM_ID), encrypting_keys()
    made = FetchContext.of(Settings(), (f"file://{root}",), SYSTEM_ID, LINEAGE, (Stretch(2, 3, 4, tail=1700),), keys)
    path.write_bytes(made.encode())
    context, content = FetchContext.read(path), b"\xbb" * SIZE
    assert context == made
    async with context.open() as server:
        with pytest.raises(IntegrityError, match="had 1700 bytes in tails when the restore was planned, and is gone"):
            await deliver(server, NEW.name, target)
        for reach, ranges in ((1700, [(0, 300), (300, 1700)]), (1900, [(600, 1900)])):
            await lay(store, chain(keys, cipher="aes-256-gcm"), NEW, content, ranges)
            assert await deliver(server, NEW.name, target)
            assert target.read_bytes() == content[:reach] + bytes(SIZE - reach)
        # Whoever may write to the store cannot add to it.
        await lay(store, chain(keys, cipher="none"), NEW, content, [(1900, 2000)])
        assert await deliver(server, NEW.name, target)
        assert target.read_bytes() == content[:1900] + bytes(SIZE - 1900)


async def test_an_object_of_a_key_it_does_not_know_is_an_error_and_not_absent(
    context: FetchContext, tmp_path: Path
) -> None:
    keys = context.keys.replace(b'"keys":{', b'"keys":{},"x":{', 1)
    with pytest.raises(IntegrityError):
        async with replace(context, keys=keys).open():
            pass
    other = replace(context, keys=encrypting_keys().restore_keys())
    async with other.open() as server:
        with pytest.raises(IntegrityError):
            await deliver(server, OLD.name, tmp_path / "x")


def test_credentials_are_kept_only_for_buckets_and_files_by_their_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(AWS_ACCESS_KEY_ID="id", AWS_SECRET_ACCESS_KEY="very secret")
    keys = encrypting_keys()
    assert FetchContext.of(settings, ("file:///x",), SYSTEM_ID, LINEAGE, (), keys).credentials == {}
    made = FetchContext.of(settings, ("s3://bucket/x",), SYSTEM_ID, LINEAGE, (), keys)
    assert made.credentials == {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "very secret"}
    assert "very secret" not in repr(made)
    secret = tmp_path / "secret"
    secret.write_text("from a file\n")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY_FILE", str(secret))
    made = FetchContext.of(settings, ("s3://bucket/x",), SYSTEM_ID, LINEAGE, (), keys)
    assert made.credentials["AWS_SECRET_ACCESS_KEY_FILE"] == str(secret)
    assert b"very secret" not in made.encode()
    assert made._settings()["aws_secret_access_key"].get_secret_value() == "from a file"
    secret.unlink()
    with pytest.raises(ConfigError, match=r"AWS_SECRET_ACCESS_KEY_FILE: .* cannot be read"):
        made._settings()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"walship_fetch_context": 1}', '{"walship_fetch_context": 2}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "context.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"context\.json is (damaged|from another version)"):
        FetchContext.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        FetchContext.read(tmp_path / "nowhere")
