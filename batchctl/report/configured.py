"""The jobs that the configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from batchctl.guard.gap import job_hours

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchctl.config import Batch, Configuration, Rollup


class Job(NamedTuple):
    """A batch, a group of one, or a rollup's grain.

    Args:
        name: `daily`, `daily/upload` or `trend/1m`.
        batch: The batch that it is or belongs to; None for a grain.
        group: The group; None for a whole batch.
        rollup: The rollup; None for a batch.
        grain: The grain of it.
    """

    name: str
    batch: Batch | None = None
    group: str | None = None
    rollup: Rollup | None = None
    grain: str | None = None

    @property
    def top(self) -> str:
        """Name the batch or the rollup."""
        return self.name.partition("/")[0]

    @property
    def lock(self) -> str:
        """Name the job's file lock."""
        return f"batch.{self.top}" if self.batch else f"rollup.{self.top}.{self.grain}"

    @property
    def enabled(self) -> bool:
        """Tell whether the configuration lets it start."""
        return (self.batch or self.rollup).enabled  # type: ignore[union-attr]  # one of the two is there

    @property
    def schedule(self) -> str:
        """Return its own cron time; empty if it has none."""
        if self.rollup is not None:
            return self.rollup.schedule.get(self.grain or "", "")
        own = self.batch.group.get(self.group) if self.batch and self.group else None
        if self.group:
            return own.schedule if own else ""
        return self.batch.schedule if self.batch else ""

    @property
    def hours(self) -> str:
        """Return the hours in which it may start; empty for any."""
        return job_hours(self.batch, self.group) if self.batch else (self.rollup.hours if self.rollup else "")


def configured_jobs(configuration: Configuration) -> Iterator[Job]:
    """List every job in the order of the file."""
    for name, batch in configuration.batches.items():
        yield Job(name, batch)
        for group in batch.groups:
            yield Job(f"{name}/{group}", batch, group)
    for name, rollup in configuration.rollups.items():
        for grain in rollup.grains:
            yield Job(f"{name}/{grain}", rollup=rollup, grain=grain)


def pausable(configuration: Configuration) -> tuple[str, ...]:
    """Name every job, and each rollup as a whole."""
    # A batch is a job itself; a rollup is only the name of its grains.
    return tuple(dict.fromkeys(name for job in configured_jobs(configuration) for name in (job.top, job.name)))
