"""``walship restore``."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from handlers.occupant import occupant
from handlers.restore import Laid
from handlers.shares import Shares, check_complete, measure, share_out
from handlers.target_dir import Targets
from infra.cli.answering import as_of, narrowed, repository_of, with_enough
from infra.cli.planned import fitted, plan_facts, plan_lines
from infra.cli.progress import EVERY, Bytes
from infra.cli.verb import (
    as_of_option,
    asynchronous,
    cluster_option,
    emit,
    from_option,
    human,
    json_option,
    say,
    settings,
    typed,
)
from infra.malloc import KEPT, give_back_large_blocks
from infra.postgres.restored import Replay, Started
from infra.records import recording
from infra.restore import Place, Repository, Restored, Watch, check_place, make_plan, restore
from infra.settings import Settings
from infra.storage.in_use import using
from infra.wiring import Site, open_site
from pipeline.errors import ConfigError
from pipeline.moments import in_json, moment_in, time_remark
from pipeline.recovery import RestorePlan
from pipeline.targets import Target
from pipeline.wal import WalFile


@click.command("restore")
@click.option("--target-dir", required=True, metavar="PATH", help="Data directory to make.")
@click.option("--latest", is_flag=True, help="As far as the stored WAL reaches (the default).")
@click.option(
    "--to-time", metavar="TIME", help="Everything committed up to then, like '2026-01-14 12:00:00+01', '2 h ago'."
)
@click.option("--to-lsn", metavar="LSN", help="Up to the record that begins there, like 16/B374D848.")
@click.option("--to-xid", metavar="XID", help="Up to the end of this transaction.")
@click.option("--to-name", metavar="NAME", help="Up to this named restore point.")
@click.option("--immediate", is_flag=True, help="Only up to the end of the base backup.")
@click.option("--exclusive", is_flag=True, help="Stop just before the target instead of just after it.")
@click.option("--timeline", type=int, metavar="T", help="Follow this timeline instead of the newest one.")
@click.option(
    "--action", type=click.Choice(["promote", "pause", "shutdown"]), default="promote", show_default=True,
    help="What the server does at the target.",
)  # fmt: skip
@cluster_option
@as_of_option
@click.option("--backup", metavar="NAME", help="Begin with this backup instead of the best one.")
@from_option
@click.option("--tablespace-map", "maps", multiple=True, metavar="OLD=NEW", help="Put a tablespace elsewhere.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--force", is_flag=True, help="Replace the data directory that is there.")
@click.option("--delta", is_flag=True, help="Keep what lies there already and is as in the backup; fetch the rest.")
@click.option(
    "--standby",
    is_flag=True,
    help="Make a standby that goes on following the archive, on this timeline only; no target.",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask before something is overwritten.")
@click.option("--start", "start_server", is_flag=True, help="Start the server and wait until it is at the target.")
@click.option("--port", type=click.IntRange(1, 65535), help="With --start: listen there.")
@click.option("--allow-unencrypted", is_flag=True, help="Accept plain objects in an encrypted repository.")
@json_option
@asynchronous
async def command(target_dir: str, **options: Any) -> None:
    """Bring the cluster back to a moment.

    The plan is made, checked and shown before anything is touched: target, backup, WAL without a hole, room, version,
    folders, what will be fetched from where, what will be overwritten. On a terminal it asks before it overwrites.
    Archiving and replication settings of the old server are switched off in the restored one, and it says which.

    \b
    Examples:
      walship restore --target-dir /var/lib/postgresql/restored --start
      walship restore --target-dir /restored --to-time '2026-01-14 11:59:00+01' --dry-run
      walship restore --target-dir /restored --to-time '10 minutes ago' --start --port 5433
      walship restore --target-dir /var/lib/postgresql/data --delta --start
      walship restore --target-dir /restored --as-of '2 hours ago' --dry-run
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    give_back_large_blocks(keep=KEPT)
    target, remark = _target(options)
    place = _place(target_dir, options)
    as_json: bool = options["as_json"]
    if remark:
        say(remark)
    began = time.monotonic()
    wanted = await as_of(narrowed(settings(), options["source"]), options["as_of"])
    waits = _Waits()
    allowed: bool = options["allow_unencrypted"]
    async with open_site(wanted, cluster=options["cluster"], allow_unencrypted=allowed, waits=waits) as opened:
        opened.keys.need_reading("walship restore")

        async def decide(site: Site) -> tuple[Site, Repository, RestorePlan, Shares]:
            repository = repository_of(site, allow_unencrypted=allowed)
            plan = await make_plan(repository, target, backup=options["backup"], progress=_scanned())
            found = await share_out(plan, repository.stores)
            check_complete(found, plan.backup)
            return site, repository, plan, found

        site, repository, plan, found = await with_enough(opened, decide, hurried=options["dry_run"])
        waits.over = True  # an object on its way may be slow
        place = _on_this_machine(place, site.settings)
        targets = await check_place(plan, place)
        occupants = await asyncio.to_thread(lambda: [occupant(folder) for folder in targets.full])
        asked = bool(occupants) and sys.stdin.isatty() and not options["yes"]
        # Nobody waits for an estimate that nobody reads.
        pace = await measure(plan.backup, repository.fetch, site.clock) if asked or options["dry_run"] else None
        lines = plan_lines(plan, targets, found, occupants, pace, site.clock.now(), delta=place.delta)
        if options["dry_run"]:
            shown = [fitted(line, sys.stdout) for line in lines]
            emit(plan_facts(plan, targets, found, occupants, pace), shown, as_json=as_json)
            return
        for line in lines:
            say(fitted(line, sys.stderr))
        planned = time.monotonic()
        if asked and not await _agreed(targets, delta=place.delta):
            raise click.Abort
        used = using(repository.stores, plan.backup.name, clock=site.clock, tell=say, what="restore")
        async with recording(site, "restore", typed(), tell=say) as entry, used as use:
            entry.summary |= {"backup": plan.backup.name, "target": str(plan.target), "directory": str(place.directory)}
            with Bytes("base backup") as bar:

                def finish(restored: Restored) -> None:
                    bar.close()
                    use.let_go()  # a standby that goes on to be fed needs new WAL only
                    _finish(plan, restored, planned - began, standby=place.standby, as_json=as_json)

                def note(line: str) -> None:
                    if line not in targets.notices:  # they stand in the plan
                        say(fitted(f"note: {line}", sys.stderr))

                watch = Watch(bar, _replayed(plan, bar), note, finish)
                restored = await restore(repository, plan, place, watch=watch)
                if not (place.standby and place.start):  # else that was told when it had caught up
                    finish(restored)
            entry.summary |= {"bytes_fetched": restored.laid.fetched, "started": restored.server is not None}


