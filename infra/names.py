"""Refuse to run when another distribution owns one of our import names.

The layout of the project is given, so its packages have generic names: ``pipeline``, ``handlers``, ``infra``. Where a
stranger brings a package of the same name, Python would quietly run the stranger's code in the middle of a backup.
This module imports nothing of ours before it has looked.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

#: The top-level packages of the wheel.
PACKAGES = ("pipeline", "handlers", "infra")
_DISTRIBUTION = "walship"
#: Where a distribution says what it is.
_METADATA = (".dist-info", ".egg-info")


def refuse_strangers(path: list[str] | None = None) -> None:
    """Raise ConfigError if a package of ours would be, or could become, somebody else's. ``path`` is ``sys.path``.

    Costs some milliseconds: the lists of installed files are searched as text and never parsed.
    """
    path = sys.path if path is None else path
    fact = _owned(path) or _apart(path)
    if not fact:
        return
    hint = "install walship in a virtual environment of its own"
    try:
        from pipeline.errors import ConfigError
    except ImportError:  # the stranger's pipeline is the one that Python finds: our own errors cannot be had
        sys.stderr.write(f"{fact}\nhint: {hint}\n")
        raise SystemExit(2) from None
    raise ConfigError(fact, hint=hint)


def _owned(path: list[str]) -> str:
    """Which other distribution has installed a package of that name, as a sentence; empty if none."""
    for folder in _metadata(path):
        if package := _ours(_files(folder)):
            from importlib.metadata import PathDistribution  # it takes as long to load as all that is done here

            try:
                about = PathDistribution(Path(folder)).metadata
                name, version = (about.get_all(field, [""])[0] for field in ("Name", "Version"))
            except ValueError:  # not UTF-8: damaged
                name = version = ""
            if re.sub(r"[-_.]+", "-", name).lower() != _DISTRIBUTION:
                whose = f"{name} {version}" if name else f"of {folder}, which does not say its name,"
                return f"the distribution {whose} owns the package {package}, which walship brings"
    return ""


def _metadata(path: list[str]) -> Iterator[str]:
    """The folders of all distributions that Python would find beside a package of such a name."""
    for place in path:
        try:
            # A hundred of them at each start: no objects are made for them.
            if not any(os.path.exists(os.path.join(place, package)) for package in PACKAGES):  # noqa: PTH110, PTH118
                continue
            with os.scandir(place or ".") as entries:
                found = {entry.name: entry.path for entry in entries if entry.name.endswith(_METADATA)}
        except OSError:
            continue  # no folder: nothing is imported from there, or it is an archive
        # A wheel's own list names all our packages, and need not be read.
        yield from (folder for name, folder in found.items() if not name.lower().startswith(f"{_DISTRIBUTION}-"))


def _ours(files: bytes) -> str:
    """Which of our packages is among these lines: at the beginning of one (RECORD), or all of one (top_level.txt)."""
    lines = b"\n" + files.replace(b"\r", b"") + b"\n"
    for package in PACKAGES:
        if any(b"\n" + package.encode() + end in lines for end in (b"/", b"\n")):
            return package
    return ""


def _files(folder: str) -> bytes:
    """What the distribution installed, one path a line, as far as it says so."""
    for name in ("RECORD", "top_level.txt"):
        try:
            with open(os.path.join(folder, name), "rb") as file:  # noqa: PTH118, PTH123  a hundred of them at each start
                if content := file.read():
                    return content
        except OSError:
            continue
    return b""


def _apart(path: list[str]) -> str:
    """Whether our packages are found in different folders, as a sentence; empty if all lie beside this one."""
    home = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        spec = PathFinder.find_spec(package, path)
        if spec is None or not spec.origin:
            continue  # an importer of its own (an editable install by hook): what it gives is what was installed
        found = Path(spec.origin).resolve().parent.parent
        if found != home:
            return f"the package {package} is found in {found}, not beside walship's own in {home}"
    return ""
