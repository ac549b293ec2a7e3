"""``docker-compose.yml`` against the settings, the files it mounts, and itself: no engine is needed for that."""

from __future__ import annotations

import re
import shlex
import stat
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from infra.demo.seaweed import find_program
from infra.planning import contradictions, doubts
from infra.postgres.recovery_files import parse_conf
from infra.remembered import jobs_of
from infra.settings import known_names, load
from tests.command_lines import below, parsed

_HOME = Path(__file__).resolve().parents[2]
_EXTRA = _HOME / "infra" / "deploy" / "compose"
#: The port that each program listens on within its container.
_PORTS = {"postgres": 5432, "s3": 8333, "walship": 9432, "prometheus": 9090, "alertmanager": 9093, "grafana": 3000}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((_HOME / "docker-compose.yml").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]
    return found


def _options(service: dict[str, Any]) -> dict[str, str]:
    words = [word for word in service["command"] if "=" in word]
    return dict(word.split("=", 1) for word in words)


def _mounts(service: dict[str, Any]) -> dict[str, str]:
    """Place in the container → volume, or path of this repository."""
    return {volume.split(":")[1]: volume.split(":")[0] for volume in service.get("volumes", [])}


def _read(name: str) -> Any:
    return yaml.safe_load((_EXTRA / name).read_text("utf-8"))


# -- the file and itself


def test_what_is_named_is_declared_and_used(compose: dict[str, Any], services: dict[str, Any]) -> None:
    named = {source for service in services.values() for source in _mounts(service).values()}
    assert {source for source in named if not source.startswith("./")} == set(compose["volumes"])
    for source in named:
        assert not source.startswith("./") or (_HOME / source).is_file(), source
    secrets = {name for service in services.values() for name in service.get("secrets", [])}
    assert secrets == set(compose["secrets"])
    for secret in compose["secrets"].values():
        (line,) = (_HOME / secret["file"]).read_text("utf-8").splitlines()
        assert len(line) >= 6
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if name.endswith("_FILE"):
                assert value.removeprefix("/run/secrets/") in service["secrets"]


def test_who_is_waited_for_can_tell_that_it_is_ready(services: dict[str, Any]) -> None:
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[name]
            else:
                assert how["condition"] == "service_completed_successfully"
                assert services[name].get("restart") != "unless-stopped"


@pytest.mark.parametrize("name", _PORTS)
def test_ports_are_open_to_this_machine_alone_and_health_is_asked_there(services: dict[str, Any], name: str) -> None:
    service, port = services[name], _PORTS[name]
    assert service.get("ports", [f"127.0.0.1:{port}:{port}"]) == [f"127.0.0.1:{port}:{port}"]
    assert service["restart"] == "unless-stopped"
    check = " ".join(service["healthcheck"]["test"]) if "healthcheck" in service else ""
    if name == "walship":
        told = (_HOME / "Dockerfile").read_text("utf-8")
        assert service["environment"]["WALSHIP_LISTEN"] == f"0.0.0.0:{port}"
        assert "HEALTHCHECK" in told
        assert "/healthz" in told
        assert f"EXPOSE {port}" in told
    elif name == "postgres":
        assert "pg_isready" in check
    else:
        assert f"http://127.0.0.1:{port}/" in check


def test_versions_are_pinned(services: dict[str, Any]) -> None:
    for service in services.values():
        if service["image"] != "walship":
            assert re.search(r":v?\d+\.\d+", service["image"]), service["image"]


# -- walship, its server and its store


