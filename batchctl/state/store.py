"""What runs and skips leave behind, and the claim that lets only one run live."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

from batchctl.state.claim import Claim, JobState, LiveRun, PastRun, PastStep, StoredRun
from batchctl.state.driver_errors import WrongDataError
from batchctl.state.migrate import require_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from datetime import datetime, timedelta

    from batchctl.state.claim import ClaimRequest
    from batchctl.state.database import Database, Session
    from batchctl.state.journal import Journal

CRASHED = "batchctl died before it could record an end"
UNKNOWN: Mapping[str, Any] = dict.fromkeys(
    (
        "at", "duration", "config_hash", "token", "batch", "job", "groups", "accounts", "steps", "host", "hostname",
        "boot_id", "pid", "pid_start_ticks", "started_at", "claimed_until", "whole",
    )
) | {"resumed": 0}  # fmt: skip
"""What records need not say, and those that an earlier version left in a journal do not."""
QUICK = {"lock": "3s", "statement": "4s"}
"""A record has less time than whoever waits for it: what is given up must not stay with the server."""


class Store:
    """Reads and writes the state over one session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def unfinished(self, batch: str, host: str) -> list[Any]:
        """List the processes of this host's unfinished runs: run_id, account, step, pid, pid_start_ticks, boot_id."""
        with self.session.bounded():
            return self.session.fetch("run.unfinished", batch=batch, host=host)

    def claim(self, request: ClaimRequest, decide: Callable[[JobState], Any]) -> Claim:
        """Claim a batch for a run.

        The caller must have made sure that this host's earlier runs of the batch are dead: they are closed as crashed.

        Args:
            request: The start.
            decide: Says what forbids the start given the job's state, or None; called in the same transaction.
        """
        session, batch = self.session, request.batch
        with session.bounded():
            session.fetch("run.lock_job", job=batch)
            now = self.now()
            corrected = tuple(row.job for row in session.fetch("run.correct_future", batch=batch, now=now))
            dead = session.fetch("run.close_dead", batch=batch, host=request.host, reason=CRASHED)
            claim = Claim(now, crashed=tuple(row.run_id for row in dead), corrected=corrected)
            live = self.live(batch)
            if live is not None:
                return claim._replace(live=live)
            job = self.job_state(request.job, now, jobs=request.jobs)
            refusal = decide(job)
            if refusal is not None:
                return claim._replace(refusal=refusal)
            columns = request.columns()
            if request.resumed is None:
                won = session.fetch("run.claim", **columns, now=now, claim=request.claim)
                mark = "run.mark_started"
            else:
                own = {"now": now, "claim": request.claim, "resumed": request.resumed}
                won = session.fetch("run.resume", **columns, **own)
                mark = "run.mark_resumed"
            if not won:
                return claim._replace(live=self.live(batch))
            jobs = list(request.jobs)
            session.fetch(mark, run_id=request.run_id, jobs=jobs, now=now, started_at=won[0].started_at)
            kept = {"started_at": won[0].started_at, "resumed": won[0].resumed, "claimed_until": now + request.claim}
            return claim._replace(run={**columns, **kept, "jobs": jobs}, past_runs=job.past_runs)

    def job_state(self, job: str, now: datetime, *, jobs: Iterable[str]) -> JobState:
        """Read what is remembered of a job that is about to start, and with it the jobs for which that counts."""
        row = self.session.fetch_one("run.job", job=job, jobs=list(jobs))
        return JobState(
            now=now,
            last_started_at=row.last_started_at,
            last_completed_at=row.last_completed_at,
            paused=tuple(row.paused),
            past_runs=self.past_runs(job),
        )

    def pause(self, job: str, *, batch: str | None) -> bool:
        """Refuse starts of a job and of all below it; return False if it was paused before.

        Args:
            job: The job.
            batch: The batch that it is or is in, None for a rollup.
        """
        with self.session.bounded():
            if batch is not None:
                # A start that is being decided comes first: afterwards it is live, or refused.
                self.session.fetch("run.lock_job", job=batch)
            return bool(self.session.fetch("run.pause", job=job))

    def unpause(self, job: str) -> tuple[str, ...]:
        """Allow starts of a job and of all below it again; return what was paused."""
        with self.session.bounded():
            return tuple(sorted(row.job for row in self.session.fetch("run.unpause", job=job)))

    def paused(self, jobs: Iterable[str]) -> tuple[str, ...]:
        """Say which of these jobs are paused."""
        return tuple(row.job for row in self.session.fetch("run.paused", jobs=list(jobs)))

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

    def resumable(self, batch: str, *, job: str | None = None, run_id: str | None = None) -> Any:
        """Return the named run, or the latest without success (of a job) that no later one made up for, or None."""
        return self.session.fetch_one("run.resumable", batch=batch, job=job, run_id=run_id)

    def attempts(self, run_id: str) -> list[Any]:
        """List the latest attempt at each step of a run."""
        return self.session.fetch("run.attempts", run_id=run_id)

    def heartbeat(self, run: Mapping[str, Any], lease: timedelta | None) -> Any:
        """Say that a run is alive and return what it is asked; None if the claim is another's or was closed."""
        own = {"run_id": run["run_id"], "resumed": run["resumed"], "lease": lease}
        with self.session.bounded(**QUICK):
            heard = self.session.fetch_one("run.heartbeat", **own)
        if heard is None:
            self.write("run_started", run)
            with self.session.bounded(**QUICK):
                heard = self.session.fetch_one("run.heartbeat", **own)
        return heard

    def request_stop(self, run_id: str, how: str) -> bool:
        """Ask a live run to end (stop, after_step, now) at its next heartbeat; return whether it was still live."""
        return bool(self.session.fetch("run.request_stop", run_id=run_id, how=how))

    def run(self, run_id: str) -> StoredRun | None:
        """Read a run, None if there is none of that id."""
        row = self.session.fetch_one("run.one", run_id=run_id)
        return row and StoredRun(*row)

    def close(self, run: StoredRun, reason: str | None = None) -> bool:
        """Close a run that is known to be dead as crashed; return whether it was still live.

        Args:
            run: The run.
            reason: What is known of its end, in words; None if no more than that it died.
        """
        session = self.session
        with session.bounded():
            # No start can claim the batch meanwhile, so what is closed is this run and no later one.
            session.fetch("run.lock_job", job=run.batch)
            live = self.live(run.batch)
            if live is None or live.run_id != run.run_id:
                return False
            session.fetch("run.close_dead", batch=run.batch, host=run.host, reason=reason or CRASHED)
            return True

    def past_runs(self, job: str) -> tuple[PastRun, ...]:
        """Return the last ten successes of a job that left nothing out, newest first.

        A group that has none gets those of the whole batch.
        """
        rows = self.session.fetch("run.past_runs", job=job)
        return tuple(
            PastRun(
                seconds,
                tuple(
                    PastStep(row.account, row.step, row.quantity, row.step_seconds)
                    for row in of_run
                    if row.step is not None
                ),
                of_batch,
            )
            for (_, of_batch, seconds), of_run in groupby(rows, key=lambda row: (row.run_id, row.of_batch, row.seconds))
        )

    def latest_durations(self, job: str) -> list[Any]:
        """List how long the last ten complete runs took: seconds and success, oldest first."""
        return self.session.fetch("run.latest_durations", job=job)

    def record_in_series(self, job: str, reason: str, detail: str) -> None:
        """Record a start that was refused; count it into the last row if that has the same reason and nothing started.

        Args:
            job: The job.
            reason: A skip reason, one word.
            detail: The same in words.
        """
        self.session.fetch("run.skip_in_series", job=job, reason=reason, detail=detail)

    def write(self, name: str, values: Mapping[str, Any]) -> Any:
        """Execute a record: run_started, step_*, run_finished, withdraw, skip; each may be repeated.

        Args:
            name: The record.
            values: Its columns; `at` is the time it is about, if that is not now.
        """
        with self.session.bounded(**QUICK):
            return self.session.fetch_one(f"run.{name}", **{**UNKNOWN, **values})

    def write_in_run(self, run: Mapping[str, Any], name: str, values: Mapping[str, Any]) -> Any:
        """Execute a record of a run whose claim the database may have lost.

        Args:
            run: The claim, as values of `run_started`.
            name: The record.
            values: Its columns.
        """
        try:
            return self.write(name, values)
        except WrongDataError:
            # A step of a run that is not there.
            self.write("run_started", run)
            return self.write(name, values)

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
    known: bool = False,
    replay: bool = True,
) -> Iterator[Store]:
    """Connect for the block, make sure that the schema fits, and record what the journal holds.

    Args:
        database: Where.
        journal: What waits for it.
        patience: As for `Database.connect`, like the next two.
        limit: The same.
        start_server: The same.
        known: The schema fitted when this command began, or its first statement shows that; it is not looked at here.
        replay: False to leave the journal alone.
    """
    with database.connect(patience=patience, limit=limit, start_server=start_server) as session:
        if not known:
            require_schema(session)
        store = Store(session)
        if replay:
            journal.replay(store.write)
        yield store
