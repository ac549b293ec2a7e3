"""What recovery targets name, found in the WAL: ends of transactions with their times, and restore points.

Everything works on the ``Payload`` of one segment (``walrecords``); feed segments in order with their carry, so that
what crosses into the next segment is found too. ``transactions`` walks all records (0.3 s for 16 MiB); the
``find_`` functions search (milliseconds).

Sources: PostgreSQL's ``access/xact.h`` and ``xactdesc.c`` (ParseCommitRecord), ``access/xlog_internal.h``
(xl_restore_point), ``catalog/pg_control.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline.wal import Lsn
from pipeline.walpages import RECORD_HEADER
from pipeline.walrecords import RM_XLOG, Payload, Record

RM_XACT = 1
#: Upper four bits of info, for RM_XLOG.
XLOG_RESTORE_POINT = 0x70
#: Bits of info that say what an RM_XACT record is.
XACT_COMMIT, XACT_ABORT, XACT_COMMIT_PREPARED, XACT_ABORT_PREPARED = 0x00, 0x20, 0x30, 0x40

_U32 = struct.Struct("<I")
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Transaction:
    """The end of a transaction."""

    #: Start and end of the commit or abort record.
    lsn: Lsn
    end: Lsn
    xid: int
    committed: bool
    #: When, by the clock of the server; in UTC.
    time: datetime


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """What ``pg_create_restore_point`` has left."""

    lsn: Lsn
    end: Lsn
    name: str
    time: datetime


def transactions(payload: Payload) -> Iterator[Transaction]:
    """Every commit and abort in the segment, in order."""
    for record in payload.records():
        if transaction := transaction_of(record, payload.major):
            yield transaction


def transaction_of(record: Record, major: int) -> Transaction | None:
    """What the record says of the end of a transaction, or None if it is about something else."""
    kind = record.info & 0x70
    if record.rmid != RM_XACT or kind not in (XACT_COMMIT, XACT_ABORT, XACT_COMMIT_PREPARED, XACT_ABORT_PREPARED):
        return None
    main = record.main
    xid = record.xid
    if kind in (XACT_COMMIT_PREPARED, XACT_ABORT_PREPARED):
        xid = _prepared_xid(main, record.info, major) or xid
    committed = kind in (XACT_COMMIT, XACT_COMMIT_PREPARED)
    return Transaction(record.lsn, record.end, xid, committed, _time(main))


def last_transaction(payload: Payload, *, committed: bool = True) -> Transaction | None:
    """The last commit in the segment (with ``committed=False``: the last commit or abort), or None."""
    last = None
    for transaction in transactions(payload):
        if transaction.committed or not committed:
            last = transaction
    return last


def find_restore_point(payload: Payload, name: str) -> RestorePoint | None:
    """The first restore point of that name in the segment; a search, not a walk."""
    text = name.encode() + b"\0"
    for record in payload.find(text, RECORD_HEADER + 2 + 8):
        if record.rmid == RM_XLOG and record.info & 0xF0 == XLOG_RESTORE_POINT:
            return RestorePoint(record.lsn, record.end, name, _time(record.main))
    return None


def restore_points(payload: Payload) -> Iterator[RestorePoint]:
    """Every restore point in the segment, in order; a search, not a walk."""
    for record in payload.find(bytes((XLOG_RESTORE_POINT, RM_XLOG, 0, 0)), 16):
        if record.rmid == RM_XLOG and record.info & 0xF0 == XLOG_RESTORE_POINT:
            name = bytes(record.main[8:]).partition(b"\0")[0].decode("utf-8", "replace")
            yield RestorePoint(record.lsn, record.end, name, _time(record.main))


def find_xid(payload: Payload, xid: int) -> Transaction | None:
    """The commit or abort of the transaction in the segment; a search, not a walk.

    ``xid`` is the 32-bit number, as ``recovery_target_xid`` takes it. Prepared transactions are found as well.
    """
    for record in payload.find(_U32.pack(xid), 4):
        if record.rmid == RM_XACT and (found := transaction_of(record, payload.major)):
            return found
    # COMMIT PREPARED is logged without a transaction of its own; the number is somewhere in its data.
    for info in _PREPARED_ENDS:
        for record in payload.find(bytes((info, RM_XACT, 0, 0)), 16):
            found = transaction_of(record, payload.major)
            if found and found.xid == xid:
                return found
    return None


#: info of COMMIT PREPARED and ABORT PREPARED, with and without XLOG_XACT_HAS_INFO and XLR_SPECIAL_REL_UPDATE.
_PREPARED_ENDS = tuple(
    kind | has | flag for kind in (XACT_COMMIT_PREPARED, XACT_ABORT_PREPARED) for has in (0x80, 0) for flag in (0, 1)
)


def _time(main: memoryview) -> datetime:
    """Microseconds since 2000-01-01 at the front of a record's data."""
    (microseconds,) = struct.unpack_from("<q", main)
    return _EPOCH + timedelta(microseconds=microseconds)


def _prepared_xid(main: memoryview, info: int, major: int) -> int:
    """Number of the prepared transaction, as ParseCommitRecord and ParseAbortRecord find it; 0 if it is not said."""
    if not info & 0x80:  # XLOG_XACT_HAS_INFO
        return 0
    (xinfo,) = _U32.unpack_from(main, 8)
    at = 12 + (8 if xinfo & 0x01 else 0)
    stats = 16 if major == 0 or major >= 18 else 12
    # Subtransactions, relations, dropped statistics, invalidations: each a count, and entries of this size.
    for bit, size in ((0x02, 4), (0x04, 12), (0x100, stats), (0x08, 16)):
        if xinfo & bit:
            at += 4 + int(_U32.unpack_from(main, at)[0]) * size
    return int(_U32.unpack_from(main, at)[0]) if xinfo & 0x10 else 0
