"""The guards in their order: each refuses a start with a reason, or lets it pass."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING

from batchctl.batch.heartbeat import LEASE
from batchctl.batch.result import HolderShown
from batchctl.config import Duration
from batchctl.errors import DatabaseUnavailableError, UsageError
from batchctl.guard.gap import Refusal, earliest_start, gap_rule, job_hours, refused
from batchctl.guard.liveness import Orphan, find_orphans, forget_runs, listed, recorded_processes
from batchctl.guard.pause import lifted_by
from batchctl.logs import elapsed, shown
from batchctl.schedule.cron import inside_hours, next_inside_hours
from batchctl.schedule.estimate import estimate
from batchctl.state.claim import ClaimRequest

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from batchctl.batch.interruption import Interruption
    from batchctl.batch.resume import Work
    from batchctl.clock import Clock
    from batchctl.config import Batch, Configuration
    from batchctl.guard.identity import ProcessIdentity
    from batchctl.guard.lock import Holder
    from batchctl.schedule.estimate import Estimate
    from batchctl.state.claim import Claim, JobState, LiveRun, PastRun
    from batchctl.state.host import Host
    from batchctl.state.journal import Journal
    from batchctl.state.store import Store


CLAIM_MARGIN = timedelta(seconds=60)
"""What a run may still need behind its deadline and grace: to end what is left, and to record it."""


@dataclass(frozen=True)
class State:
    """What a start needs of the database, loaded only when the file lock is ours (or a skip is to be recorded).

    Args:
        connect: Opens a store for a block.
        journal: Keeps what the database cannot be told.
        host: This host.
    """

    connect: Callable[..., AbstractContextManager[Store]]
    journal: Journal
    host: Host


@dataclass(frozen=True)
class Skip:
    """A start that a guard refuses."""

    reason: str
    message: str
    next_eligible_at: datetime | None = None
    holder: HolderShown | None = None
    orphans: tuple[Orphan, ...] = ()


INTERRUPTED = Skip("stopped", "A signal came before the run could start")


@dataclass(frozen=True)
class Guards:
    """What stands between a start and its run.

    Args:
        configuration: The configuration.
        job: The batch, or batch/group if one group was asked for.
        force_gap: Lift gap and `every`.
        zone: For shown times, hours and local days.
        clock: For shown durations; what is decided by time is decided by the database's clock.
        log: The batch's logger.
    """

    configuration: Configuration
    job: str
    force_gap: bool
    zone: tzinfo
    clock: Clock
    log: logging.Logger

    @property
    def name(self) -> str:
        return self.job.partition("/")[0]

    @property
    def batch(self) -> Batch:
        return self.configuration.batches[self.name]

    @property
    def group(self) -> str | None:
        return self.job.partition("/")[2] or None

    @property
    def lease(self) -> timedelta | None:
        """Say how long a heartbeat prolongs the claim; None if the claim lasts as long as the run may."""
        return LEASE if self.batch.on_lost_database == "stop" else None

    def held(self, holder: Holder | None) -> Skip:
        if holder is None:
            return Skip("running", "Previous run is still in progress (its holder has not signed). Skipped.")
        if holder.looking is not None:
            return Skip("running", f"`batchctl {holder.looking}` (pid {holder.pid}) is at work on the batch. Skipped.")
        return self._in_progress("running", HolderShown(holder.hostname, holder.pid, holder.started_at))

    def _in_progress(self, reason: str, holder: HolderShown, elsewhere: str = "") -> Skip:
        since = shown(holder.started_at, self.zone)
        # A clock that was set back must not show a negative time.
        age = elapsed(max(self.clock.now() - holder.started_at, timedelta(0)))
        return Skip(
            reason,
            f"Previous run is still in progress{elsewhere} "
            f"(pid {holder.pid} on {holder.host}, since {since}, {age}). Skipped.",
            holder=holder,
        )

    def alive(self, store: Store, host: Host) -> Skip | None:
        state_dir, batch = self.configuration.state_dir, self.name
        orphans = find_orphans(state_dir, batch, recorded_processes(store.unfinished(batch, host.host_id)))
        forget_runs(state_dir, batch, {orphan.run_id for orphan in orphans})
        skip = self._left(orphans)
        if skip is not None:
            live = store.live(batch)
            if live is not None and any(orphan.supervisor and orphan.run_id == live.run_id for orphan in orphans):
                # Somebody removed the lock file under the holder.
                return self._in_progress("running", _shown_holder(live))
        return skip

    def alive_by_locks_and_marks(self) -> Skip | None:
        """Ask the same without the database, which knows a few processes more."""
        return self._left(find_orphans(self.configuration.state_dir, self.name, ()))

    def _left(self, orphans: Sequence[Orphan]) -> Skip | None:
        # What a run left that ended by itself was left on purpose; what a dead run left is its unfinished work.
        kept = [orphan for orphan in orphans if orphan.run_ended]
        if kept and self.batch.leftovers == "ignore":
            self.log.warning("An earlier run left processes alive, ignored as configured: %s", listed(kept))
            orphans = [orphan for orphan in orphans if not orphan.run_ended]
        if not orphans:
            return None
        message = f"An earlier run left processes alive: {listed(orphans)}. Skipped."
        return Skip("orphans", message, orphans=tuple(orphans))

    def claim(
        self,
        store: Store,
        state: State,
        work: Work,
        *,
        run_id: str,
        process: ProcessIdentity,
        interruption: Interruption,
    ) -> Skip | Claim:
        plan = work.plan
        claim = store.claim(
            ClaimRequest(
                run_id=run_id,
                resumed=work.resumed,
                batch=plan.batch,
                job=plan.job,
                jobs=plan.jobs,
                groups=plan.groups,
                accounts=plan.chosen_accounts,
                steps=plan.chosen_steps,
                host=state.host.host_id,
                hostname=state.host.hostname,
                process=process,
                claim=self.lease or self.batch.timeout + self.batch.grace + CLAIM_MARGIN,
                config_hash=hashlib.sha256(repr(self.batch).encode()).hexdigest()[:16],
            ),
            lambda job: INTERRUPTED if interruption.asked else self._decide(job, resumed=work.resumed is not None),
        )
        for crashed in claim.crashed:
            self.log.warning("Run %s died without an end; it is closed as crashed", crashed)
        for job in claim.corrected:
            self.log.warning("%s last ran in the future: the database's clock was set back; taken as now", job)
        if claim.run is None and claim.live is None and claim.refusal is None:
            if work.run_id is not None:
                raise UsageError(
                    f"run {run_id} was continued meanwhile, and has ended again; `batchctl history` shows it"
                )
            raise DatabaseUnavailableError("the claim was neither granted nor refused; try again")
        if claim.live is not None:
            return self._in_progress("running_elsewhere", _shown_holder(claim.live), " on another host")
        refusal: Skip | None = claim.refusal
        return refusal or claim

    def journaled(self, journal: Journal) -> Skip | None:
        """Say whether what the journal knows forbids a start, when the database cannot be asked.

        Without the database nothing starts in any case; this gives the reason that will still hold when it is back.
        """
        if self.force_gap:
            return None
        of_job = [entry for entry in journal.entries() if self.job in entry.values.get("jobs", ())]
        completed = [entry.values["at"] for entry in of_job if entry.name == "run_finished"]
        started = [entry.values["started_at"] for entry in of_job if entry.values.get("started_at")]
        refusal = self.refusal(
            datetime.fromisoformat(max(completed)) if completed else None,
            datetime.fromisoformat(max(started)) if started else None,
            # What the database would add to the gap is not known; it holds at least that long.
            timedelta(0),
        )
        return self._too_early(refusal, self.clock.now())

    def _decide(self, job: JobState, *, resumed: bool = False) -> Skip | None:
        """Say what forbids a start at the database's time."""
        if not self.batch.enabled:
            return Skip("disabled", "Disabled in the configuration. Skipped.")
        if job.paused:
            return Skip("paused", f"Paused: {lifted_by(job.paused)}. Skipped.")
        hours = job_hours(self.batch, self.group)
        if not inside_hours(hours, job.now, self.zone):
            first = next_inside_hours(hours, job.now, self.zone)
            return Skip(
                "outside_hours",
                f"Outside the hours {hours}. Skipped; next possible start {shown(first, self.zone)}.",
                first,
            )
        if self.force_gap or resumed:
            return None
        expected = self.estimate(job.past_runs).duration
        refusal = self.refusal(job.last_completed_at, job.last_started_at, expected)
        return self._too_early(refusal, job.now)

    def _too_early(self, refusal: Refusal | None, now: datetime) -> Skip | None:
        if refusal is None or not refused(refusal, now):
            return None
        ago, apart = elapsed(max(now - refusal.since, timedelta(0))), str(Duration(seconds=refusal.gap.total_seconds()))
        completed = refusal.reason == "gap"
        what = f"Completed {ago} ago, at least {apart} apart" if completed else f"Started {ago} ago, every {apart}"
        text = f"{what}. Skipped; next possible start {shown(refusal.next_eligible_at, self.zone)}."
        return Skip(refusal.reason, text, refusal.next_eligible_at)

    def estimate(self, past_runs: Sequence[PastRun]) -> Estimate:
        return estimate(self.batch, self.group, past_runs)

    def refusal(self, completed: datetime | None, started: datetime | None, expected: timedelta) -> Refusal | None:
        return earliest_start(
            gap_rule(self.batch, self.group, self.zone),
            last_completed_at=completed,
            last_started_at=started,
            estimate=expected,
        )


def _shown_holder(live: LiveRun) -> HolderShown:
    return HolderShown(live.hostname, live.pid, live.started_at)
