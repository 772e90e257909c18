"""The directories that jobs write to: temporary or not, whose, on what, and how much room there is."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from batchctl.doctor.access import name_of
from batchctl.doctor.finding import error, ok, raised, warning
from batchctl.errors import ConfigurationError, ExitCode
from batchctl.paths import refuse_foreign

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from batchctl.doctor.finding import Finding

MOUNTS = Path("/proc/self/mountinfo")
TEMPORARY_PLACES = tuple(map(Path, ("/tmp", "/var/tmp", "/run", "/var/run", "/dev/shm")))  # noqa: S108 - to warn of them
TEMPORARY_KINDS = {"tmpfs", "ramfs", "devtmpfs"}
NETWORK_KINDS = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|gfs2|ocfs2|fuse\.\w*(ssh|s3|gluster|ceph)\w*"
)
CONTAINER_KIND = "overlay"
SCARCE_BYTES, TOO_FEW_BYTES = 1_000_000_000, 50_000_000
SCARCE_FILES, TOO_FEW_FILES = 10_000, 500
FOR_GOOD = "set {key} to a directory of its own on a disk, such as /var/lib/batchctl"


def check_directory(key: str, path: Path, mounts: Path = MOUNTS) -> Iterator[Finding]:
    """Check a directory that the configuration names.

    Args:
        key: state_dir or log_dir.
        path: The directory, there or not.
        mounts: Where the kernel lists what is mounted.
    """
    kind = _kind(path, mounts)
    found = list(_lasting(key, path, kind))
    try:
        found += _usable(key, path)
    except (OSError, ConfigurationError) as problem:
        found.append(raised(key, problem, f"choose another {key}"))
    yield from found or [ok(key, f"{path} is private, writable, and on a disk ({kind})")]


def check_disk(paths: Iterable[Path]) -> Iterator[Finding]:
    """Check the room on each file system that one of these paths is on, or will be: bytes and files."""
    seen = set()
    for path in map(_existing, paths):
        device = path.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        room = os.statvfs(path)
        free = room.f_bavail * room.f_frsize
        # A file system that makes inodes as it needs them says that it has none.
        files = room.f_favail if room.f_files else None
        text = f"{_amount(free)} free" + ("" if files is None else f", room for {files} files")
        advice = f"make room on the file system of {path}, or move state_dir and log_dir to another"
        if free < TOO_FEW_BYTES or (files is not None and files < TOO_FEW_FILES):
            yield error("disk", f"{path}: {text}", advice)
        elif free < SCARCE_BYTES or (files is not None and files < SCARCE_FILES):
            yield warning("disk", f"{path}: {text}", advice)
        else:
            yield ok("disk", f"{path}: {text}")


def _lasting(key: str, path: Path, kind: str) -> Iterator[Finding]:
    real = _existing(path).resolve()
    lost = "; locks, journal and the host's id are lost with it" if key == "state_dir" else ""
    advice = FOR_GOOD.format(key=key)
    place = next((each for each in TEMPORARY_PLACES if path.is_relative_to(each) or real.is_relative_to(each)), None)
    if kind in TEMPORARY_KINDS:
        yield warning(key, f"{path} is temporary: {kind}, which a reboot empties{lost}", advice)
    elif place is not None:
        yield warning(key, f"{path} is temporary: {place} is emptied by cleaners and reboots{lost}", advice)
    elif kind == CONTAINER_KIND:
        yield warning(key, f"{path} is in a container's own layer, gone with the container{lost}", "put it on a volume")
    if key == "state_dir" and NETWORK_KINDS.fullmatch(kind):
        yield warning(
            key,
            f"{path} is on a network file system ({kind}), whose locks may be lost or block",
            "choose a local directory: each machine needs a state_dir of its own",
        )


def _usable(key: str, path: Path) -> Iterator[Finding]:
    if not os.path.lexists(path):
        parent = _existing(path)
        if os.access(parent, os.W_OK | os.X_OK):
            yield ok(key, f"{path} is not there yet; the first job makes it")
        else:
            owner = name_of(parent.stat().st_uid)
            yield error(
                key,
                f"{path} cannot be made by {name_of(os.geteuid())}: {parent} belongs to {owner}",
                f"make it as {owner} and give it to {name_of(os.geteuid())} (chmod 700), or set another {key}",
                ExitCode.CONFIGURATION,
            )
        return
    refuse_foreign(path, "directory")
    _try_writing(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if key == "state_dir" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield warning(key, f"{path} is open to other users (mode {mode:04o})", f"chmod 700 {path}")


def _try_writing(path: Path) -> None:
    """Write and lock a file without a name, which only some disks refuse."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"batchctl doctor\n")
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        raise ConfigurationError(
            f"a file in {path} cannot be written and locked: {problem.strerror}; make it writable, or choose another"
        ) from problem


def _existing(path: Path) -> Path:
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))


def _kind(path: Path, mounts: Path) -> str:
    """Name the kind of file system that a path is on, or will be; empty if /proc does not tell."""
    device = _existing(path).stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    real = _existing(path).resolve()
    best = (0, "")
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        front, _, back = line.partition(" - ")
        _, _, mounted, _, point, *_ = front.split()
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        # A volume of btrfs has another number than its mount, so the path decides first.
        if real.is_relative_to(point):
            best = max(best, (2 * len(point) + (mounted == number), back.split()[0]))
    return best[1]


def _amount(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.0f} kB"
