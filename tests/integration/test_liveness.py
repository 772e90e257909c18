"""What the guards see of real processes: locks, marks, records; hidden, reused, dead, our own."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support import gone, skip_or_fail, wait_for

from batchctl.batch.output import cut
from batchctl.clock import SystemClock
from batchctl.errors import ConfigurationError
from batchctl.guard import ending, lock, run_locks
from batchctl.guard.ending import end_processes, send, with_descendants
from batchctl.guard.identity import ProcessIdentity, ancestors, boot_id, identify, running, start_ticks
from batchctl.guard.liveness import RUN_MARKER, Recorded, find_orphans, forget_runs
from batchctl.guard.run_files import held, known_runs
from batchctl.guard.run_locks import RunLocks

# Tests that run side by side must not take each other's processes for theirs.
RUN = f"20240101T010000Z-{os.getpid():06x}"
CLOCK = SystemClock()
MARKED = {RUN_MARKER: RUN, "BATCHCTL_ACCOUNT": "default", "BATCHCTL_STEP": "31", "PATH": "/usr/bin:/bin"}


@dataclass
class Steps:
    """Starts steps as a run does, and ends what they leave."""

    state_dir: Path
    started: list = field(default_factory=list)
    processes: list = field(default_factory=list)

    def __post_init__(self):
        self.locks = RunLocks(self.state_dir, "daily", RUN, identify(os.getpid()), CLOCK)

    def start(self, line, *, marked=True, step="31", attempt=1):
        """Start a shell line; with `marked` false it is known by its lock alone."""
        lock = self.locks.step("default", step, attempt)
        process = subprocess.Popen(
            ["sh", "-c", line],
            env=MARKED if marked else {"PATH": "/usr/bin:/bin"},
            pass_fds=(lock.descriptor,),
            start_new_session=True,
            cwd=self.state_dir,
            stdin=subprocess.DEVNULL,
        )
        lock.hand_over()
        self.started.append(process.pid)
        self.processes.append(process)
        return process, lock

    def pid(self, name):
        path = self.state_dir / name
        pid = int(wait_for(lambda: path.exists() and path.read_text().strip()))
        self.started.append(pid)
        return pid

    def find(self, *recorded):
        return find_orphans(self.state_dir, "daily", recorded)


@pytest.fixture
def steps(tmp_path):
    made = Steps(tmp_path)
    yield made
    for pid in made.started:
        with_them = with_descendants({(pid, start_ticks(pid))})
        for process in with_them:
            send(process, signal.SIGKILL)
    for process in made.processes:
        process.wait()


def orphans(steps, *recorded):
    """Look as the next start does, when the batchctl of the run is gone."""
    return [orphan for orphan in steps.find(*recorded) if not orphan.supervisor]


def test_a_lock_tells_whether_a_step_left_something(steps):
    process, step = steps.start("exec sleep 60", marked=False)
    assert held(step.file.path)
    assert [(orphan.pid, orphan.what) for orphan in orphans(steps)] == [
        (process.pid, "step 31 of account default: sleep")
    ]
    process.kill()
    process.wait()
    assert not held(step.file.path)
    assert step.release() is False
    assert orphans(steps) == []


def test_a_daemon_that_hides_in_every_way_but_the_lock_is_named(steps):
    process, step = steps.start("(setsid env -i sh -c 'echo $$ >daemon; exec sleep 60' &) ; exit 0", marked=False)
    process.wait()
    daemon = steps.pid("daemon")
    assert step.release() is True
    found = steps.locks.leftovers("default", "31")
    assert [(orphan.pid, orphan.account, orphan.step) for orphan in found] == [(daemon, "default", "31")]
    assert [orphan.pid for orphan in orphans(steps)] == [daemon]


def test_one_that_closed_the_lock_is_found_by_its_mark(steps):
    # Python closes what its children do not need.
    source = "import subprocess; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid)"
    process, step = steps.start(f'"{sys.executable}" -W ignore -c "{source}" >daemon')
    process.wait()
    daemon = steps.pid("daemon")
    assert step.release() is False
    assert [orphan.pid for orphan in steps.locks.leftovers("default", "31")] == [daemon]
    assert [orphan.pid for orphan in steps.locks.release()] == [daemon]
    assert [orphan.pid for orphan in steps.find()] == [daemon]


def test_what_ends_right_after_the_step_is_not_left(steps, monkeypatch):
    monkeypatch.setattr(run_locks, "LINGER_SECONDS", 30)
    process, step = steps.start("sleep 1 & exit 0")
    process.wait()
    assert step.release() is True
    assert steps.locks.leftovers("default", "31") == []


def test_a_run_that_left_nothing_leaves_no_file(steps):
    process, step = steps.start("exit 0")
    process.wait()
    assert step.release() is False
    assert steps.locks.release() == []
    assert known_runs(steps.state_dir, "daily") == []


def test_a_run_that_ended_is_told_from_one_that_died(steps):
    process, _ = steps.start("exec sleep 60")
    # Not released: as if batchctl had died.
    assert [orphan.run_ended for orphan in orphans(steps)] == [False]
    steps.locks.release()
    assert [(orphan.pid, orphan.run_ended) for orphan in steps.find()] == [(process.pid, True)]


def test_what_could_not_be_ended_is_not_left_on_purpose(steps):
    steps.start("exec sleep 60")
    steps.locks.unfinished = True
    steps.locks.release()
    assert [orphan.run_ended for orphan in steps.find()] == [False]


def test_a_run_lives_while_its_batchctl_does(tmp_path):
    source = f"""
