"""``walship expire``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import click

from handlers.expire import WalGoing
from infra.cli import exits
from infra.cli.progress import Bytes
from infra.cli.verb import asynchronous, cluster_option, emit, human, json_option, say, settings, typed
from infra.expire import Outcome, Plan, expire, make_plan, marks_of
from infra.records import recording
from infra.storage import display_name
from infra.storage.remains import Remains, facts, remaining
from infra.wiring import Site, open_site
from pipeline.errors import ConfigError, StoreError
from pipeline.moments import show
from pipeline.policy import Policy

#: Destination → what its bucket still holds, or why that is not known.
_Remains = Mapping[str, Remains | StoreError]

#: Ranges of WAL that are shown of one destination.
_SHOWN = 5


@click.command("expire")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why each of the others stays.")
@click.option("--yes", is_flag=True, help="Do not ask. Needed where nobody sits at a terminal.")
@click.option("--skip-unreachable", is_flag=True, help="Leave destinations that do not answer as they are.")
@cluster_option
@json_option
@click.pass_context
@asynchronous
async def command(
    context: click.Context, dry_run: bool, yes: bool, skip_unreachable: bool, cluster: str, as_json: bool
) -> None:
    """Delete the backups and the WAL that the policy (WALSHIP_KEEP_*) does not keep.

    A kept backup keeps those that it builds on, and all WAL since it began. What is pinned or in use stays, and so do
    the last good backup, histories, keys, and whatever walship did not put there. A backup goes at every destination or
    at none; what is interrupted is finished the next time.

    Exits with 11 if a store refused something, and says what stays.

    \b
    Examples:
      walship expire --dry-run
      walship expire --yes
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    wanted = settings()
    policy = wanted.retention
    if policy is None:
        raise ConfigError(
            "no retention is set, so nothing is deleted",
            hint="WALSHIP_KEEP_WINDOW=14d, or another of WALSHIP_KEEP_LAST, _DAILY, _WEEKLY, _MONTHLY, _YEARLY",
        )
    if not (dry_run or yes or sys.stdin.isatty()):
        raise ConfigError(
            "nobody can be asked here, so nothing was deleted",
            hint="--yes deletes without asking, --dry-run only looks",
        )
    async with open_site(wanted, cluster=cluster) as site:
        site.keys.need_reading("walship expire")
        if dry_run:
            plan = await make_plan(site, policy, marks_of(site), skip=skip_unreachable)
            remains = await _remains(site, plan)
            lines = _plan_lines(plan, policy, would=True) + _remains_lines(remains)
            emit(_result(plan, policy, None, remains), lines, as_json=as_json)
            return
        refused = await _run(site, policy, skip=skip_unreachable, ask=not yes, as_json=as_json)
    if refused is not None:
        context.exit(exits.report(refused, as_json=False))  # the report is the result even so


async def _run(site: Site, policy: Policy, *, skip: bool, ask: bool, as_json: bool) -> StoreError | None:
    """Delete; what a store refused, as an error to end with."""
    marks, shown = marks_of(site), None
    if ask:
        shown = await make_plan(site, policy, marks, skip=skip, settle=True)
        for line in _plan_lines(shown, policy, would=True):
            say(line)
        if not shown.empty and not await _agreed("Delete this? [y/N]: "):
            raise click.Abort
    async with recording(site, "expire", typed(), tell=say) as entry:
        # Anew, however short the question: since then somebody may have built on what goes, or gone back to it.
        plan = await make_plan(site, policy, marks, skip=skip, settle=True)
        _refuse_more(plan, shown)
        gone, whole = 0, plan.size
        with Bytes("expire") as bar:

            def progress(size: int) -> None:
                nonlocal gone
                gone += size
                bar(gone, whole)

            outcome = await expire(site, plan, marks, tell=say, progress=progress)
        entry.summary |= outcome.summary()
        if as_json and outcome.gone:  # for the log of the service, which prints no result
            say(f"deleted: {', '.join(outcome.gone)}")
        remains = await _remains(site, plan)
        lines = _plan_lines(plan, policy, would=False) + _outcome_lines(outcome) + _remains_lines(remains)
        emit(_result(plan, policy, outcome, remains), lines, as_json=as_json)
        if not outcome.refusals:
            return None
        first = outcome.refusals[0]
        error = StoreError(
            f"{len(outcome.refusals)} deletions were refused, the first of {first.what}"
            f"{f' at {first.destination}' if first.destination else ''}: {first.fact}",
            hint="the credentials need s3:DeleteObject, and a locked object stays until its time is over; what stays is"
            " listed, whole, and tried again the next time",
        )
        entry.fail(error.fact, hint=error.hint)
        return error


def _refuse_more(plan: Plan, shown: Plan | None) -> None:
    """Nothing goes to which nobody has agreed."""
    agreed = {backup.name for backup in shown.decision.going} if shown else set()
    if shown and (more := sorted({backup.name for backup in plan.decision.going} - agreed)):
        raise ConfigError(
            f"more would go by now than was shown, {', '.join(more)}: nothing was deleted", hint="look again"
        )


