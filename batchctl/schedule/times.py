"""Cron times one after another, and what daylight saving does to them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import count, islice, takewhile
from typing import TYPE_CHECKING, Literal

from cronsim import CronSim

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DAY = timedelta(days=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LEAP_CYCLE, CALENDAR_CYCLE = 1461 * DAY, 28 * 1461 * DAY / 4
"""After four years the days of the months repeat, after 28 those of the week with them (from 1901 to 2099)."""

MOST_TIMES = 20_000
"""So many cron times of an endless schedule are looked at."""


@dataclass(frozen=True)
class CronTime:
    """An instant at which cron starts a line.

    Args:
        at: The instant, in UTC.
        daylight_saving: `missing` if local times since the one before do not exist, `twice` if this one occurs twice.
        note: What that means, in words.
    """

    at: datetime
    daylight_saving: Literal["missing", "twice"] | None = None
    note: str | None = None


def cron_times(expression: str, begin: datetime, zone: tzinfo) -> Iterator[datetime]:
    """Return the cron times from an instant on, itself included, in UTC."""
    last = begin - timedelta(microseconds=1)
    # One generator for all of them: next_time would read the expression again for each.
    for time in CronSim(expression, last.astimezone(zone)):
        instant = time.astimezone(UTC)
        # What a change of the clocks puts to the same minute is one start, and the second pass of an hour is later.
        if instant > last:
            yield instant
            last = instant


def marked_times(expression: str, begin: datetime, end: datetime, zone: tzinfo) -> Iterator[CronTime]:
    """Return the cron times between two instants (the second outside), with what daylight saving does to them."""
    gaps = list(_gaps(zone, begin, end))
    for instant in takewhile(lambda time: time < end, cron_times(expression, begin, zone)):
        missing: list[datetime] = []
        while gaps and gaps[0][0] <= instant:
            missing += _wall_times(expression, *gaps.pop(0)[1:])
        local = instant.astimezone(zone)
        if missing:
            yield CronTime(instant, "missing", _missing_note(missing, local, fixed=has_fixed_time(expression)))
        elif _utc_offset(local, 0) != _utc_offset(local, 1):
            yield CronTime(instant, "twice", _twice_note(local, fixed=has_fixed_time(expression)))
        else:
            yield CronTime(instant)


def has_fixed_time(expression: str) -> bool:
    """Tell whether Debian's cron takes a line for one with a time of its own: no star in front of minute or hour.

    Such a line is started once on each day, also when its time is left out or repeated; others follow the clock.
    """
    minute, hour, *_ = expression.split()
    return not minute.startswith("*") and not hour.startswith("*")


def period(expressions: Sequence[str]) -> timedelta:
    """Return after how long cron expressions repeat, were the clocks never changed."""
    days = any(field != "*" for expression in expressions for field in expression.split()[2:4])
    weekdays = any(expression.split()[4] != "*" for expression in expressions)
    if days:
        return CALENDAR_CYCLE if weekdays else LEAP_CYCLE
    return 7 * DAY if weekdays else DAY


def repeating_times(expression: str, begin: datetime) -> Iterator[datetime]:
    """Return the cron times from an instant on as if the clocks were never changed: at least MOST_TIMES of them."""
    length = period((expression,))
    first = _first_period(expression, begin, length)
    for number in count() if first else ():
        for time in first:
            yield time + number * length


@functools.lru_cache(maxsize=64)
def _first_period(expression: str, begin: datetime, length: timedelta) -> tuple[datetime, ...]:
    return tuple(islice(takewhile(lambda time: time < begin + length, cron_times(expression, begin, UTC)), MOST_TIMES))


def _gaps(zone: tzinfo, begin: datetime, end: datetime) -> Iterator[tuple[datetime, datetime, datetime]]:
    """List when clocks are put forward: the instant, and the first local time that does not exist and that does."""
    # A cron time just after the change may be the first that is asked for.
    low = begin - DAY
    while low < end:
        high = low + DAY
        before, after = low.astimezone(zone).utcoffset(), high.astimezone(zone).utcoffset()
        if before is not None and after is not None and after > before:
            known, change = low, high
            while change - known > timedelta(seconds=1):
                middle = known + (change - known) / 2
                known, change = (middle, change) if middle.astimezone(zone).utcoffset() == before else (known, middle)
            change = change.replace(microsecond=0)
            if change > begin - timedelta(minutes=1):
                wall = change.replace(tzinfo=None)
                yield change, wall + before, wall + after
        low = high


def _wall_times(expression: str, begin: datetime, end: datetime) -> list[datetime]:
    times = CronSim(expression, begin - timedelta(seconds=1))
    return list(takewhile(lambda time: time < end, times))


def _utc_offset(local: datetime, fold: int) -> timedelta | None:
    return local.replace(fold=fold).utcoffset()


def _missing_note(missing: Sequence[datetime], local: datetime, *, fixed: bool) -> str:
    first, last = missing[0], missing[-1]
    named = f"{first:%H:%M}" if first == last else f"{first:%H:%M} to {last:%H:%M}"
    verb = "does" if first == last else "do"
    what = f"cron starts at {local:%H:%M} instead" if fixed else "cron leaves that out"
    return f"{named} {verb} not exist on {first:%Y-%m-%d} (daylight saving); {what}"


def _twice_note(local: datetime, *, fixed: bool) -> str:
    what = "the second" if local.fold else "the first"
    then = "cron starts at the first only" if fixed else f"this is {what}"
    return f"{local:%H:%M} occurs twice on {local:%Y-%m-%d} (daylight saving); {then}"
