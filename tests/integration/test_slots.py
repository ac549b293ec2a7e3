"""The slot on real servers: made, looked at, lost, and left alone when it is not ours."""

from __future__ import annotations

import pytest

from infra.postgres.connect import RefusedError, connect
from infra.postgres.replication import ReplicationConnection
from infra.postgres.slots import Slot, create, drop, look, refuse_foreign
from infra.postgres.throwaway import ThrowawayServer
from infra.postgres.walstream import WalStream
from infra.settings import Settings
from pipeline.errors import SourceError
from pipeline.wal import Lsn, WalFile
from tests.servers import SERVER_VERSIONS, StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]


def settings_for(server: ThrowawayServer, user: str = "postgres") -> Settings:
    return Settings(POSTGRES_HOST=server.host, POSTGRES_PORT=server.port, POSTGRES_USERNAME=user)


async def seen(server: ThrowawayServer, name: str = "walship", *, user: str = "postgres") -> Slot | None:
    async with await connect(settings_for(server, user)) as control:
        return await look(control, name)


@pytest.mark.parametrize("major", SERVER_VERSIONS)
async def test_a_lost_slot_is_recognised_and_made_anew(major: int, start_server: StartServer) -> None:
    server = start_server(
        major, segment_mb=1,
        settings={"max_slot_wal_keep_size": "2MB", "max_wal_size": "2MB", "min_wal_size": "2MB", "wal_keep_size": "0"},
    )  # fmt: skip
    assert await seen(server) is None
    async with await ReplicationConnection.open(settings_for(server), application_name="walship") as replication:
        await create(replication, "walship")
        slot = await seen(server)
        assert slot is not None
        assert slot.physical
        assert (slot.active, slot.holder, slot.wal_status, slot.lost) == (False, "", "reserved", False)
        assert slot.restart_lsn
        assert slot.retained < 1 << 20
        assert slot.safe_wal_size is not None

        for _ in range(6):
            server.query("select pg_logical_emit_message(false, '', 'x')")
            server.query("select pg_switch_wal()")
        server.query("checkpoint")
        slot = await seen(server)
        assert slot is not None
        assert (slot.lost, slot.wal_status, slot.restart_lsn, slot.retained) == (True, "lost", None, 0)

        # Only 18 refuses it; before, WAL would come, and be kept no longer: so look first.
        async with await ReplicationConnection.open(settings_for(server), application_name="walship") as trying:
            lsn = Lsn.parse(server.query("select pg_current_wal_flush_lsn()::text")[0][0])
            if major >= 18:
                with pytest.raises(RefusedError, match="invalidated") as refused:
                    await WalStream.start(trying, slot="walship", timeline=1, lsn=lsn)
                assert refused.value.state == "55000"
            else:
                stream = await WalStream.start(trying, slot="walship", timeline=1, lsn=lsn)
                assert isinstance(stream, WalStream)
                await stream.close()
        await replication.rows("DROP_REPLICATION_SLOT walship WAIT")  # until the server has noticed that we left
        await drop(replication, "walship")  # gone is gone
        await create(replication, "walship")
        slot = await seen(server)
        assert slot is not None
        assert not slot.lost
        with pytest.raises(RefusedError, match=r"cannot be made: .*already exists") as caught:
            await create(replication, "walship")
        assert caught.value.state == "42710"


async def test_a_slot_of_somebody_else_is_left_alone(start_server: StartServer) -> None:
    server = start_server(segment_mb=1, settings={"wal_level": "logical", "max_replication_slots": "3"})
    server.query("create role walship login replication")
    server.query("select pg_create_logical_replication_slot('decoding', 'pgoutput')")
    logical = await seen(server, "decoding", user="walship")
    assert logical is not None
    with pytest.raises(SourceError, match="decoding is a logical one") as caught:
        refuse_foreign(logical)
    assert caught.value.lasting
    assert "WALSHIP_SLOT" in caught.value.hint

    settings = settings_for(server)
    async with await ReplicationConnection.open(settings, application_name="pg_receivewal") as other:
        await create(other, "walship")
        lsn = Lsn.parse(server.query("select pg_current_wal_flush_lsn()::text")[0][0])
        stream = await WalStream.start(other, slot="walship", timeline=1, lsn=lsn)
        assert isinstance(stream, WalStream)
        taken = await seen(server)
        assert taken is not None
        assert taken.active
        assert taken.holder.startswith(f"pg_receivewal (process {taken.active_pid} of the server, from 127.0.0.1")
        assert taken.holder in taken.in_use.fact
        with pytest.raises(SourceError, match=r"walship belongs to pg_receivewal \(process"):
            refuse_foreign(taken)
        hidden = await seen(server, user="walship")  # without pg_monitor nobody's address is shown
        assert hidden is not None
        assert hidden.holder == f"pg_receivewal (process {taken.active_pid} of the server)"
        async with await ReplicationConnection.open(settings) as replication:
            with pytest.raises(RefusedError) as refused:
                await drop(replication, "walship")
            assert refused.value.state == "55006"
            await replication.rows("CREATE_REPLICATION_SLOT passing TEMPORARY PHYSICAL")
            passing = await seen(server, "passing")
            assert passing is not None
            assert passing.restart_lsn is None
            assert not passing.lost
            with pytest.raises(SourceError, match="temporary"):
                refuse_foreign(passing)
            with pytest.raises(RefusedError) as refused:
                await create(replication, "one_too_many")
            assert (refused.value.state, refused.value.lasting) == ("53400", True)
            assert "max_replication_slots" in refused.value.hint
        await stream.close()


async def test_what_its_files_show_counts_more_than_what_the_server_says(start_server: StartServer) -> None:
    server = start_server(segment_mb=1)
    async with await ReplicationConnection.open(settings_for(server)) as replication:
        await create(replication, "walship")
    for _ in range(3):
        server.query("select pg_logical_emit_message(false, '', 'x')")
        server.query("select pg_switch_wal()")
    slot = await seen(server)
    assert slot is not None
    assert slot.restart_lsn is not None
    assert (slot.lost, slot.retained >= 2 << 20) == (False, True)
    (server.data_dir / "pg_wal" / WalFile.segment(1, slot.restart_lsn, 1 << 20).name).unlink()
    slot = await seen(server)
    assert slot is not None
    assert (slot.wal_status, slot.lost) == ("reserved", True)


async def test_a_server_without_slots_says_what_to_set(start_server: StartServer) -> None:
    server = start_server(segment_mb=1, settings={"max_replication_slots": "0"})
    async with await ReplicationConnection.open(settings_for(server)) as replication:
        with pytest.raises(RefusedError) as caught:
            await create(replication, "walship")
    assert (caught.value.state, caught.value.lasting) == ("53400", True)
    assert "max_replication_slots" in caught.value.hint
