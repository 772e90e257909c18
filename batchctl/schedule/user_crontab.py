"""The crontab of whoever calls, read and replaced by crontab(1)."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

from batchctl.errors import BatchctlError
from batchctl.schedule import crontab

NONE = b"no crontab for"
"""What crontab(1) says, with a failure's exit code, to a user who has none."""
ESCAPES = {b"\r": b"\\r", b"\b": b"\\b"}
"""What Debian's `crontab -l` writes for characters that would hide something from a reader."""


class CrontabError(BatchctlError):
    """crontab(1) is missing, refuses, or did not do what it was asked for."""


def read() -> bytes | None:
    """Return the crontab byte for byte, None if there is none.

    Raises:
        CrontabError: crontab(1) is missing or refuses.
    """
    done = _crontab("-l")
    if done.returncode == 0:
        return _exact(done.stdout)
    if NONE in done.stderr and not done.stdout:
        return None
    raise _refused(done, "cannot be read")


def _exact(listed: bytes) -> bytes:
    """Return what a listing stands for: written back with its escapes, it would be another crontab."""
    if not any(escape in listed for escape in ESCAPES.values()):
        return listed
    # An editor is handed the very bytes.
    done = _crontab("-e", VISUAL="cat", EDITOR="cat")
    exact = done.stdout
    escaped = functools.reduce(lambda text, each: text.replace(*each), ESCAPES.items(), exact)
    if done.returncode != 0 or listed not in (exact, escaped):
        raise CrontabError(
            r"the crontab has \r or \b, and crontab does not tell whether as characters or as written; "
            "with `crontab -e` take them out, carriage returns at the ends of lines perhaps, then call again"
        )
    return exact


def replace(before: bytes | None, after: bytes) -> None:
    """Replace the crontab, or remove it when nothing is left, if it still is what it was.

    Args:
        before: What was read, and shown to a person perhaps.
        after: What it is to become; nothing for none.

    Raises:
        CrontabError: it was changed meanwhile, or crontab(1) is missing, refuses or did not do it.
    """
    if read() != before:
        raise CrontabError("the crontab was changed meanwhile by somebody else; nothing was written, call again")
    done = _crontab("-", text=after) if after else _crontab("-r")
    if done.returncode != 0:
        raise _refused(done, "was not changed")
    if (now := read()) != (after or None):
        left = "there is none" if now is None else f"it has {now.count(bytes([10]))} lines"
        raise CrontabError(
            f"the crontab is not what was written: {left}; look at it with `crontab -l`, somebody else may have "
            "changed it at the same time"
        )


def _crontab(*arguments: str, text: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("crontab")
    if program is None:
        raise CrontabError("crontab is not found in PATH; install cron (Debian: apt-get install cron)")
    # Messages as they are known here, and the whole crontab or what Debian's shows of it, never a user's choice.
    environment = {name: value for name, value in os.environ.items() if name != "CRONTAB_NOHEADER"}
    environment |= {"LC_ALL": "C", **variables}
    try:
        return subprocess.run([program, *arguments], input=text, capture_output=True, check=False, env=environment)
    except OSError as error:
        raise CrontabError(f"{program} cannot be started: {error.strerror}") from error


def _refused(done: subprocess.CompletedProcess[bytes], what: str) -> CrontabError:
    said = " ".join(crontab.shown(line) for line in (done.stderr or done.stdout).splitlines())
    return CrontabError(f"the crontab {what}: crontab says (exit code {done.returncode}): {said or 'nothing'}")