class _Waits:
    """Says who is waited for, until it is over."""

    over = False

    def __call__(self, line: str) -> None:
        if not self.over:
            say(line)


def _target(options: dict[str, Any]) -> tuple[Target, str]:
    """The recovery target that was typed, and a sentence on how a time was taken."""
    aimed = [name for name in ("to_time", "to_lsn", "to_xid", "to_name", "immediate", "exclusive") if options[name]]
    if options["standby"] and (aimed or options["action"] != "promote"):
        raise ConfigError(
            f"--standby and --{(aimed or ['action'])[0].replace('_', '-')} contradict each other",
            hint="a standby follows the archive and stops nowhere; leave one of the two out",
        )
    if options["standby"] and options["as_of"]:
        raise ConfigError(
            "--standby and --as-of contradict each other",
            hint="a standby follows what is still being written, and the past is not; leave one of the two out",
        )
    target = Target.parse(
        time=options["to_time"],
        lsn=options["to_lsn"],
        xid=options["to_xid"],
        name=options["to_name"],
        immediate=options["immediate"],
        latest=options["latest"],
        exclusive=options["exclusive"],
        timeline=options["timeline"],
        action=options["action"],
    )
    return target, time_remark(options["to_time"], target.time) if target.time else ""


def _place(directory: str, options: dict[str, Any]) -> Place:
    """Where to, and what happens there."""
    if not directory:  # a variable that is not set; as a path it would be the folder that somebody stands in
        raise ConfigError("--target-dir is empty", hint="name the data directory to make, for here with --target-dir .")
    maps: dict[str, str] = {}
    for entry in options["maps"]:
        old, equals, new = entry.partition("=")
        if not (equals and old and new):
            raise ConfigError(f"--tablespace-map {entry} is not OLD=NEW", hint="both are absolute paths")
        if maps.setdefault(old, new) != new:
            raise ConfigError(
                f"--tablespace-map puts {old} at {maps[old]} and at {new}", hint="it goes to one place: leave one out"
            )
    if options["port"] and not options["start_server"]:
        raise ConfigError("--port needs --start", hint="without it the restored postgresql.conf says where to listen")
    listen = {"port": str(options["port"])} if options["port"] else {}
    return Place(
        Path(directory),
        maps,
        force=options["force"],
        delta=options["delta"],
        standby=options["standby"],
        start=options["start_server"],
        options=listen,
    )


def _on_this_machine(place: Place, wanted: Settings) -> Place:
    """With programs and port. Without ``--port`` it will listen where the server that was backed up does, as a rule."""
    ports = {port for _, port in wanted.servers}
    guessed = ports.pop() if len(ports) == 1 else None
    port = int(place.options["port"]) if "port" in place.options else guessed
    return replace(place, bin_dir=wanted.pg_bin_dir, port=port)


