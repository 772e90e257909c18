"""The crontab lines that a configuration asks for."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.schedule.cron import in_other_zone, local_zone
from batchctl.schedule.crontab import command_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime, tzinfo

    from batchctl.config import Batch, Configuration

DEFAULT_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
EXPLANATION = (
    "# Written by `batchctl crontab install`, which replaces all between the two markers.",
    "# What these lines print is mailed to the MAILTO that is set above them, else to the owner of this crontab.",
)


@dataclass(frozen=True)
class Wanted:
    """What a configuration asks of a crontab.

    Attributes:
        path: The configuration file, absolute.
        lines: For the crontab, with comments, without newlines; none if nothing has a schedule.
        warnings: What will not be as the configuration says, or may surprise.
        not_found: Commands of steps that are found neither here nor by cron, in words.
    """

    path: Path
    lines: tuple[bytes, ...]
    warnings: tuple[str, ...]
    not_found: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    name: str
    schedule: str
    offset: timedelta
    arguments: tuple[str, ...]
    search_path: str | None


def wanted(configuration: Configuration, program: Sequence[str], *, search_path: str, now: datetime) -> Wanted:
    """Turn the schedules of a configuration into crontab lines, disabled jobs too: their guard answers.

    Args:
        configuration: With valid schedules.
        program: How to start batchctl, such as this_program().
        search_path: PATH as it is here; what the steps' commands are under cron, they are to be here.
        now: From when on the times have to be right, if cron reckons in another zone.

    Raises:
        BatchctlError: a path cannot be written in a crontab.
    """
    system, zone = local_zone(None), local_zone(configuration.timezone)
    lines, warnings = [line.encode() for line in EXPLANATION], list(_not_started(configuration))
    for job in _jobs(configuration, search_path):
        schedule = in_other_zone(job.schedule, zone, system, now)
        if schedule is None:
            text = (
                f"{job.name}: {job.schedule!r} is meant in {_name(zone)}, but cron reckons in the system's zone, "
                f"{_name(system)}, and no line is right in summer and winter: it starts at that time in {_name(system)}"
            )
            warnings.append(f"{text}; set the system's time zone, or `timezone`, so that they agree")
            lines.append(f"# Not as configured: {text}.".encode())
        elif schedule != job.schedule:
            text = f"# {job.name}: {job.schedule!r} in {_name(zone)} is this in {_name(system)}, cron's zone."
            lines.append(text.encode())
        environment = () if job.search_path is None else ("/usr/bin/env", f"PATH={job.search_path}")
        words = (*environment, *program, "--config", str(configuration.path), *job.arguments)
        sleep = f"sleep {job.offset // timedelta(seconds=1)};" if job.offset else ""
        start = f"{schedule or job.schedule:<11}  " + (f"{sleep:<9} " if sleep else "")
        lines.append(start.encode() + command_words(words))
    return Wanted(
        path=configuration.path,
        lines=tuple(lines) if len(lines) > len(EXPLANATION) else (),
        warnings=tuple(warnings),
        not_found=tuple(
            text for name, batch in configuration.batches.items() for text in _not_found(name, batch, search_path)
        ),
    )


def this_program() -> tuple[str, ...]:
    """Name the installed program as cron can start it: absolute, inside its virtual environment.

    Links are kept as they are: what the `python` of a virtual environment points at does not know its packages.
    """
    called = Path(os.path.abspath(sys.argv[0]))  # noqa: PTH100 - resolve() would follow links
    for program in (called, Path(sys.executable).with_name("batchctl")):
        if program.name == "batchctl" and program.is_file() and os.access(program, os.X_OK):
            return (str(program),)
    return (sys.executable, "-m", "batchctl")


def _jobs(configuration: Configuration, search_path: str) -> Iterator[_Job]:
    nothing = timedelta()
    for name, batch in configuration.batches.items():
        path = _path_of(batch, search_path)
        if batch.schedule:
            yield _Job(name, _spaced(batch.schedule), nothing, ("run-batch", name), path)
        for group_name, group in batch.group.items():
            if group.schedule:
                arguments = ("run-batch", name, "--group", group_name)
                yield _Job(f"{name}/{group_name}", _spaced(group.schedule), nothing, arguments, path)
    for name, rollup in configuration.rollups.items():
        which = ("--rollup", name) if len(configuration.rollups) > 1 else ()
        for grain in rollup.grains:
            if expression := rollup.schedule.get(grain):
                arguments = ("aggregate", *which, "--grain", grain)
                yield _Job(f"{name}/{grain}", _spaced(expression), rollup.offset.get(grain, nothing), arguments, None)


def _spaced(expression: str) -> str:
    return " ".join(expression.split())


def _not_started(configuration: Configuration) -> Iterator[str]:
    """Name the jobs that no line starts."""
    for name, batch in configuration.batches.items():
        if not batch.schedule and not any(group.schedule for group in batch.group.values()):
            yield f"{name} has no schedule, so cron does not start it"
    for name, rollup in configuration.rollups.items():
        for grain in rollup.grains:
            if not rollup.schedule.get(grain):
                yield f"{name}/{grain} has no schedule (rollup.{name}.schedule.{grain}), so cron does not start it"


def _programs(batch: Batch) -> tuple[str, ...]:
    """Name what the steps look up in PATH; one with a token, or with a PATH of its own, decides for itself."""
    names = (step.command[0] for step in batch.step if "PATH" not in step.env)
    return tuple(dict.fromkeys(name for name in names if "/" not in name and "{" not in name))


def _not_found(name: str, batch: Batch, search_path: str) -> Iterator[str]:
    for program in _programs(batch):
        if _found(program, [*_absolute(search_path), *DEFAULT_PATH]) is None:
            yield f"{name}: {program} is not found in PATH, and cron will not find it either; name it by its path"


def _path_of(batch: Batch, search_path: str) -> str:
    """Return a PATH under which the steps' commands are what they are here: cron's own, and in front what it lacks."""
    here = _absolute(search_path)
    needed: set[str] = set()
    while True:
        path = [directory for directory in here if directory in needed]
        path += [directory for directory in DEFAULT_PATH if directory not in path]
        found = {program: _found(program, here) for program in _programs(batch)}
        others = {
            os.path.dirname(place)  # noqa: PTH120 - as PATH spells it
            for program, place in found.items()
            if place is not None and _found(program, path) != place
        }
        if not others - needed:
            return ":".join(path)
        needed |= others


def _absolute(search_path: str) -> list[str]:
    """List the directories that mean the same wherever a program is started."""
    return list(
        dict.fromkeys(part.rstrip("/") for part in search_path.split(":") if part.startswith("/") and part != "/")
    )


def _found(program: str, path: Sequence[str]) -> str | None:
    return shutil.which(program, path=":".join(path))


def _name(zone: tzinfo) -> str:
    return getattr(zone, "key", None) or str(zone)