@pytest.mark.parametrize("name", ["init", "walship"])
def test_walships_settings_exist_and_agree(
    services: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = services[name]["environment"]
    parsed(services[name]["command"])
    assert set(environment) - {"TMPDIR"} <= known_names()
    for known in known_names():
        monkeypatch.delenv(known, raising=False)
    for setting, value in environment.items():
        monkeypatch.setenv(setting, value.replace("/run/secrets", str(_EXTRA / "secrets")))
    settings = load()
    assert [url.partition(":")[0] for url in settings.destinations] == ["file", "s3"]
    assert environment["POSTGRES_PASSWORD_FILE"] == services["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"]
    for secret in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert environment[secret] == services["s3"]["environment"][secret]
    assert {"full", "expire", "verify"} <= jobs_of(settings).keys()
    assert [*contradictions(settings, None), *doubts(settings)] == []


def test_walship_writes_to_volumes_and_to_what_the_image_leaves_open(services: dict[str, Any]) -> None:
    """Its root is read-only. A tmpfs belongs to root and takes the mode of the folder that it covers."""
    walship, image = services["walship"], (_HOME / "Dockerfile").read_text("utf-8")
    assert walship["read_only"]
    open_to_all = {"/tmp"}.union(
        *(line.partition("-m 1777 ")[2].split() for line in image.splitlines() if " -m 1777 " in line)
    )
    assert set(walship["tmpfs"]) <= open_to_all
    # A cluster is drilled there: no memory is for that.
    room = PurePosixPath(walship["environment"]["TMPDIR"])
    writable = [v.split(":")[1] for v in walship["volumes"] if not v.endswith(":ro")]
    assert below(room, writable)
    assert not below(room, walship["tmpfs"])


def test_what_is_built_here_is_pulled_from_nowhere(services: dict[str, Any]) -> None:
    for service in services.values():
        if service["image"] == "walship":
            assert "build" in service or service["pull_policy"] == "never"


def test_the_image_says_in_numbers_that_it_is_not_root() -> None:
    users = re.findall(r"^USER (\S+)$", (_HOME / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert users == ["999:999", "root", "999:999"]


def test_the_store_knows_its_options_and_keeps_a_name_for_its_address(services: dict[str, Any]) -> None:
    told = subprocess.run([find_program(), "mini", "-h"], check=False, capture_output=True, text=True, timeout=60)
    known = set(re.findall(r"^  -(\S+)", told.stdout + told.stderr, re.MULTILINE))
    program, *options = services["s3"]["command"]
    assert program == "mini"
    assert {option.removeprefix("-").partition("=")[0] for option in options} <= known
    assert "-ip=s3" in options  # the service's; the container's number is another one after each start


def test_the_server_archives_into_the_spool_that_walship_reads(services: dict[str, Any], tmp_path: Path) -> None:
    for place, source in _mounts(services["postgres"]).items():
        if place.startswith("/docker-entrypoint-initdb.d/"):
            subprocess.run(["/bin/sh", _HOME / source], env={"PGDATA": str(tmp_path)}, check=True)
    options = parse_conf((tmp_path / "postgresql.conf").read_text("utf-8"))
    assert options["archive_mode"] == "on"
    assert options["archive_library"] == "basic_archive"
    assert options["summarize_wal"] == "on"  # for incremental backups
    assert "archive_command" not in options  # both at once silently stop archiving
    folder = options["basic_archive.archive_directory"]
    assert folder == services["walship"]["environment"]["WALSHIP_SPOOL_DIR"]
    for name in ("postgres", "walship", "volumes"):
        assert _mounts(services[name])[folder] == "spool"


def test_a_restored_volume_does_not_archive_into_the_spool(services: dict[str, Any]) -> None:
    """Options on the command line win over the postgresql.auto.conf in which a restore switches archiving off."""
    assert "command" not in services["postgres"]


def test_the_bucket_and_port_are_those_of_the_destination(services: dict[str, Any]) -> None:
    options = _options(services["s3"])
    near, s3 = services["walship"]["environment"]["WALSHIP_DESTINATIONS"].split(",")
    assert s3.startswith(f"s3://{options['-bucket']}/")
    assert f"http://s3:{options['-s3.port']}&" in s3
    assert near.removeprefix("file://") in _mounts(services["walship"])


def test_scripts_that_are_mounted_can_be_run(services: dict[str, Any]) -> None:
    scripts = [source for place, source in _mounts(services["postgres"]).items() if place.endswith(".sh")]
    assert scripts
    for name in scripts:
        assert (_HOME / name).stat().st_mode & stat.S_IXOTH


def test_one_user_owns_the_spool_everywhere(services: dict[str, Any]) -> None:
    """basic_archive writes files that only their owner may read."""
    owner = services["volumes"]["entrypoint"][3]
    assert f"--uid {owner} " in (_HOME / "Dockerfile").read_text("utf-8")


def test_base_backups_read_the_very_files_of_the_server(services: dict[str, Any]) -> None:
    """The image of a major version keeps its data in a folder of that number, below the volume."""
    major = services["postgres"]["image"].partition(":")[2].partition(".")[0]
    (volume,) = (v for v in services["postgres"]["volumes"] if v.startswith("postgres-data:"))
    place = volume.partition(":")[2]
    assert services["walship"]["environment"]["WALSHIP_DATA_DIR"] == f"{place}/{major}/docker"
    assert f"{volume}:ro" in services["walship"]["volumes"]
    # And it can be restored there: the image has the programs of that major.
    assert f"ARG PG_MAJORS={major}\n" in (_HOME / "Dockerfile").read_text("utf-8")


def test_what_the_documents_have_typed_there_is_right(services: dict[str, Any]) -> None:
    text = (_HOME / "docs" / "deploy.md").read_text("utf-8")
    typed = [*re.findall(r"^    docker compose exec walship walship (.+)$", text, re.MULTILINE)]
    typed += re.findall(r"^    kubectl .* -- walship (.+)$", text, re.MULTILINE)
    assert len(typed) >= 8
    writable = [v.split(":")[1] for v in services["walship"]["volumes"] if not v.endswith(":ro")]
    for line in typed:
        given = parsed(shlex.split(line)).params
        for name in ("target_dir", "report_dir"):
            assert name not in given or below(PurePosixPath(given[name]), writable)


# -- those who watch


def test_prometheus_asks_walship_and_tells_alertmanager(services: dict[str, Any]) -> None:
    config = _read("prometheus.yml")
    plain = yaml.safe_load((_HOME / "infra/deploy/prometheus/prometheus.yml").read_text("utf-8"))
    mounts = _mounts(services["prometheus"])
    for rules in config["rule_files"]:
        assert mounts[f"/etc/prometheus/{rules}"].endswith(f"infra/deploy/prometheus/{rules}")
    (job,) = config["scrape_configs"]
    assert job["job_name"] == plain["scrape_configs"][0]["job_name"]
    (asked,), (told,) = (each[0]["targets"] for each in (
        job["static_configs"], config["alerting"]["alertmanagers"][0]["static_configs"],
    ))  # fmt: skip
    for target in (asked, told):
        name, _, port = target.partition(":")
        assert _PORTS[name] == int(port)
    assert _options(services["prometheus"])["--config.file"] in mounts
    assert _options(services["prometheus"])["--storage.tsdb.path"] in mounts
    assert _options(services["alertmanager"])["--config.file"] in _mounts(services["alertmanager"])


def test_grafana_finds_its_board_and_prometheus(services: dict[str, Any]) -> None:
    mounts = _mounts(services["grafana"])
    (source,) = _read("datasource.yml")["datasources"]
    assert source["url"] == f"http://prometheus:{_PORTS['prometheus']}"
    board = (_HOME / "infra/deploy/grafana/walship.json").read_text("utf-8")
    assert f'"{source["uid"]}"' in board
    (made,) = mounts.keys() & {place for place in mounts if "provisioning/dashboards" in place}
    (provider,) = yaml.safe_load((_HOME / mounts[made]).read_text("utf-8"))["providers"]
    assert f"{provider['options']['path']}/walship.json" in mounts


# -- a server on the host


class _Merging(yaml.SafeLoader):
    """Takes Compose's ``!override`` for what it stands before."""


def _plain(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node, deep=True)


_Merging.add_constructor("!override", _plain)


def test_a_server_on_the_host_takes_the_place_of_the_one_here(
    compose: dict[str, Any], services: dict[str, Any]
) -> None:
    host = yaml.load((_EXTRA / "host.yml").read_text("utf-8"), _Merging)["services"]
    assert set(host) <= set(services)
    for name in ("postgres", "volumes"):
        assert host[name]["profiles"]
    for name in ("init", "walship"):
        environment = {**services[name]["environment"], **host[name]["environment"]}
        assert set(environment) - {"TMPDIR"} <= known_names()
        assert environment["POSTGRES_CONNECTION_MODE"] == "host"
        assert f"{environment['POSTGRES_HOST']}:host-gateway" in host[name]["extra_hosts"]
        assert not {"postgres", "volumes"} & set(host[name]["depends_on"])
        places = [volume.rsplit(":", 1)[1] for volume in host[name]["volumes"]]
        assert environment["WALSHIP_SPOOL_DIR"] in places
        assert environment["WALSHIP_DESTINATIONS"].split(",")[0].removeprefix("file://") in places
        assert environment["TMPDIR"] in places
        kept = [volume.split(":")[0] for volume in host[name]["volumes"] if not volume.startswith("$")]
        assert set(kept) <= set(compose["volumes"])
    # An engine makes a folder that is missing, for root.
    made = re.search(r"^# +install -d .* -m 700 (.*)$", (_EXTRA / "host.yml").read_text("utf-8"), re.MULTILINE)
    assert made is not None
    given = [volume for volume in host["walship"]["volumes"] if volume.startswith("$")]
    assert re.findall(r":-([^}]+)}", " ".join(given)) == made[1].split()
