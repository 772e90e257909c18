"""The commands of steps: whether cron would find them, and whether the guards can see what they start."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.batch.plan import TOKENS, fill, make_plan
from batchctl.doctor.finding import error, ok, warning
from batchctl.doctor.hidden import hidden

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchctl.batch.plan import PlannedStep
    from batchctl.config import Batch
    from batchctl.doctor.finding import Finding

INTERPRETERS = re.compile(r"(python[0-9.]*|bash|sh|dash|perl|ruby|node|php|Rscript)")
BRACES = re.compile(r"(?<!\$)\{[A-Za-z_]\w*\}")
OWN_BRACES = ("awk", "gawk", "mawk", "jq")
"""Programs in whose arguments braces mean something else."""


def check_steps(name: str, batch: Batch, directory: Path, path: str, here: str) -> Iterator[Finding]:
    """Check the command of each step of a batch, for each account.

    Args:
        name: Name of the batch.
        batch: Its configuration.
        directory: The steps' working directory.
        path: The PATH that cron will have.
        here: The PATH of this call.
    """
    if not os.access(directory, os.X_OK):
        yield error("step", f"{name}: the steps' directory {directory} cannot be entered", f"chmod u+x {directory}")
        return
    found: dict[Finding, None] = {}
    planned = make_plan(name, batch).steps
    for step in planned:
        words = [fill(text, batch=name, run_id="RUN_ID", step=step) for text in step.command]
        place = f"step {step.step} of {name}"
        own_path = step.env.get("PATH", path)
        found |= dict.fromkeys(_command(place, words, directory, own_path, here))
        found |= dict.fromkeys(_braces(place, step))
        for what, why, advice in hidden(words, directory):
            found[warning("step", f"{place} runs {what}: {why}", advice)] = None
    yield from found
    if not any(finding.state == "error" for finding in found):
        count = len({step.step for step in planned})
        yield ok(
            "step", f"{name}: {count} step{'s' * (count > 1)}, every command is found in {directory} or PATH={path}"
        )


def _command(place: str, words: list[str], directory: Path, path: str, here: str) -> Iterator[Finding]:
    command = words[0]
    found = _look_up(command, directory, path)
    if found is None:
        elsewhere = None if "/" in command else _look_up(command, directory, here)
        if elsewhere is not None and os.access(elsewhere, os.X_OK):
            yield error(
                "step",
                f"{place}: {command} is found in your PATH ({elsewhere}), not in that of cron ({path})",
                f"write {elsewhere} in its command, or let `batchctl crontab install` set PATH",
            )
        else:
            where = directory / command if "/" in command else f"{command} in PATH={path}"
            yield error("step", f"{place}: there is no {where}", "install it, or correct the step's command")
        return
    if problem := _not_executable(found):
        yield error("step", f"{place}: {found} {problem[0]}", problem[1])
    elif len(words) > 1 and INTERPRETERS.fullmatch(found.name) and not words[1].startswith("-"):
        script = directory / words[1]
        if not script.is_file():
            yield error("step", f"{place}: there is no {script}", "correct the path; it starts from the configuration")
        elif not os.access(script, os.R_OK):
            yield error(
                "step", f"{place}: {script} cannot be read by this user", f"chmod it, or run as {script.owner()}"
            )


def _look_up(command: str, directory: Path, path: str) -> Path | None:
    """Find a program as the kernel will, from the steps' directory; one that is there but not executable too."""
    if "/" in command:
        return directory / command if (directory / command).is_file() else None
    places = [directory / entry / command for entry in path.split(os.pathsep)]
    there = [place for place in places if place.is_file()]
    return next((place for place in there if os.access(place, os.X_OK)), there[0] if there else None)


def _not_executable(program: Path) -> tuple[str, str] | None:
    if not os.access(program, os.X_OK):
        return "may not be executed by this user", f"chmod +x {program}, or call its interpreter"
    try:
        with program.open("rb") as file:
            first = file.readline(256)
    except OSError:
        return None  # a program that may be executed but not read
    if first.startswith(b"#!"):
        interpreter = os.fsdecode(first[2:].split()[0]) if first[2:].split() else ""
        if not Path(interpreter).is_file():
            return f"names an interpreter that does not exist: {interpreter}", "correct its first line"
    elif not first.startswith(b"\x7fELF"):
        return "is neither a program nor a script with a #! line", "begin it with #!/bin/sh, or call its interpreter"
    return None


def _braces(place: str, step: PlannedStep) -> Iterator[Finding]:
    if Path(step.command[0]).name in OWN_BRACES:
        return
    known = re.findall(r"[a-z_]+", TOKENS.pattern)
    for text in step.command:
        for token in BRACES.findall(TOKENS.sub("", text)):
            yield warning(
                "step",
                f"{place}: {token} is not a token, and is handed to the command as it is",
                f"tokens are {' '.join(f'{{{name}}}' for name in known)}; leave it if the command means it",
            )