async def _agreed(targets: Targets, *, delta: bool) -> bool:
    """Ask whoever sits at the terminal. Only a loop that waits hears Ctrl-C: nothing blocks until a line is there."""
    folders = " and ".join(map(str, targets.full))
    what = "overwrite what differs in" if delta else "lose what is in"
    click.echo(f"Go on, and {what} {folders}? [y/N]: ", nl=False, err=True)
    loop, typed = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, typed.set)
    try:
        await typed.wait()
    finally:
        loop.remove_reader(sys.stdin)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _scanned() -> Any:
    last = time.monotonic()

    def told(count: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            say(f"looking for the target: {count} segments read")

    return told


def _replayed(plan: RestorePlan, bar: Bytes) -> Callable[[Replay], None]:
    """Progress of the replay in bytes of WAL, from the backup's start to where the plan ends."""
    begun = False
    whole = max(0, plan.goal - plan.path.start)

    def told(replay: Replay) -> None:
        nonlocal begun
        position = replay.lsn
        if position is None and (file := WalFile.parse(replay.segment)):
            position = file.start(plan.path.segment_size)
        if position is None:
            return
        if not begun:
            begun = True
            bar.begin("replay")
        done = min(max(0, position - plan.path.start), whole)
        share = f", {100 * done // whole} %" if whole else ""
        bar(done, whole, f"LSN {position} of {plan.goal}{share}")

    return told


def _finish(plan: RestorePlan, restored: Restored, planning: float, *, standby: bool, as_json: bool) -> None:
    laid, server = restored.laid, restored.server
    took = {"planning": planning, "base": restored.base_seconds, "replay": restored.replay_seconds}
    result = {
        **plan.summary(),
        "directory": str(restored.directory),
        "files": laid.files,
        "bytes_fetched": laid.fetched,
        "bytes_kept": laid.kept,
        "files_removed": laid.removed,
        "notes": list(restored.notices),
        "seconds": round(sum(took.values()), 3),
        "took": {step: round(seconds, 3) for step, seconds in took.items()},
    }
    lines = [f"{restored.directory} holds {plan.backup.name}: {laid.files} files, {human(laid.size)}"]
    if laid.kept:
        lines.append(_saved(laid))
    if laid.removed:
        files = "1 file was" if laid.removed == 1 else f"{laid.removed} files were"
        lines.append(f"{files} removed: the backup does not have that")
    if server is None:
        del took["replay"]
        what = "follows the archive" if standby else "recovers to the target"
        lines.append(f"start the server with pg_ctl or your service manager: it {what} by itself")
    else:
        result |= {
            "state": server.state,
            "pid": server.pid,
            "port": server.port,
            "socket_dir": server.socket_dir,
            "stopped_at": server.stopped_at,
            "last_transaction": _last_transaction(server) or result["last_transaction"],
        }
        where = f", port {server.port}" if server.port else ""
        lines.append(f"the server is {server.state}{where}; its log is {server.log_file}")
        lines.append(_reached(plan, server))
        if server.state == "paused":
            lines.append(
                "it can be read, and not written to: SELECT pg_wal_replay_resume(); ends recovery here and promotes it;"
                " for another target stop it, and restore again with --delta"
            )
    lines.append("it took " + ", ".join(f"{seconds:.1f} s for {_STEPS[step]}" for step, seconds in took.items()))
    emit(result, lines, as_json=as_json)


def _saved(laid: Laid) -> str:
    """Parts are fetched whole: some of what was there already is fetched all the same."""
    kept, other = human(laid.kept), human(max(0, laid.size - laid.kept))
    if not laid.fetched:
        return f"{kept} were there already, and nothing was fetched"
    saved = max(0, 100 - 100 * laid.fetched // max(1, laid.size))
    return (
        f"{kept} were there already; for the other {other}, {human(laid.fetched)} were fetched, in whole parts that"
        f" hold many files each: saved {saved} %"
    )


_STEPS = {"planning": "the plan", "base": "the base backup", "replay": "start and replay"}


def _last_transaction(server: Started) -> str:
    """When it ended, as JSON has times; the server's log has another spelling."""
    return in_json(moment_in(server.last_transaction) or server.last_transaction)


def _reached(plan: RestorePlan, server: Started) -> str:
    """Up to where it is recovered, in the server's own words where it said any."""
    last = server.last_transaction
    parts = [f"recovered to {plan.target}"]
    parts += [server.stopped_at] if server.stopped_at else [f"the WAL up to LSN {plan.goal} is replayed"]
    parts += [f"the last transaction ended at {last}"] if last else []
    return "; ".join(parts)
