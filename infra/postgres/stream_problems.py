"""What is wrong with a server for the stream and for synchronous commits. ``walship check`` shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from infra.postgres.control import ServerFacts
from infra.postgres.problems import Problem
from infra.postgres.senders import Sender, StreamFacts
from infra.postgres.sync import Meaning, SyncNames, meaning, order, parse
from infra.settings import Settings

error, warning = partial(Problem, "error"), partial(Problem, "warning")

#: Values of synchronous_commit by which commits wait for no standby.
NO_WAIT = ("local", "off")
#: A sender that hears nothing for so many seconds is closed; below this, a busy moment closes it.
_SHORT = 5
#: A slot that keeps less than so many segments is lost in any busy minute.
_FEW = 8

_KEEP = "in psql: ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf(); -- what the disk can spare"


def stream_problems(facts: ServerFacts, stream: StreamFacts, settings: Settings) -> list[Problem]:
    """All that is wrong for WALSHIP_SOURCES=stream, errors first."""
    found = [*_server(facts, stream), *_slot(stream, settings.slot), *_kept(facts, stream, settings)]
    found += commit_problems(facts, stream, settings.slot)
    return sorted(found, key=lambda problem: problem.severity)


def _server(facts: ServerFacts, stream: StreamFacts) -> Iterator[Problem]:
    if facts.in_recovery:
        yield error("this server is a standby, and the stream is taken from a primary",
                    "let POSTGRES_HOST name the primary, or all servers of the cluster, separated by commas: walship"
                    " takes the one that can be written to")  # fmt: skip
    senders = len(stream.senders)
    if facts.max_wal_senders == 1:
        yield error("max_wal_senders is 1: the stream takes it, and a base backup finds none",
                    "set max_wal_senders = 10 and restart the server")  # fmt: skip
    elif stream.user is None and 0 < facts.max_wal_senders <= senders:
        who = "; ".join(str(sender) for sender in stream.senders)
        yield error(f"all {facts.max_wal_senders} WAL senders are in use: {who}",
                    "close one, or raise max_wal_senders and restart the server")  # fmt: skip
    if stream.slot is None and stream.slots >= stream.max_slots:
        yield error(f"there is no room for a slot: {stream.slots} exist, max_replication_slots is {stream.max_slots}",
                    "drop one that nobody needs (SELECT * FROM pg_replication_slots;), or raise max_replication_slots"
                    " and restart the server")  # fmt: skip
    if stream.sender_timeout == 0:
        yield warning("wal_sender_timeout is 0: the server does not notice a connection that is cut, and the slot stays"
                      " in use until TCP gives up", "set wal_sender_timeout = '60s'")  # fmt: skip
    elif stream.sender_timeout < _SHORT:
        yield warning(f"wal_sender_timeout is {stream.sender_timeout:g} s: a busy moment ends the stream",
                      "set wal_sender_timeout = '60s'")  # fmt: skip


def _slot(stream: StreamFacts, name: str) -> Iterator[Problem]:
    """One that is not there is made when the service starts."""
    slot = stream.slot
    if slot is None:
        return
    if not slot.physical:
        yield error(f"the slot {name} is a logical one, which sends rows and no WAL",
                    "set WALSHIP_SLOT to another name; walship makes the slot itself")  # fmt: skip
        return
    if slot.temporary:
        yield error(f"the slot {name} is a temporary one and ends with its session ({slot.holder})",
                    "end that session, or set WALSHIP_SLOT to another name; walship makes the slot itself")  # fmt: skip
        return
    if slot.active and stream.ours is None and slot.application_name.lower() != name:
        yield error(f"the slot {name} is in use by another program: {slot.holder}",
                    "end it, or set WALSHIP_SLOT to another name: a slot serves one")  # fmt: skip
    if slot.lost:
        yield error(f"the slot {name} is lost: the server did not keep its WAL (max_slot_wal_keep_size, or it was not"
                    " used for too long)",
                    "walship makes it anew when it connects; take a base backup then (`walship backup`), because what"
                    " was not stored is a hole")  # fmt: skip
    elif slot.wal_status == "unreserved":
        yield warning(f"the slot {name} is about to be lost: it keeps {_mb(slot.retained)}, more than"
                      " max_slot_wal_keep_size, and goes at the next checkpoint",
                      "see why so little is stored (`walship status`), and raise max_slot_wal_keep_size")  # fmt: skip
    elif slot.restart_lsn is None:
        yield warning(f"the slot {name} keeps no WAL until somebody has streamed from it",
                      f"drop it, and let walship make it: SELECT pg_drop_replication_slot('{name}');")  # fmt: skip
    elif not slot.active:
        yield warning(f"nobody streams from the slot {name}: it keeps {_mb(slot.retained)} of WAL since LSN"
                      f" {slot.restart_lsn}, and more each minute",
                      "start `walship run`, or see in its log why it does not stream; if it is to go for good:"
                      f" SELECT pg_drop_replication_slot('{name}');")  # fmt: skip


def _kept(facts: ServerFacts, stream: StreamFacts, settings: Settings) -> Iterator[Problem]:
    """How long WAL is kept while walship, or the store, is away."""
    if stream.keep_size is None:
        yield warning("max_slot_wal_keep_size is -1: while nothing can be shipped, the server keeps all WAL, until its"
                      " disk is full", _KEEP)  # fmt: skip
    elif stream.keep_size < _FEW * facts.segment_size:
        few = f"max_slot_wal_keep_size is {_mb(stream.keep_size)}"
        if "watch" in settings.sources:
            yield warning(f"{few}: a little behind, and the slot is lost; the archive fills the hole later", _KEEP)
        else:
            yield error(f"{few}: a little behind, and the slot is lost, with WAL that nothing else keeps", _KEEP)
    if stream.idle_timeout:
        yield warning(f"idle_replication_slot_timeout is {stream.idle_timeout} s: if walship is away for longer, its"
                      " slot is lost, and what was not stored is a hole",
                      "set idle_replication_slot_timeout = 0, or to days")  # fmt: skip


def commit_problems(facts: ServerFacts, stream: StreamFacts, name: str) -> Iterator[Problem]:
    """Whether a commit that has returned is stored: several settings look as if it were."""
    means = meaning(facts.synchronous_standby_names, name)
    if means.wait == "none":
        return
    if means.wait == "unknown":
        yield error(means.fact, means.hint)
        return
    names = parse(facts.synchronous_standby_names)
    assert names is not None
    others = _stand_ins(stream, names)
    if means.wait == "others":
        yield _for_others(means, names, others)
        return
    if means.wait == "ours":
        hang = warning if facts.synchronous_commit in NO_WAIT else error
        yield from _for_us(stream, names, others, name, hang)
    else:
        yield error(means.fact, means.hint)
    yield from _how(facts, stream, name)


def _for_others(means: Meaning, names: SyncNames, others: list[Sender]) -> Problem:
    if len(others) < names.count:
        there = f"only {len(others)} of them are" if others else "nobody of that name is"
        return error(f"{means.fact}; {there} connected, so they wait for ever", means.hint)
    return warning(f"{means.fact}: what they wait for is not offsite", means.hint)


def _for_us(
    stream: StreamFacts, names: SyncNames, others: list[Sender], name: str, hang: Callable[[str, str], Problem]
) -> Iterator[Problem]:
    """The setting is right; is everybody there, and who they seem to be? ``hang``: how bad it is if nobody is."""
    if len(others) >= names.count:
        who = "; ".join(str(sender) for sender in others)
        yield error(f"commits need not wait for {name}: other connections release them in its place ({who})",
                    "end them, or give them another application_name: each confirms for all of that name")  # fmt: skip
    elif stream.ours is None:
        yield hang(f"commits wait: nobody streams as {name}, and they hang until somebody does",
                      "start `walship run`, or see in its log why it does not stream; to let them go on without it, in"
                      " psql: ALTER SYSTEM RESET"
                      " synchronous_standby_names; SELECT pg_reload_conf();")  # fmt: skip
    elif len(others) < names.count - 1:
        yield hang(f"commits wait for {names.count} standbys, and {len(others) + 1} of the named are connected: they"
                   " hang until the others are", f"connect them; or {order(name)}")  # fmt: skip


def _how(facts: ServerFacts, stream: StreamFacts, name: str) -> Iterator[Problem]:
    """synchronous_commit: for our role, and where a role or a database has another."""
    if facts.synchronous_commit == "remote_apply":
        yield error(f"synchronous_commit is remote_apply: commits wait until {name} has replayed them, which it never"
                    " does, so they wait for ever", "set synchronous_commit = on")  # fmt: skip
    elif facts.synchronous_commit in NO_WAIT:
        yield warning(f"synchronous_commit is {facts.synchronous_commit}: commits do not wait for {name}, whatever"
                      " synchronous_standby_names says", "set synchronous_commit = on")  # fmt: skip
    for other in stream.other_commits:
        value = other.rpartition(": ")[2]
        does = {"remote_apply": "its commits wait for ever", "local": "its commits do not wait",
                "off": "its commits do not wait"}.get(value)  # fmt: skip
        if does:
            yield warning(f"synchronous_commit is another one for the {other}: {does}",
                          "take it back (ALTER ROLE … RESET synchronous_commit; or ALTER DATABASE …), if it is not"
                          " meant so")  # fmt: skip


def _stand_ins(stream: StreamFacts, names: SyncNames) -> list[Sender]:
    """Who else is connected under a name that counts. A base backup confirms nothing."""
    ours = stream.ours
    return [
        sender
        for sender in stream.senders
        if sender != ours and sender.state in ("streaming", "stopping") and names.matches(sender.application_name)
    ]


def stream_words(facts: ServerFacts, stream: StreamFacts, settings: Settings) -> list[str]:
    """What is as it should be, one sentence each: the slot, and what a commit means."""
    slot = stream.slot
    said = []
    if slot is None:
        said.append(f"the slot {settings.slot} is not there yet: `walship run` makes it")
    elif stream.ours is not None:
        said.append(f"the slot {slot.name} is in use by {slot.holder}, and keeps {_mb(slot.retained)} of WAL")
    means = meaning(facts.synchronous_standby_names, settings.slot)
    if means.wait == "none":
        said.append(
            f"{means.fact}; losing this host costs what is younger than {settings.tail_interval:g} s"
            " (WALSHIP_TAIL_INTERVAL) and one upload"
        )
    elif means.wait == "ours":
        said.append(
            f"{means.fact}. Limits: a commit whose wait is cancelled returns with a mere WARNING, and one that a fast"
            " shutdown interrupts is kept by the server; neither may be stored"
        )
        said.append(_patience(settings))
    return said


def _patience(settings: Settings) -> str:
    if settings.sync_timeout is None:
        return "WALSHIP_SYNC_TIMEOUT is not set: commits wait as long as a required destination does not answer"
    if len(settings.required_urls) < 2:
        return "WALSHIP_SYNC_TIMEOUT has no effect: one destination is required, and without it commits wait"
    return (
        f"a required destination that stores nothing for {settings.sync_timeout:g} s is no longer waited for"
        " (WALSHIP_SYNC_TIMEOUT), as long as another one stores"
    )


def _mb(size: int) -> str:
    return f"{size >> 20} MB" if size >> 20 or not size else f"{size} bytes"
