"""What a claim asks for and comes to, and what it meets: runs and jobs as they are recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta


class ClaimRequest(NamedTuple):
    """A start that asks to be the only one.

    Args:
        run_id: The run's id: a new one, or that of the run to continue.
        resumed: None for a new run; else how many times the run to continue had been continued when it was chosen.
        batch: Name of the batch.
        job: The batch, or batch/group.
        jobs: Jobs for which the start counts.
        groups: Groups that take part.
        accounts: Accounts that take part, None for all.
        steps: Steps that take part, None for all of the job.
        host: Id of the state directory.
        hostname: Name of the machine.
        process: Process id, start in ticks, boot id of batchctl.
        claim: How long another host must take the run to be alive.
        config_hash: Hash of the batch's configuration.
    """

    run_id: str
    resumed: int | None
    batch: str
    job: str
    jobs: tuple[str, ...]
    groups: tuple[str, ...]
    accounts: tuple[str, ...] | None
    steps: tuple[str, ...] | None
    host: str
    hostname: str
    process: tuple[int, int, str]
    claim: timedelta
    config_hash: str

    def columns(self) -> dict[str, Any]:
        """Return the request as columns of the table `run`."""
        pid, ticks, boot_id = self.process
        return {
            "run_id": self.run_id,
            "batch": self.batch,
            "job": self.job,
            "groups": list(self.groups),
            "accounts": None if self.accounts is None else list(self.accounts),
            "steps": None if self.steps is None else list(self.steps),
            "host": self.host,
            "hostname": self.hostname,
            "pid": pid,
            "pid_start_ticks": ticks,
            "boot_id": boot_id,
            "whole": self.accounts is None and self.steps is None,
            "config_hash": self.config_hash,
        }


class LiveRun(NamedTuple):
    """A run that has no outcome yet."""

    run_id: str
    host: str
    hostname: str
    pid: int
    start_ticks: int
    boot_id: str
    started_at: datetime


class StoredRun(NamedTuple):
    """A run as it is recorded; without an outcome it is live."""

    run_id: str
    batch: str
    host: str
    hostname: str
    outcome: str | None
    finished_at: datetime | None
    claimed_until: datetime


class PastStep(NamedTuple):
    """How long a step took in a run, its failed attempts included."""

    account: str
    step: str
    quantity: int
    seconds: float


class PastRun(NamedTuple):
    """How long a run took, and its steps as far as they were recorded.

    Args:
        seconds: That long.
        steps: Its steps.
        of_batch: Whether it ran the whole batch, while the job is a group of it.
    """

    seconds: float
    steps: tuple[PastStep, ...] = ()
    of_batch: bool = False

    @property
    def quantities(self) -> dict[tuple[str, str], int]:
        """Return what each step of each account was given."""
        return {(step.account, step.step): step.quantity for step in self.steps}


class JobState(NamedTuple):
    """What is remembered of a job at the moment of a claim, by the database's clock.

    Args:
        now: The database's clock.
        last_started_at: None if it never started.
        last_completed_at: None if it never completed.
        paused: What is paused of all that would start with the job.
        past_runs: Its last successes, by which its next run is estimated.
    """

    now: datetime
    last_started_at: datetime | None
    last_completed_at: datetime | None
    paused: tuple[str, ...]
    past_runs: tuple[PastRun, ...] = ()


class Claim(NamedTuple):
    """What became of a claim: ours since `now`, or refused by a live run or by the caller's decision.

    Args:
        now: The database's clock.
        run: What to record again should the database lose it (values of `run_started`); None if it was refused.
        live: The run that is in the way.
        refusal: What the caller's decision returned.
        crashed: Runs that were found dead and closed.
        past_runs: The job's last successes, if the claim is ours.
        corrected: Jobs whose last start or completion lay ahead of the database's clock and was brought back to now.
    """

    now: datetime
    run: Mapping[str, Any] | None = None
    live: LiveRun | None = None
    refusal: Any = None
    crashed: tuple[str, ...] = ()
    past_runs: tuple[PastRun, ...] = ()
    corrected: tuple[str, ...] = ()
