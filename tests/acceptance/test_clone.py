"""A clone that was started with the settings of its original ships nothing into the original's repository."""

from __future__ import annotations

from infra.postgres.processes import give, run_as
from tests.rig import Rig


def test_no_command_ships_beside_the_service_of_another_spool(rig: Rig) -> None:
    rig.serve()
    spool = rig.folder / "spool of the clone"
    spool.mkdir()
    give(spool, run_as())
    rig.server.query(f"alter system set basic_archive.archive_directory = '{spool}'")
    rig.server.reload()
    clone = rig.environment(WALSHIP_SPOOL_DIR=str(spool))

    def arrived() -> bool:
        rig.sql("select pg_logical_emit_message(false, '', 'x'), pg_switch_wal()")
        return any(spool.glob("0*"))

    rig.wait(arrived, "the server archives into the clone's spool")
    for verb in ("push", "backup"):
        done = rig.run(verb, expect=10, environment=clone)
        assert "this repository is written already by process " in done.stderr
        assert "a clone of the server needs a repository of its own" in done.stderr
        assert "shipping what arrives" not in done.stderr
    for segment in spool.glob("0*"):
        assert not list(rig.folder.glob(f"near/*/wal/*/{segment.name}"))
    assert not list(rig.folder.glob("near/*/base/*/backup_info"))
