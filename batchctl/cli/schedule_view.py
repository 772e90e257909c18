"""A simulation as people draw it: what each cron time brings, bars over days, the cadence in words."""

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

MINUTE_SHOWN = "%Y-%m-%d %H:%M"
CELL = timedelta(minutes=30)
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
    rows: list[list[str]] = []
    for _, same in groupby(played.events, key=lambda event: (event.job, event.action, event.reason)):
        series = list(same)
        hidden = len(series) - 2 if series[0].action == "skip" and len(series) > LONGEST_SERIES else 0
        for number, event in enumerate(series):
            if hidden and number == 1:
                rows.append(["", f"{hidden} more", *([event.job or ""] if several else []), _what(event), "", ""])
            if not hidden or number in (0, len(series) - 1):
                day = (event.scheduled_at.astimezone(zone).date() - first).days + 1 if first else 0
                rows.append(
                    [
                        str(day),
                        _time(event.scheduled_at, zone) + ("*" if event.note else ""),
                        *([event.job or ""] if several else []),
                        _what(event),
                        _time(event.ends_at, zone),
                        _time(event.next_eligible_at, zone),
                    ]
                )
    job = ["job"] if several else []
    return ("day", "cron time", *job, "what happens", "finished at", "next possible start"), rows


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
    walls = [(event, _wall(event.scheduled_at, zone)) for event in played.events]
    first = walls[0][1].replace(hour=0, minute=0)
    runs = [(wall, _wall(event.ends_at, zone), event.job) for event, wall in walls if event.ends_at]
    last = max([walls[-1][1], *(end for _, end, _ in runs)])
    days = (last - first).days + 1
    shown = min(days, LONGEST_LINE)
    cells = [["."] * CELLS for _ in range(shown)]

    def draw(begin: datetime, end: datetime, letter: str) -> None:
        for number in range(int((begin - first) / CELL), min(-int((first - end) // CELL), shown * CELLS)):
            cells[number // CELLS][number % CELLS] = letter

    for begin, end, job in runs:
        draw(begin, end, bars[job])
    for event, wall in walls:
        if event.action == "skip":
            draw(wall, wall + CELL / CELLS, "x")
    yield ""
    yield " " * 16 + "".join(f"{hour:02}".ljust(12) for hour in range(0, 24, 6)) + "24"
    for number, row in enumerate(cells):
        yield f"{first + number * timedelta(days=1):%a %Y-%m-%d}  {''.join(row)}"
    if days > shown:
        yield f"{days - shown} more days"
    several = [f"{bar} {job}" for job, bar in bars.items()] if len(bars) > 1 else ["# runs"]
    yield f"{', '.join(several)}, x skipped"
    yield ""


def in_words(played: Simulation) -> Iterator[str]:
    """Say how often it runs in the end."""
    for cadence in played.jobs:
        name = f"{cadence.job}: " if cadence.job is not None else ""
        yield f"{name}{_cadence(cadence)}"
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
    found, scheduled = cadence.cadence_seconds, cadence.scheduled_seconds
    if found is None:
        return "In the end it starts less than twice: there is no cadence."
    if scheduled is None or found == scheduled:
        return f"In the end it starts every {_spoken(found)}, at each cron time."
    text = f"In the end it starts every {_spoken(found)}, not every {_spoken(scheduled)} as scheduled"
    if cadence.shortest_seconds != cadence.longest_seconds:
        shortest, longest = (_duration(each or 0) for each in (cadence.shortest_seconds, cadence.longest_seconds))
        text += f"; the distances are {shortest} to {longest}"
    return f"{text}."


def _spoken(seconds: float) -> str:
    """Name a distance, in days too where it is whole days."""
    days = seconds / DAY
    return f"{_duration(seconds)} ({days:g} days)" if days > 1 and seconds % DAY == 0 else _duration(seconds)


def _duration(seconds: float) -> str:
    return str(Duration(seconds=int(seconds))) if seconds % 60 == 0 else elapsed(seconds)


def _what(event: Event) -> str:
    if event.action == "start":
        return "starts, is cut" if event.outcome == "timeout" else "starts"
    return f"skipped: {event.reason}"


def _time(instant: datetime | None, zone: tzinfo) -> str:
    return "-" if instant is None else instant.astimezone(zone).strftime(MINUTE_SHOWN)


def _wall(instant: datetime, zone: tzinfo) -> datetime:
    return instant.astimezone(zone).replace(tzinfo=UTC)
