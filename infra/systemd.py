"""What systemd is told of the service: that it is up, that it still turns, that it ends. Silent where nobody listens.

The protocol is one datagram per message (sd_notify(3)): ``NAME=value`` lines to the socket in ``$NOTIFY_SOCKET``.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


def tell(**values: str) -> None:
    """Send ``NAME=value`` lines. A supervisor that cannot be reached is no reason to stop shipping."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    place = address if address.startswith("/") else f"\0{address[1:]}"  # @ is how an abstract socket is written
    lines = "\n".join(f"{name}={' '.join(value.splitlines())}" for name, value in values.items())
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as there:
        there.settimeout(0)
        there.sendto(lines.encode(), place)


def interval() -> float | None:
    """Seconds between two signs of life: half of what the watchdog allows; None if none watches this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    allowed = os.environ.get("WATCHDOG_USEC", "")
    return int(allowed) / 2e6 if allowed.isdigit() and int(allowed) else None


@asynccontextmanager
async def supervised() -> AsyncIterator[None]:
    """The service is up during the block, and its loop turns.

    Up is when its settings are right and it has begun: a store or a server that is away is waited for, loudly, and is
    no reason for systemd to start it anew.
    """
    tell(READY="1", STATUS="started")
    pause = interval()
    signs = asyncio.create_task(_signs_of_life(pause)) if pause else None
    try:
        yield
    finally:
        tell(STOPPING="1", STATUS="stopping")
        if signs is not None:
            signs.cancel()


async def _signs_of_life(pause: float) -> None:
    while True:
        tell(WATCHDOG="1")
        await asyncio.sleep(pause)
