"""next: when a job will really start."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from batchctl.cli.app import command
from batchctl.cli.run_batch import Json
from batchctl.cli.session import Session
from batchctl.errors import UsageError, choices

if TYPE_CHECKING:
    from datetime import tzinfo

EARLIEST_YEAR, LATEST_YEAR = 1970, 2199


def in_reach(option: str, text: str, found: datetime) -> datetime:
    """Refuse an instant so far away that calendars end before the cron times behind it do."""
    if not EARLIEST_YEAR <= found.year <= LATEST_YEAR:
        raise UsageError(f"{option} {text}: expected a year from {EARLIEST_YEAR} to {LATEST_YEAR}")
    return found


def instant(session: Session, option: str, text: str, zone: tzinfo | None = None) -> datetime:
    """Read an instant as people write it; without an offset it is in the zone, by default the configured one."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{option} {text}: expected a day such as 2026-01-31 or a time such as 2026-01-31T01:00Z"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=zone or session.zone)


@command("next")
def next_start(
    session: Session,
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="A batch, a group (daily/upload) or a rollup's grain.")
    ] = None,
    *,
    at: Annotated[
        str | None, typer.Option("--at", metavar="T", help="As if it were then: 2026-01-31T01:00.", show_default=False)
    ] = None,
    json: Json = False,
) -> int:
    """Show the first cron time that every guard will allow.

    And what each guard says now.
    """
    from batchctl.cli import job_view
    from batchctl.report.jobs import JobReader

    when = None if at is None else in_reach("--at", at, instant(session, "--at", at))
    with session.connect() as store:
        reader = JobReader(session.configuration, store, session.zone, session.clock)
        starts = reader.next_starts(job, when)
    if job is not None and not starts:
        raise UsageError(f"no such job: {choices([job])}; configured: {choices(reader.names())}")
    job_view.next_starts(starts, zone=session.zone, json=json)
    return 0
