"""What would suit a batch better than its schedule; each proposal is played, and only what is better is said."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import msgspec

from batchctl.config import HOUR, Group, OptionalDuration
from batchctl.logs import elapsed
from batchctl.report.player import Length
from batchctl.report.scenario import Scenario, job_name, overall

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from batchctl.config import Batch
    from batchctl.report.player import Cadence

DAY_SECONDS = 24 * HOUR


@dataclass(frozen=True)
class Recommendation:
    """What would be better.

    Args:
        kind: One word: hourly, schedule, every, split, parallel, gap.
        text: What to do, in words.
        cadence_seconds: The cadence that this gives, simulated like everything else.
    """

    kind: str
    text: str
    cadence_seconds: float


@dataclass(frozen=True)
class _Proposal:
    kind: str
    text: str
    scenario: Scenario
    regular: bool = False
    """Good for even distances, not for more starts."""
    job: str | None = None
    """The job that it is about, if not all."""


def recommend(scenario: Scenario, measured: tuple[Cadence, ...], begin: datetime) -> tuple[Recommendation, ...]:
    """Return what gives a better cadence, best first; of each kind the best.

    Args:
        scenario: What was played.
        measured: What came of it.
        begin: As it was played.
    """
    if all(each.cadence_seconds is not None and each.cadence_seconds == each.scheduled_seconds for each in measured):
        return ()
    best: dict[str, Recommendation] = {}
    for proposal in _proposals(scenario, measured, begin):
        tried = proposal.scenario.cadences(begin)
        cadence = overall(tried, proposal.job or (scenario.name if proposal.scenario.batch.schedule else ""))
        even = proposal.regular and all(each.shortest_seconds == each.longest_seconds for each in tried)
        if cadence is None or not (even or _better(tried, measured)):
            continue
        known = best.get(proposal.kind)
        if known is None or cadence < known.cadence_seconds:
            best[proposal.kind] = Recommendation(proposal.kind, proposal.text, cadence)
    return tuple(sorted(best.values(), key=lambda each: each.cadence_seconds))


def _better(tried: tuple[Cadence, ...], measured: tuple[Cadence, ...]) -> bool:
    """Tell whether something starts more often and nothing less often; a batch that is split, as its slower part."""

    def distances(cadences: tuple[Cadence, ...]) -> list[float]:
        return [math.inf if each.cadence_seconds is None else each.cadence_seconds for each in cadences]

    after, before = distances(tried), distances(measured)
    if len(after) != len(before):
        return max(after) < max(before)
    return after != before and all(new <= old for new, old in zip(after, before, strict=True))


def _proposals(scenario: Scenario, measured: tuple[Cadence, ...], begin: datetime) -> Iterator[_Proposal]:
    batch = scenario.batch
    if len(measured) == 1 and batch.schedule:
        yield from _every(scenario, measured[0])
        yield from _more_often(scenario, begin)
        yield from _split(scenario)
        yield from _parallel(scenario)
    yield from _another_hour(scenario, measured)
    if batch.gap_factor:
        text = f"gap_factor = 0, so that only min_gap ({batch.min_gap}) counts from each completion"
        yield _Proposal("gap", text, _with(scenario, gap_factor=0.0))


def _every(scenario: Scenario, measured: Cadence) -> Iterator[_Proposal]:
    minute, hour, day, month, weekday = scenario.batch.schedule.split()
    if match := re.fullmatch(r"(?:\*|1-31)/(\d+)", day):
        every = _duration(int(match[1]) * DAY_SECONDS)
        line = f"{minute} {hour} * {month} {weekday}"
        text = (
            f'schedule = "{line}" with every = "{every}": {day} begins anew with each month, '
            "so the 31st and the 1st, one day apart, both count"
        )
        yield _Proposal("every", text, _with(scenario, schedule=line, every=every))
    longest, shortest = measured.longest_seconds, measured.shortest_seconds
    if longest and longest % DAY_SECONDS == 0 and day == "*" and not scenario.batch.every:
        every = _duration(longest)
        days = int(longest // DAY_SECONDS)
        even = "even distances, also" if shortest != longest else "what it comes to now becomes the rule, also"
        text = f'every = "{every}": {even} after a run that was short'
        if days > 1:
            text += f". A cron line with */{days} for the day would not give that: it begins anew with each month"
        yield _Proposal("every", text, _with(scenario, every=every), regular=True)


def _more_often(scenario: Scenario, begin: datetime) -> Iterator[_Proposal]:
    minute, hour, day, month, weekday = scenario.batch.schedule.split()
    # What has its own rhythm of days keeps it.
    if not (minute.isdigit() and hour.isdigit()) or "/" in day:
        return
    first, second = sorted((int(hour), (int(hour) + 12) % 24))
    twice = f"{minute} {first},{second} {day} {month} {weekday}"
    yield _Proposal("schedule", f'schedule = "{twice}", twice a day', _with(scenario, schedule=twice))
    line = f"{minute} * {day} {month} {weekday}"
    hourly = _with(scenario, schedule=line)
    (measured,) = hourly.cadences(begin)
    text = f'schedule = "{line}", hourly'
    if measured.shortest_seconds and not scenario.batch.every:
        # What it comes to anyhow, so that a run that ends early does not bring the next one forward.
        every = _duration(measured.shortest_seconds // HOUR * HOUR)
        hourly = _with(hourly, every=every)
        text += f' with every = "{every}"'
    yield _Proposal("hourly", f"{text}: starts as soon as it may, at another time of day each time", hourly)


def _another_hour(scenario: Scenario, measured: tuple[Cadence, ...]) -> Iterator[_Proposal]:
    batch = scenario.batch
    # A daily line alone does the same at any hour.
    if len(measured) == 1 and not any(job.hours for job in scenario.jobs()):
        return
    rare = {each.job: -math.inf if each.cadence_seconds is None else -each.cadence_seconds for each in measured}
    # What runs least often is moved first.
    for job in sorted(scenario.jobs(), key=lambda job: rare[job.name]):
        minute, hour, *days = job.schedule.split()
        if not hour.isdigit():
            continue
        group = None if job.name == scenario.name else (job.name or "").rpartition("/")[2]
        # The nearest hour first, which is as good as any other that gives the same.
        for other in sorted(range(24), key=lambda other: min((other - int(hour)) % 24, (int(hour) - other) % 24)):
            line = " ".join((minute, str(other), *days))
            if group is None:
                changed = _with(scenario, schedule=line)
            else:
                groups = {**batch.group, group: msgspec.structs.replace(batch.group[group], schedule=line)}
                changed = _with(scenario, group=groups)
            yield _Proposal("schedule", f'schedule = "{line}" for {job.name or "it"}', changed, job=job.name)


def _split(scenario: Scenario) -> Iterator[_Proposal]:
    batch, name = scenario.batch, scenario.name
    minute, hour, *days = batch.schedule.split()
    if len(batch.step) < 2 or not hour.isdigit() or not minute.isdigit():  # noqa: PLR2004 - what two groups need
        return
    halves = _halves(scenario)
    later = " ".join((minute, str((int(hour) + 12) % 24), *days))
    groups: dict[str, Group] = {}
    lengths: dict[str | None, tuple[Length, ...]] = {}
    shown = []
    for (group, share), line in zip(halves.items(), (batch.schedule, later), strict=True):
        own = batch.group.get(group, Group())
        groups[group] = msgspec.structs.replace(own, schedule=line)
        lengths[job_name(name, group)] = _scaled(scenario, share)
        shown.append(f'{group} at "{line}" (about {_longest(lengths[job_name(name, group)])})')
    steps = batch.step
    if set(halves) != set(batch.groups):
        first = len(steps) - len(_second_half(scenario))
        steps = tuple(
            msgspec.structs.replace(step, group=list(halves)[number >= first]) for number, step in enumerate(steps)
        )
    changed = _with(scenario, schedule="", step=steps, group=groups)
    split = replace(changed, lengths=lengths, known={})
    yield _Proposal("split", f"two groups with schedules of their own: {' and '.join(shown)}", split)


def _parallel(scenario: Scenario) -> Iterator[_Proposal]:
    batch, name = scenario.batch, scenario.name
    seconds = _seconds(scenario)
    total = sum(seconds.values())
    if name is None:
        lengths = _scaled(scenario, 0.5)
        text = f"its two halves at the same time (steps of a group with parallel = true), about {_longest(lengths)}"
        yield _Proposal("parallel", text, replace(scenario, lengths={name: lengths}, known={}))
        return
    for group in batch.groups:
        own = [seconds[step.id] for step in batch.step if step.group == group]
        if len(own) > 1 and not (group in batch.group and batch.group[group].parallel):
            lengths = _scaled(scenario, 1 - (sum(own) - max(own)) / total)
            text = f"parallel = true for the {len(own)} steps of {group}, about {_longest(lengths)} a run"
            yield _Proposal("parallel", text, replace(scenario, lengths={name: lengths}, known={}))
    accounts = len(batch.accounts)
    if batch.max_parallel < accounts:
        lengths = _scaled(scenario, 1 / math.ceil(accounts / batch.max_parallel))
        text = f"max_parallel = {accounts}, all accounts at the same time, about {_longest(lengths)} a run"
        yield _Proposal("parallel", text, replace(scenario, lengths={name: lengths}, known={}))


def _halves(scenario: Scenario) -> Mapping[str, float]:
    """Return two groups and their shares of the duration: those of the batch, or its steps cut in the middle."""
    batch, seconds = scenario.batch, _seconds(scenario)
    total = sum(seconds.values())
    if len(batch.groups) == 2 and all(step.group for step in batch.step):  # noqa: PLR2004 - the first and the second
        return {
            group: sum(seconds[step.id] for step in batch.step if step.group == group) / total for group in batch.groups
        }
    second = sum(seconds[step] for step in _second_half(scenario)) / total
    return {"first": 1 - second, "second": second}


def _second_half(scenario: Scenario) -> list[str]:
    seconds = _seconds(scenario)
    total = sum(seconds.values())
    steps = [step.id for step in scenario.batch.step]
    ends = list(accumulate(seconds[step] for step in steps))[:-1]
    first = min(range(len(ends)), key=lambda number: abs(ends[number] - total / 2)) + 1
    return steps[first:]


def _seconds(scenario: Scenario) -> dict[str, float]:
    """Return how long each step takes; those of which nothing is known as long as the others on average."""
    known = scenario.step_seconds
    usual = sum(known.values()) / len(known) if sum(known.values()) else 1.0
    return {step.id: known.get(step.id, usual) for step in scenario.batch.step}


def _scaled(scenario: Scenario, share: float) -> tuple[Length, ...]:
    whole = scenario.lengths[scenario.name]
    # Nobody plans to the second.
    minutes = [max(round(length.duration.total_seconds() * share / 60), 1) for length in whole]
    return tuple(Length(timedelta(minutes=count), each.success) for count, each in zip(minutes, whole, strict=True))


def _longest(lengths: tuple[Length, ...]) -> str:
    return elapsed(max(length.duration for length in lengths))


def _duration(seconds: float) -> OptionalDuration:
    return OptionalDuration(seconds=int(seconds))


def _with(scenario: Scenario, **changed: Any) -> Scenario:
    batch: Batch = msgspec.structs.replace(scenario.batch, **changed)
    return replace(scenario, batch=batch)
