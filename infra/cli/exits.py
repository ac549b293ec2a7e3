"""The one place that maps errors to exit codes, and prints them."""

from __future__ import annotations

import json
import sys

from pipeline.errors import ConfigError, IntegrityError, RecoveryError, SourceError, StoreError, WalshipError

#: Exit code of each kind of error. 2 is also what a mistyped command line gives.
EXIT_CODES: dict[type[WalshipError], int] = {
    ConfigError: 2,
    SourceError: 10,
    StoreError: 11,
    IntegrityError: 12,
    RecoveryError: 13,
}

#: Ended by a person (Ctrl-C), as a shell reports it.
INTERRUPTED = 130


def exit_code(error: WalshipError) -> int:
    """10 PostgreSQL or spool, 11 store, 12 integrity, 13 target cannot be reached, 2 settings."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def report(error: WalshipError, *, as_json: bool) -> int:
    """Print the error (JSON to stdout, where the result would have been; words to stderr) and return its exit code."""
    code = exit_code(error)
    if as_json:
        kind = next(kind for kind in EXIT_CODES if isinstance(error, kind)).__name__
        print(json.dumps({"error": {"kind": kind, "fact": error.fact, "hint": error.hint, "exit_code": code}}))
    print(f"walship: {error.fact}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return code
