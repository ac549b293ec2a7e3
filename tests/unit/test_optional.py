"""Which destinations that are not required have a backup: asked for a few seconds, and told with what to do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from infra.cli.optional import not_yet, where_is
from infra.settings import Settings
from infra.storage.memory import MemoryStore
from pipeline.backup import BackupInfo
from pipeline.catalog import REPOSITORY, info_key
from tests.expiring import add_backup
from tests.sites import site_at


@pytest.fixture
async def backup() -> BackupInfo:
    return await add_backup(await site_at(MemoryStore("a")), 1, 2)


def settings(folder: Path, backup: BackupInfo, **stored: tuple[str, ...]) -> Settings:
    """A destination for each, of which the first alone is required, with empty objects of these names."""
    for name, keys in stored.items():
        (folder / name).mkdir()
        for key in keys:
            path = folder / name / backup.system_id / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    urls = [f"file://{folder}/{name}" for name in stored]
    return Settings(_env_file=None, WALSHIP_DESTINATIONS=",".join(urls), WALSHIP_REQUIRED=urls[0])


async def test_each_that_lacks_it_is_told_with_what_helps(tmp_path: Path, backup: BackupInfo) -> None:
    info = info_key(backup.name)
    chosen = settings(tmp_path, backup, near=(), far=(REPOSITORY, info), late=(REPOSITORY,), emptied=(), seems=(info,))
    near, far, late, emptied, seems = chosen.destinations
    places, lacking = await where_is(backup, chosen)
    assert places == [near, far]
    assert [not_yet(name, why) for name, why in lacking.items()] == [
        (
            f"not yet at {late}, which is not required: {backup.name} is not complete there. `walship run` copies it"
            " there once it can"
        ),
        *(
            f"not yet at {name}, which is not required: {name} has no repository.json: it was emptied, or it is new, or"
            " something else is in its place. Nothing counts as stored there; after walship init what other"
            " destinations have is copied"
            for name in (emptied, seems)
        ),
    ]


async def test_what_was_not_asked_is_not_said_to_have_it(tmp_path: Path, backup: BackupInfo) -> None:
    """Ctrl-C behind a backup: it is complete, and no more than that is known."""
    chosen = settings(tmp_path, backup, near=(), far=(REPOSITORY, info_key(backup.name)))
    asking = asyncio.create_task(where_is(backup, chosen))
    async with asyncio.timeout(60):
        while not any("_why" in repr(task.get_coro()) for task in asyncio.all_tasks()):
            await asyncio.sleep(0)
    asking.cancel()
    near, far = chosen.destinations
    places, lacking = await asking
    assert (places, {name: why.fact for name, why in lacking.items()}) == (
        [near], {far: "it was not asked, for the command was stopped"},
    )  # fmt: skip
