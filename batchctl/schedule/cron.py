"""Cron times, time zones, daylight saving."""

from __future__ import annotations

import functools
import re
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from cronsim import CronSim, CronSimError

from batchctl.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchctl.config import Configuration

CRON_FIELDS = 5
DAY = 24 * 60  # minutes
YEARS = timedelta(days=2 * 366)
CRON_CHARACTERS = re.compile(r"^[0-9A-Za-z*,/\- ]+$")


def next_time(expression: str, after: datetime, zone: tzinfo) -> datetime | None:
    """Return the first cron time after an instant, in UTC, or None if there is none."""
    return next((time.astimezone(UTC) for time in CronSim(expression, after.astimezone(zone))), None)


def moved(expression: str, time: datetime, zone: tzinfo) -> bool:
    """Tell whether a cron time stands for a local time that does not exist that day, as clocks were put forward."""
    # The same hands on a clock that is never changed.
    hands = time.astimezone(zone).replace(tzinfo=UTC)
    return next_time(expression, hands - timedelta(minutes=1), UTC) != hands


def inside_hours(hours: str, now: datetime, zone: tzinfo) -> bool:
    """Tell whether an instant lies in the hours (cron's hour field, local); no hours means always."""
    return not hours or now.astimezone(zone).hour in hours_of_day(hours)


def next_inside_hours(hours: str, after: datetime, zone: tzinfo) -> datetime:
    """Return the first minute inside the hours after an instant."""
    minute = after.astimezone(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
    # Every zone is a multiple of a quarter of an hour away from UTC, so its hours begin at one.
    while not inside_hours(hours, minute, zone):
        minute += timedelta(minutes=15 - minute.minute % 15)
    return minute


@functools.cache
def hours_of_day(hours: str) -> frozenset[int]:
    """Return the hours that cron's hour field stands for; a repeated or missing hour changes nothing about them."""
    midnight = datetime(2024, 1, 1, tzinfo=UTC)
    times = CronSim(f"0 {hours} * * *", midnight - timedelta(minutes=1))
    return frozenset(time.hour for time in takewhile(lambda time: time.date() == midnight.date(), times))


def in_other_zone(expression: str, zone: tzinfo, other: tzinfo, now: datetime) -> str | None:
    """Write a cron expression of one time zone in the hours of another; None if none is right the whole year.

    Args:
        expression: A valid one.
        zone: In which it is meant.
        other: In which it is to be read.
        now: From when on it has to be right, for two years of daylight saving.
    """
    ahead = _minutes_ahead(zone, other, now)
    if ahead == {0}:
        return expression
    minute, _, *days = expression.split()
    found = CronSim(expression, now)
    times = {hour * 60 + minute for hour in found.hours for minute in found.minutes}
    moved = [{(time + minutes) % DAY for time in times} for minutes in ahead]
    if any(each != moved[0] for each in moved):
        return None
    if days != ["*"] * 3 and any(not 0 <= time + minutes < DAY for time in times for minutes in ahead):
        return None
    if moved[0] == times:
        return expression
    hours, minutes = sorted({time // 60 for time in moved[0]}), sorted({time % 60 for time in moved[0]})
    if len(hours) * len(minutes) != len(times):
        return None
    minute = minute if set(minutes) == set(found.minutes) else ",".join(map(str, minutes))
    return " ".join((minute, "*" if len(hours) == len(range(24)) else ",".join(map(str, hours)), *days))


@functools.cache
def _minutes_ahead(zone: tzinfo, other: tzinfo, now: datetime) -> set[int]:
    """Return by how many minutes the clocks of the other zone are ahead, all values that occur."""
    if zone == other:
        return {0}
    start = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    hours = (start + timedelta(hours=number) for number in range(YEARS // timedelta(hours=1)))
    zero = timedelta()
    return {
        ((hour.astimezone(other).utcoffset() or zero) - (hour.astimezone(zone).utcoffset() or zero))
        // timedelta(minutes=1)
        for hour in hours
    }


def problem(expression: str) -> str | None:
    """Say what is wrong with a cron expression, None if it is one that the system's cron takes too."""
    fields = expression.split()
    if len(fields) != CRON_FIELDS or CRON_CHARACTERS.match(expression) is None:
        return f"found {expression!r}, expected five cron fields such as '0 1 * * *'"
    # cronsim also knows L and #, which Debian's cron would refuse when the line is installed.
    if re.search(r"(^|[,\-/\s])\d*L", expression):
        return f"found {expression!r}, expected fields that the system's cron knows, which has no L"
    try:
        found = next(CronSim(expression, datetime(2024, 1, 1, tzinfo=UTC)), None)
    except CronSimError as error:
        return f"found {expression!r}, which is not a cron expression ({error}); expected one such as '0 1 * * *'"
    return None if found else f"found {expression!r}, which no day ever matches"


def validate(configuration: Configuration) -> None:
    """Check every cron expression of a configuration.

    Raises:
        ConfigurationError: names the key path of the first that is wrong.
    """
    for key_path, expression in _expressions(configuration):
        wrong = problem(expression)
        if wrong is not None:
            raise ConfigurationError(f"{configuration.path}: {key_path}: {wrong}")
    for key_path, hours in _hours(configuration):
        if " " in hours or problem(f"0 {hours} * * *"):
            raise ConfigurationError(
                f"{configuration.path}: {key_path}: found {hours!r}, expected cron's hour field such as '0-6' or '1,13'"
            )


def _expressions(configuration: Configuration) -> Iterator[tuple[str, str]]:
    for name, batch in configuration.batches.items():
        if batch.schedule:
            yield f"batch.{name}.schedule", batch.schedule
        for group_name, group in batch.group.items():
            if group.schedule:
                yield f"batch.{name}.group.{group_name}.schedule", group.schedule
    for name, rollup in configuration.rollups.items():
        for grain, expression in rollup.schedule.items():
            yield f"rollup.{name}.schedule.{grain}", expression


def _hours(configuration: Configuration) -> Iterator[tuple[str, str]]:
    for name, batch in configuration.batches.items():
        if batch.hours:
            yield f"batch.{name}.hours", batch.hours
        for group_name, group in batch.group.items():
            if group.hours:
                yield f"batch.{name}.group.{group_name}.hours", group.hours
    for name, rollup in configuration.rollups.items():
        if rollup.hours:
            yield f"rollup.{name}.hours", rollup.hours


def local_zone(name: str | None) -> tzinfo:
    """Return the configured time zone, or the system's as /etc/localtime has it (not $TZ, which cron does not set)."""
    import zoneinfo  # noqa: PLC0415 - needed only where times are shown or counted in days

    if name is not None:
        return zoneinfo.ZoneInfo(name)
    system = Path("/etc/localtime")
    try:
        _, found, zone = str(system.resolve(strict=True)).rpartition("/zoneinfo/")
        if found:
            return zoneinfo.ZoneInfo(zone)
        with system.open("rb") as file:
            return zoneinfo.ZoneInfo.from_file(file, key="localtime")
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        return UTC