import os, sys, time
from pathlib import Path
from batchctl.clock import SystemClock
from batchctl.guard.identity import identify
from batchctl.guard.run_locks import RunLocks
locks = RunLocks(Path({str(tmp_path)!r}), "daily", {RUN!r}, identify(os.getpid()), SystemClock())
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        (found,) = find_orphans(tmp_path, "daily", ())
        assert (found.pid, found.supervisor) == (process.pid, True)
        forget_runs(tmp_path, "daily", ())
        assert known_runs(tmp_path, "daily")
        process.kill()
    assert find_orphans(tmp_path, "daily", ()) == []
    forget_runs(tmp_path, "daily", ())
    assert known_runs(tmp_path, "daily") == []


def test_a_reused_number_another_boot_and_a_zombie_are_dead(steps):
    process = subprocess.Popen(["sleep", "60"], env={"PATH": "/usr/bin:/bin"})
    steps.started.append(process.pid)
    real = identify(process.pid)

    def record(**changes):
        return Recorded(RUN, real._replace(**changes), "default", "31")

    assert [orphan.pid for orphan in orphans(steps, record())] == [process.pid], "the control: it is seen"
    assert orphans(steps, record(start_ticks=real.start_ticks - 1)) == []
    assert orphans(steps, record(boot_id="another")) == []
    process.kill()
    wait_for(lambda: gone(process.pid))
    assert Path(f"/proc/{process.pid}/stat").exists(), "not reaped yet"
    assert orphans(steps, record()) == []
    process.wait()
    assert orphans(steps, record()) == []


def test_a_marked_zombie_is_dead(steps):
    process, _ = steps.start("exit 0")
    wait_for(lambda: gone(process.pid))
    assert orphans(steps) == []
    process.wait()


def test_a_process_that_may_not_be_asked_is_alive(steps):
    if os.geteuid() == 0:
        pytest.skip("root may ask all")
    ours, own = os.geteuid(), ancestors()
    others = [each.pid for each in running() if each.pid not in own and Path(f"/proc/{each.pid}").stat().st_uid != ours]
    if not others:
        pytest.skip("no process of another user is seen")
    found = orphans(steps, Recorded(RUN, identify(others[0]), "default", "31"))
    assert [orphan.pid for orphan in found] == [others[0]]


def test_our_own_ancestors_never_count_but_what_is_beside_them_does(steps):
    look = (
        "from pathlib import Path; from batchctl.guard.liveness import find_orphans; "
        "print([o.pid for o in find_orphans(Path('.'), 'daily', ()) if not o.supervisor])"
    )
    for marked in (True, False):
        for beside in ("", "sleep 60 & echo $! >beside;"):
            line = f'{beside} "{sys.executable}" -c "{look}" >found; exit 0'
            process, _ = steps.start(line, marked=marked)
            process.wait()
            expected = [steps.pid("beside")] if beside else []
            assert (steps.state_dir / "found").read_text() == f"{expected}\n", (marked, beside)
            for pid in expected:
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: gone(pid))


