"""Jobs as `status` and `next` show them: what each does now, when it will start, what each guard says."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from batchctl.cli.output import document, line, table
from batchctl.logs import elapsed, shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, tzinfo

    from batchctl.report.jobs import JobStatus
    from batchctl.report.start import NextStart


def status(statuses: Sequence[JobStatus], *, zone: tzinfo, json: bool) -> None:
    """Print the state of each job."""
    if json:
        document({"jobs": [asdict(job) for job in statuses]})
        return

    def time(instant: datetime | None) -> str:
        return "-" if instant is None else shown(instant, zone)

    rows = [
        (
            job.job,
            _state(job),
            time(job.last_started_at if job.state == "running" else job.last_completed_at),
            job.last_outcome or "-" if job.state != "running" else "-",
            time(job.next_eligible_at),
            _notes(job, zone),
        )
        for job in statuses
    ]
    table(("job", "state", "since", "outcome", "next eligible", "notes"), rows)


def _state(job: JobStatus) -> str:
    notes = [] if job.enabled else ["disabled"]
    if job.state == "running":
        return ", ".join((f"running (pid {job.pid} on {job.host})", *(["paused"] if job.paused else []), *notes))
    if job.paused and job.job not in job.paused:
        # What is not paused itself says on whose account it is.
        notes = [*job.paused, *notes]
    return f"{job.state} ({', '.join(notes)})" if notes else job.state


def _notes(job: JobStatus, zone: tzinfo) -> str:
    notes = [f"hours {job.hours}"] if job.hours else []
    if job.estimate_seconds is not None:
        notes.append(f"{'takes' if job.estimate_runs else 'timeout'} {elapsed(job.estimate_seconds)}")
    if job.overdue:
        notes.append("overdue")
    if job.expected_end_at is not None:
        notes.append(f"estimated end {shown(job.expected_end_at, zone)}")
    return ", ".join(notes)


def next_starts(starts: Sequence[NextStart], *, zone: tzinfo, json: bool) -> None:
    """Print when jobs will next start, and what each guard says."""
    if json:
        document({"jobs": [asdict(start) for start in starts]})
        return
    if not starts:
        line("No job has a schedule; `batchctl next JOB` asks about one.")
    for start in starts:
        line(f"{start.job}: {_when(start, zone)}")
        moved = " (this local time does not exist that day; cron starts the job when clocks have changed)"
        line(f"  schedule: {start.schedule or 'none'}{moved if start.moved else ''}")
        for answer in start.guards:
            line(f"  {answer.guard}: {answer.text}")


def _when(start: NextStart, zone: tzinfo) -> str:
    estimated = " (estimated)" if start.estimated else ""
    if start.next_start_at is not None:
        return f"{shown(start.next_start_at, zone)}{estimated}"
    if start.next_eligible_at is None:
        refusing = ", ".join(answer.guard for answer in start.guards if not answer.allows)
        return f"no start in sight ({refusing})"
    if start.schedule:
        return "no start in sight (schedule and hours never meet)"
    return f"no schedule; may start from {shown(start.next_eligible_at, zone)} on{estimated}"
