"""``check`` calls a setting safe only if a required destination outlives this host, and the database server."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from infra.checkup import _off_host
from infra.settings import Settings
from infra.whereabouts import exposed, why_here

FAR = "s3://bucket/pg?endpoint=http://192.0.2.9:9000"  # an address for documents: nobody's, and known without asking


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost", "LOCALHOST:1", "[::1]:9000", "127.9.9.9", "OWN"])
def test_an_endpoint_on_this_host_is_here_however_it_is_spelled(host: str) -> None:
    host = host.replace("OWN", socket.gethostname())
    said = why_here(f"s3://bucket/pg?region=x&endpoint=http://{host}")
    if host == "[::1]:9000" and not said:
        pytest.skip("this machine has no IPv6")
    assert said.endswith(", which is this host")


def test_what_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_here(FAR) == why_here("s3://bucket/pg") == ""
    assert why_here(FAR, ["/var/run/postgresql", "192.0.2.8"]) == ""
    assert why_here(FAR, ["192.0.2.8", "192.0.2.9"]) == "is at 192.0.2.9, which is the database server 192.0.2.9"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert why_here("s3://bucket/pg") == "is at 127.0.0.1, which is this host"
    assert why_here("s3://bucket/pg?endpoint=http://no-such-host.invalid") == "", "whoever connects is told"


def test_a_folder_is_here_unless_another_machine_serves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_here(f"file://{tmp_path}") == "is a local folder"
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr("infra.mounts._MOUNTS", mounts)
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 22 0:40 / {tmp_path}/far\\040off rw,noatime shared:1 - nfs4 nas:/export rw\n"
        f"31 30 8:2 / {tmp_path}/far\\040off/disk rw - xfs /dev/sdb1 rw\n",
        "utf-8",
    )
    assert why_here(f"file://{tmp_path}/far%20off/walship") == ""
    assert why_here(f"file://{tmp_path}/far%20off/disk/walship") == "is a local folder"
    assert why_here(f"file://{tmp_path}/far%20offside") == "is a local folder"
    mounts.unlink()
    assert why_here(f"file://{tmp_path}") == "is a local folder", "not known is not safe"


@pytest.mark.parametrize(
    ("required", "severity", "words"),
    [
        ("all", "ok", "what is acknowledged is off this host: s3://bucket/pg"),
        (
            "file:///near",
            "warning",
            "file:///near is a local folder. s3://bucket/pg may be elsewhere, and is not required. Losing",
        ),
        (FAR, "ok", "off this host: s3://bucket/pg"),
    ],
    ids=["all", "the near one", "the far one"],
)
def test_only_a_required_destination_counts(required: str, severity: str, words: str) -> None:
    settings = Settings(_env_file=None, WALSHIP_DESTINATIONS=f"file:///near,{FAR}", WALSHIP_REQUIRED=required)
    finding = _off_host(settings)
    assert (finding.subject, finding.severity) == ("destinations", severity)
    assert words in finding.fact
    assert ("WALSHIP_REQUIRED" in finding.hint) is (severity == "warning")


@pytest.mark.parametrize(
    ("destinations", "where"),
    [
        ("", None),
        (FAR, None),
        (f"file:///near,{FAR}", None),
        ("file:///near", "this host"),
        ("s3://bucket/pg?endpoint=http://192.0.2.8:9000", "the database server"),
        ("file:///near,s3://bucket/pg?endpoint=http://192.0.2.8:9000", "this host and the database server"),
    ],
)
def test_what_is_lost_with_which_host(destinations: str, where: str | None) -> None:
    found = exposed(Settings(_env_file=None, WALSHIP_DESTINATIONS=destinations, POSTGRES_HOST="192.0.2.8"))
    assert (found and found.where) == where
