"""``walship run`` that kills itself (SIGKILL) at a chosen point: ``DIE_AT=point:n``, when it gets there the n-th time.

Run as a program in place of the command. The points are the boundaries between stages; walship knows nothing of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from infra.cli import main
from infra.sources.watcher import SpoolWatcher
from infra.storage.local import LocalStore
from infra.storage.s3 import S3Store

POINTS = (
    "read", "compressed", "encrypted", "checksummed", "before-local", "after-local", "before-s3", "after-s3",
    "before-done", "after-done",
)  # fmt: skip


class Countdown:
    """Dies when it has been called often enough."""

    def __init__(self, left: int) -> None:
        self._left = left

    def __call__(self) -> None:
        self._left -= 1
        if not self._left:
            die()


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("SIGKILL came late")


def arrange(point: str, count: int) -> None:
    """Have the n-th passage of the point be the last thing this process does."""
    countdown = Countdown(count)
    match point:
        case "read":
            _after(SpoolWatcher, "read", countdown)
        case "compressed":
            _in_stage(Compress, countdown)
        case "encrypted":
            _in_stage(Encrypt, countdown)
        case "checksummed":
            _in_stage(Checksum, countdown)
        case "before-local" | "after-local":
            _around(LocalStore, "put", countdown, before=point.startswith("before"))
        case "before-s3" | "after-s3":
            _around(S3Store, "put", countdown, before=point.startswith("before"))
        case "before-done" | "after-done":
            _around(SpoolWatcher, "done", countdown, before=point.startswith("before"))
        case _:
            raise SystemExit(f"no point {point}")


def _after(owner: type, name: str, countdown: Countdown) -> None:
    original = getattr(owner, name)

    def wrapped(self: Any, *words: Any) -> Any:
        result = original(self, *words)
        countdown()
        return result

    setattr(owner, name, wrapped)


def _around(owner: type, name: str, countdown: Countdown, *, before: bool) -> None:
    original = getattr(owner, name)

    async def wrapped(self: Any, *words: Any, **options: Any) -> Any:
        if before:
            countdown()
        result = await original(self, *words, **options)
        if not before:
            countdown()
        return result

    setattr(owner, name, wrapped)


def _in_stage(owner: type, countdown: Countdown) -> None:
    original = owner.forward  # type: ignore[attr-defined]  # every stage has it

    def forward(self: Any, header: Any, pieces: Iterable[Any]) -> Iterator[Any]:
        for piece in original(self, header, pieces):
            countdown()
            yield piece

    owner.forward = forward  # type: ignore[attr-defined]  # likewise


if __name__ == "__main__":
    point, _, count = os.environ["DIE_AT"].partition(":")
    arrange(point, int(count or 1))
    main()
