"""``walship history``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import click

from handlers.fetch import Fetcher
from infra.cli.verb import asynchronous, cluster_option, emit, human, json_option, say, settings
from infra.records import listed, read_all
from infra.wiring import open_site
from pipeline.errors import WalshipError
from pipeline.moments import show
from pipeline.operations import RECORDED, Record, RecordName

#: Characters of a line's last column.
_SHOWN = 160


@click.command("history")
@click.option("--verb", type=click.Choice(RECORDED), help="Only this one.")
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="So many.")
@cluster_option
@json_option
@asynchronous
async def command(verb: str | None, last: int, cluster: str, as_json: bool) -> None:
    """What was done to the repository, when, where, and how it ended: the newest comes last.

    Each backup, expire, verify, copy, restore, drill and change of keys leaves a small record at every destination that
    it may write to. Records older than a year are removed by `walship expire`, all but the newest thousand.

    \b
    Examples:
      walship history
      walship history --verb drill --last 5
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    async with open_site(settings(), cluster=cluster) as site:
        there = await listed(site.stores)
        for name, error in there.failures.items():
            say(f"{name} is left out: {error.fact}. What only it has is not shown")
        stores = tuple(store for store in site.stores if store.name not in there.failures)
        names = [name for name in there.names if verb in (None, name.verb)][:last][::-1]
        fetch = Fetcher(
            stores, site.chain, site.facts.system_id, notify=say, refresh=lambda: site.keys.refresh_from(stores)
        )
        records = await read_all(fetch, names)
    pairs = sorted(zip(names, records, strict=True), key=_ended)
    emit([_result(name, record) for name, record in pairs], _lines(pairs, verb), as_json=as_json)


def _ended(pair: tuple[RecordName, Record | WalshipError]) -> datetime:
    """Its content tells it more exactly than its name."""
    name, record = pair
    return record.ended if isinstance(record, Record) else name.ended


def _result(name: RecordName, record: Record | WalshipError) -> dict[str, Any]:
    told: dict[str, Any] = {"record": name.key, "verb": name.verb, "ok": name.ok, "ended": name.ended.isoformat()}
    if isinstance(record, WalshipError):
        return told | {"unreadable": record.fact}
    return told | {
        "began": record.began.isoformat(),
        "seconds": record.seconds,
        "host": record.host,
        "version": record.version,
        "arguments": list(record.arguments),
        "error": record.error or None,
        "hint": record.hint or None,
        "stopped": record.stopped,
        "summary": record.summary,
    }


def _lines(pairs: Sequence[tuple[RecordName, Record | WalshipError]], verb: str | None) -> list[str]:
    if not pairs:
        return [f"no {verb or 'operation'} was recorded yet"]
    rows = [_row(name, record) for name, record in pairs]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in rows
    ]


def _row(name: RecordName, record: Record | WalshipError) -> tuple[str, ...]:
    outcome = "ok" if name.ok else "FAILED"
    if isinstance(record, WalshipError):
        return show(name.ended), name.verb, outcome, "?", "?", _one_line(f"its record cannot be read: {record.fact}")
    if record.stopped:
        outcome = "stopped"
    # Which change of keys it was stands in what was typed; of other verbs that says less than the outcome.
    done = " ".join(record.arguments) if record.verb == "key" else ""
    words = [done, _SAYS.get(record.verb, _anything)(record.summary), "" if record.stopped else record.error]
    said = "; ".join(filter(None, words))
    return show(name.ended), name.verb, outcome, _took(record.seconds), _one_line(record.host), _one_line(said)


def _took(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _one_line(text: str) -> str:
    """Without what could play tricks on a terminal: whoever may write to the store may have written it."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= _SHOWN else plain[: _SHOWN - 2] + " …"


def _number(summary: dict[str, Any], name: str) -> float | None:
    value = summary.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _backup(summary: dict[str, Any]) -> str:
    if not isinstance(summary.get("name"), str):
        return ""
    kind = "" if summary.get("kind") == "full" else f" ({summary.get('kind')})"
    stored = _number(summary, "stored_size")
    said = f"{summary['name']}{kind}" + (f", {human(stored)} stored" if stored is not None else "")
    return f"{said}, {damaged:.0f} DAMAGED files" if (damaged := _number(summary, "damaged")) else said


def _verify(summary: dict[str, Any]) -> str:
    objects, size = _number(summary, "objects"), _number(summary, "bytes")
    if objects is None:
        return ""
    read = f"{objects:.0f} objects" + (f", {human(size)}" if size is not None else "")
    return f"{read}, {_number(summary, 'faults') or 0:.0f} faults, {_number(summary, 'holes') or 0:.0f} holes"


def _restore(summary: dict[str, Any]) -> str:
    return " ".join(f"{word} {summary[key]}" for word, key in _RESTORED if isinstance(summary.get(key), str))


def _expire(summary: dict[str, Any]) -> str:
    deleted, freed, refused = (summary.get(key) for key in ("deleted", "freed", "refused"))
    if not isinstance(deleted, list) or not isinstance(freed, dict):
        return ""
    size = sum(_number(each, "bytes") or 0 for each in freed.values() if isinstance(each, dict))
    words = f"{len(deleted)} backups deleted, {human(size)} freed"
    return f"{words}, {len(refused)} refused" if isinstance(refused, list) and refused else words


_RESTORED = (("of", "backup"), ("to", "target"), ("in", "directory"))


def _drill(summary: dict[str, Any]) -> str:
    words = []
    for name, key in (("RTO", "rto_seconds"), ("RPO", "rpo_seconds")):
        if (seconds := _number(summary, key)) is not None:
            words.append(f"{name} {seconds:.1f} s")
    if (checks := _number(summary, "checks")) is not None:
        words.append(f"{checks:.0f} checks")
    return ", ".join(words)


def _anything(summary: dict[str, Any]) -> str:
    """Of a verb that has no words of its own: what is short."""
    plain = {key: value for key, value in summary.items() if isinstance(value, str | int | float | bool)}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items())


_SAYS: dict[str, Callable[[dict[str, Any]], str]] = {
    "backup": _backup, "expire": _expire, "verify": _verify, "restore": _restore, "drill": _drill,
}  # fmt: skip
