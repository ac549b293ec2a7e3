"""Libraries of the system that the test servers want and a bare machine lacks: Debian's packages, beside the server.

The servers' wheels are linked against libxml2, which a Debian with only python3 and make does not have. Nothing is
installed: the packages are fetched and unpacked by ``.ci/debian``, which needs no root, and their libraries are copied
into the server's own lib folder, which comes first in its LD_LIBRARY_PATH.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from infra.postgres.programs import environment_for

_HOME = Path(__file__).resolve().parents[1]
_MISSING = re.compile(r"^\s*(\S+) => not found$", re.MULTILINE)


def complete(home: Path) -> None:
    """Bring what ``bin/postgres`` and ``bin/psql`` below ``home`` lack. Raises RuntimeError if that cannot be had."""
    asked: set[str] = set()
    while missing := _missing(home):
        packages = {_package(library) for library in missing}
        if packages <= asked:
            raise RuntimeError(
                f"the test servers want {', '.join(sorted(missing))}, which this machine lacks; install it"
            )
        asked |= packages
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                ["sh", _HOME / ".ci" / "debian", folder, *sorted(packages)],
                capture_output=True, text=True, check=False, timeout=600,
            )  # fmt: skip
            if done.returncode != 0:
                raise RuntimeError(
                    f"the test servers want {', '.join(sorted(missing))}, which this machine lacks, and"
                    f" {', '.join(sorted(packages))} could not be fetched: {done.stderr.strip()}"
                )
            for library in Path(folder).rglob("lib*.so.*"):
                # A link is copied as what it points to: the name that is asked for must be a file here.
                if not (home / "lib" / library.name).exists():
                    shutil.copy2(library, home / "lib" / library.name)


def _missing(home: Path) -> set[str]:
    """Sonames that the loader does not find; none where there is no ldd to ask (not Linux)."""
    if shutil.which("ldd") is None:
        return set()
    programs = [home / "bin" / name for name in ("postgres", "psql")]
    told = subprocess.run(
        ["ldd", *programs], env=environment_for(home / "bin"), capture_output=True, text=True, check=False, timeout=60
    )
    return set(_MISSING.findall(told.stdout))


def _package(library: str) -> str:
    """Debian's name for the package of a library: name and version, with the version left out for libxml2."""
    name, _, version = library.partition(".so.")
    if name == "libxml2":
        return name
    if name.startswith("libicu"):
        return f"libicu{version.split('.')[0]}"
    joint = "-" if name[-1].isdigit() else ""
    return f"{name}{joint}{version.split('.')[0]}".lower().replace("_", "-")
