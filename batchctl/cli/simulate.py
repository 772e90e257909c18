"""simulate: what a schedule will really do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.run_batch import Json
from batchctl.cli.schedule import in_reach, instant
from batchctl.cli.session import Session
from batchctl.errors import ConfigurationError, UsageError, choices

if TYPE_CHECKING:
    from batchctl.config import Duration, OptionalDuration
    from batchctl.report.player import Length
    from batchctl.report.scenario import Scenario, Wish
    from batchctl.state.store import Store

MOST_FACTOR = 100


@command("simulate")
def simulate(
    session: Session,
    batch: Annotated[str | None, typer.Argument(metavar="BATCH", help="A configured batch.")] = None,
    *,
    schedule: Annotated[
        str | None, typer.Option(metavar="CRON", help="Its cron time, in quotes.", show_default=False)
    ] = None,
    duration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DURATION", help="How long a run takes; several in turn. G=12h: of group G.", show_default=False
        ),
    ] = None,
    days: Annotated[int, typer.Option(metavar="N", min=1, max=36525, help="How many days to play.")] = 7,
    min_gap: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Gap after a completion.", show_default=False)
    ] = None,
    gap_factor: Annotated[
        float | None, typer.Option(metavar="X", help="The gap as a multiple of the estimate.", show_default=False)
    ] = None,
    every: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Distance of starts.", show_default=False)
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="DURATION", help="No run is longer.", show_default=False)
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="DATE", help="The first day (today).", show_default=False)
    ] = None,
    timezone: Annotated[str | None, typer.Option(metavar="TZ", help="Time zone.", show_default=False)] = None,
    json: Json = False,
) -> int:
    """Play a schedule: what starts, what is skipped, what is better.

    --schedule and --duration alone are enough; with a configuration they stand in for what it says, and without
    --duration the last real runs are played.
    """
    from batchctl.cli import render
    from batchctl.report.scenario import Wish
    from batchctl.report.simulation import simulate as play
    from batchctl.schedule.cron import problem

    if schedule is not None and (wrong := problem(schedule)):
        raise UsageError(f"--schedule: {wrong}")
    # Not a number is neither below nor above.
    if gap_factor is not None and not 0 <= gap_factor <= MOST_FACTOR:
        raise UsageError(f"--gap-factor: found {gap_factor}, expected a number from 0 to {MOST_FACTOR}")
    wish = Wish(
        schedule=schedule,
        min_gap=None if min_gap is None else _duration("--min-gap", min_gap),
        gap_factor=gap_factor,
        every=None if every is None else _every(every),
        timeout=None if timeout is None else _duration("--timeout", timeout, positive=True),
    )
    played = _scenario(session, batch, wish, _lengths(duration or []), _named_zone(timezone))
    simulation = play(played, _begin(session, start, played.zone), days)
    render.simulation(simulation, played, json=json)
    return 0


def _scenario(
    session: Session,
    batch: str | None,
    wish: Wish,
    lengths: dict[str | None, tuple[Length, ...]],
    zone: tzinfo | None,
) -> Scenario:
    """Put together what is played: from options alone if they say enough, else a configured batch."""
    from batchctl.report.scenario import Scenario, scheduled, unconfigured

    if batch is None and wish.schedule is not None and set(lengths) == {None}:
        return Scenario(None, wish.applied(unconfigured()), lengths, zone or _zone(session))
    try:
        name = session.only_batch(batch)
    except ConfigurationError as error:
        if batch is not None:
            raise
        missing = [
            option
            for option, given in (("--schedule '0 1 * * *'", wish.schedule), ("--duration 26h", lengths.get(None)))
            if not given
        ]
        raise UsageError(f"give {' and '.join(missing)}, or a batch of a configuration file ({error})") from error
    configured = wish.applied(session.configuration.batches[name])
    jobs = scheduled(name, configured)
    if not jobs:
        raise UsageError(f"{name} has no schedule in {session.configuration.path}; give --schedule '0 1 * * *'")
    of_groups = {group for group in lengths if group is not None}
    for group in sorted(of_groups - set(configured.groups)):
        raise UsageError(f"--duration {group}=: no such group in {name}; known: {choices(configured.groups)}")
    given = {}
    for job in jobs:
        own = lengths.get((job or "").partition("/")[2] or None) or lengths.get(None)
        if own:
            given[job] = own
    scenario = Scenario(name, configured, given, zone or session.zone)
    return scenario if len(given) == len(jobs) else _with_history(session, scenario, jobs)


def _with_history(session: Session, scenario: Scenario, jobs: tuple[str | None, ...]) -> Scenario:
    """Play the last real durations of the jobs for which none is given; after a change of quantities, the estimate."""
    from dataclasses import replace

    from batchctl.report.player import Length
    from batchctl.schedule.estimate import estimate, step_seconds

    lengths = dict(scenario.lengths)
    known: dict[str | None, tuple[float, ...]] = {}
    parts_known = set()
    with session.connect() as store:
        for job in (job for job in jobs if job is not None and job not in lengths):
            latest = store.latest_durations(job)
            if not latest and (taken := _part(scenario, job, store)) is not None:
                lengths[job] = (Length(taken),)
                parts_known.add(job)
                continue
            if not latest:
                form = f"{job.partition('/')[2]}=6h" if "/" in job else "6h"
                raise UsageError(
                    f"{job} has no complete run of its own yet, so nothing is known of its duration; "
                    f"give --duration, for instance --duration {form}"
                )
            expected = estimate(scenario.batch, job.partition("/")[2] or None, store.past_runs(job))
            if expected.scaled:
                lengths[job], known[job] = (Length(expected.duration),), (expected.seconds,)
                continue
            lengths[job] = tuple(Length(timedelta(seconds=row.seconds), row.success) for row in latest)
            known[job] = tuple(row.seconds for row in latest if row.success)
        steps = step_seconds(scenario.batch, store.past_runs(scenario.name or ""))
    return replace(scenario, lengths=lengths, known=known, step_seconds=steps, parts_known=frozenset(parts_known))


def _part(scenario: Scenario, job: str, store: Store) -> timedelta | None:
    """Return how long the steps of a group take, as far as runs of the whole batch tell."""
    from batchctl.schedule.estimate import estimate

    expected = estimate(scenario.batch, job.partition("/")[2] or None, store.past_runs(job))
    return expected.duration if expected.runs else None


def _lengths(texts: list[str]) -> dict[str | None, tuple[Length, ...]]:
    """Read the durations, those of a group with its name in front."""
    from batchctl.report.player import Length

    found: dict[str | None, tuple[Length, ...]] = {}
    for text in texts:
        group, equals, own = text.rpartition("=")
        key = group if equals else None
        found[key] = (*found.get(key, ()), Length(_duration("--duration", own, positive=True)))
    return found


def _duration(option: str, text: str, *, positive: bool = False) -> Duration:
    from batchctl.config import parse_duration

    try:
        found = parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    if positive and not found:
        raise UsageError(f"{option}: found {text!r}, expected a duration longer than nothing")
    return found


def _every(text: str) -> OptionalDuration:
    from batchctl.config import OptionalDuration

    return OptionalDuration(seconds=_duration("--every", text).total_seconds()) if text else OptionalDuration()


def _named_zone(name: str | None) -> tzinfo | None:
    import zoneinfo

    try:
        return None if name is None else zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise UsageError(
            f"--timezone: found {name!r}, expected a name of the time zone database such as Asia/Seoul"
        ) from None


def _zone(session: Session) -> tzinfo:
    """Return the configured zone if there is a configuration, else the system's."""
    from batchctl.schedule.cron import local_zone

    try:
        return session.zone
    except ConfigurationError:
        return local_zone(None)


def _begin(session: Session, text: str | None, zone: tzinfo) -> datetime:
    """Return when to begin: the given day or time, else today."""
    if text is None:
        return session.clock.now().astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0)
    return in_reach("--start", text, instant(session, "--start", text, zone)).astimezone(UTC)
