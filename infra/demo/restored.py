"""The server that ``walship restore --start`` has left running: how to reach it, and how to end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg

from infra.postgres.processes import dismiss, guard, kill_tree, run_as


class RestoredServer:
    """Known by its process id and its port, as the restore has reported them."""

    def __init__(self, pid: int, port: int, data_dir: Path, *, tail_bytes: int = 0) -> None:
        self.data_dir = data_dir
        #: Of the WAL that was replayed, what came from tails.
        self.tail_bytes = tail_bytes
        self._pid = pid
        self._port = port
        self._running = True
        # It was started to outlive the restore; it shall not outlive the demo.
        self._guard = guard(pid, run_as())

    def dsn(self) -> str:
        """A connection string."""
        return psycopg.conninfo.make_conninfo(host="127.0.0.1", port=self._port, user="postgres", dbname="postgres")

    def environment(self) -> dict[str, str]:
        """The settings that lead walship to this server."""
        return {"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": str(self._port), "POSTGRES_USERNAME": "postgres"}

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """One statement on a connection of its own, in autocommit; its rows, if it gives any."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def kill9(self) -> None:
        """SIGKILL all of it; idempotent."""
        if self._running:
            self._running = False
            kill_tree(self._pid)
            dismiss(self._guard)
