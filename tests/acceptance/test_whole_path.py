"""The main job on every supported server: watch, ship to two stores, back up, and restore to each kind of target.

Every restore is compared by content with what was in the table at that moment, and is made from S3 alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Load, Rig, stop_started
from tests.servers import NEWEST, SERVER_VERSIONS

pytestmark = pytest.mark.xdist_group("whole-path")

DIGEST = """
select count(*), coalesce(md5(string_agg(t::text, ',' order by n)), ''), (select count(*) from in_tablespace) from t
"""


@dataclass(frozen=True)
class Moment:
    """A recovery target, and what table t held there."""

    options: tuple[str, ...]
    content: tuple[object, ...]


@pytest.fixture(params=SERVER_VERSIONS, ids=lambda major: f"pg{major}")
def rig(request: pytest.FixtureRequest, seaweed: Seaweed, s3_prefix: str) -> Iterator[Rig]:
    folder = make_folder("walship-w-")
    with Rig(
        folder,
        request.param,
        [f"file://{folder}/local", seaweed.url(s3_prefix)],
        settings=seaweed.environment,
        # One version with the usual size, the others with small segments: many boundaries in little time.
        segment_mb=16 if request.param == 17 else 1,
        as_installed=request.param == NEWEST,
    ) as made:
        yield made
    shutil.rmtree(folder)


def make_tables(rig: Rig) -> None:
    """One table in the default tablespace, one in a tablespace of its own, to which every write adds a row."""
    place = rig.folder / "tablespace"
    place.mkdir()
    give(place, run_as())
    rig.sql(f"create tablespace elsewhere location '{place}'")
    rig.sql("create table t (n int primary key, filler text)")
    rig.sql("create table in_tablespace (n int) tablespace elsewhere")


def write(rig: Rig, first: int, count: int = 400) -> None:
    rig.sql(f"insert into in_tablespace values ({first})")
    rig.sql(f"insert into t select n, repeat(md5(n::text), 8) from generate_series({first}, {first + count - 1}) n")


def content(rig: Rig) -> tuple[object, ...]:
    (row,) = rig.sql(DIGEST)
    return row


def restored(rig: Rig, s3: str, *options: str) -> tuple[tuple[object, ...], bool]:
    """What table t holds after a restore from S3, and whether table load is there."""
    target, port = rig.target(), free_port()
    mapped = target.with_name(f"{target.name}-tablespace")
    result = rig.json(
        "restore", "--target-dir", str(target), "--tablespace-map", f"{rig.folder}/tablespace={mapped}",
        "--from", s3, "--start", "--port", str(port), *options,
    )  # fmt: skip
    assert result["state"] == "in production"
    import psycopg

    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres", autocommit=True) as connection:
        (row,) = connection.execute(DIGEST).fetchall()
        (settings,) = connection.execute("select current_setting('archive_mode'), to_regclass('load')").fetchall()
    stop_started(target)
    assert any(mapped.iterdir()), "the tablespace went where it was told to"
    shutil.rmtree(target)
    shutil.rmtree(mapped)
    assert settings[0] == "off", "a restored server must not archive into the old one's spool"
    return row, settings[1] is not None


def test_every_target(rig: Rig, seaweed: Seaweed, s3_prefix: str) -> None:
    s3 = seaweed.url(s3_prefix)
    rig.server.start()
    rig.run("init")
    service = rig.serve()
    make_tables(rig)
    with Load(rig.server) as load:
        write(rig, 1)
        at_backup = content(rig)  # nothing else touches t until the backup is done
        rig.json("backup")
        moments = [Moment(("--immediate",), at_backup)]
        write(rig, 1001)
        # A commit behind the moment is what a time target stops in front of.
        ((time,),) = rig.sql("select clock_timestamp()::text")
        moments.append(Moment(("--to-time", time), content(rig)))
        write(rig, 2001)
        ((lsn,),) = rig.sql("select pg_current_wal_insert_lsn()::text")
        moments.append(Moment(("--to-lsn", lsn), content(rig)))
        write(rig, 3001)
        rig.sql("select pg_create_restore_point('before the accident')")
        moments.append(Moment(("--to-name", "before the accident"), content(rig)))
        ((xid,),) = rig.sql("with gone as (delete from t where n % 7 = 0) select pg_current_xact_id()::text")
        moments.append(Moment(("--to-xid", xid), content(rig)))
        moments.append(Moment(("--to-xid", xid, "--exclusive"), moments[-2].content))
        write(rig, 4001)
        rig.sql("update t set filler = 'changed' where n % 3 = 0")
    moments.append(Moment(("--latest",), content(rig)))
    if rig.major == NEWEST:
        moments.append(Moment((), moments[-1].content))  # the same to every server
    rig.json("switch")
    rig.drained()
    assert rig.stop(service) == 0
    assert load.acknowledged, "the load has to have written beside the backup"
    for moment in moments:
        found, loaded = restored(rig, s3, *moment.options)
        assert found == moment.content, f"restore {moment.options} brought back something else"
    assert loaded, "the last is the latest state"
    assert rig.json("verify")["ok"]
