"""What the doctor says of directories, files and disks: real modes, real owners, real file systems."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import skip_or_fail

from batchctl.config_file import decode
from batchctl.doctor.installation import check_configuration, check_program
from batchctl.doctor.places import check_directory, check_disk
from batchctl.errors import ExitCode

ROOT = os.geteuid() == 0
NOBODY = 65534


@contextmanager
def tmpfs(options):
    """A file system of one's own, small enough to be full."""
    if not ROOT:
        skip_or_fail("only root may mount")
    place = Path(tempfile.mkdtemp(prefix="bc-mount-"))
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
    try:
        if done.returncode:
            skip_or_fail(f"mount refuses: {done.stderr.decode().strip()}")
        yield place
    finally:
        if not done.returncode:
            subprocess.run(["umount", place], check=True)
        place.rmdir()


@pytest.fixture
def lasting():
    """A directory that is not in a temporary place."""
    home = Path(__file__).resolve().parents[2]
    path = Path(tempfile.mkdtemp(prefix=".doctor-", dir=home))
    if str(path).startswith(("/tmp/", "/var/tmp/", "/run/", "/dev/shm/")):
        path.rmdir()
        base = Path("/var/lib") if ROOT else Path.home()
        path = Path(tempfile.mkdtemp(prefix=".batchctl-test-", dir=base))
    path.chmod(0o700)
    yield path
    shutil.rmtree(path)


def test_a_private_directory_on_a_disk_is_well(lasting):
    (found,) = check_directory("state_dir", lasting)
    assert found.state == "ok" or "container" in found.found


def test_temporary_places_are_warned_of():
    for path in (Path("/tmp/state"), Path("/run/batchctl"), Path("/dev/shm/x"), Path("/var/tmp/x")):
        found = next(iter(check_directory("state_dir", path)))
        assert (found.state, "temporary" in found.found) == ("warning", True), path


def test_a_tmpfs_elsewhere_is_temporary_too(lasting):
    with tmpfs("size=5m") as place:
        place.chmod(0o700)
        link = lasting / "state"
        subprocess.run(["mkdir", link], check=True)
        subprocess.run(["mount", "--bind", place, link], check=True)
        try:
            (found,) = check_directory("state_dir", link)
            assert (found.state, "tmpfs" in found.found) == ("warning", True)
        finally:
            subprocess.run(["umount", link], check=True)


def test_a_network_file_system_is_warned_of(lasting, tmp_path):
    device = lasting.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for kind, expected in (("nfs4", ["warning"]), ("fuse.sshfs", ["warning"]), ("ext4", ["ok"])):
        mounts = tmp_path / kind
        mounts.write_text(
            f"1 0 {number} / / rw - ext4 /dev/a rw\n2 1 {number} / {lasting.parent} rw shared:1 - {kind} srv:/x rw\n"
        )
        assert [found.state for found in check_directory("state_dir", lasting, mounts)] == expected, kind


def test_who_may_look_into_the_state_directory(lasting):
    lasting.chmod(0o755)
    found = [each for each in check_directory("state_dir", lasting) if each.advice.startswith("chmod")]
    assert [each.state for each in found] == ["warning"]
    assert list(check_directory("log_dir", lasting))[-1].state != "error"
    lasting.chmod(0o777)
    (found,) = [each for each in check_directory("state_dir", lasting) if each.state == "error"]
    assert "can be written by others" in found.found
    assert found.exit_code == ExitCode.CONFIGURATION


def test_a_link_and_a_stranger_s_directory_are_errors(lasting):
    real = lasting / "real"
    real.mkdir(mode=0o700)
    (lasting / "link").symlink_to(real)
    (found,) = [each for each in check_directory("state_dir", lasting / "link") if each.state == "error"]
    assert "symbolic link" in found.found
    if ROOT:
        os.chown(real, NOBODY, NOBODY)
        (found,) = [each for each in check_directory("state_dir", real) if each.state == "error"]
        assert "belongs to user id 65534" in found.found


