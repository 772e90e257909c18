"""Rows under headings, as wide as the terminal: what does not fit goes on an indented line of its own, uncut."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GAP, INDENT = 2, 4
"""Columns of a terminal between two cells, and in front of what is continued."""
LEAST_TEXT = 24
"""How much room a last cell with sentences needs to begin beside the others."""


def printable(text: str) -> str:
    """Make of a text one line that does nothing to a terminal; what is not printed is escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def laid_out(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, measure: Callable[[str], int] = len
) -> list[str]:
    """Return the lines of a table, headings first; the last column may have sentences.

    Args:
        columns: The headings.
        rows: A cell for each of them.
        width: Columns of the terminal; None for as many as it takes, with each row on one line.
        measure: How many columns a text takes.
    """
    table = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(measure(cell) for cell in column) for column in zip(*table, strict=True)]
    groups = [list(range(len(columns)))] if width is None else _groups(widths, width)
    lines = []
    for number, row in enumerate(table):
        for place, group in enumerate(groups):
            if number and not any(row[column] for column in group):
                continue
            cells = [row[column] + " " * (widths[column] - measure(row[column])) for column in group]
            text = " " * (INDENT if place else 0) + (" " * GAP).join(cells).rstrip()
            hanging = (INDENT if place else 0) + sum(widths[column] + GAP for column in group[:-1])
            lines += [text] if width is None else _folded(text, width, hanging, measure)
    return lines


def _groups(widths: Sequence[int], width: int) -> list[list[int]]:
    """Put columns on as few lines as they fit on, in their order."""
    groups: list[list[int]] = [[]]
    used = 0
    for column, own in enumerate(widths):
        needed = min(own, LEAST_TEXT) if column == len(widths) - 1 else own
        if groups[-1] and used + needed > width:
            groups.append([])
            used = INDENT
        groups[-1].append(column)
        used += own + GAP
    return groups


def _folded(text: str, width: int, hanging: int, measure: Callable[[str], int]) -> list[str]:
    """Break a line that is too long, at a space if there is one, and indent what follows."""
    if hanging > width - LEAST_TEXT:
        hanging = INDENT
    lines = []
    while measure(text) > max(width, 2 * INDENT):
        end = len(text)
        while end > 1 and measure(text[:end]) > width:
            end -= 1
        space = text.rfind(" ", hanging + 1, end + 1)
        cut = space if space > 0 and text[:space].strip() else end
        lines.append(text[:cut].rstrip())
        text = " " * hanging + text[cut:].lstrip()
    return [*lines, text] if text.strip() else lines
