"""What cannot be compared with the server's WAL is told, not passed over in silence."""

from __future__ import annotations

import os

from structlog.testing import capture_logs

from infra.overlap import check_overlap
from pipeline.lineage import Leg, Lineage
from pipeline.resume import GoOn
from pipeline.wal import Lsn, WalFile
from tests.parts import Shelf
from tests.tails import change, lay
from tests.unit.test_status import SIZE, site_of


async def test_tails_that_are_damaged_are_told_where_the_server_is_compared_with_what_is_stored() -> None:
    shelf = Shelf()
    file = WalFile.segment(1, 3 * SIZE, SIZE)
    first, _ = await lay(shelf.store, shelf.chain, file, os.urandom(SIZE), [(0, 5000), (5000, 9000)])
    await change(shelf.store, first, flip=300)
    # Nothing is left to be compared, so no server is asked for anything.
    lineage = Lineage((Leg(1, Lsn(0), None),), SIZE)
    with capture_logs() as said:
        await check_overlap(site_of(shelf, shelf.store), lineage, {}, GoOn(1, Lsn(3 * SIZE)))
    assert {line["event"] for line in said} == {"tails_passed_over"}
    assert {line["segment"] for line in said} == {file.name}
    told = " ".join(line["error"] for line in said)
    assert first in told
