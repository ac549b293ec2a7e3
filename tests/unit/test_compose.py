"""``docker-compose.yml`` against the settings: no engine is needed to notice a misspelled name."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.postgres.recovery_files import parse_conf
from infra.settings import Settings, known_names

_HOME = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((_HOME / "docker-compose.yml").read_text("utf-8"))["services"]
    return found


def _options(service: dict[str, Any]) -> dict[str, str]:
    words = [word for word in service["command"] if "=" in word]
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize("name", ["init", "walship"])
def test_walships_settings_exist_and_agree(
    services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = services[name]["environment"]
    assert set(environment) <= known_names()
    for known in known_names():
        monkeypatch.delenv(known, raising=False)
    for setting, value in environment.items():
        monkeypatch.setenv(setting, value)
    settings = Settings(_env_file=None)
    assert [url.partition(":")[0] for url in settings.destinations] == ["file", "s3"]
    assert settings.postgres_password.get_secret_value() == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert environment[secret] == services["s3"]["environment"][secret]


def test_the_server_archives_into_the_spool_that_walship_reads(services: dict[str, Any], tmp_path: Path) -> None:
    for volume in services["postgres"]["volumes"]:
        if ":/docker-entrypoint-initdb.d/" in volume:
            subprocess.run(["/bin/sh", _HOME / volume.split(":")[0]], env={"PGDATA": str(tmp_path)}, check=True)
    options = parse_conf((tmp_path / "postgresql.conf").read_text("utf-8"))
    assert options["archive_mode"] == "on"
    assert options["archive_library"] == "basic_archive"
    assert "archive_command" not in options  # both at once silently stop archiving
    folder = options["basic_archive.archive_directory"]
    assert folder == services["walship"]["environment"]["WALSHIP_SPOOL_DIR"]
    for name in ("postgres", "walship", "volumes"):
        assert f"spool:{folder}" in services[name]["volumes"]


def test_a_restored_volume_does_not_archive_into_the_spool(services: dict[str, Any]) -> None:
    """Options on the command line win over the postgresql.auto.conf in which a restore switches archiving off."""
    assert "command" not in services["postgres"]


def test_the_bucket_and_port_are_those_of_the_destination(services: dict[str, Any]) -> None:
    options = _options(services["s3"])
    s3 = services["walship"]["environment"]["WALSHIP_DESTINATIONS"].split(",")[1]
    assert s3.startswith(f"s3://{options['-bucket']}/")
    assert f"http://s3:{options['-s3.port']}&" in s3


def test_files_that_are_mounted_are_there_and_can_be_run(services: dict[str, Any]) -> None:
    mounted = [v.split(":")[0] for s in services.values() for v in s.get("volumes", []) if v.startswith("./")]
    assert mounted
    for name in mounted:
        assert (_HOME / name).stat().st_mode & stat.S_IXOTH


def test_one_user_owns_the_spool_everywhere(services: dict[str, Any]) -> None:
    """basic_archive writes files that only their owner may read."""
    owner = services["volumes"]["entrypoint"][3]
    assert f"--uid {owner} " in (_HOME / "Dockerfile").read_text("utf-8")


def test_base_backups_read_the_very_files_of_the_server(services: dict[str, Any]) -> None:
    """The image of a major version keeps its data in a folder of that number, below the volume."""
    major = services["postgres"]["image"].partition(":")[2].partition("-")[0]
    (volume,) = (v for v in services["postgres"]["volumes"] if v.startswith("postgres-data:"))
    place = volume.partition(":")[2]
    assert services["walship"]["environment"]["WALSHIP_DATA_DIR"] == f"{place}/{major}/docker"
    assert f"{volume}:ro" in services["walship"]["volumes"]
