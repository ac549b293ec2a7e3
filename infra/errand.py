"""A verb in a process of its own: its memory, its load and its crash are not the service's.

What it says to people goes to the log line by line; of its progress, which is for whoever watches, a line a minute. It
is ended as a person would end it, and gets time to clean up; one that does not go then is killed.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

#: How a child is started: this Python, with nothing of the working directory on its path.
WALSHIP = (sys.executable, "-P", "-m", "infra.cli")
#: Seconds to clean up in.
GRACE = 15.0
#: Bytes of a result that are kept; and of a line.
_MOST, _LINE = 4 << 20, 16 << 10
#: Seconds between lines of progress that are handed on; and what those look like.
_EVERY = 60.0
_PROGRESS = re.compile(r", [\d.]+ [KMGT]?B/s(, \d+ s left)?$|^(verified \d|replaying: |pg_amcheck: )")


@dataclass(frozen=True, slots=True)
class Ended:
    """How it went."""

    #: As ``exits`` has them; negative: the signal that killed it.
    code: int
    #: What went wrong, and what to do about it; empty if nothing did.
    error: str = ""
    hint: str = ""


class _Said:
    """What a child says on stderr, by lines; and what of it is the error."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._progressed = time.monotonic()
        self.error = self.hint = ""

    async def follow(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while piece := await stream.read(_LINE):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self._take(line)
            if len(rest) > _LINE:
                self._take(rest)
                rest = b""
        self._take(rest)

    def _take(self, line: bytes) -> None:
        words = _note(line[:_LINE].decode("utf-8", "replace").strip())
        if not words or words.startswith('{"progress"') or self._too_soon(words):
            return
        if words.startswith("walship: "):
            self.error, self.hint = words.removeprefix("walship: "), ""
        elif words.startswith("hint: ") and self.error:
            self.hint = words.removeprefix("hint: ")
        else:
            self._say(words)

    def _too_soon(self, words: str) -> bool:
        if not _PROGRESS.search(words):
            return False
        now = time.monotonic()
        if now - self._progressed < _EVERY:
            return True
        self._progressed = now
        return False


async def run(
    words: Sequence[str], say: Callable[[str], None], *, program: Sequence[str] = WALSHIP, grace: float = GRACE
) -> Ended:
    """Run ``walship WORDS`` to its end; ``say`` gets each line. Cancelled, it ends the child before it returns."""
    try:
        child = await asyncio.create_subprocess_exec(
            *program,
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C on the service's terminal is the service's to pass on, once
        )
    except OSError as error:
        return Ended(
            -1, f"`walship {words[0]}` could not be started: {error.strerror}", "was walship moved or removed?"
        )
    assert child.stdout is not None
    assert child.stderr is not None
    said = _Said(say)
    output = asyncio.gather(_kept(child.stdout), said.follow(child.stderr))
    try:
        result, _ = await asyncio.shield(output)
        code = await child.wait()
    except asyncio.CancelledError:
        await _end(child, grace)
        raise
    finally:
        output.cancel()
        with suppress(asyncio.CancelledError):
            await output
    if code == 0:
        return Ended(code)
    fact, hint = _error(result)
    return Ended(code, fact or said.error or _unsaid(words[0], code), hint or said.hint)


async def _end(child: asyncio.subprocess.Process, grace: float) -> None:
    with suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT)
    # Not asyncio.timeout: within a task that is being cancelled, Python 3.11 takes its time-out for that.
    ended = asyncio.ensure_future(child.wait())
    await asyncio.wait([ended], timeout=grace)
    if not ended.done():
        with suppress(ProcessLookupError):
            child.kill()
    await ended


async def _kept(stream: asyncio.StreamReader) -> bytes:
    """The beginning of what a child writes; it goes on writing unhindered."""
    kept = bytearray()
    while piece := await stream.read(1 << 16):
        kept += piece[: _MOST - len(kept)]
    return bytes(kept)


def _note(words: str) -> str:
    """``{"note": "some words"}`` → ``some words``: see ``infra.cli.json_lines``."""
    if not words.startswith('{"note"'):
        return words
    try:
        return str(json.loads(words)["note"])
    except (ValueError, KeyError):
        return words


def _error(result: bytes) -> tuple[str, str]:
    """Fact and hint of an error that was printed as JSON."""
    try:
        told = json.loads(result)["error"]
        return str(told["fact"]), str(told["hint"])
    except (ValueError, KeyError, TypeError):
        return "", ""


def _unsaid(verb: str, code: int) -> str:
    if code < 0:
        return f"`walship {verb}` was ended by signal {-code}"
    return f"`walship {verb}` ended with exit code {code}"
