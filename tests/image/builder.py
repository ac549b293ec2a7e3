"""Debian's buildah in a folder of its own: builds the Dockerfile and runs programs in what came out, with no registry.

The base image is made here of Debian's packages, and PostgreSQL comes from there as well, so the major is Debian's.
Wants root, and the packages buildah and mmdebstrap.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_HOME = Path(__file__).resolve().parents[2]
#: The release of Debian that the Dockerfile names, and the major of PostgreSQL in it.
RELEASE, MAJOR = "bookworm", 15
_MIRROR = f"deb http://deb.debian.org/debian {RELEASE} main"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
#: Where this machine keeps what its pip is told.
_PIP = ("/etc/pip.conf", "~/.config/pip", "/opt/wheels", "/opt/pypi", "/opt/pypi-more")
NEEDED = ("buildah", "mmdebstrap")
#: Walls that an engine puts around a container, of which buildah knows none. Arguments: root, user, group, the places
#: that are to be a tmpfs, the volumes as FOLDER:PLACE, and the words. runc gives a tmpfs the mode of what it
#: covers, and root as its owner; the flags are Docker's.
_WALLS = """
root=$1 uid=$2 gid=$3 places=$4 volumes=$5
shift 5
mount --bind "$root" "$root"
for place in $places; do
    mount -t tmpfs -o "nosuid,nodev,noexec,mode=$(stat -c %a "$root$place")" tmpfs "$root$place"
done
for volume in $volumes /etc/hosts:/etc/hosts; do
    from=${volume%%:*} to=$root${volume#*:}
    if [ -d "$from" ]; then mkdir -p "$to"; else : >>"$to"; fi
    mount --bind "$from" "$to"
done
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs \\
    --bounding-set -all --inh-caps -all sh -c 'cd /var/lib/walship && exec "$@"' sh "$@"
"""


class Builder:
    """One storage of images; ``close`` removes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._containers: list[str] = []

    def buildah(self, *words: str, log: bool = False) -> str:
        """Run it; its output, or all that it said if it fails."""
        done = subprocess.run(self.command(*words), env=_environment(), check=False, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(
                f"buildah {' '.join(words)}: {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
            )
        return done.stdout.strip() + (done.stderr if log else "")

    def command(self, *words: str) -> list[str]:
        place = ["--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")]
        return ["buildah", *place, *words]

    def make_base(self, name: str) -> None:
        """A small Debian with Python, in place of the image that the Dockerfile begins with."""
        archive = self.folder / "base.tar"
        include = "--include=python3,python3-venv,ca-certificates"
        command = ["mmdebstrap", "--quiet", "--variant=apt", include, RELEASE, str(archive), _MIRROR]
        subprocess.run(command, check=True, capture_output=True)
        made = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", made, str(archive), "/")
        archive.unlink()
        # Whoever this machine trusts, pip has to trust there.
        self.buildah("copy", "--quiet", made, str(_CERTIFICATES), str(_CERTIFICATES))
        self.buildah("commit", "--quiet", "--rm", made, name)

    def build(self, name: str, *, base: str, target: str = "") -> None:
        places = [Path(place).expanduser() for place in _PIP]
        volumes = [word for place in places if place.exists() for word in ("--volume", f"{place}:{place}:ro")]
        arguments = ["--build-arg", f"BASE={base}", "--build-arg", f"PG_MAJORS={MAJOR}"]
        wanted = ["--target", target] if target else []
        # Docker's own format: the other one has no health check.
        self.buildah(
            "build",
            "--layers",
            "--format",
            "docker",
            "--network",
            "host",
            *volumes,
            *arguments,
            *wanted,
            "--tag",
            name,
            str(_HOME),
        )

    def megabytes(self, name: str) -> int:
        (image,) = json.loads(self.buildah("images", "--json", name))
        return int(float(str(image["size"]).split()[0]))

    def settings(self, name: str) -> dict[str, Any]:
        """What the image says of itself: user, entry point, health check."""
        told: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", name))["Docker"]["config"]
        return told

    def container(self, name: str) -> str:
        self._containers.append(made := self.buildah("from", name))
        return made

    def run(
        self, container: str, words: Sequence[str], *, environment: Mapping[str, str], folder: Path
    ) -> subprocess.Popen[str]:
        """A program in a container, on this machine's network; ``folder`` is there under its own name."""
        settings = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        command = self.command(
            "run", "--network", "host", "--volume", f"{folder}:{folder}", *settings, container, "--", *words
        )
        return subprocess.Popen(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def confined(
        self,
        name: str,
        words: Sequence[str],
        *,
        environment: Mapping[str, str],
        user: int,
        tmpfs: Sequence[str],
        volumes: Mapping[str, str],
    ) -> subprocess.CompletedProcess[str]:
        """A program of the image as docker-compose.yml has it run: its root is read-only, it has no rights left.

        ``volumes`` are folder → place in the container. What it leaves running keeps its walls.
        """
        root = self.buildah("mount", self.container(name))
        own = dict(setting.split("=", 1) for setting in self.settings(name)["Env"])
        mounts = " ".join(f"{folder}:{place}" for folder, place in volumes.items())
        walls = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-euc", _WALLS, "walls"]
        command = [*walls, root, str(user), str(user), " ".join(tmpfs), mounts, *words]
        with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as out:
            # Not pipes, which would stay open as long as what it leaves running.
            done = subprocess.run(
                command, env={**own, **environment}, check=False, text=True, timeout=300,
                stdin=subprocess.DEVNULL, stdout=out, stderr=told,
            )  # fmt: skip
            for file in (out, told):
                file.seek(0)
            return subprocess.CompletedProcess(words, done.returncode, out.read(), told.read())

    def close(self) -> None:
        for container in self._containers:
            self.buildah("rm", container)
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self.folder)


def _environment() -> dict[str, str]:
    return {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}
