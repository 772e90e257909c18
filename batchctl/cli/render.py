"""Results become tables, lines and JSON documents."""

from __future__ import annotations

import shlex
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from batchctl.cli.output import document, line, table, warning
from batchctl.cli.terminal import on_terminal
from batchctl.logs import elapsed, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import tzinfo

    from batchctl.batch.plan import Plan
    from batchctl.batch.recovery import Left
    from batchctl.batch.result import RunResult, StepResult
    from batchctl.batch.resume import Work
    from batchctl.doctor.finding import Finding
    from batchctl.report.scenario import Scenario
    from batchctl.report.simulation import Simulation
    from batchctl.rollup.result import GrainResult

STEP_KEYS = (
    "account", "step", "group", "outcome", "exit_code", "signal", "attempts", "duration_seconds", "quantity", "log"
)  # fmt: skip
ORPHAN_KEYS = ("run_id", "pid", "what", "account", "step", "command", "run_ended")


def plan(work: Work, *, json: bool) -> None:
    """Print what a run would do."""
    from batchctl.batch.plan import fill

    planned = work.plan
    steps = [step for step in planned.steps if (step.account, step.step) not in work.done]
    if json:
        keys = ("account", "step", "group", "quantity", "command")
        group = planned.job.partition("/")[2] or None
        told = [{key: getattr(step, key) for key in keys} for step in steps]
        document({"batch": planned.batch, "group": group, "run_id": work.run_id, "steps": told})
        return
    # There is no run yet, and so no id of it, unless one is continued.
    known = {"batch": planned.batch, "run_id": work.run_id or "{run_id}"}
    rows = [
        (
            step.account,
            step.step,
            step.group or "",
            str(step.quantity),
            elapsed(step.timeout),
            shlex.join(fill(text, step=step, **known) for text in step.command),
        )
        for step in steps
    ]
    table(("account", "step", "group", "quantity", "timeout", "command"), rows)


def run_result(result: RunResult, *, json: bool, shown: bool) -> None:
    """Print what became of a start."""
    if json:
        holder = result.holder and asdict(result.holder)
        keys = (
            "batch", "group", "outcome", "reason", "run_id", "started_at", "finished_at", "duration_seconds",
            "next_eligible_at",
        )  # fmt: skip
        steps = [{key: getattr(step, key) for key in STEP_KEYS} for step in result.steps]
        orphans = [{key: getattr(orphan, key) for key in ORPHAN_KEYS} for orphan in result.orphans]
        values = {key: getattr(result, key) for key in keys}
        document({**values, "holder": holder, "steps": steps, "detail": result.message, "orphans": orphans})
    elif shown:
        line(result.message)


@contextmanager
def run_view(planned: Plan, *, shown: bool) -> Iterator[Callable[[StepResult], None]]:
    """Show the steps of a run as they go, on a terminal; elsewhere show nothing."""
    if not (shown and on_terminal()):
        yield lambda _: None
        return
    from batchctl.cli.live import LiveRun

    view = LiveRun(planned)
    try:
        yield view.update
    finally:
        view.close()


def history(entries: Sequence[Any], *, zone: tzinfo, json: bool) -> None:
    """Print what ran and what was skipped."""
    if json:
        keys = ("kind", "job", "at", "outcome", "reason", "run_id", "duration_seconds", "detail", "count")
        document({"entries": [{key: getattr(entry, key) for key in keys} for entry in entries]})
        return
    rows = [
        (
            shown(entry.at, zone),
            entry.job,
            entry.outcome or "no end yet",
            "" if entry.duration_seconds is None else elapsed(entry.duration_seconds),
            entry.run_id or "",
            (entry.detail or entry.reason or "") + (f" ({entry.count} times)" if entry.count > 1 else ""),
        )
        for entry in entries
    ]
    table(("at", "job", "outcome", "duration", "run", "why"), rows)


