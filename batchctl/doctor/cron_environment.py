"""The doctor once more, in the environment that cron gives to a job."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from batchctl.config_file import NONE_FOUND
from batchctl.doctor.finding import Finding, error, ok, warning
from batchctl.doctor.patient import own_entry
from batchctl.errors import BatchctlError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SHELL = "/bin/sh"
LIMIT_SECONDS = 240.0
"""Longer than every limit inside."""
TELLING = (
    "BATCHCTL_CONFIG", "BATCHCTL_DATABASE_URL", "PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE", "PGSSLMODE", "PGSSLCERT",
    "PGSSLKEY", "PGSSLROOTCERT", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "TZ", "LANG", "LC_ALL",
)  # fmt: skip
"""Variables whose absence changes what a job does; others are left unnamed."""


def cron_environment(path: str) -> dict[str, str]:
    """Return all that cron sets for a job.

    Args:
        path: The PATH that the crontab sets, or cron's own.
    """
    entry = own_entry()
    return {"HOME": entry.pw_dir, "LOGNAME": entry.pw_name, "SHELL": SHELL, "PATH": path}


def examine_as_cron(
    program: Sequence[str], path: str, here: Mapping[str, str], configuration: Path | None = None
) -> tuple[Finding, ...]:
    """Call the doctor again as cron would: its environment, its shell, no terminal, the home directory.

    Args:
        program: The program, absolute, with the options of this call as they were given.
        path: The PATH that cron will have.
        here: The environment of this call.
        configuration: The file that this call has found, which cron may not find.

    Raises:
        BatchctlError: that call ended without a report.
    """
    environment = cron_environment(path)
    line = shlex.join([*program, "doctor", "--json"])
    home = environment["HOME"]
    if not os.path.isdir(home) or not os.access(home, os.X_OK):  # noqa: PTH112 - of a text from passwd
        # Debian's cron then starts nothing at all.
        return (
            error(
                "environment",
                f"the home directory {home}, in which cron starts jobs, does not exist or cannot be entered",
                "make it, or correct the passwd entry (usermod --home)",
                ExitCode.CONFIGURATION,
            ),
        )
    first = ok("environment", f"as cron: {SHELL} -c in {home}, PATH={path}, no terminal, nothing else set")
    missing = [name for name in TELLING if here.get(name) and name not in environment]
    findings = [first]
    if missing:
        findings.append(
            warning(
                "environment",
                f"set here and not by cron: {', '.join(missing)}",
                "if the lines below find fault, set it in the crontab or, better, in the configuration",
            )
        )
    found = _read(_call(line, home, environment))
    return (*findings, *(_naming(each, configuration) for each in found))


def _naming(finding: Finding, configuration: Path | None) -> Finding:
    """Advise to name the file where cron finds none: another one is not what is missing."""
    if configuration is None or not finding.found.startswith(NONE_FOUND):
        return finding
    option = f"--config {shlex.quote(str(configuration))}"
    advice = (
        f"{configuration} is found from here alone: look again by `batchctl doctor --as-cron {option}`, and name it in "
        "the crontab too, as `batchctl crontab install` does"
    )
    return replace(finding, advice=advice)


def _call(line: str, home: str, environment: dict[str, str]) -> tuple[str, str, int]:
    process = subprocess.Popen(
        [SHELL, "-c", line],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=home,
        env=environment,
        start_new_session=True,
        umask=0o022,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        stdout, stderr = process.communicate(timeout=LIMIT_SECONDS)
    except BaseException as reason:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(reason, subprocess.TimeoutExpired):
            raise BatchctlError(
                f"under cron's environment the doctor has not ended after {LIMIT_SECONDS:g}s; call it without --as-cron"
            ) from reason
        raise
    return stdout, stderr, process.returncode


def _read(ended: tuple[str, str, int]) -> list[Finding]:
    stdout, stderr, code = ended
    try:
        document: dict[str, Any] = json.loads(stdout)
        return [_finding(each) for each in document["checks"]]
    except (ValueError, KeyError, TypeError) as reason:
        said = " ".join(stderr.split())[-500:] or "nothing"
        raise BatchctlError(
            f"under cron's environment the program ended with {code} and said: {said}; see that it starts with nothing "
            "but cron's environment"
        ) from reason


def _finding(said: Mapping[str, Any]) -> Finding:
    code = ExitCode(said["exit_code"]) if said["exit_code"] else ExitCode.FAILED
    return Finding(said["check"], said["state"], said["found"], said["advice"] or "", code)
