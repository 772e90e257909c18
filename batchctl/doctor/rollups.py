"""Rollups: as they are configured, with every change noticed, and with somebody who aggregates."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from batchctl.config import grain_seconds
from batchctl.doctor.finding import error, ok, raised, warning
from batchctl.errors import BatchctlError, ExitCode
from batchctl.rollup import ddl
from batchctl.schedule.cron import inside_hours, next_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime, tzinfo

    from batchctl.clock import Clock
    from batchctl.config import Rollup
    from batchctl.doctor.finding import Finding
    from batchctl.rollup.definition import Definition
    from batchctl.state.database import Session

LATE = timedelta(minutes=2)
"""How long after a cron time a grain may begin: cron waits for a minute, and a line may sleep."""
MIGRATE = "call `batchctl migrate`"


def check_rollup(session: Session, definition: Definition, clock: Clock) -> Iterator[Finding]:
    """Ask what `migrate` would have to do for a rollup, its tables and all its triggers; change nothing."""
    place = f"rollup.{definition.name}"
    try:
        plan = ddl.migrate(session, [definition], clock, dry_run=True)
    except BatchctlError as problem:
        yield raised("rollup", problem)
        return
    if plan.created:
        yield not_migrated(definition.name)
        return
    if plan.changed:
        text = f"{place} has changed since it was migrated, so it is not aggregated"
        yield error("rollup", text, MIGRATE, ExitCode.CONFIGURATION)
        return
    said = [text.removeprefix(f"{place}: ") for text in plan.warnings if text.startswith(f"{place}: ")]
    for text in said:
        found, _, advice = text.rpartition("; ")
        if plan.statements and found.startswith("tracking was missing"):
            yield error("rollup", f"{place}: {found} (no trigger, or a disabled one): changes are not noticed", MIGRATE)
        else:
            yield warning("rollup", f"{place}: {found or text}", advice if found else "see the docs on rollups")
    if plan.switched:
        text = f"{place}: `lookback` was set or taken out since it was migrated, so it is not aggregated"
        yield error("rollup", text, MIGRATE, ExitCode.CONFIGURATION)
    elif plan.statements and not any(text.startswith("tracking was missing") for text in said):
        yield warning(
            "rollup", f"{place} lacks something that `migrate` makes: a view, or what a new batchctl needs", MIGRATE
        )
    if not plan.statements and not said:
        yield ok("rollup", f"{place}: tables and triggers are as configured{_purge(definition)}")


def _purge(definition: Definition) -> str:
    if definition.retention_seconds:
        return ""
    return "; rows that are deleted or purged leave the rollup too, unless source_retention is set"


def not_migrated(name: str) -> Finding:
    """Find that a rollup has no tables yet."""
    text = f"rollup.{name} is not migrated, so its changes are not noticed"
    return error("rollup", text, MIGRATE, ExitCode.CONFIGURATION)


def check_silenced(session: Session) -> Iterator[Finding]:
    """Name roles and databases for which no trigger fires."""
    for row in session.fetch("doctor.silenced"):
        yield warning(
            "rollup",
            f"session_replication_role = replica for {row.role} in {row.database}: what they write, no trigger sees",
            "reset it (ALTER ROLE or ALTER DATABASE ... RESET), then `batchctl aggregate --rebuild` what was missed",
        )


def check_strangers(session: Session, configured: Mapping[str, Rollup]) -> Iterator[Finding]:
    """Name rollups in the database that the configuration does not have."""
    for row in session.fetch("doctor.registered"):
        if row.rollup not in configured:
            yield warning(
                "rollup",
                f"{row.rollup} is in the database, not in the configuration: changes are captured, nothing aggregates",
                f"call `batchctl migrate --drop {row.rollup}`, or configure it",
            )


def check_lag(
    session: Session,
    name: str,
    rollup: Rollup,
    jobs: Mapping[str, Any],
    *,
    now: datetime,
    zone: tzinfo,
) -> Iterator[Finding]:
    """Check that cron aggregates a rollup: each tick leaves its time, an empty one too.

    Args:
        session: An open session.
        name: The rollup.
        rollup: Its configuration.
        jobs: Rows of the state table, by job.
        now: By the database's clock.
        zone: Of schedules.
    """
    migrated = {row.rollup: row.migrated_at for row in session.fetch("doctor.registered")}
    if name not in migrated or not rollup.enabled:
        return
    for grain in rollup.grains:
        job, schedule = f"{name}/{grain}", rollup.schedule.get(grain, "")
        row = jobs.get(job)
        paused = any(jobs[each].paused for each in (name, job) if each in jobs)
        if not schedule or paused:
            continue
        last = row.last_started_at if row else None
        due = next_time(schedule, last or migrated[name], zone)
        waiting = session.fetch_one(
            "doctor.waiting",
            rollup=name,
            grain=grain,
            closed_after=grain_seconds(grain) + rollup.settle.total_seconds(),
        )
        wait = "no closed bucket waits"
        if waiting.buckets:
            plural = waiting.buckets > 1
            wait = f"{waiting.buckets} closed bucket{'s wait' if plural else ' waits'}, the oldest {waiting.oldest}"
        if due is not None and due + LATE < now and inside_hours(rollup.hours, due, zone):
            since = "was never aggregated" if last is None else f"was last aggregated {last:%Y-%m-%d %H:%M} UTC"
            yield (error if waiting.buckets else warning)(
                "rollup",
                f"{job} {since}, though its schedule is {schedule!r}; {wait}",
                "see whether cron runs and has the line (`batchctl crontab install`), and read its mail and the log",
            )
        elif row is not None and row.last_outcome == "failed":
            text = f"{job} failed when it was last aggregated, {row.last_started_at:%Y-%m-%d %H:%M} UTC; {wait}"
            yield error(
                "rollup", text, f"`batchctl aggregate --rollup {name} --grain {grain}` says why, and so does the log"
            )
        else:
            yield ok("rollup", f"{job}: {wait}")
