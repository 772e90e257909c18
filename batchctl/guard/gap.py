"""The third guard's arithmetic: the earliest next start (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchctl.config import Batch

CRON_JITTER = timedelta(seconds=60)
"""How much too early a start may come under `every`: cron does not start at the same second each day."""
DAY = timedelta(days=1)


@dataclass(frozen=True)
class GapRule:
    """How far apart starts have to be.

    Args:
        min_gap: Between a completion and the next start.
        gap_factor: The same as a multiple of the estimate; 0 for none.
        every: Between two starts; 0 for no such rule.
        zone: Where whole days of `every` are counted as local days.
    """

    min_gap: timedelta
    gap_factor: float
    every: timedelta
    zone: tzinfo

    def gap(self, estimate: timedelta) -> timedelta:
        """Return the gap that holds for a job that takes that long."""
        return max(self.min_gap, estimate * self.gap_factor)


@dataclass(frozen=True)
class Refusal:
    """Why a start comes too early, and from when on it does not."""

    reason: str
    next_eligible_at: datetime
    gap: timedelta
    since: datetime


def earliest_start(
    rule: GapRule, *, last_completed_at: datetime | None, last_started_at: datetime | None, estimate: timedelta
) -> Refusal | None:
    """Return what forbids a start, and until when; None if nothing ever ran.

    The instants are the database's; the reason is `gap` (after a completion) or `not_due` (`every`), whichever holds
    longer.
    """
    refusals = []
    if last_completed_at is not None:
        gap = rule.gap(estimate)
        refusals.append(Refusal("gap", last_completed_at + gap, gap, last_completed_at))
    if last_started_at is not None and rule.every:
        due = due_after(last_started_at, rule.every, rule.zone) - CRON_JITTER
        refusals.append(Refusal("not_due", due, rule.every, last_started_at))
    return max(refusals, key=lambda refusal: refusal.next_eligible_at, default=None)


def due_after(start: datetime, every: timedelta, zone: tzinfo) -> datetime:
    """Return when a start is due again; whole days are local days, also those of 23 or 25 hours."""
    if every % DAY:
        return start + every
    return _first_at_or_after(_meant(start, zone) + every, zone)


def _meant(start: datetime, zone: tzinfo) -> datetime:
    """Return the local time of a start; right after clocks went forward, the one that they left out.

    Cron then starts what stands in the hour that is missing. Counted from the later time on the clock, the start of the
    next day would come an hour too early, and be lost.
    """
    before, wall = ((start - early).astimezone(zone).replace(tzinfo=None) for early in (CRON_JITTER, timedelta(0)))
    return min(wall, before + CRON_JITTER)


def _first_at_or_after(wall: datetime, zone: tzinfo) -> datetime:
    """Return the first instant at which local clocks show a time or have gone past it."""
    # Of a time that exists twice this is the first; one that does not exist is read by the offset before the change.
    late = wall.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if late.astimezone(zone).replace(tzinfo=None) == wall:
        return late
    # Clocks went past it when they changed, which cron takes as its minute too. By the offset after the change it is
    # earlier than that.
    early = wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
    while late - early > timedelta(microseconds=1):
        middle = early + (late - early) / 2
        if middle.astimezone(zone).replace(tzinfo=None) < wall:
            early = middle
        else:
            late = middle
    return late


def refused(refusal: Refusal | None, now: datetime) -> bool:
    """Tell whether a start now is too early."""
    return refusal is not None and now < refusal.next_eligible_at


def gap_rule(batch: Batch, group: str | None, zone: tzinfo) -> GapRule:
    """Say how far apart starts of a batch, or of one of its groups, have to be."""
    own = batch.group.get(group) if group else None
    min_gap = own.min_gap if own and own.min_gap is not None else batch.min_gap
    every = own.every if own and own.every is not None else batch.every
    return GapRule(min_gap, batch.gap_factor, every, zone)


def job_hours(batch: Batch, group: str | None) -> str:
    """Say in which hours a batch, or one of its groups, may start."""
    own = batch.group.get(group) if group else None
    return own.hours if own and own.hours is not None else batch.hours
