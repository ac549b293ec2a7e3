"""Refuse to run when another distribution owns one of our import names.

The layout of the project is given, so its packages have generic names: ``pipeline``, ``handlers``, ``infra``. Where a
stranger brings a package of the same name, Python would quietly run the stranger's code in the middle of a backup.
This module imports nothing of ours before it has looked.
"""

from __future__ import annotations

import re
import sys
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path

#: The top-level packages of the wheel.
PACKAGES = ("pipeline", "handlers", "infra")
_DISTRIBUTION = "walship"
_OURS = re.compile(rf"^({'|'.join(PACKAGES)})(?:/.*)?$", re.MULTILINE)


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
    for distribution in distributions(path=path):
        installed = _files(distribution)
        match = _OURS.search(installed) if installed else None
        if match:
            name = str(distribution.metadata["Name"] or "")
            if re.sub(r"[-_.]+", "-", name).lower() != _DISTRIBUTION:
                return (
                    f"the distribution {name} {distribution.version} owns the package {match[1]}, which walship brings"
                )
    return ""


def _files(distribution: Distribution) -> str:
    """What the distribution installed, one path a line, as far as it says so."""
    return distribution.read_text("RECORD") or distribution.read_text("top_level.txt") or ""


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
