"""Progress on stderr, chapter by chapter: a spinner on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text


class Chapter:
    """One step of the story. ``result`` is what is said of it when it is done; the last word counts."""

    def __init__(self) -> None:
        self.result = ""
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began


class Teller:
    """Says what happens, with the seconds since the beginning in front."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning of the story."""
        return time.monotonic() - self._began

    @contextmanager
    def chapter(self, title: str) -> Iterator[Chapter]:
        """Announce, do, and say how long it took. A chapter that fails says nothing: the error does."""
        chapter = Chapter()
        if self._console.is_terminal:
            with self._console.status(Text(title)):
                yield chapter
        else:
            self._say(f"{title} ...")
            yield chapter
        result = f": {chapter.result}" if chapter.result else ""
        self._say(f"{title}{result} ({chapter.seconds:.1f} s)", style="green" if self._console.is_terminal else "")

    def _say(self, line: str, style: str = "") -> None:
        self._console.print(Text(f"{self.seconds:5.1f} s  {line}", style=style), soft_wrap=True)
