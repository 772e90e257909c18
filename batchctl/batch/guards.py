"""The guards in their order: each refuses a start with a reason, or lets it pass."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING

from batchctl.batch.result import HolderShown
from batchctl.config import Duration
from batchctl.guard.gap import Refusal, earliest_start, gap_rule, job_hours, refused
from batchctl.guard.identity import ProcessIdentity
from batchctl.guard.liveness import Orphan, Recorded, find_orphans
from batchctl.guard.pause import lifted_by
from batchctl.logs import elapsed, shown
from batchctl.schedule.cron import inside_hours, next_inside_hours

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from batchctl.batch.plan import Plan
    from batchctl.batch.process import Interruption
    from batchctl.clock import Clock
    from batchctl.config import Batch, Configuration
    from batchctl.guard.lock import Holder
    from batchctl.state.host import Host
    from batchctl.state.journal import Journal
    from batchctl.state.store import ClaimRequest, JobState, LiveRun, Store


CLAIM_MARGIN = timedelta(seconds=60)
"""What a run may still need behind its deadline and grace: to end what is left, and to record it."""


@dataclass(frozen=True)
class State:
    """What a start needs of the database, loaded only when the file lock is ours (or a skip is to be recorded).

    Args:
        connect: Opens a store for a block.
        journal: Keeps what the database cannot be told.
        host: This host.
        request: Makes a claim.
    """

    connect: Callable[..., AbstractContextManager[Store]]
    journal: Journal
    host: Host
    request: type[ClaimRequest]


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
        plan: What the run would do.
        force_gap: Lift gap and `every`.
        zone: For shown times, hours and local days.
        clock: For shown durations; what is decided by time is decided by the database's clock.
        log: The batch's logger.
    """

    configuration: Configuration
    plan: Plan
    force_gap: bool
    zone: tzinfo
    clock: Clock
    log: logging.Logger

    @property
    def batch(self) -> Batch:
        return self.configuration.batches[self.plan.batch]

    @property
    def group(self) -> str | None:
        return self.plan.job.partition("/")[2] or None

    def held(self, holder: Holder | None) -> Skip:
        if holder is None:
            return Skip("running", "Previous run is still in progress (its holder has not signed). Skipped.")
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
        recorded = [
            Recorded(
                row.run_id,
                "batchctl" if row.step is None else f"step {row.step} of account {row.account}",
                ProcessIdentity(row.pid, row.pid_start_ticks, row.boot_id),
            )
            for row in store.unfinished(self.plan.batch, host.host_id)
        ]
        orphans = tuple(find_orphans(self.configuration.state_dir, self.plan.batch, recorded))
        # What a run left that has an end was left on purpose; what a dead run left is its unfinished work.
        unfinished = {record.run_id for record in recorded}
        kept = [orphan for orphan in orphans if orphan.run_id not in unfinished]
        if kept and self.batch.leftovers == "ignore":
            self.log.warning("An earlier run left processes alive, ignored as configured: %s", listed(kept))
            orphans = tuple(orphan for orphan in orphans if orphan.run_id in unfinished)
        if not orphans:
            return None
        live = store.live(self.plan.batch)
        if live is not None and any(orphan.what == "batchctl" and orphan.pid == live.pid for orphan in orphans):
            # Somebody removed the lock file under the holder.
            return self._in_progress("running", _shown_holder(live))
        return Skip("orphans", f"An earlier run left processes alive: {listed(orphans)}. Skipped.", orphans=orphans)

    def claim(
        self, store: Store, state: State, run_id: str, process: ProcessIdentity, interruption: Interruption
    ) -> Skip | datetime:
        claim = store.claim(
            state.request(
                run_id=run_id,
                batch=self.plan.batch,
                job=self.plan.job,
                jobs=self.plan.jobs,
                groups=self.plan.groups,
                host=state.host.host_id,
                hostname=state.host.hostname,
                process=process,
                claim=self.batch.timeout + self.batch.grace + CLAIM_MARGIN,
                whole=self.plan.whole,
                config_hash=hashlib.sha256(repr(self.batch).encode()).hexdigest()[:16],
            ),
            lambda job: INTERRUPTED if interruption.count else self._decide(job),
        )
        for crashed in claim.crashed:
            self.log.warning("Run %s died without an end; it is closed as crashed", crashed)
        if claim.live is not None:
            return self._in_progress("running_elsewhere", _shown_holder(claim.live), " on another host")
        if claim.refusal is not None:
            skip: Skip = claim.refusal
            return skip
        assert claim.started_at is not None  # noqa: S101 - neither a live run nor a refusal leaves only this
        return claim.started_at

    def _decide(self, job: JobState) -> Skip | None:
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
        refusal = self.refusal(job.last_completed_at, job.last_started_at, job.estimate_seconds)
        if self.force_gap or refusal is None or not refused(refusal, job.now):
            return None
        ago, apart = elapsed(job.now - refusal.since), str(Duration(seconds=refusal.gap.total_seconds()))
        completed = refusal.reason == "gap"
        what = f"Completed {ago} ago, at least {apart} apart" if completed else f"Started {ago} ago, every {apart}"
        text = f"{what}. Skipped; next possible start {shown(refusal.next_eligible_at, self.zone)}."
        return Skip(refusal.reason, text, refusal.next_eligible_at)

    def refusal(
        self, completed: datetime | None, started: datetime | None, estimate_seconds: float | None
    ) -> Refusal | None:
        estimate = self.batch.timeout if estimate_seconds is None else timedelta(seconds=estimate_seconds)
        return earliest_start(
            gap_rule(self.batch, self.group, self.zone),
            last_completed_at=completed,
            last_started_at=started,
            estimate=estimate,
        )


def listed(orphans: Iterable[Orphan]) -> str:
    """Name processes for people."""
    return "; ".join(f"pid {orphan.pid or '?'}, {orphan.what}" for orphan in orphans)


def _shown_holder(live: LiveRun) -> HolderShown:
    return HolderShown(live.hostname, live.pid, live.started_at)