def simulation(played: Simulation, scenario: Scenario, *, json: bool) -> None:
    """Print what a schedule will do: a table and a time line, the cadence in words, and what would be better."""
    if json:
        # There may be very many events, which asdict would copy one by one.
        parts = {key: [vars(each) for each in getattr(played, key)] for key in ("events", "jobs", "recommendations")}
        document({**vars(played), **parts})
        return
    from batchctl.cli import schedule_view

    for text in schedule_view.heading(scenario):
        line(text)
    table(*schedule_view.events(played, scenario.zone))
    for text in schedule_view.notes(played):
        line(text)
    for text in schedule_view.time_line(played, scenario.zone):
        line(text)
    for text in schedule_view.in_words(played):
        line(text)
    if played.recommendations:
        table(*schedule_view.advice(played))


def orphans(found: Sequence[Left], *, zone: tzinfo, json: bool) -> None:
    """Print what earlier runs left alive, and what was ended of it."""
    if json:
        keys = ("run_id", "account", "step", "pid", "command", "user")
        document(
            {
                "orphans": [
                    {
                        "batch": left.batch,
                        **{key: getattr(left.orphan, key) for key in keys},
                        "since": left.since,
                        "run_ended": left.orphan.run_ended,
                        "killed": left.killed,
                    }
                    for left in found
                ]
            }
        )
        return
    if not found:
        line("No orphans.")
        return
    ends = {None: "alive", True: "ended", False: "could not be ended"}
    rows = [
        (
            left.batch,
            left.orphan.run_id + (" (ended)" if left.orphan.run_ended else " (unfinished)"),
            str(left.orphan.pid or "?"),
            left.orphan.user or "?",
            "?" if left.since is None else shown(left.since, zone),
            ends[left.killed],
            left.orphan.what,
        )
        for left in found
    ]
    table(("batch", "run", "pid", "user", "since", "state", "what"), rows)


def grain_results(results: Sequence[GrainResult], *, json: bool, shown: bool) -> None:
    """Print what became of each grain."""
    if json:
        document({"rollups": [asdict(result) for result in results]})
    elif shown:
        rows = [
            (
                result.rollup,
                result.grain,
                result.outcome + (f" ({result.reason})" if result.reason else ""),
                *(str(count) for count in (result.buckets, result.source_rows, result.rows_written)),
                str(result.remaining_buckets),
                elapsed(result.duration_seconds),
            )
            for result in results
        ]
        table(("rollup", "grain", "outcome", "buckets", "rows read", "rows written", "remaining", "time"), rows)
        for detail in (result.detail for result in results if result.detail is not None):
            line(detail)


def waiting(grains: Sequence[tuple[str, str, int]], *, json: bool) -> None:
    """Print how many closed buckets wait in each grain."""
    if json:
        keys = ("rollup", "grain", "remaining_buckets")
        document({"rollups": [dict(zip(keys, grain, strict=True)) for grain in grains]})
        return
    table(("rollup", "grain", "waiting buckets"), [(rollup, grain, str(count)) for rollup, grain, count in grains])


def statements(texts: Sequence[str]) -> None:
    """Print SQL, each statement ended by a semicolon."""
    for text in texts:
        line(f"{text.strip().rstrip(';')};")


def migrated(lines: Sequence[str], warnings: Sequence[str], *, shown: bool) -> None:
    """Print what migrate did; warnings go to standard error."""
    for text in warnings:
        warning(text)
    for text in lines if shown else ():
        line(text)


def findings(found: Sequence[Finding], *, json: bool, everything: bool) -> None:
    """Print what the doctor found, each with what to do, and a summary.

    Args:
        found: The findings, in order.
        json: As one document.
        everything: False to leave out what is as it should be, and the summary if all is.
    """
    if json:
        keys = ("check", "state", "found")
        told = [
            {
                **{key: getattr(each, key) for key in keys},
                "advice": each.advice or None,
                "exit_code": int(each.exit_code) if each.state == "error" else None,
            }
            for each in found
        ]
        document({"checks": told})
        return
    rows = [
        (each.state, each.check, each.found + (f". Do: {each.advice}" if each.advice else ""))
        for each in found
        if everything or each.state != "ok"
    ]
    if not rows:
        return
    table(("state", "check", "found"), rows)
    counts = {state: sum(each.state == state for each in found) for state in ("error", "warning", "ok")}
    line(f"{counted(counts['error'], 'error')}, {counted(counts['warning'], 'warning')}, {counts['ok']} ok.")


def counted(count: int, what: str) -> str:
    """Say how many there are."""
    return f"{count} {what}{'' if count == 1 else 's'}"
