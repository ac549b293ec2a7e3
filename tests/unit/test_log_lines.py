"""What a line of the log looks like: on a terminal, in a file, of a command, of a library; and what is never in it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import structlog

from infra.cli.verb import say
from infra.monitoring.log import configure
from infra.postgres.throwaway import free_port, make_folder
from infra.settings import SECRETS

_PROGRAM = """
import logging, structlog
from infra.monitoring.log import configure
configure(plain=PLAIN)
configure(plain=PLAIN)
log = structlog.get_logger()
log.info("shipped", what="000000010000000000000007", hint="")
log.error("not_shipped", error="the server said:\\nno", hint="ask it", retry_in=2.0)
log.debug("nobody wants to know")
logging.getLogger("some.library").warning("the pool is %s", "full")
logging.getLogger("some.library").info("chatter")
try:
    raise KeyError("unforeseen")
except KeyError:
    logging.getLogger("asyncio").exception("a task has failed")
log.warning("too_much", error="x" * 2_000_000, colour="\\x1b[31m")
"""


def said(*, terminal: bool = False, plain: bool = False, **environment: str) -> str:
    """What a program of its own writes to stderr."""
    words = [sys.executable, "-c", _PROGRAM.replace("PLAIN", str(plain))]
    around = {**os.environ, "COLUMNS": "200", **environment}
    if not terminal:
        return subprocess.run(words, env=around, capture_output=True, text=True, check=True).stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, env=around, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs):
        os.close(theirs)
        found = b""
        try:
            while piece := os.read(ours, 4096):
                found += piece
        except OSError:  # the other side is closed
            pass
    os.close(ours)
    return found.decode().replace("\r\n", "\n")


def test_in_a_file_each_line_is_json() -> None:
    lines = [json.loads(line) for line in said().splitlines()]
    assert [line["event"] for line in lines] == ["shipped", "not_shipped", "library", "library", "too_much"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["timestamp"]) for line in lines)
    assert [line["level"] for line in lines] == ["info", "error", "warning", "error", "warning"]
    assert lines[0]["what"] == "000000010000000000000007"
    assert "hint" not in lines[0]
    assert (lines[1]["error"], lines[1]["hint"], lines[1]["retry_in"]) == ("the server said:\nno", "ask it", 2.0)
    assert (lines[2]["source"], lines[2]["said"]) == ("some.library", "the pool is full")
    assert "KeyError: 'unforeseen'" in lines[3]["exception"]
    assert lines[4]["error"] == "x" * 10_000 + "…"


def test_on_a_terminal_each_line_is_an_event_and_its_values() -> None:
    text = said(terminal=True, NO_COLOR="1")
    assert "\x1b" not in text, "also where it comes from outside"
    shipped, failed, library, *_ = text.splitlines()
    assert re.search(r"\[info +\] shipped +what=000000010000000000000007$", shipped)
    assert re.search(
        r"\[error +\] not_shipped +error='?the server said:\\+nno'? hint='?ask it'? retry_in=2\.0$", failed
    )
    assert re.search(r"\[warning +\] library +said='?the pool is full'? source=some\.library$", library)
    assert "\x1b[" in said(terminal=True)


def test_of_a_command_each_line_is_for_people() -> None:
    for terminal in (False, True):
        lines = said(plain=True, terminal=terminal).splitlines()
        assert lines[0] == "info: shipped 000000010000000000000007"
        assert lines[1] == r"error: not shipped (retry in 2.0): the server said:\nno; hint: ask it"
        assert lines[2] == "warning: library (source some.library): the pool is full"
        assert lines[-1].startswith(r"warning: too much (colour \x1b[31m): xxx")


@pytest.mark.parametrize("destination", ["s3", "file"])
def test_what_can_be_foreseen_has_no_traceback_and_nothing_tells_a_secret(destination: str, tmp_path: Path) -> None:
    """The store and the server are away; the log says so, again and again, and how to go on."""
    secrets = {name: f"hush-{number}-{name.lower()}" for number, name in enumerate(SECRETS)}
    url = f"s3://bucket/x?endpoint=http://127.0.0.1:{free_port()}&region=us-east-1" if destination == "s3" else (
        f"file://{tmp_path}/nowhere"
    )  # fmt: skip
    folder = make_folder("walship-g-")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), **secrets, "BACKUP_ENCRYPTION_ENABLED": "true",
        "POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": str(free_port()), "WALSHIP_SOURCES": "stream",
        "WALSHIP_DESTINATIONS": url, "WALSHIP_LISTEN": "off", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "infra.cli", "run"]
        service = subprocess.Popen(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not (text := (folder / "log").read_text("utf-8")) and service.poll() is None:
            assert time.monotonic() < deadline, "nothing was said"
            time.sleep(0.05)
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(20)
    text = (folder / "log").read_text("utf-8")
    assert "Traceback" not in text
    assert not [secret for secret in secrets.values() if secret in text]
    lines = text.splitlines()
    assert lines
    for line in lines:
        if not line.startswith(("walship: ", "hint: ")):  # how the command says why it ends
            assert json.loads(line)["event"]
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_why_a_destination_is_away_is_told_once_by_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever wants something of it notices; what follows from it is told all the same, and so is any other fact."""
    away = "the folder /b of file:///b is not there"
    configure(plain=True)
    try:
        log = structlog.get_logger()
        log.warning("repository", destination="file:///b", error=away, hint="mount it")
        log.warning("keys", destination="file:///b", error=away, hint="mount it", served_by="s3://c")
        log.error("destination_failed", destination="file:///b", object="wal/x", error=away, hint="mount it")
        say(f"file:///b is left out: {away}. What only it has cannot be restored")
        log.warning("keys", destination="file:///b", error=f"{away} any more")
        log.warning("keys", destination="s3://c", error=away)
        say(f"file:///b is odd: {away} any more or less")
        configure(plain=True)
        say(f"file:///b is left out: {away}")
    finally:
        structlog.reset_defaults()
    assert capsys.readouterr().err.splitlines() == [
        f"warning: repository (destination file:///b): {away}; hint: mount it",
        "error: destination failed (destination file:///b, object wal/x): as said above",
        "file:///b is left out: as said above. What only it has cannot be restored",
        f"warning: keys (destination file:///b): {away} any more",
        f"warning: keys (destination s3://c): {away}",
        f"file:///b is odd: {away} any more or less",
        f"file:///b is left out: {away}",
    ]
