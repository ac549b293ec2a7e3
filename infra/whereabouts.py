"""Where a destination is: on this host, on a database server's, or elsewhere. What is here is lost with the host.

It looks at names, addresses and mounts, and sends nothing. A container has an address of its own: two on one machine
cannot be told from two machines.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from infra.mounts import file_system
from infra.settings import Settings
from infra.storage import display_name

#: File systems of other machines, as Linux calls them.
_NETWORK = ("nfs", "cifs", "smb", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "afs", "fuse.sshfs",
            "fuse.glusterfs", "fuse.ceph", "fuse.rclone", "fuse.s3fs")  # fmt: skip
_SERVER = "which is the database server"


@dataclass(frozen=True, slots=True)
class Exposed:
    """All that is acknowledged may be lost with one host."""

    #: ``this host``, ``the database server``, or both.
    where: str
    #: Each required destination, and why it counts as there.
    fact: str
    #: What to do about it.
    hint: str


def required_elsewhere(settings: Settings) -> tuple[str, ...]:
    """Names of the required destinations that outlive this host and the database server. Blocking: see ``why_here``."""
    return tuple(name for name, why in _whys(settings).items() if not why)


def exposed(settings: Settings) -> Exposed | None:
    """What there is to say if no required destination is elsewhere; None if one is. Blocking: see ``why_here``."""
    whys = _whys(settings)
    if not all(whys.values()) or not whys:
        return None
    optional = [name for url in settings.destinations if (name := display_name(url)) not in whys]
    where = "; ".join(f"{name} {why}" for name, why in whys.items())
    more = f". {', '.join(optional)} may be elsewhere, and is not required" if optional else ""
    there = dict.fromkeys("the database server" if _SERVER in why else "this host" for why in whys.values())
    return Exposed(
        " and ".join(there),
        f"no required destination is off this host: {where}{more}. Losing the host may lose all of it",
        "add a destination on another host to WALSHIP_DESTINATIONS, an s3:// one most likely, and require it"
        " (WALSHIP_REQUIRED)",
    )


def _whys(settings: Settings) -> dict[str, str]:
    servers = [host for host, _ in settings.servers]
    return {display_name(url): why_here(url, servers) for url in settings.required_urls}


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
        kind = file_system(Path(unquote(parts.path)))
        return "" if kind.startswith(_NETWORK) else "is a local folder"
    host = urlsplit(endpoint_of(url)).hostname or ""
    if not host:
        return ""
    addresses = _addresses(host)
    if any(map(_is_ours, addresses)):
        return f"is at {host}, which is this host"
    for server in servers:
        if not server.startswith("/") and addresses & _addresses(server):
            return f"is at {host}, {_SERVER} {server}"
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
