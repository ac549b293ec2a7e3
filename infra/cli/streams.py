"""The process's own stdin, stdout and stderr, made such that what cannot be printed never stops the work.

stderr is for people and logs: a line that it does not take (its disk is full, its reader has gone) is lost, and nothing
else happens. stdout holds the result: one that could not be printed is no success, which ``settle`` tells at the end.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

#: Exit code of a verb that has done its work and could not print the result.
UNPRINTED = 1


class _Lossy(io.FileIO):
    """A file that drops what it cannot take, and remembers why."""

    failure: OSError | None = None

    def write(self, data: memoryview, /) -> int:  # type: ignore[override]  # "any buffer" has no type before 3.12
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = error
            return len(data)
        if written is None:  # it does not block, and is full
            self.failure = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return len(data)
        return written


def secure() -> None:
    """Fill what is closed of the three with /dev/null, and let nothing fail that is written to stdout or stderr.

    A closed one is filled because the next file or socket would get its number, and then our messages.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lossy(1, sys.stdout, "strict")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lossy(2, sys.stderr, "backslashreplace", line_buffering=True)


def settle(code: int) -> int:
    """Flush stdout. The exit code: the one given, and UNPRINTED in the place of 0 if the result was not printed."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = raw.failure if isinstance(raw, _Lossy) else None
    if failure is None:
        return code
    if not isinstance(failure, BrokenPipeError):  # | head is no trouble to speak of
        print(f"walship: stdout cannot be written: {failure.strerror}", file=sys.stderr)
    return code or UNPRINTED


def _lossy(number: int, old: TextIO | None, errors: str, *, line_buffering: bool = False) -> TextIO:
    """A text stream on the same number, that writes as ``old`` did (None: it was closed)."""
    if old is not None:
        old.flush()
        errors = old.errors or errors
    at_once = line_buffering or (old is not None and (bool(old.line_buffering) or getattr(old, "write_through", False)))
    binary = io.BufferedWriter(_Lossy(number, "w", closefd=False))  # type: ignore[type-var]  # for the same reason
    return io.TextIOWrapper(binary, old.encoding if old else "utf-8", errors, line_buffering=at_once)
