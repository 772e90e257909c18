"""What a schedule will really do: each cron time, the cadence in the end, and what would be better."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from batchctl.errors import UsageError
from batchctl.report.advice import Recommendation, recommend
from batchctl.report.player import Cadence, Event, play
from batchctl.report.scenario import Scenario, overall

MOST_EVENTS = 100_000
"""More cron times than anybody reads."""


@dataclass(frozen=True)
class Simulation:
    """What a schedule will really do.

    Args:
        schedule: The cron expression of the whole batch; None if only groups have one.
        timezone: Name of the zone.
        events: Each cron time and what comes of it.
        cadence_seconds: The mean distance between starts in the end; None if there are fewer than two.
        jobs: The same for each job with a schedule.
        recommendations: What would be better, best first.
    """

    schedule: str | None
    timezone: str
    events: tuple[Event, ...]
    cadence_seconds: float | None
    jobs: tuple[Cadence, ...]
    recommendations: tuple[Recommendation, ...]


def simulate(scenario: Scenario, begin: datetime, days: int) -> Simulation:
    """Play a scenario from an instant on.

    Args:
        scenario: What is played.
        begin: The first instant at which cron may start something.
        days: How many local days.

    Raises:
        UsageError: that is too much to play.
    """
    zone, jobs = scenario.zone, scenario.jobs()
    # Arithmetic on an aware datetime of one zone moves the wall clock: days of 23 hours are days.
    end = (begin.astimezone(zone) + timedelta(days=days)).astimezone(UTC)
    events = tuple(islice(play(jobs, scenario.batch.timeout, zone, begin.astimezone(UTC), end), MOST_EVENTS + 1))
    if len(events) > MOST_EVENTS:
        raise UsageError(f"--days {days}: more than {MOST_EVENTS:,} cron times in so many days; give fewer days")
    measured = scenario.cadences(begin)
    return Simulation(
        schedule=scenario.batch.schedule or None,
        timezone=str(zone),
        events=events,
        cadence_seconds=overall(measured, scenario.name),
        jobs=measured,
        recommendations=recommend(scenario, measured, begin),
    )
