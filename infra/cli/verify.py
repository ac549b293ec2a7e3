"""``walship verify``."""

from __future__ import annotations

from typing import Any

import click

from handlers.verify_report import Healing, Report
from infra.cli import exits
from infra.cli.answering import as_of
from infra.cli.progress import Bytes
from infra.cli.verb import as_of_option, asynchronous, cluster_option, emit, human, json_option, say, settings, typed
from infra.records import recording
from infra.verification import Order, verify_site
from infra.wiring import open_site
from pipeline.errors import ConfigError, IntegrityError


@click.command("verify")
@click.argument("backup", required=False)
@click.option("--all", "everything", is_flag=True, help="Read also what was verified within WALSHIP_VERIFY_INTERVAL.")
@click.option("--heal", is_flag=True, help="Bring what is damaged or missing from a destination that has it.")
@click.option("--dry-run", is_flag=True, help="With --heal: only say what would be done.")
@click.option("--stored-only", is_flag=True, help="Checksums of stored bytes only: decrypts and decompresses nothing.")
@click.option(
    "--rate", type=click.IntRange(min=1), metavar="BYTES", help="Read at most so much a second (WALSHIP_VERIFY_RATE)."
)
@cluster_option
@as_of_option
@json_option
@click.pass_context
@asynchronous
async def command(context: click.Context, /, *, as_json: bool, cluster: str, **options: Any) -> None:
    """Verify every destination: stored bytes, keys, backups against their manifests, holes in the WAL.

    A destination is good only if it could be read without the others. What was read within WALSHIP_VERIFY_INTERVAL and
    has not changed since is not read again: whether it is there, the listing tells. With a BACKUP, that one, those that
    it builds on, and the WAL from its start on.

    With --heal, what is damaged or missing at one destination is copied from another that has it whole. Nothing is
    deleted, and what is whole but differs is left to you.

    Exits with 12 as long as anything is damaged or missing.

    \b
    Examples:
      walship verify
      walship verify base_20260114_120000
      walship verify --heal --dry-run
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    if options["dry_run"] and not options["heal"]:
        raise ConfigError("--dry-run is for --heal", hint="verifying alone changes nothing")
    time = options.pop("as_of")
    if time and options["heal"]:
        raise ConfigError("--heal and --as-of contradict each other", hint="the past cannot be changed: copy it")
    wanted = await as_of(settings(), time)
    rate = options.pop("rate") or wanted.verify_rate
    order = Order(rate=rate, **options)
    async with open_site(wanted, cluster=cluster) as site, recording(site, "verify", typed(), tell=say) as entry:
        if not site.keys.reads:
            say("this host can only write (WALSHIP_WRITER_FILE): stored bytes are verified, nothing is decrypted")
        with Bytes("verify") as bar:

            def progress(objects: int, size: int, trusted: int) -> None:
                bar(size, detail=f"{objects} objects, {trusted} known to be good")

            report = await verify_site(site, order, tell=say, progress=progress, healed=_say_healing)
        entry.summary |= _recorded(report)
        if not report.ok:
            entry.fail(_verdict(report))
    emit(report.summary(), _lines(report), as_json=as_json)
    if not report.ok:
        # The report is the result even so, and the only thing on stdout: the error is words, and the exit code.
        error = IntegrityError(_verdict(report), hint=_hint(report, heal=options["heal"]))
        context.exit(exits.report(error, as_json=False))


def _hint(report: Report, *, heal: bool) -> str:
    hint = "what is good elsewhere can still be restored: see the list"
    if not heal and any(fault.kind in ("missing", "damaged") for fault in report.faults):
        hint += "; `walship verify --heal` brings what another destination has"
    if any(fault.kind == "conflict" for fault in report.faults):
        hint += "; what differs and is whole on both sides is never exchanged by itself: find out which is right"
    return hint


def _recorded(report: Report) -> dict[str, object]:
    """For the record of it, which holds figures and not each object."""
    faults = [f"{fault.kind}: {fault.name} at {fault.destination}" for fault in report.faults[:20]]
    return {
        "objects": report.objects,
        "bytes": report.size,
        "trusted": report.trusted,
        "faults": len(report.faults),
        "kinds": report.kinds,
        "examples": faults,
        "holes": len(report.holes),
        "backups": len(report.backups),
        "usable": sum(backup.usable for backup in report.backups),
        "compared": report.compared,
        "healed": sum(healing.outcome == "healed" for healing in report.healings),
    }


def _verdict(report: Report) -> str:
    usable = sum(b.usable for b in report.backups)
    kinds = "".join(f" ({', '.join(f'{n} {kind}' for kind, n in report.kinds.items())})" if report.kinds else "")
    return (
        f"{len(report.faults)} objects are damaged or missing{kinds}, {len(report.holes)} holes in the WAL,"
        f" {usable} of {len(report.backups)} backups are usable"
    )


def _say_healing(healing: Healing) -> None:
    say(_healing(healing))


def _healing(healing: Healing) -> str:
    fault = healing.fault
    what = f"{fault.name} at {fault.destination}"
    words = {
        "healed": f"healed: {what}, {human(healing.size)} from {healing.source}",
        "would": f"would be healed: {what}, {fault.kind}, {human(healing.size)} from {healing.source}",
        "good": f"good by now: {what}",
    }
    return words.get(healing.outcome, f"cannot be healed: {what}, {fault.kind}: {healing.fact}")


def _lines(report: Report) -> list[str]:
    known = f"; {report.trusted} that were read before have not changed" if report.trusted else ""
    lines = [f"{report.objects} objects were read, {human(report.size)}{known}"]
    lines += [_healing(healing) for healing in report.healings]
    lines += [f"{fault.kind}: {fault.name} at {fault.destination}: {fault.fact}" for fault in report.faults]
    for backup in report.backups:
        state = "usable" if backup.usable else "NOT USABLE"
        lines.append(f"{backup.name}: {state}, {backup.good} of {backup.objects} objects are good")
        if backup.differs:
            lines.append(f"  {backup.differs}")
        if backup.broken:
            lines.append(f"  it builds on {backup.broken}, which is not whole")
        if backup.needs:
            lines.append(f"  segment {backup.needs} is missing: it cannot become consistent")
        elif backup.hole:
            lines.append(f"  segment {backup.hole} is missing: nothing behind it can be reached")
    lines += [f"hole: {hole.count} segments, {hole.first} to {hole.last}" for hole in report.holes]
    lines += [f"problem: {problem}" for problem in report.problems]
    lines += [f"warning: {warning}" for warning in report.warnings]
    if report.healings and report.ok:
        lines.append("all that was wrong is healed")
    return lines
