"""``walship verify``."""

from __future__ import annotations

import time

import click

from handlers.fetch import read_catalog
from handlers.verify import verify
from handlers.verify_report import Report
from infra.cli import exits
from infra.cli.progress import EVERY
from infra.cli.verb import asynchronous, cluster_option, emit, human, json_option, say, settings, typed
from infra.records import recording
from infra.wiring import open_site
from pipeline.errors import IntegrityError


@click.command("verify")
@click.argument("backup", required=False)
@click.option("--stored-only", is_flag=True, help="Checksums of stored bytes only: decrypts and decompresses nothing.")
@cluster_option
@json_option
@click.pass_context
@asynchronous
async def command(context: click.Context, backup: str | None, stored_only: bool, cluster: str, as_json: bool) -> None:
    """Read everything back at every destination: stored bytes, keys, completeness of backups, holes in the WAL.

    A destination is good only if it could be read without the others. With a BACKUP, that one, those that it builds
    on, and the WAL from its start on. Exits with 12 if anything is damaged or missing.

    Example: walship verify base_20260114_120000
    """
    said = time.monotonic()

    def progress(objects: int, size: int, _trusted: int) -> None:
        nonlocal said
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            say(f"verified {objects} objects, {human(size)}")

    async with open_site(settings(), cluster=cluster) as site, recording(site, "verify", typed(), tell=say) as entry:
        catalog = await read_catalog(
            site.stores, site.fetch, site.facts.system_id, segment_size=site.facts.segment_size
        )
        if not site.keys.reads:
            say("this host can only write (WALSHIP_WRITER_FILE): stored bytes are verified, nothing is decrypted")
        chain = None if stored_only or not site.keys.reads else site.chain
        report = await verify(catalog, site.stores, chain=chain, backup=backup, progress=progress)
        entry.summary |= _recorded(report)
        if not report.ok:
            entry.fail(_verdict(report))
    emit(report.summary(), _lines(report), as_json=as_json)
    if not report.ok:
        hint = "what is good elsewhere can still be restored: see the list"
        if any(fault.kind == "missing" for fault in report.faults):
            hint += "; `walship run` copies what another destination has at its next start"
        # The report is the result even so, and the only thing on stdout: the error is words, and the exit code.
        context.exit(exits.report(IntegrityError(_verdict(report), hint=hint), as_json=False))


def _recorded(report: Report) -> dict[str, object]:
    """For the record of it, which holds figures and not each object."""
    faults = [f"{fault.kind}: {fault.name} at {fault.destination}" for fault in report.faults[:20]]
    return {
        "objects": report.objects,
        "bytes": report.size,
        "faults": len(report.faults),
        "examples": faults,
        "holes": len(report.holes),
        "backups": len(report.backups),
        "usable": sum(backup.usable for backup in report.backups),
    }


def _verdict(report: Report) -> str:
    usable = sum(b.usable for b in report.backups)
    return (
        f"{len(report.faults)} objects are damaged or missing, {len(report.holes)} holes in the WAL,"
        f" {usable} of {len(report.backups)} backups are usable"
    )


def _lines(report: Report) -> list[str]:
    lines = [f"{report.objects} objects were read, {human(report.size)}"]
    lines += [f"{fault.kind}: {fault.name} at {fault.destination}: {fault.fact}" for fault in report.faults]
    for backup in report.backups:
        state = "usable" if backup.usable else "NOT USABLE"
        lines.append(f"{backup.name}: {state}, {backup.good} of {backup.objects} objects are good")
        if backup.broken:
            lines.append(f"  it builds on {backup.broken}, which is not whole")
        if backup.needs:
            lines.append(f"  segment {backup.needs} is missing: it cannot become consistent")
        elif backup.hole:
            lines.append(f"  segment {backup.hole} is missing: nothing behind it can be reached")
    lines += [f"hole: {hole.count} segments, {hole.first} to {hole.last}" for hole in report.holes]
    lines += [f"problem: {problem}" for problem in report.problems]
    lines += [f"warning: {warning}" for warning in report.warnings]
    return lines
