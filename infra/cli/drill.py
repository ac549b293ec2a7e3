"""``walship drill``."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import click

from handlers.check_file import Check, parse
from handlers.drill import Reading, Report, State
from infra.cli.answering import answering, as_of, narrowed, repository_of
from infra.cli.exits import exit_code
from infra.cli.progress import EVERY, Bytes
from infra.cli.verb import (
    as_of_option,
    asynchronous,
    cluster_option,
    emit,
    from_option,
    json_option,
    say,
    settings,
    typed,
)
from infra.drill import Order, drill, judge
from infra.malloc import KEPT, give_back_large_blocks
from infra.postgres.restored import Replay
from infra.records import recording
from infra.restore import Watch
from infra.storage.counting import Counting
from infra.wiring import open_site
from pipeline.errors import ConfigError, WalshipError
from pipeline.moments import time_remark
from pipeline.targets import Target

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False, readable=True)


@click.command("drill")
@click.option("--to-time", metavar="TIME", help="Restore to then; without it, as far as the stored WAL reaches.")
@click.option("--check", "check_file", type=_FILE, metavar="FILE.sql", help="Your own checks: see above.")
@click.option("--skip-amcheck", is_flag=True, help="Leave out pg_amcheck, which reads every table and index.")
@click.option("--backup", metavar="NAME", help="Begin with this backup instead of the best one.")
@from_option
@click.option(
    "--work-dir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Make the throw-away folder below this one (else TMPDIR, or the system's temporary folder).",
)  # fmt: skip
@click.option(
    "--report", "report_dir", default=".", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Put the report there (else here): drill_DATE_TIME.md and .json.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave the folder and its server, and say where they are.")
@cluster_option
@as_of_option
@click.option("--allow-unencrypted", is_flag=True, help="Accept plain objects in an encrypted repository.")
@json_option
@asynchronous
async def command(**options: Any) -> None:
    """Restore for real into a throw-away server, check it, and report how long it took and what would be lost.

    The server that was backed up is not even connected to. The throw-away one listens on a private socket only, and is
    removed with all its files at the end. pg_amcheck looks at every table and B-tree index, and then your own checks
    are run: SQL statements, each with comment lines in front that say what is expected.

    \b
      -- database: shop
      -- name: orders are there
      -- expect: > 0
      SELECT count(*) FROM orders;

    expect is the one value that has to come: a number (also with <>, <, <=, > or >=), true, false, null or a text;
    without it the statement has to run. timeout is in seconds, 300 if not said; database counts from there on.

    Exits with 12 if a check failed, 13 if the target cannot be reached, 11 if a store failed, 10 if pg_amcheck is
    missing.

    \b
    Examples:
      walship drill
      walship drill --check checks.sql --report /var/lib/walship/drills
      walship drill --to-time 'yesterday 14:30' --skip-amcheck
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    give_back_large_blocks(keep=KEPT)
    began, start = datetime.now(UTC), time.monotonic()
    as_json: bool = options["as_json"]
    target = Target.parse(time=options["to_time"], now=began)
    if target.time and (remark := time_remark(options["to_time"], target.time)):
        say(remark)
    report = Report(began, start, version("walship"), str(target))
    order = Order(
        target,
        backup=options["backup"],
        checks=_checks(options["check_file"]),
        amcheck=not options["skip_amcheck"],
        work_dir=options["work_dir"] or Path(tempfile.gettempdir()),
        keep=options["keep"],
    )
    folder = _report_folder(options["report_dir"])
    try:
        await _rehearse(order, report, options)
    except WalshipError as error:
        report.failure = error
        write_report(report, folder)
        raise
    write_report(report, folder)
    emit(report.summary(), _lines(report), as_json=as_json)
    if (verdict := judge(report)) is not None:
        # The report is the result, on stdout, and one result is enough for whoever reads JSON.
        say(f"walship: {verdict.fact}")
        say(f"hint: {verdict.hint}")
        click.get_current_context().exit(exit_code(verdict))


async def _rehearse(order: Order, report: Report, options: dict[str, Any]) -> None:
    """With the site opened, and closed again: what that takes belongs to the time that a restore takes."""
    allowed: bool = options["allow_unencrypted"]
    wanted = await as_of(narrowed(settings(), options["source"]), options["as_of"])
    order = replace(order, bin_dir=wanted.pg_bin_dir, user=wanted.postgres_username)
    async with contextlib.AsyncExitStack() as stack:
        opening = time.monotonic()
        try:
            site = await answering(
                await stack.enter_async_context(
                    open_site(wanted, cluster=options["cluster"], allow_unencrypted=allowed)
                )
            )
        finally:
            report.steps.append(("find the repository and its keys", time.monotonic() - opening))
        site.keys.need_reading("walship drill")
        report.cluster = site.facts.system_id
        report.readings += [Reading(store.name) for store in site.stores]
        counted = (Counting(store, r.served) for store, r in zip(site.stores, report.readings, strict=True))
        site = replace(site, stores=tuple(counted))
        repository = repository_of(site, allow_unencrypted=allowed)
        entry = await stack.enter_async_context(recording(site, "drill", typed(), tell=say))
        with Bytes("base backup") as bar:
            await drill(repository, order, report, Watch(files=bar, replay=_replayed(), say=say))
        entry.summary |= {
            "backup": report.plan.backup.name if report.plan else None,
            "rto_seconds": report.rto,
            "rpo_seconds": report.rpo,
            "verdict": report.verdict,
            "checks": len(report.outcomes),
            "failed": [outcome.name for outcome in report.of(State.FAILED)],
        }
        if (verdict := judge(report)) is not None:
            entry.fail(verdict.fact, hint=verdict.hint)


def _checks(path: Path | None) -> tuple[Check, ...]:
    if path is None:
        return ()
    try:
        return parse(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _report_folder(folder: Path) -> Path:
    """Asked for before the drill: an hour later would be too late."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the report's folder {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"no report can be written into {folder}", hint="--report names a folder that is yours")
    return folder


def write_report(report: Report, folder: Path) -> None:
    """Both files, each complete or not there. Of drills that began in the same second the later ones get a number."""
    report.seconds = time.monotonic() - report.start
    stem = name = f"drill_{report.began:%Y%m%d_%H%M%S}"
    numbers = itertools.count(2)
    content = json.dumps(report.summary(), indent=2) + "\n"
    while (folder / f"{name}.md").exists() or not _put(folder / f"{name}.json", content):
        name = f"{stem}_{next(numbers)}"
    _put(folder / f"{name}.md", report.markdown())
    say(f"report: {folder / name}.md and .json")


def _put(path: Path, content: str) -> bool:
    """False if there is one of that name. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(content, "utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"the report {path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return True


def _lines(report: Report) -> list[str]:
    lines = [report.conclusion]
    lines += [f"  {seconds:8.2f} s  {name}" for name, seconds in report.steps]
    for outcome in report.outcomes:
        told = (
            ""
            if outcome.state is State.PASSED
            else f": expected {outcome.expected}, found {shorten(outcome.found, 200)}"
        )
        lines.append(f"  {outcome.state.value:8}    {outcome.name}{told}")
    return lines


def _replayed() -> Any:
    last = time.monotonic()

    def told(replay: Replay) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY and (replay.lsn or replay.segment):
            last = time.monotonic()
            say(f"replaying: LSN {replay.lsn or 'unknown'}, segment {replay.segment or 'unknown'}")

    return told
