"""``python -m tests.drill_sample FILE`` (``make drill-sample``): a report as the command writes it, for the docs.

A bank is shipped to an S3 server while payments go on. Then its host is lost, all of it but the bucket, and the drill
is all there is. Every value in the report is measured; nothing of it is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from infra.demo.load import Writer, open_bank
from infra.demo.premises import Premises

_HOME = Path(__file__).resolve().parents[1]
_CHECKS = _HOME / "docs" / "drill-checks.sql"
_ORIGIN = (
    "<!-- Written by `make drill-sample`: an embedded PostgreSQL and S3 server, a bank with 50,000 payments and more of"
    " them until its host was lost. -->\n\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.drill_sample", description=__doc__)
    parser.add_argument("file", type=Path)
    target = parser.parse_args().file.resolve()
    with Premises() as here:
        _say("starting PostgreSQL and an S3 server")
        here.open()
        here.walship("init")
        here.start_service()
        open_bank(here.server.dsn(), 50_000)
        _say("walship backup, while payments go on")
        writer = Writer(here.server.dsn())
        writer.start()
        try:
            here.walship("backup")
            writer.write_for(5)
        finally:
            writer.stop()
        here.destroy()
        _say("walship drill")
        reports = here.folder / "reports"
        words = ("--check", str(_CHECKS), "--report", str(reports), "--work-dir", str(here.folder))
        here.walship("drill", *words, s3_only=True)
        (report,) = reports.glob("*.md")
        target.write_text(_ORIGIN + report.read_text("utf-8"), "utf-8")
    _say(f"{target.name} is written")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