async def _agreed(question: str) -> bool:
    """Ask whoever sits at the terminal. Only a loop that waits hears Ctrl-C: nothing blocks until a line is there."""
    click.echo(question, nl=False, err=True)
    loop, typed_in = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin, typed_in.set)
    try:
        await typed_in.wait()
    finally:
        loop.remove_reader(sys.stdin)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _plan_lines(plan: Plan, policy: Policy, *, would: bool) -> list[str]:
    decision = plan.decision
    goes = "would go" if would else "goes"
    lines = [f"kept are: {policy.words}"]
    for kept in decision.kept:
        lines.append(f"stays     {kept.backup.name}  {show(kept.backup.stopped)}  {kept.backup.kind}")
        lines += [f"            {reason}" for reason in kept.reasons]
    lines += [
        f"{goes:<9} {backup.name}  {show(backup.stopped)}  {backup.kind}, {human(backup.stored_size)}"
        for backup in decision.going
    ]
    lines += [f"{goes:<9} {name}: parts of a backup that nobody lists" for name in plan.seen.leftovers]
    for store in plan.seen.stores:
        going = plan.wal[store.name]
        lines += _wal_lines(store.name, going, goes)
        backups = plan.size_of(store.name)
        lines.append(f"at {store.name}: {human(backups + going.size)} in all")
    for name, error in plan.seen.away.items():
        lines.append(f"at {name}: nothing, and what is pinned or used only there is not known: {error.fact}")
    lines += [f"note: {note}" for note in decision.notes]
    if plan.empty:
        lines.append("nothing has to go")
    return lines


def _wal_lines(destination: str, going: WalGoing, goes: str) -> list[str]:
    ranges = [*going.ranges()]
    count = sum(number for _, _, number in ranges)
    if not going.objects:
        return []
    segments = "segment" if count == 1 else "segments"
    lines = [f"{goes:<9} at {destination}: {count} {segments} of WAL, {human(going.wal_size)}"]
    lines += [f"            {first}" + (f" to {last}" if number > 1 else "") for first, last, number in ranges[:_SHOWN]]
    if len(ranges) > _SHOWN:
        lines.append(f"            and {len(ranges) - _SHOWN} other ranges")
    if going.others or going.tails:
        lines.append(
            f"            with {len(going.others)} .partial and .backup files, and {len(going.tails)} tails"
            f" ({human(going.tails_size)})"
        )
    return lines


def _outcome_lines(outcome: Outcome) -> list[str]:
    lines = [f"STAYED {name}: {reason}" for name, reason in outcome.stayed.items()]
    lines += [
        f"REFUSED {each.what}{f' at {each.destination}' if each.destination else ''}: {each.fact}"
        for each in outcome.refusals
    ]
    lines += [
        f"deleted at {name}: {freed.objects} objects, {human(freed.size)}" for name, freed in outcome.freed.items()
    ]
    return lines


async def _remains(site: Site, plan: Plan) -> _Remains:
    """What buckets with versions still hold, at the destinations that were looked at."""
    names = {store.name for store in plan.seen.stores}
    urls = [url for url in site.settings.destinations if display_name(url) in names]
    return await remaining(urls, site.settings, site.facts.system_id)


def _remains_lines(remains: _Remains) -> list[str]:
    lines = []
    for name, found in remains.items():
        if isinstance(found, StoreError):
            lines.append(f"{name} keeps versions; what it still holds of what was deleted is not known: {found.fact}")
            continue
        words = (
            f"{name} keeps versions: {'' if found.counted else 'at least '}{found.versions} old ones"
            f" ({human(found.size)}) and {found.markers} delete markers are there"
        )
        if found.locked_until is not None:
            words += f"; the bucket's lock ({found.lock}) holds the last of them until {show(found.locked_until)}"
        if found.versions and found.rule is not None:
            words += "; a lifecycle rule removes them" if found.rule else "; no lifecycle rule ever removes them"
        lines.append(words)
    return lines


def _result(plan: Plan, policy: Policy, outcome: Outcome | None, remains: _Remains) -> dict[str, Any]:
    decision = plan.decision
    return {
        "dry_run": outcome is None,
        "policy": policy.words,
        "kept": [{"name": kept.backup.name, "reasons": list(kept.reasons)} for kept in decision.kept],
        "going": [
            {
                "name": backup.name,
                "kind": backup.kind,
                "stopped": backup.stopped.isoformat(),
                "bytes": backup.stored_size,
            }
            for backup in decision.going
        ],
        "unfinished": list(plan.seen.leftovers),
        "destinations": [_destination(plan, store.name) for store in plan.seen.stores],
        "unreachable": {name: error.fact for name, error in plan.seen.away.items()},
        "notes": list(decision.notes),
        "versions": {name: facts(found) for name, found in remains.items()},
        **(outcome.summary() if outcome else {}),
    }


def _destination(plan: Plan, name: str) -> dict[str, Any]:
    going = plan.wal[name]
    return {
        "destination": name,
        "backup_bytes": plan.size_of(name),
        "wal": [{"first": str(first), "last": str(last), "segments": count} for first, last, count in going.ranges()],
        "wal_bytes": going.wal_size,
        "tails": len(going.tails),
        "tail_bytes": going.tails_size,
    }
