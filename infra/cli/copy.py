"""``walship copy``."""

from __future__ import annotations

from typing import Any

import click

from handlers.copy import Copied, Trouble
from infra.cli import exits
from infra.cli.answering import as_of
from infra.cli.progress import Bytes
from infra.cli.verb import (
    as_of_option,
    asynchronous,
    cluster_option,
    destination_names,
    emit,
    human,
    json_option,
    say,
    settings,
    typed,
)
from infra.copying import Ends, Outcome, Selection, lacking, open_ends, run, select, url_of, with_target
from infra.records import Entry, recording
from pipeline.errors import ConfigError, IntegrityError, WalshipError

#: Troubles that are told one by one; all are counted, and in the result.
_TOLD = 20
#: What is never copied, in words.
_NEVER = (
    "versions of objects, locks, tags, storage classes, encryption by the store: those of the target apply",
    "leases and marks of use (lease/, use/): who is at work at one place is nothing to another",
)
_KINDS = {
    "keys": "keys", "wal": "WAL", "history": "timeline histories", "conflict": "set aside (conflict/)", "tail": "tails",
    "part": "parts of base backups", "backup": "backup_info", "pin": "pins", "record": "records of operations",
}  # fmt: skip


@click.command("copy")
@click.option(
    "--from", "sources", multiple=True, required=True, metavar="DEST", shell_complete=destination_names,
    help="Copy from here: URL of a destination, or the name of one in the settings. Given again: serves what the first"
    " has damaged or lost.",
)  # fmt: skip
@click.option(
    "--to", "target", required=True, metavar="DEST", shell_complete=destination_names,
    help="Copy to here; it need not be in the settings.",
)  # fmt: skip
@click.option("--backup", default="", metavar="ID", help="This base backup, those it builds on, and the WAL it needs.")
@click.option("--wal", is_flag=True, help="WAL and no backups; with --backup or --backups: all WAL since they began.")
@click.option("--backups", is_flag=True, help="All base backups, each with the WAL it needs.")
@click.option("--existing", is_flag=True, help="Refuse a target without a repository, as that of an unmounted disk.")
@click.option("--rate", type=click.IntRange(min=1), default=None, metavar="BYTES", help="At most so many a second.")
@click.option("--dry-run", is_flag=True, help="Only compare the listings, and say what would be copied.")
@cluster_option
@as_of_option
@json_option
@click.pass_context
@asynchronous
async def command(
    context: click.Context,
    /,
    sources: tuple[str, ...],
    target: str,
    backup: str,
    wal: bool,
    backups: bool,
    existing: bool,
    rate: int | None,
    dry_run: bool,
    cluster: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Copy a repository to another destination: what is there and lacking here, verbatim, checked on the way.

    All of it, unless something is chosen. Nothing is overwritten, nothing is deleted, and no key is needed, but to
    choose backups. Stopped or killed, it goes on where it was when it is called again. A target without a repository
    gets one, and is found by nobody until everything is there.

    A backup that is chosen comes with the WAL that it needs to become consistent, and can be restored to its own end;
    with --wal, to any moment since.

    Exits with 12, and a list, if something is damaged at the source, or other bytes are at the target.

    \b
    Examples:
      walship copy --from s3://bucket/pg --to file:///mnt/offsite/pg --existing
      walship copy --from file:///backups --to 's3://new/pg?endpoint=https://s3.example.com' --dry-run
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    if backup and backups:
        raise ConfigError("--backup and --backups were given", hint="one backup, or all of them")
    wanted = settings()
    urls = tuple(url_of(wanted, each) for each in sources)
    begin = await as_of(wanted.model_copy(update={"destinations": urls}), options["as_of"])
    async with open_ends(wanted, begin.destinations, target, cluster=cluster, existing=existing, dry=dry_run) as ends:
        selection = await select(ends, backup=backup, wal=wal, backups=backups)
        if dry_run:
            outcome = await lacking(ends, selection)
            emit(_result(ends, outcome, dry=True), _lines(ends, selection, outcome, dry=True), as_json=as_json)
            return
        outcome = await _recorded(ends, selection, rate or 0)
    emit(_result(ends, outcome, dry=False), _lines(ends, selection, outcome, dry=False), as_json=as_json)
    if (error := _verdict(outcome.copied, backup)) is not None:
        context.exit(exits.report(error, as_json=False))  # the result is printed even so


async def _recorded(ends: Ends, selection: Selection, rate: int) -> Outcome:
    """Copy, and leave a record at both ends, if a key is at hand to make one with."""
    site = with_target(ends)
    if site is None:
        why = ends.site.fact if isinstance(ends.site, WalshipError) else ""
        say(f"no key is at hand, and none is needed; only no record of this copy is kept: {why}")
        return await _copy(ends, selection, rate)
    async with recording(site, "copy", typed(), tell=say) as entry:
        outcome = await _copy(ends, selection, rate)
        _fill(entry, ends, outcome)
        if (error := _verdict(outcome.copied, selection.backup)) is not None:
            entry.fail(error.fact, hint=error.hint)
    return outcome


async def _copy(ends: Ends, selection: Selection, rate: int) -> Outcome:
    say(f"comparing the listings of {ends.sources[0].name} and {ends.target.name}")
    before = (await lacking(ends, selection)).copied.total
    say(f"{before.objects} objects are lacking, {human(before.size)}")
    done = objects = told = 0

    def trouble(found: Trouble) -> None:
        nonlocal told
        told += 1
        if told <= _TOLD:
            say(f"not copied ({found.kind}): {found.name}: {found.fact}")

    with Bytes("copy") as bar:

        def progress(size: int) -> None:
            nonlocal done, objects
            done, objects = done + size, objects + 1
            bar(done, before.size, f"{objects} of {max(objects, before.objects)} objects")

        return await run(ends, selection, rate=rate, tell=say, progress=progress, trouble=trouble)


def _fill(entry: Entry, ends: Ends, outcome: Outcome) -> None:
    """For the record: figures, and a few names."""
    copied = outcome.copied
    entry.summary |= {
        "from": [store.name for store in ends.sources],
        "to": ends.target.name,
        "objects": copied.total.objects,
        "bytes": copied.total.size,
        "backups": copied.backups[-_TOLD:],
        "troubles": len(copied.troubles),
        "examples": [f"{found.kind}: {found.name}" for found in copied.troubles[:_TOLD]],
    }


def _verdict(copied: Copied, backup: str) -> IntegrityError | None:
    if copied.troubles:
        first = copied.troubles[0]
        return IntegrityError(
            f"{len(copied.troubles)} objects were not copied, the first is {first.name} ({first.kind}): {first.fact}",
            hint="everything else is there. What is damaged, another destination may have: --from it as well; other"
            " bytes at the target are never overwritten: find out which are right, and move the others away",
        )
    if backup in copied.given_up:
        fact = f"{backup} was not copied: {copied.given_up[backup]}"
        return IntegrityError(fact, hint="`walship list` shows which backups there are")
    return None


def _lines(ends: Ends, selection: Selection, outcome: Outcome, *, dry: bool) -> list[str]:
    copied, total = outcome.copied, outcome.copied.total
    lines = [f"cluster {ends.facts.system_id}: {ends.sources[0].name} to {ends.target.name}", *selection.words]
    verb = "would be copied" if dry else "copied"
    lines += [
        f"{verb}: {amount.objects} {_KINDS[kind]}, {human(amount.size)}"
        for kind, amount in sorted(copied.kinds.items(), key=lambda each: [*_KINDS].index(each[0]))
    ]
    if not total.objects and not copied.troubles:
        lines.append("nothing is lacking")
    if copied.backups:
        lines.append(
            f"{'backups that would be there' if dry else 'backups that are there now'}: {_few(copied.backups)}"
        )
    lines += [f"NOT COPIED {found.name} ({found.kind}): {found.fact}" for found in copied.troubles]
    lines += [f"NOT COMPLETE {name}: {why}" for name, why in copied.given_up.items()]
    if copied.vanished:
        lines.append(f"{copied.vanished} objects went at the source meanwhile, as expire does it")
    if copied.strange.count:
        lines.append(f"left out: {copied.strange.count} names that no walship makes: {_few(copied.strange.examples)}")
    if outcome.left_out:
        lines.append(f"left out, because this walship does not know them: {', '.join(outcome.left_out)}")
    lines += [f"never copied: {what}" for what in _NEVER]
    lines += [f"note: {note}" for note in outcome.notes]
    if outcome.made:
        lines.append(f"{ends.target.name} {'would become' if dry else 'is'} a repository of the cluster with this copy")
    return lines


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _result(ends: Ends, outcome: Outcome, *, dry: bool) -> dict[str, Any]:
    copied, total = outcome.copied, outcome.copied.total
    return {
        "dry_run": dry,
        "system_id": ends.facts.system_id,
        "from": [store.name for store in ends.sources],
        "to": ends.target.name,
        "objects": total.objects,
        "bytes": total.size,
        "kinds": {kind: {"objects": each.objects, "bytes": each.size} for kind, each in copied.kinds.items()},
        "backups": copied.backups,
        "made_repository": outcome.made,
        "troubles": [{"name": each.name, "kind": each.kind, "fact": each.fact} for each in copied.troubles],
        "not_complete": copied.given_up,
        "vanished": copied.vanished,
        "unknown_names": copied.strange.count,
        "left_out": list(outcome.left_out),
        "never_copied": list(_NEVER),
        "notes": outcome.notes,
    }
