"""SQL by name: each statement in a .sql file under a name, with its purpose."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import LiteralString

DIRECTORY = Path(__file__).parent


class Migration(NamedTuple):
    """One numbered upgrade of the schema; its text has a place for the schema's name."""

    version: int
    name: str
    text: LiteralString


@functools.cache
def named_queries(file_name: str) -> dict[str, LiteralString]:
    """Read the statements of a file by their names.

    A statement follows a line `-- name: like_this`; comment lines below it say what it is for.
    """
    text = (DIRECTORY / file_name).read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)[1:]
    names, bodies = parts[::2], parts[1::2]
    without_comments = (re.sub(r"^--.*$", "", body, flags=re.MULTILINE).strip().rstrip(";") for body in bodies)
    # The files are part of the program, so their text is as literal as a string in a module.
    return dict(zip(names, without_comments, strict=True))


def migrations() -> list[Migration]:
    """Read the upgrades of the schema in order."""
    found = []
    for path in sorted((DIRECTORY / "migrations").glob("*.sql")):
        number, _, name = path.stem.partition("_")
        found.append(Migration(int(number), name.replace("_", " "), path.read_text(encoding="utf-8")))
    return found


# Kept beside the files so that a hot path need not list a directory; a test compares them.
LATEST_VERSION = 5
