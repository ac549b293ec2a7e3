"""What is due when: after outages, over changes of clocks, after failures."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from infra.cron import Cron, zone
from pipeline.schedule import BUSY_AFTER, ORDER, RETRIES, RETRY_AFTER, VERBS, Outcome, Schedule

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)  # a Wednesday
NIGHTLY = {"full": "0 3 * * SUN", "incremental": "0 3 * * *", "expire": "0 3 * * *", "verify": "0 3 * * *"}


def schedule(now: datetime = NOON, time_zone: str = "UTC", **jobs: str) -> Schedule:
    there = zone(time_zone)
    return Schedule({job: Cron(expression, there).after for job, expression in (jobs or NIGHTLY).items()}, now)


def run(
    made: Schedule, start: datetime, hours: float, *, takes: timedelta = MINUTE, step: timedelta = MINUTE
) -> list[str]:
    """What runs, one at a time, and when it began."""
    found, now, end = [], start, start + hours * HOUR
    while now < end:
        for job in made.due(now)[:1]:
            found.append(f"{now:%d %H:%M} {job}")
            made.began(job, now)
            now += takes
            made.ended(job, now, "done")
        now += step
    return found


def test_what_is_due_at_one_time_runs_in_order_and_one_after_the_other() -> None:
    assert run(schedule(), NOON, 18, takes=HOUR) == ["15 03:00 incremental", "15 04:01 expire", "15 05:02 verify"]


def test_a_full_backup_is_an_incremental_one_as_well() -> None:
    sunday = datetime(2026, 1, 18, 2, tzinfo=UTC)
    assert run(schedule(sunday), sunday, 3) == ["18 03:00 full", "18 03:02 expire", "18 03:04 verify"]


def test_an_incremental_backup_is_taken_where_the_full_one_failed() -> None:
    sunday = datetime(2026, 1, 18, 3, tzinfo=UTC)
    made = schedule(sunday - HOUR)
    assert made.due(sunday)[0] == "full"
    made.ended("full", sunday + MINUTE, "failed")
    assert made.due(sunday + MINUTE)[0] == "incremental"


def test_what_was_missed_is_caught_up_once() -> None:
    made = schedule()
    made.remember("incremental", NOON - 9 * DAY)
    made.remember("verify", NOON - 9 * DAY)
    assert run(made, NOON, 1) == ["14 12:00 incremental", "14 12:02 verify"]


def test_what_passes_while_it_runs_is_not_caught_up() -> None:
    assert run(schedule(incremental="0 * * * *"), NOON, 5, takes=timedelta(minutes=90)) == [
        "14 13:00 incremental", "14 15:00 incremental",
    ]  # fmt: skip


def test_a_backup_that_failed_is_tried_again_three_times_and_then_at_its_next_time() -> None:
    made, now, began = schedule(full="0 3 * * *"), NOON, list[datetime]()
    while now < NOON + 2 * DAY:
        for job in made.due(now):
            began.append(now)
            made.began(job, now)
            made.ended(job, now, "failed")
        now += MINUTE
    first = NOON + 15 * HOUR
    nights = [[night + n * RETRY_AFTER for n in range(RETRIES + 1)] for night in (first, first + DAY)]
    assert began == [*nights[0], *nights[1]]


@pytest.mark.parametrize("job", ["expire", "verify", "drill"])
def test_what_else_failed_waits_for_its_next_time(job: str) -> None:
    made = schedule(NOON, **{job: "0 3 * * *"})
    made.ended(job, NOON + 15 * HOUR, "failed")
    assert made.due_at(job) == NOON + 15 * HOUR + DAY


def test_who_is_in_the_way_is_waited_for_and_is_no_failure() -> None:
    made, three = schedule(full="0 3 * * *"), NOON + 15 * HOUR
    for minute in range(90):
        now = three + minute * BUSY_AFTER
        assert made.due(now) == ["full"]
        made.began("full", now)
        made.ended("full", now, "busy")
        assert made.due(now) == []
    made.ended("full", three + 91 * MINUTE, "done")
    assert made.due_at("full") == three + DAY


def test_a_failed_backup_of_before_the_start_is_tried_again() -> None:
    made = schedule(full="0 3 * * *", drill="0 3 * * *")
    for job in made.jobs:
        made.remember(job, NOON - 5 * MINUTE, failed=True)
    assert made.due_at("full") == NOON + 10 * MINUTE
    assert made.due_at("drill") == NOON + 15 * HOUR


def test_the_first_backup_does_not_wait() -> None:
    made = schedule()
    made.at_once("full", NOON)
    assert run(made, NOON, 1) == ["14 12:00 full"]


@pytest.mark.parametrize(
    ("night", "began"),
    [
        (datetime(2026, 3, 28, 12, tzinfo=UTC), ["29 03:00", "30 02:30"]),  # there is no 02:30 on the 29th
        (datetime(2026, 10, 24, 12, tzinfo=UTC), ["25 02:30", "26 02:30"]),  # there are two on the 25th
    ],
)
def test_where_clocks_change_a_night_has_one_backup(night: datetime, began: list[str]) -> None:
    made, berlin, now, found = schedule(night, "Europe/Berlin", full="30 2 * * *"), zone("Europe/Berlin"), night, []
    while now < night + 2 * DAY:
        for job in made.due(now):
            found.append(f"{now.astimezone(berlin):%d %H:%M}")
            made.ended(job, now, "done")
        now += MINUTE
    assert found == began


def test_a_clock_that_was_an_hour_fast_runs_nothing_twice() -> None:
    made, three = schedule(full="0 3 * * *"), NOON + 15 * HOUR
    assert made.due(three) == ["full"]  # in truth it is 02:00
    made.began("full", three)
    made.ended("full", three + MINUTE, "done")
    assert run(made, three - HOUR, 20) == []


def test_a_clock_that_is_put_back_during_a_run_runs_it_once() -> None:
    made, three = schedule(full="0 3 * * *"), NOON + 15 * HOUR
    made.began("full", three)
    made.ended("full", three - HOUR + MINUTE, "done")
    assert run(made, three - HOUR + MINUTE, 20) == []


def test_a_clock_that_was_an_hour_slow_skips_nothing() -> None:
    made, three = schedule(full="0 3 * * *"), NOON + 15 * HOUR
    assert made.due(three - MINUTE) == []
    assert made.due(three - MINUTE + HOUR) == ["full"]


@pytest.mark.parametrize("outcome", ["done", "failed", "busy"])
def test_a_clock_that_was_years_fast_stops_nothing(outcome: Outcome) -> None:
    made = schedule(full="0 3 * * *")
    future = NOON + 3653 * DAY
    assert made.due(future) == ["full"]
    made.began("full", future)
    made.ended("full", future, outcome)
    assert len(run(made, NOON, 72)) in (3, 4)  # of which one may be the retry


def test_whatever_the_clock_does_everything_runs_and_nothing_too_often() -> None:
    """Forty days, in which the wall clock goes wrong now and then; what really passes is counted."""
    for seed in range(10):
        chance = random.Random(seed)
        made = schedule(NOON, **{job: f"{chance.randrange(60)} {chance.randrange(24)} * * *" for job in ORDER})
        counts, wrong = dict.fromkeys(ORDER, 0), timedelta(0)
        for hour in range(24 * 40):
            if chance.random() < 0.01:
                wrong = chance.choice([-HOUR, HOUR, timedelta(0)])
            for _ in range(len(ORDER)):
                now = NOON + hour * HOUR + wrong
                for job in made.due(now)[:1]:
                    counts[job] += 1
                    made.began(job, now)
                    made.ended(job, now, "done")
        counts["incremental"] += counts["full"]  # it may have been part of it
        for job, count in counts.items():
            most = 82 if job == "incremental" else 41
            assert 39 <= count <= most, (seed, job, counts)


def test_every_job_has_a_verb() -> None:
    assert set(VERBS) == set(ORDER)
