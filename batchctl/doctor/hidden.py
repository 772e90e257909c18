"""Commands that hide what they start from the guards (pure but for reading the shell scripts of steps)."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_AS_USER = (
    "as another user, in a new environment and without the step's lock, it looks like a stranger's and cannot be ended",
    "let cron run batchctl itself as that user",
)
_CONTAINER = (
    "a container is a child of its daemon, and goes on when the step is ended or its client dies",
    "give it a fixed --name with --rm, so that a second one is refused, and stop it on SIGTERM",
)
_LATER = ("it is started later, when the step has long ended", "let the step run it itself")
_AWAY = (
    "it goes on beside the step, which is taken to have ended",
    "let the step wait for it; batchctl gives it a session and a log of its own",
)
HIDING = {
    **dict.fromkeys(("sudo", "doas", "su", "runuser", "pkexec"), _AS_USER),
    **dict.fromkeys(("docker", "podman", "nerdctl"), _CONTAINER),
    "systemd-run": ("systemd starts it, outside of the step", "add --scope, which keeps it in the step"),
    "ssh": (
        "on the other machine it goes on when the connection ends, and no guard looks there",
        "take a lock there (flock -n) and a limit (timeout)",
    ),
    **dict.fromkeys(("at", "batch"), _LATER),
    **dict.fromkeys(("setsid", "nohup", "screen", "tmux", "daemonize", "start-stop-daemon"), _AWAY),
}
"""Programs, why the guards do not see what they start, and what to do."""
STARTS_CONTAINER = {"run", "exec", "start", "up"}
SHELLS = {"sh", "bash", "dash", "zsh", "ksh"}
BEFORE = {
    "env", "nice", "ionice", "timeout", "time", "stdbuf", "chrt", "taskset", "flock", "exec", "command", "then", "do",
    "else", "if", "while", "until", "!", "{",
}  # fmt: skip
"""Words after which a command follows, perhaps behind options of theirs."""
NEAR = 4
"""In how many words behind one of these a command is looked for."""
LONGEST_SCRIPT = 100_000  # bytes


def hidden(words: Sequence[str], directory: Path) -> Iterator[tuple[str, str, str]]:
    """Name what in a step's command hides something, why, and what to do.

    Args:
        words: The command with its tokens filled in. A line for a shell, and a shell script that is called, are looked
            into, as far as they are simple.
        directory: From where a relative script is looked for.
    """
    commands = [list(words)]
    if Path(words[0]).name in SHELLS and len(words) > 1:
        line = next((text for option, text in pairwise(words[1:]) if _takes_line(option)), None)
        commands += _commands(line if line is not None else _script(directory / words[1]))
    else:
        commands += _commands(_script(directory / words[0]) if "/" in words[0] else "")
    seen = set()
    for command in commands:
        for name in _hiding(command):
            if name not in seen:
                seen.add(name)
                yield name, *HIDING[name]


def _takes_line(option: str) -> bool:
    return re.fullmatch(r"-[a-z]*c", option) is not None


def _script(path: Path) -> str:
    """Read a shell script; nothing if it is none."""
    try:
        if path.stat().st_size > LONGEST_SCRIPT:
            return ""
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    first = text.partition("\n")[0]
    return text if re.match(r"#!.*\b(sh|bash|dash|zsh|ksh)\b", first) or path.suffix == ".sh" else ""


def _commands(script: str) -> Iterator[list[str]]:
    """Split a script into simple commands, line by line; a line that is not simple is passed over."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        try:
            for word in lexer:
                if set(word) <= set(";&|()"):
                    yield command
                    command = []
                else:
                    command.append(word)
        except ValueError:
            continue
        yield command


def _hiding(command: Sequence[str]) -> Iterator[str]:
    words = [Path(word).name for word in command]
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    reach = 1
    for number, word in enumerate(words):
        if number == reach:
            return
        if word in BEFORE or word in HIDING:
            reach = number + 1 + NEAR
        if word in HIDING and _starts_something(word, words[number + 1 :]):
            yield word


def _starts_something(name: str, arguments: Sequence[str]) -> bool:
    if HIDING[name] is _CONTAINER:
        return not STARTS_CONTAINER.isdisjoint(arguments)
    return name != "systemd-run" or "--scope" not in arguments
