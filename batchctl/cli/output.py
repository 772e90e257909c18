"""The only place that prints: lines, tables, JSON documents, questions. rich is loaded on a terminal only."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from batchctl.cli.table import laid_out
from batchctl.cli.terminal import on_terminal, write
from batchctl.logs import rfc3339

if TYPE_CHECKING:
    from collections.abc import Sequence


def document(content: dict[str, Any]) -> None:
    """Print one JSON document; instants become RFC 3339 in UTC."""

    def encode(value: Any) -> Any:
        if isinstance(value, datetime):
            return rfc3339(value)
        raise TypeError(type(value).__name__)

    write(json.dumps({"version": 1, **content}, default=encode, ensure_ascii=False) + "\n")


def line(text: str) -> None:
    """Print a plain line, at once: who reads a pipe of a long command sees how far it is."""
    write(f"{text}\n")


def warning(text: str) -> None:
    """Say on standard error what a command that did its work could not do, or what somebody has to know."""
    complain(f"warning: {text}")


def complain(text: str) -> None:
    """Say on standard error what is not as it should be, on one line."""
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"batchctl: {' '.join(text.split())}\n")


def confirmed(question: str) -> bool:
    """Ask on the terminal; anything but a yes is a no."""
    write(f"{question} [y/N] ")
    answer = sys.stdin.readline() if sys.stdin is not None else ""
    if not answer.endswith("\n"):
        line("")
    return answer.strip().lower() in {"y", "yes"}


def crontab_lines(text: bytes) -> None:
    """Print lines of a crontab; a path may hold bytes that are no text, which are written as escapes."""
    write(text.decode(errors="backslashreplace"))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under headings: as wide as the terminal, elsewhere one line for each."""
    if not on_terminal():
        for text in laid_out(columns, rows, None):
            line(text)
        return
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    console = Console()
    headings = len(laid_out(columns, (), console.width, cell_len))
    with console.capture() as captured:
        for number, text in enumerate(laid_out(columns, rows, console.width, cell_len)):
            console.print(Text(text, "bold" if number < headings else ""), soft_wrap=True)
    write(captured.get())
