"""``walship backup``."""

from __future__ import annotations

import click

from handlers.base_backup import Progress
from infra.backups import backup
from infra.cli.json_lines import JsonLines, note
from infra.cli.optional import not_yet, where_is
from infra.cli.progress import Bytes
from infra.cli.verb import asynchronous, emit, human, json_option, say, settings, typed
from infra.clock import SystemClock
from infra.malloc import KEPT, PARTS, PARTS_KEPT, give_back_large_blocks
from infra.monitoring import log
from infra.postgres.damage import Damage
from pipeline.moments import show


@click.command("backup")
@click.option("--label", default="walship", show_default=True, help="Written into backup_label, for people.")
@click.option("--incremental", is_flag=True, help="Only what changed since the last one (PostgreSQL 17 and later).")
@json_option
@asynchronous
async def command(label: str, incremental: bool, as_json: bool) -> None:
    """Take a base backup now, straight from the server to every destination.

    Nothing is staged on disk. With WALSHIP_DATA_DIR the files are read by walship itself, else the server sends them;
    with WALSHIP_BACKUP_HOST it is taken from a standby. It counts as a backup only once all WAL that it needs is safe
    at every required destination; killed before that, it leaves no backup, only parts that nobody lists. A destination
    that is not required and lacks it is named on stderr, and no failure.

    An incremental backup needs all those before it up to a full one: a restore fetches and joins them. The server has
    to keep summaries of its WAL for it (summarize_wal = on).

    Pages whose checksum is wrong were damaged before: they are told of, and backed up as they are.

    With --json, a line of progress as JSON goes to stderr every second, and all else that is told is JSON there too.

    \b
    Examples:
      walship backup
      walship backup --incremental
      walship backup --label 'before the migration' --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    clock = SystemClock()
    began = clock.monotonic()
    chosen = settings()
    # The client of a bucket takes 40 MB itself, and the network more time than the heap can save.
    bucket = any(url.startswith("s3:") for url in chosen.destinations)
    if chosen.data_dir is not None and not incremental:
        give_back_large_blocks(large=PARTS, keep=PARTS_KEPT, one_heap=bucket)
    else:
        give_back_large_blocks(keep=KEPT, one_heap=bucket)
    damaged: list[Damage] = []
    tell = say
    if as_json:  # whatever is read there, it is JSON
        tell = note
        log.configure()
    with JsonLines("base backup") if as_json else Bytes("base backup") as bar:

        def report(progress: Progress) -> None:
            bar(progress.done, progress.estimate, progress.current)

        taken = await backup(
            chosen,
            label=label,
            report=report,
            tell=tell,
            incremental=incremental,
            damaged=damaged.append,
            arguments=typed(),
        )
    seconds = clock.monotonic() - began  # what somebody has waited for: the copy itself is the smaller part of it
    places, missing = await where_is(taken, chosen)
    took = f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    lines = [
        f"{taken.name}: {human(taken.size)} (stored {human(taken.stored_size)}) in {took}",
        f"restorable from {show(taken.stopped)} (LSN {taken.stop_lsn}, timeline {taken.timeline}) on",
    ]
    if taken.parent:
        lines.append(f"it builds on {taken.parent}, and is of no use without that")
    lines += [f"DAMAGED: {found}" for found in damaged]
    if as_json:
        for found in damaged:
            note(f"DAMAGED: {found}")
    result = {
        "name": taken.name,
        "kind": taken.kind,
        "parent": taken.parent or None,
        "size": taken.size,
        "stored_size": taken.stored_size,
        "timeline": taken.timeline,
        "start_lsn": str(taken.start_lsn),
        "stop_lsn": str(taken.stop_lsn),
        "started": taken.started.isoformat(),
        "stopped": taken.stopped.isoformat(),
        "seconds": round(seconds, 3),
        "destinations": places,
        "missing": {name: why.fact for name, why in missing.items()},
        "damaged": [{"path": found.path, "blocks": found.blocks} for found in damaged],
    }
    emit(result, lines, as_json=as_json)
    for name, why in missing.items():  # last: what is above it is all well
        tell(not_yet(name, why))
