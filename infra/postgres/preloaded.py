"""Which libraries of shared_preload_libraries act by themselves: a copy of a server would do what the original does.

They do it in background workers: run jobs, drop old partitions, send what is queued, connect to other servers, the one
that was backed up among them. Nobody knows all of them, so what is not known to be idle counts as acting.
"""

from __future__ import annotations

from pathlib import Path

#: They watch, answer or are called; or their workers do no more than that: warm the cache, take samples.
IDLE = frozenset({
    "auth_delay", "auto_explain", "basebackup_to_shell", "basic_archive", "passwordcheck", "pg_overexplain",
    "pg_prewarm", "pg_stat_statements", "plpgsql", "sepgsql", "test_decoding",
    "credcheck", "hypopg", "pg_hint_plan", "pg_qualstats", "pg_stat_kcache", "pg_stat_monitor", "pg_store_plans",
    "pg_wait_sampling", "pgaudit", "pgauditlogtofile", "pgextwlist", "plpgsql_check", "plprofiler", "plugin_debugger",
    "safeupdate", "set_user", "wal2json",
})  # fmt: skip
#: Nothing but workers, as far as a copy goes: its tables can be read without them, and it needs no program of theirs.
WORKERS_ONLY = frozenset({
    "bdr", "pg_cron", "pg_failover_slots", "pg_net", "pg_partman_bgw", "pg_squeeze", "pgactive", "pglogical", "powa",
    "spock",
})  # fmt: skip


def acting(setting: str) -> tuple[str, ...]:
    """Of the libraries that a value of shared_preload_libraries names those that may act by themselves."""
    return tuple(name for name in _named(setting) if _plain(name) not in IDLE)


def without_workers(setting: str) -> tuple[str, tuple[str, ...]]:
    """The value without ``WORKERS_ONLY``; and which of those it named."""
    names = _named(setting)
    left_out = tuple(name for name in names if _plain(name) in WORKERS_ONLY)
    return ", ".join(f'"{name}"' for name in names if name not in left_out), left_out


def _named(setting: str) -> list[str]:
    return [name.strip().strip('"') for name in setting.split(",") if name.strip()]


def _plain(name: str) -> str:
    """``$libdir/pg_cron.so`` → ``pg_cron``."""
    return Path(name).name.removesuffix(".so").removesuffix(".dylib")
