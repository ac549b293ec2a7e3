"""The server that ``walship restore --start`` has left running: how to reach it, and how to end it."""

from __future__ import annotations

from pathlib import Path

import psycopg

from infra.postgres.processes import dismiss, guard, kill_tree, run_as
from infra.postgres.throwaway import free_port


class RestoredServer:
    """Knows its data directory; everything else is in the ``postmaster.pid`` that the server wrote there."""

    def __init__(self, data_dir: Path) -> None:
        lines = (data_dir / "postmaster.pid").read_text("utf-8").splitlines()
        self._pid = int(lines[0])
        self._port = int(lines[3])
        self._running = True
        # It was started to outlive the restore; it shall not outlive the demo.
        self._guard = guard(self._pid, run_as(data_dir))

    @property
    def dsn(self) -> str:
        return psycopg.conninfo.make_conninfo(host="127.0.0.1", port=self._port, user="postgres", dbname="postgres")

    def close(self) -> None:
        """End it at once; idempotent."""
        if self._running:
            self._running = False
            kill_tree(self._pid)
            dismiss(self._guard)


def own_place(conf: Path, sockets: Path) -> None:
    """Write settings that let a copy run beside the original: another port, another folder for its socket.

    The original's postgresql.conf includes ``conf``, so the copy's does too; the original has its own place on its
    command line, which wins.
    """
    conf.write_text(
        f"port = {free_port()}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{sockets}'\n", "utf-8"
    )
    conf.chmod(0o644)
