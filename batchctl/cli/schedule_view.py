"""A simulation as operators draw it: what each cron time brings, bars over days, the cadence in words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import TYPE_CHECKING

from batchctl.config import Duration
from batchctl.logs import elapsed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import tzinfo

    from batchctl.report.player import Cadence, Event
    from batchctl.report.scenario import Scenario
    from batchctl.report.simulation import Simulation

TIME_SHOWN, SHORT_TIME_SHOWN = "%Y-%m-%d %H:%M", "%m-%d %H:%M"
MINUTE, CELL = timedelta(minutes=1), timedelta(minutes=30)
CELLS = 48
LONGEST_LINE = 31
"""Days that the time line shows."""
LONGEST_SERIES = 3
"""Equal skips in a row that are shown one by one."""
BARS = "#=+%@&"
"""What the runs of each job are drawn with."""
HOUR, DAY = 3600, 86400


def heading(scenario: Scenario) -> Iterator[str]:
    """Say what is played."""
    batch = scenario.batch
    jobs = scenario.jobs()
    for job in jobs:
        name = f"{job.name}: " if scenario.name is not None else ""
        lengths = ", ".join(_duration(length.duration.total_seconds()) for length in job.lengths)
        yield f'{name}schedule "{job.schedule}" in {scenario.zone}, runs of {lengths}'
        rules = [f"at least {_duration(job.rule.min_gap.total_seconds())} after a completion"]
        if job.rule.gap_factor:
            rules.append(f"or {job.rule.gap_factor:g} times the estimate")
        if job.rule.every:
            rules.append(f"every {_duration(job.rule.every.total_seconds())}")
        if job.hours:
            rules.append(f"in the hours {job.hours}")
        yield f"  {', '.join(rules)}"
    if any(length.duration > batch.timeout for job in jobs for length in job.lengths):
        yield f"  what is longer than the timeout of {batch.timeout} is cut there (--timeout)"
    yield ""


def events(played: Simulation, zone: tzinfo) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return headings and rows: what each cron time brings; a long series of equal skips is shown by its ends."""
    several = len(played.jobs) > 1
    first = played.events[0].scheduled_at.astimezone(zone).date() if played.events else None
    # With a column more there is no room for years in 80.
    form = SHORT_TIME_SHOWN if several else TIME_SHOWN
    rows: list[list[str]] = []
    for event, hidden in _shown(played.events):
        job = [event.job or ""] if several else []
        if hidden:
            rows.append(["", f"{hidden} more", *job, _what(event), "", ""])
        day = (event.scheduled_at.astimezone(zone).date() - first).days + 1 if first else 0
        scheduled, ends, eligible = (
            "-" if instant is None else instant.astimezone(zone).strftime(form)
            for instant in (event.scheduled_at, event.ends_at, event.next_eligible_at)
        )
        rows.append([str(day), scheduled + ("*" if event.note else ""), *job, _what(event), ends, eligible])
    if several:
        return ("day", "cron time", "job", "what happens", "finished at", "next possible"), rows
    return ("day", "cron time", "what happens", "finished at", "next possible start"), rows


def _shown(played: Sequence[Event]) -> Iterator[tuple[Event, int]]:
    """Leave out the middle of long series of equal skips: each event that is shown, and how many are not before it."""
    for _, same in groupby(played, key=lambda event: (event.job, event.action, event.reason)):
        series = list(same)
        if series[0].action == "start" or len(series) <= LONGEST_SERIES:
            yield from ((event, 0) for event in series)
        else:
            yield series[0], 0
            yield series[-1], len(series) - 2


def notes(played: Simulation) -> Iterator[str]:
    """Say what daylight saving does."""
    for note in dict.fromkeys(event.note for event in played.events if event.note):
        yield f"* {note}"
    if not played.events:
        yield "No cron time in so many days."


