"""What jobs inherit from the machine: the locale, the time zone."""

from __future__ import annotations

import locale
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.doctor.finding import ok, warning
from batchctl.schedule.cron import local_zone

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime, tzinfo

    from batchctl.doctor.finding import Finding

MONTHS = 13
"""Over how many months two zones are compared: a year, with its changes of the clock."""


def check_locale(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check that what jobs print and read is taken as UTF-8."""
    name, value = next(
        ((name, environment[name]) for name in ("LC_ALL", "LC_CTYPE", "LANG") if environment.get(name)), ("LANG", "")
    )
    shown = f"{name}={value}" if value else "no LANG"
    if "utf-8" not in value.lower() and "utf8" not in value.lower():
        yield warning(
            "locale",
            f"{shown}: steps take text for ASCII, and many fail at the first other letter",
            "put LANG=C.UTF-8 into the crontab, or into a step's env",
        )
        return
    try:
        locale.setlocale(locale.LC_CTYPE, value)
    except locale.Error:
        yield warning(
            "locale",
            f"{shown} is not installed on this machine, so programs fall back to ASCII",
            "use C.UTF-8, or install it (locale-gen)",
        )
        return
    yield ok("locale", f"{shown}: UTF-8")


def check_timezone(
    configured: str | None, now: datetime, environment: Mapping[str, str], *, cron_zone: str | None, translated: bool
) -> Iterator[Finding]:
    """Compare the time zones of the system, of cron and of the configuration.

    Args:
        configured: The configured zone, None for the system's.
        now: The present.
        environment: The environment of this call.
        cron_zone: What the daemon of cron has as TZ, None if it has none or does not show it.
        translated: True if crontab lines are installed, whose times are then compared as lines.
    """
    system = local_zone(None)
    found = []
    if not translated and configured is not None and (apart := _first_difference(local_zone(configured), system, now)):
        found.append(
            warning(
                "timezone",
                f"timezone = {configured!r}, but cron keeps the system's time, {_name(system)}: schedules differ by "
                f"{apart}",
                "let `batchctl crontab install` write the lines, or set the system's zone to the same (timedatectl)",
            )
        )
    written = _written()
    if written is not None and _known(written) and _first_difference(local_zone(written), system, now):
        found.append(
            warning(
                "timezone",
                f"/etc/timezone says {written}, /etc/localtime {_name(system)}",
                "set the system's zone anew (timedatectl set-timezone)",
            )
        )
    for variable, where in ((environment.get("TZ"), "here"), (cron_zone, "for the cron daemon")):
        zone = (variable or "").removeprefix(":")
        if zone and _known(zone) and _first_difference(local_zone(zone), system, now):
            found.append(
                warning(
                    "timezone",
                    f"TZ={variable} {where}, but the system's zone is {_name(system)}",
                    "do without TZ: batchctl shows times in the configured zone, else the system's",
                )
            )
    yield from found or [ok("timezone", f"{configured or _name(system)}, the same for cron")]


def _first_difference(one: tzinfo, other: tzinfo, now: datetime) -> timedelta | None:
    """Return by how much two zones differ somewhere in the coming year, None if they never do."""
    for month in range(MONTHS):
        instant = now + timedelta(days=30 * month)
        apart = (one.utcoffset(instant.astimezone(one)) or timedelta()) - (
            other.utcoffset(instant.astimezone(other)) or timedelta()
        )
        if apart:
            return abs(apart)
    return None


def _name(zone: tzinfo) -> str:
    return str(zone)


def _known(name: str) -> bool:
    try:
        local_zone(name)
    except (OSError, ValueError, LookupError):
        return False
    return True


def _written() -> str | None:
    try:
        return Path("/etc/timezone").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
