"""Where a destination is: on this host, on a database server's, or elsewhere. What is here is lost with the host.

It looks at names, addresses and mounts, and sends nothing. A container has an address of its own: two on one machine
cannot be told from two machines.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

#: File systems of other machines, as Linux calls them.
_NETWORK = ("nfs", "cifs", "smb", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "afs", "fuse.sshfs",
            "fuse.glusterfs", "fuse.ceph", "fuse.rclone", "fuse.s3fs")  # fmt: skip
_MOUNTS = Path("/proc/self/mountinfo")


def endpoint_of(url: str) -> str:
    """The address of an S3 destination's server, as its URL or the environment has it; empty: Amazon's."""
    given = parse_qs(urlsplit(url).query).get("endpoint", [""])[0]
    return given or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def why_here(url: str, servers: Iterable[str] = ()) -> str:
    """Why what is stored there may be lost with this host, or with a database ``server``; empty: it is elsewhere.

    A predicate, to follow the name of the destination: ``is a local folder``. Asks the resolver: call it in a thread.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        kind = _file_system(Path(unquote(parts.path)))
        return "" if kind.startswith(_NETWORK) else "is a local folder"
    host = urlsplit(endpoint_of(url)).hostname or ""
    if not host:
        return ""
    addresses = _addresses(host)
    if any(map(_is_ours, addresses)):
        return f"is at {host}, which is this host"
    for server in servers:
        if not server.startswith("/") and addresses & _addresses(server):
            return f"is at {host}, which is the database server {server}"
    return ""


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)}
    except (OSError, UnicodeError):
        return set()  # whoever connects is told


def _is_ours(address: str) -> bool:
    """Only an address of this host can be bound to."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _file_system(folder: Path) -> str:
    """Its type, as the kernel names it; empty where that cannot be found out. The one mounted last counts."""
    real, best, kind = os.path.realpath(folder), "", ""
    try:
        lines = _MOUNTS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""  # not Linux
    for line in lines:
        before, _, behind = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not behind:
            continue
        point = fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape")  # \040 is a space
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, behind.split(" ")[0]
    return kind
