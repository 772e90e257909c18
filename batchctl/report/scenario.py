"""What is played: a batch with its schedules and gaps, and how long its runs take."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from batchctl.config import Batch, Duration, OptionalDuration, Step
from batchctl.guard.gap import gap_rule, job_hours
from batchctl.report.player import Cadence, Job, Length, cadences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Wish:
    """What options say instead of the configuration; None where they say nothing."""

    schedule: str | None = None
    min_gap: Duration | None = None
    gap_factor: float | None = None
    every: OptionalDuration | None = None
    timeout: Duration | None = None

    def applied(self, batch: Batch) -> Batch:
        """Return a batch with these in place of its own, in its groups too."""
        options = {"schedule", "min_gap", "gap_factor", "every", "timeout"}
        own = {option: value for option in options if (value := getattr(self, option)) is not None}
        # A group without a gap of its own has that of the batch.
        of_groups = {option: None for option in ("min_gap", "every") if option in own}
        groups = {name: msgspec.structs.replace(group, **of_groups) for name, group in batch.group.items()}
        return msgspec.structs.replace(batch, group=groups, **own)


@dataclass(frozen=True)
class Scenario:
    """A batch, how long its runs take, and where.

    Args:
        name: The batch; None for one that is not configured.
        batch: Its configuration.
        lengths: How long the runs of each job take, in turn.
        zone: Of schedules, hours and local days.
        known: Durations of the last successes of each job, in seconds.
        step_seconds: How long each step takes, as far as that is known.
        parts_known: Groups whose steps are known from runs of the whole batch before the first that is played.
    """

    name: str | None
    batch: Batch
    lengths: Mapping[str | None, tuple[Length, ...]]
    zone: tzinfo
    known: Mapping[str | None, tuple[float, ...]] = field(default_factory=dict)
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    parts_known: frozenset[str] = frozenset()

    def jobs(self) -> tuple[Job, ...]:
        """List what cron starts: the whole batch, then its groups, as far as they have schedules."""
        return tuple(self._job(name) for name in scheduled(self.name, self.batch))

    def _job(self, name: str | None) -> Job:
        batch = self.batch
        group = None if name == self.name else (name or "").rpartition("/")[2]
        taking_part = batch.groups if group is None else (group,)
        return Job(
            name=name,
            schedule=batch.schedule if group is None else batch.group[group].schedule,
            rule=gap_rule(batch, group, self.zone),
            hours=job_hours(batch, group),
            lengths=self.lengths[name],
            counts_for=(self.name, *(job_name(self.name, each) for each in taking_part)),
            known=self.known.get(name, ()),
            part=None if group is None else _usual(self.lengths[name]),
            part_known=name in self.parts_known,
        )

    def cadences(self, begin: datetime) -> tuple[Cadence, ...]:
        """Say how often each job runs in the end; measured on the local clock, as if it were never changed."""
        wall = begin.astimezone(self.zone).replace(tzinfo=UTC)
        return cadences(self.jobs(), self.batch.timeout, wall)

    def cadence(self, begin: datetime) -> float | None:
        """Say how often all of it runs in the end, in seconds."""
        return overall(self.cadences(begin), self.name)


def _usual(lengths: Sequence[Length]) -> float:
    """Return how many seconds a group takes; its steps are as long in a run of the whole batch."""
    return median(length.duration.total_seconds() for length in lengths)


def overall(measured: tuple[Cadence, ...], name: str | None) -> float | None:
    """Say how often all of a batch runs: as often as the whole batch, or else as its group that runs least often."""
    for cadence in measured:
        if cadence.job == name:
            return cadence.cadence_seconds
    found = [cadence.cadence_seconds for cadence in measured]
    return max((each for each in found if each is not None), default=None) if None not in found else None


def job_name(batch: str | None, group: str) -> str:
    """Name a group's job."""
    return f"{batch or ''}/{group}"


def scheduled(name: str | None, batch: Batch) -> tuple[str | None, ...]:
    """Name the jobs of a batch that have a schedule: the batch, then its groups."""
    groups = (group for group in batch.groups if group in batch.group and batch.group[group].schedule)
    return (*([name] if batch.schedule else []), *(job_name(name, group) for group in groups))


def unconfigured() -> Batch:
    """Make a batch of which nothing is known; it is taken to have two halves that could run apart."""
    halves = tuple(Step(id=half, group=half, command=("true",)) for half in ("first", "second"))
    return Batch(step=halves)
