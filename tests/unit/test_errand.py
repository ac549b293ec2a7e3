"""A process beside the service: what it says, how it ends, and how it is ended."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from infra.errand import Ended, run

PYTHON = (sys.executable, "-c")


async def child(program: str) -> tuple[Ended, list[str]]:
    said: list[str] = []
    return await run(["backup"], said.append, program=(*PYTHON, program)), said


async def test_its_lines_are_heard_and_its_progress_is_not() -> None:
    program = """
import sys
print("x" * 10_000_000)
print('{"progress": "base backup", "bytes": 5}', file=sys.stderr)
print("one\\n\\ntwo", file=sys.stderr)
print("base backup: base/5/1259: 15.0 MB of 2.0 GB, 3.1 MB/s, 600 s left", file=sys.stderr)
print("expire: 12 B, 0 B/s", file=sys.stderr)
print('{"note": "three"}', file=sys.stderr)
print("four", end="", file=sys.stderr)
"""
    assert await child(program) == (Ended(0), ["one", "two", "three", "four"])


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        (
            "import json; print(json.dumps({'error': {'fact': 'full', 'hint': 'buy'}})); exit(11)",
            Ended(11, "full", "buy"),
        ),
        (
            "import sys; print('{}'); print('walship: damaged\\nhint: heal', file=sys.stderr); exit(12)",
            Ended(12, "damaged", "heal"),
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            Ended(-9, "`walship backup` was ended by signal 9"),
        ),
        ("exit(3)", Ended(3, "`walship backup` ended with exit code 3")),
    ],
)
async def test_why_it_failed_is_known(program: str, ended: Ended) -> None:
    assert (await child(program))[0] == ended


async def test_what_cannot_be_started_is_a_failure() -> None:
    ended = await run(["drill"], pytest.fail, program=("/nowhere/python",))
    assert ended == Ended(
        -1, "`walship drill` could not be started: No such file or directory", "was walship moved or removed?"
    )


@pytest.mark.parametrize("polite", [True, False])
async def test_it_is_ended_with_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, polite: bool) -> None:
    """Asked first; killed if that does not help."""
    note, said = tmp_path / "note", list[str]()
    program = f"""
import os, pathlib, signal, sys, time
def clean(*_):
    pathlib.Path({str(note)!r}).write_text("cleaned")
    if {polite}:
        raise SystemExit(130)
signal.signal(signal.SIGINT, clean)
print(os.getpid(), file=sys.stderr, flush=True)
for _ in range(1200):
    time.sleep(0.1)
"""
    work = asyncio.create_task(run(["backup"], said.append, program=(*PYTHON, program), grace=3600))
    async with asyncio.timeout(60):
        while not said:  # while it is being started, there is nobody yet who could be asked
            await asyncio.sleep(0.01)
        work.cancel()
        while not (note.exists() and note.read_text() == "cleaned"):
            await asyncio.sleep(0.01)
    if not polite:  # it was asked, it is still there, and now its time is over
        assert not work.done()
        loop, now = asyncio.get_running_loop(), asyncio.get_running_loop().time
        monkeypatch.setattr(loop, "time", lambda: now() + 3600)
    with pytest.raises(asyncio.CancelledError):
        await work
    with pytest.raises(ProcessLookupError):
        os.kill(int(said[0]), 0)
