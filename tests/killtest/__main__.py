"""The kill test: the host of the server and the service is destroyed, and S3 alone must have what was promised.

Clients commit numbered rows and note every answer with its time. At a random moment server and service get SIGKILL,
connections to the store are cut, and data directory, spool and local store are deleted; then `walship restore --latest`
from the bucket. In synchronous mode no acknowledged commit may be missing; in asynchronous mode only those that were
acknowledged within the interval plus one PUT of the kill. Each round is drawn from the seed and its number.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from infra.demo.seaweed import Seaweed
from tests.killtest.plan import Plan
from tests.killtest.round import play
from tests.killtest.verdict import Outcome, table


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, _interrupt)
    numbers = [options.round] if options.round is not None else range(1, options.rounds + 1)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="walship-bucket-") as folder:
        seaweed = Seaweed(Path(folder))
        try:
            seaweed.start()
            for number in numbers:
                synchronous = options.mode == "sync" or (options.mode == "both" and number % 2 == 1)
                plan = Plan.draw(options.seed, number, synchronous=synchronous)
                _say(f"round {number}: {plan}")
                outcome = play(plan, seaweed, f"round-{number}", keep=options.keep)
                outcomes.append(outcome)
                _say(f"  {outcome}")
                for violation in outcome.violations:
                    _say(f"  VIOLATION: {violation}")
        finally:
            seaweed.kill()
    print(table(outcomes))
    if any(outcome.violations for outcome in outcomes):
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make kill-test", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (default 1)")
    parser.add_argument("--round", type=int, help="only the round of this number")
    parser.add_argument(
        "--mode", choices=("sync", "async", "both"), default="both", help="both (default): odd rounds are synchronous"
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder of a round that failed")
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    """SIGTERM ends what was started, as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