def time_line(played: Simulation, zone: tzinfo) -> Iterator[str]:
    """Draw the runs over the days, half an hour a letter, on the local clock."""
    if not played.events:
        return
    bars = {cadence.job: BARS[number % len(BARS)] for number, cadence in enumerate(played.jobs)}
    # Where clocks are put back meanwhile, they may show no more at the end than at the beginning.
    runs = [
        (since := _wall(event.scheduled_at, zone), max(_wall(event.ends_at, zone), since + MINUTE), bars[event.job])
        for event in played.events
        if event.ends_at
    ]
    skips = [_wall(event.scheduled_at, zone) for event, _ in _shown(played.events) if event.action == "skip"]
    begin = _wall(played.events[0].scheduled_at, zone).replace(hour=0, minute=0)
    rows: dict[int, list[str]] = {}

    def draw(since: datetime, until: datetime, letter: str) -> None:
        for cell in range(int((since - begin) / CELL), -int((begin - until) // CELL)):
            rows.setdefault(cell // CELLS, ["."] * CELLS)[cell % CELLS] = letter

    for since, until, letter in runs:
        draw(since, until, letter)
    for at in skips:
        draw(at, at + MINUTE, "x")
    yield ""
    yield " " * 16 + "".join(f"{hour:02}".ljust(12) for hour in range(0, 24, 6)) + "24"
    last = -1
    for day in sorted(rows)[:LONGEST_LINE]:
        if day - last > 1:
            yield f"{day - last - 1} more days without a run"
        yield f"{begin + day * timedelta(days=1):%a %Y-%m-%d}  {''.join(rows[day])}"
        last = day
    if len(rows) > LONGEST_LINE:
        yield f"{len(rows) - LONGEST_LINE} more days with runs"
    several = [f"{bar} {job}" for job, bar in bars.items()] if len(bars) > 1 else ["# runs"]
    yield f"{', '.join(several)}, x skipped"
    yield ""


def in_words(played: Simulation) -> Iterator[str]:
    """Say how often it runs in the end."""
    for cadence in played.jobs:
        yield _cadence(cadence)
    if played.recommendations:
        yield ""
        yield "Better, each played in the same way:"
    elif any(each.cadence_seconds != each.scheduled_seconds for each in played.jobs):
        yield "Nothing that was tried is better."


def advice(played: Simulation) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return headings and rows: what would be better."""
    rows = [(f"every {_duration(each.cadence_seconds)}", each.kind, each.text) for each in played.recommendations]
    return ("cadence", "what", "how"), rows


def _cadence(cadence: Cadence) -> str:
    job, found, scheduled = cadence.job or "It", cadence.cadence_seconds, cadence.scheduled_seconds
    if found is None:
        return f"{job} does not start twice: there is no cadence."
    if scheduled is None or found == scheduled:
        return f"{job} starts every {_spoken(found)}, at each cron time."
    text = f"{job} starts every {_spoken(found)} in the long run, not every {_spoken(scheduled)} as scheduled"
    if cadence.shortest_seconds != cadence.longest_seconds:
        shortest, longest = (_duration(each or 0) for each in (cadence.shortest_seconds, cadence.longest_seconds))
        text += f"; the distances are {shortest} to {longest}"
    return f"{text}."


def _spoken(seconds: float) -> str:
    """Name a distance, in days too where it is whole days."""
    days = seconds / DAY
    shown = _duration(seconds)
    return f"{shown} ({days:g} days)" if days > 1 and seconds % DAY == 0 and "d" not in shown else shown


def _duration(seconds: float) -> str:
    return str(Duration(seconds=int(seconds))) if seconds % 60 == 0 else elapsed(seconds)


def _what(event: Event) -> str:
    if event.action == "start":
        return "starts, is cut" if event.outcome == "timeout" else "starts"
    return f"skipped: {event.reason}"


def _wall(instant: datetime, zone: tzinfo) -> datetime:
    return instant.astimezone(zone).replace(tzinfo=UTC)
