"""What runs and skips leave behind, and the claim that lets only one run live."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchctl.state.migrate import require_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime, timedelta

    from batchctl.state.database import Database, Session
    from batchctl.state.journal import Journal

CRASHED = "batchctl died before it could record an end"


@dataclass(frozen=True)
class ClaimRequest:
    """A start that asks to be the only one.

    Args:
        run_id: The run's new id.
        batch: Name of the batch.
        job: The batch, or batch/group.
        jobs: Jobs for which the start counts.
        groups: Groups that take part.
        host: Id of the state directory.
        hostname: Name of the machine.
        process: Process id, start in ticks, boot id of batchctl.
        claim: How long another host must take the run to be alive.
        whole: True if nothing was left out.
        config_hash: Hash of the batch's configuration.
    """

    run_id: str
    batch: str
    job: str
    jobs: tuple[str, ...]
    groups: tuple[str, ...]
    host: str
    hostname: str
    process: tuple[int, int, str]
    claim: timedelta
    whole: bool
    config_hash: str


@dataclass(frozen=True)
class LiveRun:
    """A run that has no outcome yet."""

    run_id: str
    host: str
    hostname: str
    pid: int
    start_ticks: int
    boot_id: str
    started_at: datetime


@dataclass(frozen=True)
class StoredRun:
    """A run as it is recorded; without an outcome it is live."""

    run_id: str
    batch: str
    host: str
    hostname: str
    outcome: str | None
    finished_at: datetime | None
    claimed_until: datetime


@dataclass(frozen=True)
class JobState:
    """What is remembered of a job at the moment of a claim, by the database's clock."""

    now: datetime
    last_started_at: datetime | None
    last_completed_at: datetime | None
    paused: bool
    estimate_seconds: float | None


@dataclass(frozen=True)
class Claim:
    """What became of a claim: ours since `now`, or refused by a live run or by the caller's decision.

    Args:
        now: The database's clock.
        started_at: Start of our run, None if the claim was refused.
        live: The run that is in the way.
        refusal: What the caller's decision returned.
        crashed: Runs that were found dead and closed.
    """

    now: datetime
    started_at: datetime | None
    live: LiveRun | None
    refusal: Any
    crashed: tuple[str, ...]


class Store:
    """Reads and writes the state over one session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def unfinished(self, batch: str, host: str) -> list[Any]:
        """List the processes of this host's unfinished runs: run_id, account, step, pid, pid_start_ticks, boot_id."""
        return self.session.fetch("run.unfinished", batch=batch, host=host)

    def claim(self, request: ClaimRequest, decide: Callable[[JobState], Any]) -> Claim:
        """Claim a batch for a run.

        The caller must have made sure that this host's earlier runs of the batch are dead: they are closed as crashed.

        Args:
            request: The start.
            decide: Says what forbids the start given the job's state, or None; called in the same transaction.
        """
        session = self.session
        with session.transaction():
            session.fetch("run.bound")
            session.fetch("run.lock_job", job=request.batch)
            now = session.fetch_one("run.now").now
            crashed = tuple(
                row.run_id
                for row in session.fetch("run.close_dead", batch=request.batch, host=request.host, reason=CRASHED)
            )
            live = self.live(request.batch)
            if live is not None:
                return Claim(now, None, live, None, crashed)
            refusal = decide(self.job_state(request.job, now, batch=request.batch))
            if refusal is not None:
                return Claim(now, None, None, refusal, crashed)
            pid, ticks, boot_id = request.process
            won = session.fetch(
                "run.claim",
                **{
                    name: getattr(request, name)
                    for name in ("run_id", "batch", "job", "host", "hostname", "claim", "whole", "config_hash")
                },
                groups=list(request.groups),
                pid=pid,
                pid_start_ticks=ticks,
                boot_id=boot_id,
                now=now,
            )
            if not won:
                return Claim(now, None, self.live(request.batch), None, crashed)
            session.fetch("run.mark_started", now=now, run_id=request.run_id, jobs=list(request.jobs))
            return Claim(now, now, None, None, crashed)

    def job_state(self, job: str, now: datetime, batch: str) -> JobState:
        """Read what is remembered of a job; it is paused if its batch is."""
        row = self.session.fetch_one("run.job", job=job)
        above = row if job == batch else self.session.fetch_one("run.job", job=batch)
        return JobState(
            now=now,
            last_started_at=row.last_started_at if row else None,
            last_completed_at=row.last_completed_at if row else None,
            paused=bool((row and row.paused) or (above and above.paused)),
            estimate_seconds=self.estimate_seconds(job),
        )

    def now(self) -> datetime:
        """Read the database's clock."""
        now: datetime = self.session.fetch_one("run.now").now
        return now

    def live(self, batch: str) -> LiveRun | None:
        """Return the run of a batch that has no outcome yet, on whatever host."""
        row = self.session.fetch_one("run.live", batch=batch)
        if row is None:
            return None
        return LiveRun(row.run_id, row.host, row.hostname, row.pid, row.pid_start_ticks, row.boot_id, row.started_at)

    def run(self, run_id: str) -> StoredRun | None:
        """Read a run, None if there is none of that id."""
        row = self.session.fetch_one("run.one", run_id=run_id)
        return row and StoredRun(*row)

    def close(self, run: StoredRun, reason: str) -> bool:
        """Close a run that is known to be dead as crashed; return whether it was still live.

        Args:
            run: The run.
            reason: What is known of its end, in words.
        """
        session = self.session
        with session.transaction():
            session.fetch("run.bound")
            # No start can claim the batch meanwhile, so what is closed is this run and no later one.
            session.fetch("run.lock_job", job=run.batch)
            live = self.live(run.batch)
            if live is None or live.run_id != run.run_id:
                return False
            session.fetch("run.close_dead", batch=run.batch, host=run.host, reason=reason)
            return True

    def estimate_seconds(self, job: str) -> float | None:
        """Return the median duration of the last ten successes, None before the first."""
        seconds: float | None = self.session.fetch_one("run.estimate", job=job).seconds
        return seconds

    def record_skip(self, job: str, reason: str, detail: str, *, series: bool = False) -> None:
        """Record a start that was refused.

        Args:
            job: The job.
            reason: A skip reason, one word.
            detail: The same in words.
            series: Count it into the last row if that has the same reason and nothing started since.
        """
        if series:
            self.session.fetch("run.skip_in_series", job=job, reason=reason, detail=detail)
        else:
            self.write("skip", {"job": job, "reason": reason, "detail": detail})

    def write(self, name: str, values: Mapping[str, Any]) -> Any:
        """Execute one of the records step_started, step_finished, run_finished, skip; each may be repeated.

        Args:
            name: The record.
            values: Its columns; `at` is the time it is about, if that is not now.
        """
        return self.session.fetch_one(f"run.{name}", **{"at": None, **values})

    def jobs(self) -> list[Any]:
        """List the state of all jobs."""
        return self.session.fetch("run.jobs")

    def history(self, limit: int, job: str | None = None) -> list[Any]:
        """List runs and skips, newest first."""
        return self.session.fetch("run.history", limit=limit, job=job)


@contextmanager
def open_store(
    database: Database,
    journal: Journal,
    *,
    patience: float = 0,
    limit: float | None = None,
    start_server: bool = True,
) -> Iterator[Store]:
    """Connect for the block, make sure that the schema fits, and record what the journal holds."""
    with database.connect(patience=patience, limit=limit, start_server=start_server) as session:
        require_schema(session)
        store = Store(session)
        journal.replay(store.write)
        yield store
