"""The wheel as it is installed: among spaces, by root or an ordinary user, with a home that cannot be written.

What it depends on is not fetched anew: a file names the folder where this environment has it.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree

import pytest

from infra.names import PACKAGES
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer, make_folder
from tests.docs_blocks import blocks_of
from tests.servers import NEWEST, new_server

_HOME = Path(__file__).resolve().parents[2]
_VERSION = importlib.metadata.version("walship")


def copy_checkout(checkout: Path) -> None:
    """What the wheel is made of."""
    checkout.mkdir()
    for name in ("pyproject.toml", "constraints.lock", "README.md", "LICENSE", ".env.example"):
        (checkout / name).write_bytes((_HOME / name).read_bytes())
    for name in PACKAGES:
        copytree(_HOME / name, checkout / name, ignore=ignore_patterns("__pycache__"))


class Installed:
    """An environment of its own with the wheel in it, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        checkout = folder / "checkout"
        copy_checkout(checkout)
        _done([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, checkout])
        (wheel,) = folder.glob("*.whl")
        self.place = folder / "a place with spaces"
        # venv and pip as pipx calls them, but for the network.
        _done([sys.executable, "-m", "venv", "--without-pip", self.place])
        (packages,) = self.place.glob("lib/python*/site-packages")
        options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
        _done([sys.executable, "-m", "pip", "--python", self.place / "bin" / "python", "install", *options, wheel])
        # A line in a .pth file is a folder; that of this environment names the checkout in another such file, which is
        # read for folders of the environment itself alone.
        (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", "utf-8")
        self.packages = packages

    def run(self, *words: str, plain: bool = False, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
        """``plain``: as an ordinary user. The home folder is there, and nobody may write to it."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder / "home"), "LANG": "C.UTF-8", **settings}
        return subprocess.run(
            [self.place / "bin" / "walship", *words], env=environment, cwd=folder, check=False, timeout=120, text=True,
            capture_output=True, stdin=subprocess.DEVNULL, **(run_as() if plain else {}),
        )  # fmt: skip


def _done(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    folder = make_folder("walship-i-")
    made = Installed(folder)
    home = folder / "home"
    home.mkdir()
    home.chmod(0o555)
    yield made
    rmtree(folder)


@pytest.fixture(scope="module")
def server(installed: Installed) -> Iterator[ThrowawayServer]:
    with new_server(NEWEST, installed.folder) as made:
        made.start()
        yield made


def test_it_says_what_it_is(installed: Installed) -> None:
    assert installed.run("--version", folder=installed.folder).stdout == f"walship, version {_VERSION}\n"
    said = installed.run("--help", folder=installed.folder)
    assert said.returncode == 0
    assert "Bring the cluster back to a moment." in said.stdout


def test_its_own_modules_are_the_ones_of_the_wheel(installed: Installed) -> None:
    ask = "import infra, handlers, pipeline; print(infra.__file__, handlers.__file__, pipeline.__file__)"
    done = subprocess.run(
        [installed.place / "bin" / "python", "-I", "-c", ask], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.count(str(installed.packages)) == 3


def test_the_settings_come_with_it(installed: Installed) -> None:
    """As docs/install.md has it; pipx, too, puts a link to the command elsewhere."""
    links = installed.folder / "links"
    links.mkdir()
    (links / "walship").symlink_to(installed.place / "bin" / "walship")
    text = (_HOME / "docs" / "install.md").read_text("utf-8")
    (line,) = [line.strip() for line in text.splitlines() if "env.example" in line and line.startswith("    cp ")]
    environment = {"PATH": f"{links}:{os.environ['PATH']}"}
    subprocess.run(["/bin/sh", "-euc", line], cwd=links, env=environment, check=True)
    assert (links / ".env").read_bytes() == (_HOME / ".env.example").read_bytes()


@pytest.mark.parametrize("plain", [False, True], ids=["as we are", "as an ordinary user"])
def test_it_works_among_spaces_and_without_a_home(installed: Installed, server: ThrowawayServer, plain: bool) -> None:
    folder = installed.folder / f"settings and more {plain}"
    store = folder / "the backups"
    store.mkdir(parents=True)
    if plain:
        give(folder, run_as())
    settings = {
        "WALSHIP_DESTINATIONS": f"file://{store}", "WALSHIP_SOURCES": "stream", "WALSHIP_LISTEN": "off",
        **server.environment(),
    }  # fmt: skip
    (folder / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()), "utf-8")
    before = {path for path in installed.place.rglob("*") if "__pycache__" not in path.parts}
    for verb in ("init", "list" if plain else "check"):
        done = installed.run(verb, plain=plain, folder=folder)
        assert done.returncode == 0, (verb, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
    assert [path.name for path in store.glob("*/repository.json")] == ["repository.json"]
    assert not list((installed.folder / "home").iterdir())
    assert before == {path for path in installed.place.rglob("*") if "__pycache__" not in path.parts}
    if plain and run_as():
        assert {path.stat().st_uid for path in store.rglob("*")} == {run_as()["user"]}


def test_the_readmes_way_to_install_it(tmp_path: Path) -> None:
    """The block as it stands, but for /opt and /usr/local; what is depended on is here already, and is not fetched."""
    (block,) = [block for block in blocks_of("README.md") if "/opt/walship" in block.text]
    copy_checkout(tmp_path / "checkout")
    (tmp_path / "bin").mkdir()
    text = block.text.replace("/usr/bin/python3", sys.executable)
    text = text.replace("/opt/", f"{tmp_path}/opt/").replace("/usr/local/bin/", f"{tmp_path}/bin/")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8",
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["/bin/sh", "-euxc", text], cwd=tmp_path / "checkout", env=environment, check=False, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = subprocess.run(
        ["walship", "--version"], env=environment | {"PATH": f"{tmp_path}/bin"}, cwd="/", check=True, text=True,
        capture_output=True,
    )  # fmt: skip
    assert said.stdout == f"walship, version {_VERSION}\n"
    (place,) = tmp_path.glob("opt/walship/lib/python*/site-packages/infra/__init__.py")
    assert place.is_file()
