"""Chains of backups: whole or not, however long; and what of a broken one is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.backups import parent_of
from pipeline.backup import BackupInfo
from pipeline.backup_chain import LONGEST, chain_of, whole_ones
from pipeline.errors import RecoveryError
from tests.unit.test_recovery import backup


def chain(length: int) -> dict[str, BackupInfo]:
    """A full backup ``b0`` and what builds on it."""
    known: dict[str, BackupInfo] = {}
    for number in range(length):
        info = replace(backup(f"b{number}", 0x1000000 * (number + 1)), id=f"{number:032x}", manifest="0a" * 32)
        if number:
            info = replace(info, kind="incremental", parent=f"b{number - 1}", parent_id=f"{number - 1:032x}")
        known[info.name] = info
    return known


def test_a_chain_of_any_length_is_restored() -> None:
    known = chain(1500)
    assert [info.name for info in chain_of(known["b1499"], known)] == [f"b{number}" for number in range(1500)]
    problems: list[str] = []
    assert len(whole_ones(known.values(), problems.append)) == 1500
    assert problems == []


def test_what_is_missing_is_named_with_its_object() -> None:
    known = chain(4)
    del known["b1"]
    with pytest.raises(RecoveryError) as caught:
        chain_of(known["b3"], known)
    assert caught.value.fact == (
        "backup b3 cannot be used: it builds on b1 by way of b2, and base/b1/backup_info is not there, or of no use"
    )
    assert "walship backup" in caught.value.hint
    problems: list[str] = []
    assert [info.name for info in whole_ones(known.values(), problems.append)] == ["b0"]
    assert problems[0].startswith("backup b2 cannot be used: it builds on b1, and base/b1/backup_info is not there")


def test_another_backup_of_that_name_is_not_the_one() -> None:
    known = chain(3)
    known["b0"] = replace(known["b0"], id="f" * 32)
    with pytest.raises(RecoveryError, match="base/b0/backup_info is of another backup than it was taken from"):
        chain_of(known["b2"], known)


def test_a_circle_has_an_end() -> None:
    known = chain(3)
    known["b0"] = replace(known["b0"], kind="incremental", parent="b2", parent_id=known["b2"].id)
    with pytest.raises(RecoveryError, match="in the end on itself"):
        chain_of(known["b2"], known)


def test_a_long_chain_is_built_upon_no_further() -> None:
    said: list[str] = []
    known = chain(LONGEST)
    before = tuple(known.values())[:-1]
    assert parent_of(before, said.append) == before[-1]
    assert parent_of(tuple(known.values()), said.append) is None
    assert said[-1].startswith(f"a full backup is taken: b{LONGEST - 1} builds on {LONGEST - 1} others already")
    assert "walship backup" in said[-1]


def test_a_backup_without_a_manifest_is_no_base() -> None:
    said: list[str] = []
    known = chain(2)
    assert parent_of((known["b0"], replace(backup("b9", 0x9000000), manifest="")), said.append) == known["b0"]
    assert parent_of((), said.append) is None
    assert "there is no backup yet" in said[-1]
