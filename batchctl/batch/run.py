"""A run that has its claim: its steps, its heartbeat, its end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from batchctl.batch.attempt import RunSetting
from batchctl.batch.heartbeat import Heartbeat
from batchctl.batch.interruption import Stop
from batchctl.batch.overrun import Overrun
from batchctl.batch.record import Recorder
from batchctl.batch.result import RunResult, StepResult
from batchctl.batch.runner import Runner
from batchctl.errors import BatchctlError
from batchctl.guard.liveness import listed
from batchctl.logs import elapsed, shown
from batchctl.state.within import within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from batchctl.batch.guards import Guards, State
    from batchctl.batch.interruption import Interruption
    from batchctl.batch.resume import Work
    from batchctl.clock import Clock
    from batchctl.guard.run_locks import RunLocks
    from batchctl.schedule.estimate import Estimate

SKIP_LIMIT_SECONDS = 2.0
"""How long what is decided already may wait for the database."""


@dataclass(frozen=True)
class Claimed:
    """A claim that is ours.

    Args:
        work: What is to be done.
        run: The claim, as values of the record `run_started`.
        at: When it was made, by the database's clock.
        began: The same by the monotonic clock.
        asked: When it was asked for, by that clock: not later than the database counts from.
        locks: What says that the run lives, and what its steps inherit.
        expected: How long the whole job was taken to run at that moment.
    """

    work: Work
    run: Mapping[str, Any]
    at: datetime
    began: float
    asked: float
    locks: RunLocks
    expected: Estimate

    @property
    def run_id(self) -> str:
        return str(self.run["run_id"])

    @property
    def started_at(self) -> datetime:
        """Return when the run first started."""
        started_at: datetime = self.run["started_at"]
        return started_at

    def now(self, clock: Clock) -> datetime:
        """Return the time by the database's clock without asking it; the host's own may be wrong."""
        return self.at + timedelta(seconds=clock.monotonic() - self.began)


@dataclass(frozen=True)
class Run:
    """One run of a batch, or one that goes on.

    Args:
        guards: What let it start; they say when the next may.
        state: The database.
        claimed: The claim.
        interruption: The wish to end it early.
        watch: Told of each change of a step.
        environment: What the steps inherit.
    """

    guards: Guards
    state: State
    claimed: Claimed
    interruption: Interruption
    watch: Callable[[StepResult], None]
    environment: Mapping[str, str]

    def run(self) -> RunResult:
        """Run the steps, record how they and the run ended, and return it."""
        guards, claimed, log, clock = self.guards, self.claimed, self.guards.log, self.guards.clock
        recorder = Recorder(claimed.run, self.state.connect, self.state.journal, lambda: claimed.now(guards.clock), log)
        outcome: str = "failed"
        reason: str | None = None
        steps: tuple[StepResult, ...] = ()
        self.interruption.told = self._say_asked
        try:
            self._announce()
            runner = Runner(
                claimed.work,
                self._setting(),
                recorder=recorder,
                clock=clock,
                interruption=self.interruption,
                log=log,
                watch=self.watch,
            )
            with Heartbeat(
                recorder,
                self.interruption,
                lease=guards.lease,
                since=claimed.asked,
                grace=guards.batch.grace,
                clock=clock,
                log=log,
                looks=(runner.output.check, Overrun(claimed.expected, claimed.began, clock, log).look),
            ):
                steps = runner.run()
            outcome, reason = runner.outcome(), runner.reason()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            # Whatever happened, a claim never outlives its run.
            duration = clock.monotonic() - claimed.began
            ended = {"outcome": outcome, "reason": reason, "duration": timedelta(seconds=duration)}
            row = recorder.write("run_finished", {**ended, "jobs": self._completed(steps)}, last=True)
            self._name_leftovers()
            level = log.info if outcome == "success" else log.error
            level("Run finished: %s in %s", outcome, elapsed(duration))
        finished_at = row.finished_at if row else claimed.now(clock)
        refusal = guards.refusal(finished_at, claimed.started_at, self._expected_next())
        return RunResult(
            guards.name,
            guards.group,
            outcome,
            reason=reason,
            run_id=claimed.run_id,
            started_at=claimed.started_at,
            finished_at=finished_at,
            duration_seconds=round(duration, 3),
            next_eligible_at=refusal.next_eligible_at if refusal else None,
            steps=steps,
            message=f"Run finished: {outcome} in {elapsed(duration)}",
            signal=self.interruption.signal,
        )

    def _say_asked(self, how: Stop, reason: str) -> None:
        level = self.guards.log.warning if how is Stop.AFTER_STEP else self.guards.log.error
        grace = f" ({self.guards.batch.grace}; a second signal, or `batchctl stop --now`, ends it)"
        level("The run is to end %s%s: %s", how.words, grace if how is Stop.STOP else "", reason)

    def _completed(self, steps: Iterable[StepResult]) -> list[str]:
        """Name the jobs for which this completion counts: a group of which nothing has run has not taken part."""
        ran = {f"{self.guards.name}/{step.group}" for step in steps if step.outcome != "not_run"}
        return [job for job in self.claimed.run["jobs"] if job == self.guards.name or job in ran]

    def _announce(self) -> None:
        guards, work = self.guards, self.claimed.work
        if work.run_id is None:
            guards.log.info("Run started: %s", shown(self.claimed.started_at, guards.zone))
        else:
            done, all_steps = len(work.done), len(work.plan.steps)
            guards.log.info("Run %s goes on: %d of %d steps are done", work.run_id, done, all_steps)
        quantities = {step.step: step.quantity for step in work.plan.steps}
        guards.log.info("Steps: %s", ", ".join(f"{step}={quantity}" for step, quantity in quantities.items()))

    def _setting(self) -> RunSetting:
        guards, claimed = self.guards, self.claimed
        return RunSetting(
            batch=guards.batch,
            run_id=claimed.run_id,
            directory=guards.configuration.directory,
            log_dir=guards.configuration.log_dir / guards.name / claimed.run_id,
            locks=claimed.locks,
            deadline=claimed.began + guards.batch.timeout.total_seconds(),
            deadline_at=claimed.at + guards.batch.timeout,
            environment=self.environment,
        )

    def _name_leftovers(self) -> None:
        locks = self.claimed.locks
        left = locks.release()
        if left:
            ignored = self.guards.batch.leftovers == "ignore" and not locks.unfinished
            policy = "ignores" if ignored else "is skipped because of"
            self.guards.log.warning("The run left processes alive, the next start %s them: %s", policy, listed(left))

    def _expected_next(self) -> timedelta:
        """Return the estimate for the next run: with this one in the history, if that can be asked."""
        if not self.guards.batch.gap_factor:
            return timedelta(0)  # it decides nothing then

        def ask() -> timedelta:
            with self.state.connect(limit=SKIP_LIMIT_SECONDS) as store:
                return self.guards.estimate(store.past_runs(self.guards.job)).duration

        try:
            return within(SKIP_LIMIT_SECONDS, ask)
        except BatchctlError:
            return self.claimed.expected.duration
