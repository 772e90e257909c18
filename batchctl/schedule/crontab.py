"""The text of a crontab: lines of ours between two markers, all others byte for byte as they were (pure)."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from difflib import unified_diff
from os import fsencode
from typing import TYPE_CHECKING, Literal

from batchctl.errors import BatchctlError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MARKER = re.compile(rb"# (BEGIN|END) batchctl(?:[ \t]+(.*?))?[ \t\r]*\n?")
NEWLINE_ADDED = b" (newline added above)"
"""Behind a path in a marker: the line above it had no newline, and has one only to keep the two apart."""
NOT_PORTABLE = re.compile(r"[\x00-\x1f\x7f\\]")


class DamagedMarkersError(BatchctlError):
    """The markers do not come in pairs, so what is between them cannot be told."""


@dataclass(frozen=True)
class Installed:
    """What a crontab has of a configuration.

    Attributes:
        state: "current" (the lines are the wanted ones), "different", or "absent" (no block of this configuration).
        missing: Wanted lines that are not in the block.
        extra: Lines of the block that are not wanted.
        elsewhere: Numbers and texts of active lines outside the block that name this configuration too.
    """

    state: Literal["absent", "different", "current"]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    elsewhere: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class _Block:
    owner: bytes
    begin: int
    """Index of the line with the first marker."""
    end: int
    """Index of the line after the second marker."""
    newline_added: bool


def command_words(words: Sequence[str]) -> bytes:
    """Write an argument list as a crontab takes it: quoted for the shell, and `%` escaped for cron.

    Raises:
        BatchctlError: a word has a control character or a backslash, which crons read in different ways.
    """
    for word in words:
        if NOT_PORTABLE.search(word):
            raise BatchctlError(
                f"{word!r} has a backslash or a control character, which cannot be written in a crontab so that every "
                "cron reads it alike; rename it"
            )
    return fsencode(shlex.join(words).replace("%", "\\%"))


def block(path: Path, lines: Sequence[bytes]) -> bytes:
    """Put a configuration's lines, without their newlines, between its markers."""
    return _block(_owner(path), lines, newline_added=False)


def install(text: bytes, path: Path, lines: Sequence[bytes]) -> bytes:
    """Replace the lines of a configuration where they are, or add them at the end.

    Args:
        text: A crontab.
        path: The configuration file, absolute.
        lines: What is to be between the markers, without newlines.

    Raises:
        DamagedMarkersError: the markers of the crontab are not in pairs.
    """
    rows = _rows(text)
    owner = _owner(path)
    for found in _blocks(rows):
        if found.owner == owner:
            new = _block(owner, lines, newline_added=found.newline_added)
            return b"".join((*rows[: found.begin], new, *rows[found.end :]))
    unfinished = bool(text) and not text.endswith(b"\n")
    return text + (b"\n" if unfinished else b"") + _block(owner, lines, newline_added=unfinished)


def remove(text: bytes, path: Path) -> bytes:
    """Take the lines of a configuration away, and what was added to make room for them.

    Raises:
        DamagedMarkersError: the markers of the crontab are not in pairs.
    """
    rows = _rows(text)
    owner = _owner(path)
    for found in _blocks(rows):
        if found.owner != owner:
            continue
        above, below = b"".join(rows[: found.begin]), rows[found.end :]
        if found.newline_added and above.endswith(b"\n"):
            if not below:
                above = above[:-1]
            elif (marker := MARKER.fullmatch(below[0])) and not _newline_added(marker[2]):
                # The block that now follows the unfinished line takes the note over.
                below = [b"# BEGIN batchctl " + marker[2] + NEWLINE_ADDED + b"\n", *below[1:]]
        return above + b"".join(below)
    return text


def lines_of(text: bytes, path: Path) -> tuple[bytes, ...] | None:
    """Return what is between the markers of a configuration, without newlines; None if it has none.

    Raises:
        DamagedMarkersError: the markers of the crontab are not in pairs.
    """
    rows = _rows(text)
    owner = _owner(path)
    for found in _blocks(rows):
        if found.owner == owner:
            return tuple(row.rstrip(b"\r\n") for row in rows[found.begin + 1 : found.end - 1])
    return None