def test_a_directory_that_cannot_be_made_or_written_is_an_error(lasting):
    if ROOT:
        with tmpfs("size=5m") as place:
            place.chmod(0o700)
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
            found = [each for each in check_directory("state_dir", place) if each.state == "error"]
            assert [each.exit_code for each in found] == [ExitCode.CONFIGURATION]
            assert "Read-only" in found[0].found
        return
    lasting.chmod(0o500)
    found = [each for each in check_directory("state_dir", lasting / "state") if each.state == "error"]
    lasting.chmod(0o700)
    assert "cannot be made" in found[0].found


def test_a_file_system_without_room_is_an_error():
    with tmpfs("size=60m,nr_inodes=100000") as place:
        assert [each.state for each in check_disk([place])] == ["warning"]
        (place / "big").write_bytes(b"x" * 20_000_000)
        (found,) = check_disk([place, place / "log"])
        assert (found.state, "free" in found.found) == ("error", True)
    with tmpfs("size=2g,nr_inodes=100") as place:
        (found,) = check_disk([place])
        assert (found.state, "room for 9" in found.found) == ("error", True)


def test_a_disk_with_room_is_well(lasting):
    room = os.statvfs(lasting)
    if room.f_bavail * room.f_frsize < 2_000_000_000:
        skip_or_fail("the disk is nearly full")
    assert [each.state for each in check_disk([lasting, lasting / "log"])] == ["ok"]


def test_the_program(lasting):
    program = lasting / "batchctl"
    assert [each.state for each in check_program(program)] == ["error"]
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    (found,) = check_program(program)
    assert "cannot be executed" in found.found
    program.chmod(0o755)
    assert [each.state for each in check_program(program)] == ["ok"]
    lasting.chmod(0o777)
    (found,) = check_program(program)
    assert (found.state, str(lasting) in found.found) == ("error", True)
    lasting.chmod(0o1777)
    assert [each.state for each in check_program(program)] == ["ok"], "with the sticky bit nobody can replace it"


def configuration(path, database=None, mode=0o600):
    path.write_text("")
    path.chmod(mode)
    return decode({"database": database or {"embedded": True}}, path, {})


def look(found, named=None, environment=None, crontab=None):
    return list(check_configuration(found, named, environment or {}, crontab))


def test_how_the_configuration_was_found(lasting, monkeypatch):
    path = lasting / "batchctl.toml"
    found = configuration(path)
    assert [each.state for each in look(found, named=path)] == ["ok"]
    for case in ({"named": Path("batchctl.toml")}, {"environment": {"BATCHCTL_CONFIG": str(path)}}):
        (warned,) = look(found, **case)
        assert (warned.state, warned.advice.endswith(f"--config {path}")) == ("warning", True)
        # The control: where the crontab names it, it does not matter how this call found it.
        assert [each.state for each in look(found, **case, crontab=path)] == ["ok"]
    assert [each.state for each in look(found)] == ["ok"]
    monkeypatch.chdir(lasting)
    (warned,) = look(found)
    assert "in the working directory" in warned.found


def test_a_database_url_that_only_this_shell_has(lasting):
    found = configuration(lasting / "batchctl.toml")
    environment = {"BATCHCTL_DATABASE_URL": "postgresql://u:hush@h/d"}
    warned = look(found, named=found.path, environment=environment)[-1]
    assert (warned.state, "hush" in repr(warned)) == ("warning", False)


def test_who_may_change_and_read_the_configuration(lasting):
    found = configuration(lasting / "batchctl.toml", mode=0o666)
    (wrong,) = look(found, named=found.path)
    assert (wrong.state, "anybody may write" in wrong.found) == ("error", True)
    found = configuration(lasting / "batchctl.toml", {"url": "postgresql://u:hush@h/d"}, 0o644)
    warned = look(found, named=found.path)[0]
    assert (warned.state, "password" in warned.found, "hush" in repr(warned)) == ("warning", True, False)
    for database, mode in (({"url": "postgresql://u:hush@h/d"}, 0o600), ({"url": "postgresql://u@h/d"}, 0o644)):
        found = configuration(lasting / "batchctl.toml", database, mode)
        assert [each.state for each in look(found, named=found.path)] == ["ok"]
