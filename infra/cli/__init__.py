"""The ``walship`` command: one file per verb, loaded when it is called (``group``).

Results go to stdout, everything else to stderr. Exit codes are in ``exits``.
"""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from infra import early
from infra.cli import streams
from infra.names import refuse_strangers

#: Verbs in the order of ``--help``, and what each does in a few words.
VERBS = {
    "init": "Make or join the repository at every destination.",
    "check": "Try every setting, permission and store; say what is wrong and what to do.",
    "run": "The service: ship WAL as it comes.",
    "backup": "Take a base backup now.",
    "switch": "Switch WAL and wait until all before it is safe at every required destination.",
    "push": "Ship what waits in the spool, then exit.",
    "status": "Whether it is safe and why, and how far behind each destination is.",
    "list": "Backups, and the times that can be restored.",
    "restore": "Bring the cluster back to a moment.",
    "drill": "Restore into a throw-away server, check it, and report.",
    "verify": "Check stored bytes, and look for holes in the WAL.",
    "copy": "Copy a repository, or part of it, to another destination.",
    "history": "What was done to the repository, and how it ended.",
    "key": "Who may read the repository: passphrases, recipients, and hosts that only write.",
    "expire": "Delete the backups and the WAL that the policy does not keep.",
    "pin": "Keep a backup whatever the policy says.",
    "unpin": "Leave a backup to the policy again.",
    "fetch-wal": "Fetch one WAL file (what restore_command calls).",
    "demo": "All of it, on an embedded server, in about a minute.",
}
#: Those that begin by opening the key ring: see ``early``.
_OPENING = frozenset(VERBS) - {"init", "check", "copy", "key", "fetch-wal", "demo"}


def main() -> NoReturn:
    """Entry point of the ``walship`` script and of ``python -m infra.cli``."""
    streams.secure()
    try:
        if _OPENING.intersection(sys.argv[1:2]) and not {"-h", "--help"}.intersection(sys.argv):
            early.begin()
        from infra.cli.group import call  # not before: what it loads takes a while, and scrypt as long
    except ImportError:
        refuse_strangers()  # somebody else's package of that name, in front of ours, has no such module
        raise
    except KeyboardInterrupt:
        print("walship: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    sys.exit(streams.settle(call()))
