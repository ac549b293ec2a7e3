"""``walship restore``."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from handlers.target_dir import Targets
from infra.cli.answering import answering, narrowed, repository_of
from infra.cli.progress import EVERY, Bytes
from infra.cli.verb import asynchronous, cluster_option, emit, human, json_option, say, settings
from infra.postgres.restored import Replay
from infra.restore import Place, Repository, Restored, Watch, check_place, make_plan, restore
from infra.settings import Settings
from infra.wiring import open_site
from pipeline.errors import ConfigError
from pipeline.moments import time_remark
from pipeline.recovery import RestorePlan
from pipeline.targets import Target


@click.command("restore")
@click.option("--target-dir", required=True, type=click.Path(path_type=Path), help="Data directory to make.")
@click.option("--latest", is_flag=True, help="As far as the stored WAL reaches (the default).")
@click.option(
    "--to-time", metavar="TIME", help="Everything committed up to then; zone as in 2026-01-14T12:00:00+01:00."
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
@click.option("--backup", metavar="NAME", help="Begin with this backup instead of the best one.")
@click.option("--from", "source", default="", metavar="DEST", help="Read from this destination only.")
@click.option("--tablespace-map", "maps", multiple=True, metavar="OLD=NEW", help="Put a tablespace elsewhere.")
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--force", is_flag=True, help="Replace the data directory that is there.")
@click.option("--delta", is_flag=True, help="Keep what lies there already and is as in the backup; fetch the rest.")
@click.option("--standby", is_flag=True, help="Make a standby that goes on following the archive.")
@click.option("--start", "start_server", is_flag=True, help="Start the server and wait until it is at the target.")
@click.option("--port", type=click.IntRange(1, 65535), help="With --start: listen there.")
@click.option("--allow-unencrypted", is_flag=True, help="Accept plain objects in an encrypted repository.")
@json_option
@asynchronous
async def command(target_dir: Path, **options: Any) -> None:
    """Bring the cluster back to a moment.

    The plan is made and checked before anything is touched: target, backup, WAL without a hole, room, version, folders.
    Archiving and replication settings of the old server are switched off in the restored one, and it says which.

    \b
    Examples:
      walship restore --target-dir /var/lib/postgresql/restored --start
      walship restore --target-dir /restored --to-time '2026-01-14 11:59:00+01' --dry-run
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    target, remark = _target(options)
    place = _place(target_dir, options)
    as_json: bool = options["as_json"]
    if remark:
        say(remark)
    began = time.monotonic()
    wanted = narrowed(settings(), options["source"])
    async with open_site(wanted, cluster=options["cluster"], allow_unencrypted=options["allow_unencrypted"]) as opened:
        site = await answering(opened)
        repository = repository_of(site, allow_unencrypted=options["allow_unencrypted"])
        plan = await make_plan(repository, target, backup=options["backup"], progress=_scanned())
        place = _on_this_machine(place, site.settings)
        targets = await check_place(plan, place)
        _show(plan, targets, repository)
        if options["dry_run"]:
            emit(plan.summary(), [], as_json=as_json)
            return
        _confirm(targets)
        with Bytes("base backup") as bar:
            watch = Watch(files=bar, replay=_replayed(), say=lambda line: say(f"note: {line}"))
            restored = await restore(repository, plan, place, watch=watch)
    _finish(plan, restored, time.monotonic() - began, as_json=as_json)


def _target(options: dict[str, Any]) -> tuple[Target, str]:
    """The recovery target that was typed, and a sentence on how a time without zone was taken."""
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


def _place(directory: Path, options: dict[str, Any]) -> Place:
    """Where to, and what happens there."""
    maps = {}
    for entry in options["maps"]:
        old, equals, new = entry.partition("=")
        if not (equals and old and new):
            raise ConfigError(f"--tablespace-map {entry} is not OLD=NEW", hint="both are absolute paths")
        maps[old] = new
    if options["port"] and not options["start_server"]:
        raise ConfigError("--port needs --start", hint="without it the restored postgresql.conf says where to listen")
    listen = {"port": str(options["port"])} if options["port"] else {}
    return Place(
        directory,
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


def _show(plan: RestorePlan, targets: Targets, repository: Repository) -> None:
    """The plan, for people, before anything happens."""
    say(f"restore {plan.target} into {targets.directory}")
    say(f"  backup    {plan.backup.name}, PostgreSQL {plan.backup.major}, {human(plan.size)}")
    say(f"  WAL       {plan.path.count} segments on timeline {plan.timeline}, LSN {plan.path.start} to {plan.path.end}")
    say(f"  from      {', '.join(store.name for store in repository.stores)}")
    for tablespace, path in targets.tablespaces:
        say(f"  tablespace {tablespace.oid}: {tablespace.location} goes to {path}")
    for folder in targets.full:
        say(f"  {folder} is emptied first")
    for notice in plan.notices:
        say(f"  note: {notice}")


def _confirm(targets: Targets) -> None:
    """Ask before anything is destroyed, if there is somebody to ask."""
    if targets.full and sys.stdin.isatty():
        click.confirm("Go on, and lose what is there?", abort=True, err=True)


def _scanned() -> Any:
    last = time.monotonic()

    def told(count: int) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            say(f"looking for the target: {count} segments read")

    return told


def _replayed() -> Any:
    last = time.monotonic()

    def told(replay: Replay) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY and (replay.lsn or replay.segment):
            last = time.monotonic()
            say(f"replaying: LSN {replay.lsn or 'unknown'}, segment {replay.segment or 'unknown'}")

    return told


def _finish(plan: RestorePlan, restored: Restored, seconds: float, *, as_json: bool) -> None:
    result = {
        **plan.summary(),
        "directory": str(restored.directory),
        "files": restored.laid.files,
        "bytes_fetched": restored.laid.fetched,
        "bytes_kept": restored.laid.kept,
        "notes": list(restored.notices),
        "seconds": round(seconds, 3),
    }
    lines = [f"{restored.directory} holds {plan.backup.name}: {restored.laid.files} files, {human(restored.laid.size)}"]
    server = restored.server
    if server is None:
        lines.append("start the server with pg_ctl or your service manager: it recovers to the target by itself")
    else:
        result |= {
            "state": server.state,
            "pid": server.pid,
            "port": server.port,
            "socket_dir": server.socket_dir,
            "stopped_at": server.stopped_at,
        }
        where = f", port {server.port}" if server.port else ""
        lines.append(f"the server is {server.state}{where}, after {seconds:.1f} s; its log is {server.log_file}")
        if server.stopped_at:
            lines.append(server.stopped_at)
    emit(result, lines, as_json=as_json)