def compare(text: bytes, path: Path, lines: Sequence[bytes]) -> Installed:
    """Compare what is installed of a configuration with what is wanted; comments, order and PATH do not count.

    The PATH of a line is left out because it is made from that of the shell which installed it, and not every shell
    that asks has the same.

    Raises:
        DamagedMarkersError: the markers of the crontab are not in pairs.
    """
    found = lines_of(text, path)
    has = {line: _essential(line) for line in found or () if _active(line)}
    asked = {line: _essential(line) for line in lines if _active(line)}
    same = sorted(has.values()) == sorted(asked.values())
    return Installed(
        state="absent" if found is None else "current" if same else "different",
        missing=tuple(shown(line) for line, essential in asked.items() if essential not in has.values()),
        extra=tuple(shown(line) for line, essential in has.items() if essential not in asked.values()),
        elsewhere=_elsewhere(text, path),
    )


def difference(before: bytes, after: bytes) -> tuple[str, ...]:
    """Return the unified difference between two crontabs, safe to show on a terminal; nothing if there is none."""
    old, new = (tuple(_shown_row(row) for row in _rows(text)) for text in (before, after))
    return tuple(
        line for row in unified_diff(old, new, "crontab", "crontab, new", lineterm="") for line in row.split("\n")
    )


def shown(line: bytes) -> str:
    """Make a line of a crontab readable: what is not text, or would steer a terminal, is written as an escape."""
    text = line.decode(errors="backslashreplace")
    return "".join(each if each.isprintable() or each == "\t" else ascii(each)[1:-1] for each in text)


def _shown_row(row: bytes) -> str:
    return shown(row[:-1]) if row.endswith(b"\n") else shown(row) + "\n\\ No newline at the end"


def _owner(path: Path) -> bytes:
    return command_words([str(path)]).replace(b"\\%", b"%")


def _block(owner: bytes, lines: Sequence[bytes], *, newline_added: bool) -> bytes:
    note = NEWLINE_ADDED if newline_added else b""
    rows = (b"# BEGIN batchctl " + owner + note, *lines, b"# END batchctl " + owner)
    return b"".join(row + b"\n" for row in rows)


def _rows(text: bytes) -> list[bytes]:
    """Split at newlines alone, as cron does, and keep them."""
    return re.findall(rb"[^\n]*\n|[^\n]+", text)


def _newline_added(rest: bytes) -> bool:
    return rest.endswith(NEWLINE_ADDED)


def _blocks(rows: Sequence[bytes]) -> list[_Block]:
    found: list[_Block] = []
    opened: tuple[int, bytes] | None = None
    for index, row in enumerate(rows):
        marker = MARKER.fullmatch(row)
        if marker is None:
            continue
        rest = marker[2] or b""
        owner = rest.removesuffix(NEWLINE_ADDED)
        if not owner:
            raise _damaged(rows, [index], "names no configuration")
        if marker[1] == b"BEGIN":
            if opened is not None:
                raise _damaged(rows, [opened[0], index], "the first has no END before the second")
            if any(block.owner == owner for block in found):
                raise _damaged(rows, [next(each.begin for each in found if each.owner == owner), index], "it is twice")
            opened = index, rest
        elif opened is None:
            raise _damaged(rows, [index], "has no BEGIN above it")
        elif opened[1].removesuffix(NEWLINE_ADDED) != owner:
            raise _damaged(rows, [opened[0], index], "they name different configurations")
        else:
            found.append(_Block(owner, opened[0], index + 1, _newline_added(opened[1])))
            opened = None
    if opened is not None:
        raise _damaged(rows, [opened[0]], "has no END below it")
    return found


def _damaged(rows: Sequence[bytes], indexes: Sequence[int], what: str) -> DamagedMarkersError:
    named = " and ".join(f"line {index + 1} ({shown(rows[index].strip())})" for index in indexes)
    return DamagedMarkersError(
        f"the markers of batchctl in the crontab are damaged: {named}: {what}; nothing was changed. With `crontab -e`, "
        "remove the lines between the markers and the markers themselves, then call `batchctl crontab install`"
    )


def _active(line: bytes) -> bool:
    return bool(line.strip()) and not line.lstrip(b" \t").startswith(b"#")


def _essential(line: bytes) -> bytes:
    return re.sub(rb" /usr/bin/env (?:PATH=\S+|'PATH=(?:[^']|'\"'\"')*') ", b" ", line)


def _elsewhere(text: bytes, path: Path) -> tuple[tuple[int, str], ...]:
    """List active lines outside all blocks that start something of this configuration."""
    rows = _rows(text)
    inside = {index for block in _blocks(rows) for index in range(block.begin, block.end)}
    name = re.compile(rb"(?<![\w./-])" + re.escape(command_words([str(path)])) + rb"(?![\w./-])")
    return tuple(
        (index + 1, shown(row.strip()))
        for index, row in enumerate(rows)
        if index not in inside and _active(row) and b"batchctl" in row and name.search(row)
    )
