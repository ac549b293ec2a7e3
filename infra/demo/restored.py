"""The server that ``walship restore --start`` has left running: how to reach it, and how to end it."""

from __future__ import annotations

import psycopg

from infra.postgres.processes import dismiss, guard, kill_tree, run_as


class RestoredServer:
    """Known by its process id and its port, as the restore has reported them."""

    def __init__(self, pid: int, port: int) -> None:
        self._pid = pid
        self._port = port
        self._running = True
        # It was started to outlive the restore; it shall not outlive the demo.
        self._guard = guard(pid, run_as())

    @property
    def dsn(self) -> str:
        return psycopg.conninfo.make_conninfo(host="127.0.0.1", port=self._port, user="postgres", dbname="postgres")

    def close(self) -> None:
        """End it at once; idempotent."""
        if self._running:
            self._running = False
            kill_tree(self._pid)
            dismiss(self._guard)