def test_lock_files_of_the_version_before(tmp_path):
    directory = tmp_path / "run" / "daily"
    directory.mkdir(parents=True)
    (directory / "free.lock").touch()
    descriptor = os.open(directory / f"{RUN}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    process = subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,), env={})
    os.close(descriptor)
    with process:
        (found,) = find_orphans(tmp_path, "daily", ())
        assert (found.run_id, found.pid, found.command, found.run_ended) == (RUN, process.pid, "sleep", False)
        forget_runs(tmp_path, "daily", {RUN})
        assert [path.name for path in directory.iterdir()] == [f"{RUN}.lock"]
        process.kill()
    assert find_orphans(tmp_path, "daily", ()) == []
    forget_runs(tmp_path, "daily", ())
    assert list(directory.iterdir()) == []


def test_a_step_whose_name_is_as_long_as_it_may_be(steps):
    name = "\N{HANGUL SYLLABLE GA}" * 60
    steps.locks.step(name, name, 1).release()
    with pytest.raises(ConfigurationError, match="cannot be made"):
        steps.locks.step("default", "x" * 300, 1)


def test_a_resumed_run_does_not_lose_sight_of_what_its_first_part_left(steps):
    first, _ = steps.start("exec sleep 60", marked=False)
    assert [orphan.pid for orphan in steps.locks.release()] == [first.pid]
    steps.locks = RunLocks(steps.state_dir, "daily", RUN, identify(os.getpid()), CLOCK)
    second, step = steps.start("exec sleep 60", marked=False)
    second.kill()
    second.wait()
    assert step.release() is False
    assert [orphan.pid for orphan in orphans(steps)] == [first.pid]


def test_a_start_that_came_to_nothing_leaves_what_it_found(steps, tmp_path):
    RunLocks(tmp_path, "other", RUN, identify(os.getpid()), CLOCK).release()
    assert known_runs(tmp_path, "other") == []
    process, _ = steps.start("exec sleep 60", marked=False)
    steps.locks.release()
    # Resumed, and refused before a step was started.
    RunLocks(tmp_path, "daily", RUN, identify(os.getpid()), CLOCK).release()
    assert [(orphan.pid, orphan.run_ended) for orphan in steps.find()] == [(process.pid, True)]


HIDDEN = """
import sys
from pathlib import Path
from batchctl.guard.identity import ProcessIdentity, boot_id
from batchctl.guard.liveness import Recorded, find_orphans
pid, ticks = int(sys.argv[2]), int(sys.argv[3])
recorded = [Recorded({run!r}, ProcessIdentity(pid, ticks, boot_id()), "default", "31")] if pid else []
print([(o.pid, o.command, o.step) for o in find_orphans(Path(sys.argv[1]), "daily", recorded)])
"""


def test_what_proc_hides_counts_only_while_its_lock_is_held():
    """An ordinary user, /proc mounted with hidepid, and processes of root: what a cron unit with ProtectProc sees."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("needs root, unshare and setpriv")
    probe = ["unshare", "-m", "mount", "-o", "remount,hidepid=2", "/proc"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        skip_or_fail("the kernel refuses a /proc of one's own")
    directory = Path(tempfile.mkdtemp())
    steps = Steps(directory)
    try:
        process, _ = steps.start("exec sleep 60", marked=True)
        steps.locks.unfinished = True
        steps.locks.release()
        for path in (directory, *directory.rglob("*")):
            os.chown(path, 65534, 65534)
        package = Path(ending.__file__).parents[2]

        def look(pid=0, ticks=0):
            inside = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c"]
            mount = 'mount -o remount,hidepid=2 /proc && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", mount, "sh", *inside, HIDDEN.format(run=RUN), directory]
            done = subprocess.run(
                [*map(str, command), str(pid), str(ticks)], capture_output=True, text=True, check=False, cwd="/",
                env={"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join([str(package), *sys.path])},
            )  # fmt: skip
            if "Permission denied" in done.stderr:
                skip_or_fail("another user cannot read this Python or its packages")
            assert done.returncode == 0, done
            return done.stdout.strip()

        # Only the lock tells that there is something.
        assert look() == "[(None, None, '31')]"
        # A recorded number that is in use and hidden is taken for it.
        assert look(process.pid, 1) == f"[({process.pid}, None, '31')]"
        process.kill()
        process.wait()
        # Without a held lock a hidden process (here: init) is somebody else's.
        assert look(1, 1) == "[]"
        assert look() == "[]"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


# Ending


def running_pid(pid):
    return next(process for process in running() if process.pid == pid)


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_number_that_has_changed_hands_is_never_hit(monkeypatch, pidfd):
    if not pidfd:
        refuse_pidfd(monkeypatch)
    process = subprocess.Popen(["sleep", "60"])
    with process:
        real = running_pid(process.pid)
        send(real._replace(start_ticks=real.start_ticks - 1), signal.SIGKILL)
        assert process.poll() is None
        left = end_processes(lambda: [real._replace(start_ticks=real.start_ticks - 1)], 0.2, CLOCK)
        assert (process.poll(), left) == (None, set())
        send(real, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        send(real, signal.SIGKILL)


def refuse_pidfd(monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)


@pytest.mark.parametrize("pidfd", [True, False])
def test_first_politely_then_hard(tmp_path, monkeypatch, pidfd):
    if not pidfd:
        refuse_pidfd(monkeypatch)
    line = "trap 'echo bye >polite; exit 0' TERM; echo >ready1; while :; do sleep 0.1; done"
    polite = subprocess.Popen(["sh", "-c", line], cwd=tmp_path)
    stubborn = subprocess.Popen(["sh", "-c", "trap '' TERM; echo >ready2; while :; do sleep 1; done"], cwd=tmp_path)
    wait_for(lambda: (tmp_path / "ready1").exists() and (tmp_path / "ready2").exists())
    # Both are in the session of the tests, which must survive: only they are meant.
    shells = {running_pid(each.pid) for each in (polite, stubborn)}
    left = end_processes(lambda: shells, 3.0, CLOCK)
    assert left == set()
    assert (tmp_path / "polite").read_text() == "bye\n"
    assert polite.wait() == 0
    assert stubborn.wait() == -signal.SIGKILL


def test_a_session_and_what_is_below_it_belong_together(tmp_path):
    line = "sh -c 'echo $$ >child; exec sleep 60' & setsid sh -c 'echo $$ >away; exec sleep 60' & echo >ready; wait"
    process = subprocess.Popen(["sh", "-c", line], cwd=tmp_path, start_new_session=True)
    wait_for(lambda: all((tmp_path / name).exists() for name in ("child", "away", "ready")))
    child, away = (int(wait_for((tmp_path / name).read_text)) for name in ("child", "away"))
    found = with_descendants({(process.pid, start_ticks(process.pid))})
    assert {process.pid, child, away} <= {each.pid for each in found}
    assert os.getpid() not in {each.pid for each in found}
    assert end_processes(lambda: found, 5, CLOCK) == set()
    process.wait()
    assert gone(child)
    assert gone(away)


# The lock of a batch


def holder():
    return lock.Holder("host1", *identify(os.getpid()), datetime.now(UTC))


@pytest.mark.parametrize("how", ["removed", "replaced", "renamed"])
def test_a_lock_file_that_goes_between_open_and_lock_is_taken_again(tmp_path, monkeypatch, how):
    path = lock.lock_path(tmp_path, "batch.daily")
    real, calls = fcntl.flock, []

    def flock(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            if how == "renamed":
                path.rename(path.with_suffix(".away"))
            else:
                path.unlink()
            if how == "replaced":
                path.touch(0o600)
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    taken = lock.acquire(path, holder())
    assert taken is not None
    assert os.path.samestat(os.fstat(taken.descriptor), path.stat())
    monkeypatch.undo()
    assert lock.acquire(path, holder()) is None, "it keeps others out"
    assert not os.get_inheritable(taken.descriptor)
    taken.release()


def test_a_lock_file_that_is_removed_each_time_is_refused(tmp_path, monkeypatch):
    path = lock.lock_path(tmp_path, "batch.daily")
    real = fcntl.flock

    def flock(descriptor, operation):
        path.unlink(missing_ok=True)
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigurationError, match="removed again and again"):
        lock.acquire(path, holder())


# Output


def test_a_log_is_cut_while_a_process_appends_to_it(tmp_path):
    """Every line that is left is whole, the last one is there, and the count is off by what the cut itself lost."""
    log = tmp_path / "31.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    source = "import os\nfor n in range(300000): os.write(1, b'line %07d\\n' % n)"
    process = subprocess.Popen([sys.executable, "-c", source], stdout=descriptor)
    os.close(descriptor)
    cuts = 0
    while process.poll() is None:
        cuts += cut(log, 100_000, 25_000)
    assert process.returncode == 0
    cut(log, 100_000, 100_000)
    lines = log.read_bytes().splitlines()
    assert cuts > 1
    assert lines[0] == b"line 0000000"
    assert lines[-1] == b"line 0299999"
    assert log.stat().st_size <= 100_000
    numbers = [int(line.split()[1]) for line in lines if line.startswith(b"line")]
    assert numbers == sorted(numbers)
    assert all(len(line) == 12 for line in lines if not line.startswith(b"[batchctl"))


def test_the_identity_of_this_boot_is_known():
    assert boot_id()
    assert ProcessIdentity(os.getpid(), start_ticks(os.getpid()), boot_id()) == identify(os.getpid())


def test_a_link_among_the_runs_is_refused_and_never_followed(tmp_path):
    precious = tmp_path / "precious"
    (precious / "steps" / "a").mkdir(parents=True)
    kept = precious / "steps" / "a" / "1.1.lock"
    kept.touch()
    runs = tmp_path / "state" / "run" / "daily"
    runs.mkdir(parents=True, mode=0o700)
    (runs / RUN).symlink_to(precious)
    with pytest.raises(ConfigurationError, match="symbolic link"):
        find_orphans(tmp_path / "state", "daily", ())
    (runs / RUN).unlink()
    # Nor inside the directory of a run.
    (runs / RUN).mkdir(mode=0o700)
    (runs / RUN / "steps").symlink_to(precious / "steps")
    forget_runs(tmp_path / "state", "daily", ())
    assert kept.exists()
