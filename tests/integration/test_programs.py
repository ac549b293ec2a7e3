"""Finding the server's programs, and saying where they were looked for when the right ones are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.postgres.programs import embedded, environment_for, find, look_at
from pipeline.errors import SourceError
from tests.servers import NEWEST, SERVER_VERSIONS, programs, server_folder

__all__ = ["server_folder"]


@pytest.mark.parametrize("major", SERVER_VERSIONS)
def test_a_given_folder_is_asked_for_its_version(major: int) -> None:
    found = find(major, bin_dir=programs(major))
    assert (found.major, found.bin_dir) == (major, programs(major))
    assert found.version.startswith(f"{major}.")
    assert Path(found.path("pg_controldata")).is_file()


def test_another_version_is_named_with_the_place() -> None:
    with pytest.raises(SourceError) as caught:
        find(16, bin_dir=programs(17))
    assert f"the programs of PostgreSQL 16 were not found; there is 17.11 in {programs(17)}" in caught.value.fact
    assert "WALSHIP_PG_BIN_DIR" in caught.value.hint


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"no other version is there .looked in {tmp_path}.$"):
        find(16, bin_dir=tmp_path)


def test_a_server_on_the_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.postgres.programs.USUAL_PLACES", ())
    monkeypatch.setenv("PATH", f"{programs(17)}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert find(17).bin_dir == programs(17)
    assert find(None).major == 17
    with pytest.raises(SourceError, match=r"the programs of PostgreSQL 14 were not found; there is 17\.11 in"):
        find(14)


def test_a_program_that_is_no_server_is_no_server(tmp_path: Path) -> None:
    fake = tmp_path / "postgres"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    assert look_at(tmp_path) is None
    fake.write_text("not even a program")
    assert look_at(tmp_path) is None


def test_a_missing_program_is_named() -> None:
    with pytest.raises(SourceError, match=f"PostgreSQL 18.6 in {programs(NEWEST)} has no pg_nothing"):
        find(NEWEST, bin_dir=programs(NEWEST)).path("pg_nothing")


def test_the_installation_brings_its_own_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/other")
    monkeypatch.setenv("PGHOST", "production")
    environment = environment_for(programs(NEWEST))
    assert environment["LD_LIBRARY_PATH"] == f"{programs(NEWEST).parent / 'lib'}:/other"
    assert "PGHOST" not in environment


def test_the_embedded_server_is_found_where_it_is_installed() -> None:
    found = embedded()
    if found is None:
        pytest.skip("the demo extra is not installed")
    assert found.major == 18
    assert Path(found.path("initdb")).is_file()
