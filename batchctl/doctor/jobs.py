"""Jobs: what earlier runs left, what is paused or disabled, and schedules that runs do not fit into."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from batchctl.batch.recovery import Leftovers
from batchctl.doctor.finding import ok, warning
from batchctl.guard.gap import gap_rule
from batchctl.guard.identity import ProcessIdentity, alive
from batchctl.guard.liveness import recorded_processes
from batchctl.logs import elapsed
from batchctl.report.configured import pausable
from batchctl.schedule.cron import next_time
from batchctl.schedule.estimate import estimate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime, tzinfo

    from batchctl.clock import Clock
    from batchctl.config import Configuration
    from batchctl.doctor.finding import Finding
    from batchctl.state.store import Store

CRON_TIMES = 10
"""How many cron times in a row are looked at for the shortest time between two."""


def check_orphans(configuration: Configuration, store: Store | None, clock: Clock) -> Iterator[Finding]:
    """Name what earlier runs left alive on this host, and runs that died without an end; change nothing.

    Args:
        configuration: The configuration.
        store: The state; None does without what is recorded there.
        clock: The machine's clock.
    """
    host_id = _host_id(configuration)
    recorded = {}
    found = []
    if store is not None and host_id is not None:
        for batch in configuration.batches:
            recorded[batch] = recorded_processes(store.unfinished(batch, host_id))
            live = store.live(batch)
            if live is None or live.host != host_id:
                continue
            process = ProcessIdentity(live.pid, live.start_ticks, live.boot_id)
            if not alive(process, hidden_counts=True):
                found.append(
                    warning(
                        "orphans",
                        f"run {live.run_id} of {batch} died without an end",
                        "the next start closes it, or `batchctl recover` now",
                    )
                )
    for left in Leftovers(configuration, recorded, clock).find():
        pid = left.orphan.pid or "?"
        found.append(
            warning(
                "orphans",
                f"run {left.orphan.run_id} of {left.batch} left pid {pid} alive ({left.orphan.what})",
                "`batchctl orphans` shows it, `batchctl orphans --kill` ends it",
            )
        )
    yield from found or [ok("orphans", "earlier runs left nothing")]


def check_jobs(configuration: Configuration, rows: Mapping[str, Any]) -> Iterator[Finding]:
    """Say which jobs are paused or disabled, because they do not start however well cron works."""
    paused = [name for name in pausable(configuration) if name in rows and rows[name].paused]
    disabled = [name for name, batch in configuration.batches.items() if not batch.enabled]
    disabled += [name for name, rollup in configuration.rollups.items() if not rollup.enabled]
    for word, names in (("paused", paused), ("disabled", disabled)):
        if names:
            how = "batchctl unpause" if word == "paused" else "enabled = true"
            yield ok("job", f"{word}: {', '.join(names)} (`{how}` lets them start)")
    if not paused and not disabled:
        yield ok("job", "none is paused or disabled")


def check_schedules(configuration: Configuration, store: Store, now: datetime, zone: tzinfo) -> Iterator[Finding]:
    """Compare how often cron starts batches with what they take and how far apart their starts have to be.

    Before the first success only the gap is known, which no run makes shorter.
    """
    for name, batch in configuration.batches.items():
        jobs = {name: batch.schedule} | {f"{name}/{group}": each.schedule for group, each in batch.group.items()}
        for job, schedule in jobs.items():
            cadence = _cadence(schedule, now, zone) if schedule else None
            if cadence is None:
                continue
            group = job.partition("/")[2] or None
            expected = estimate(batch, group, store.past_runs(job))
            taken = expected.duration if expected.runs else timedelta(0)
            rule = gap_rule(batch, group, zone)
            gap = rule.gap(taken)
            text = f"cron starts {job} every {elapsed(cadence)}"
            if expected.runs:
                text = f"{job} takes about {elapsed(taken)}, and cron starts it every {elapsed(cadence)}"
            # Who asks cron more often than `every` wants most of that skipped.
            wanted = max(cadence, rule.every)
            if taken + gap > wanted:
                why = f", and {elapsed(gap)} have to be between a completion and a start" if taken <= wanted else ""
                yield warning(
                    "schedule", f"{text}{why}, so starts are skipped", f"`batchctl simulate {name}` shows what fits"
                )
            elif wanted > cadence:
                yield ok("schedule", f"{text}; all but one start in {elapsed(wanted)} is skipped, as `every` asks")
            elif expected.runs:
                yield ok("schedule", text)


def _cadence(schedule: str, now: datetime, zone: tzinfo) -> timedelta | None:
    """Return the shortest time between the coming cron times."""
    times = [now]
    while len(times) <= CRON_TIMES:
        time = next_time(schedule, times[-1], zone)
        if time is None:
            break
        times.append(time)
    return min((later - time for time, later in pairwise(times[1:])), default=None)


def _host_id(configuration: Configuration) -> str | None:
    """Read the id of this host; None if there is none yet, and then nothing ran here."""
    try:
        return (configuration.state_dir / "host_id").read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
