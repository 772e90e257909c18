"""Chaos: batchctl, a step or the server is killed at random moments, and starts are tried until one goes through.

    pytest tests/acceptance/test_chaos.py                      30 rounds
    pytest tests/acceptance/test_chaos.py --chaos-rounds 300   more
    BATCHCTL_TEST_SEED=N pytest tests/acceptance/test_chaos.py the same choices again

Two state directories are two hosts on one database, whose server keeps what it has committed. Each step takes a lock
that lives as long as the step and its children do, and looks for the locks of other runs: so two runs that are alive
at the same time are seen by whichever step begins later, however short the overlap is.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import psycopg
from psycopg.conninfo import make_conninfo
from support import PROGRAM, Command, gone, kill_server

if TYPE_CHECKING:
    from pathlib import Path

    from batchctl.state.embedded import EmbeddedServer

SEED = int(os.environ.get("BATCHCTL_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**9)
CONTROL_ROUNDS = 4
ACCOUNTS, STEPS = ("a", "b"), ("31", "32", "33")
FAULTS = ("kill batchctl", "kill a step", "kill the server", "stop batchctl")
EXPECTED_CODES = {0, 1, 3, 69, 75, 128 + signal.SIGTERM}
LONGEST_ROUND_SECONDS = 90
ENOUGH_ROUNDS = 20
"""Who plays as many wants to see that every fault strikes a live run, and that every guard refuses a start."""
EVERYTHING = {"success", "partial", "running", "running_elsewhere", "orphans"}

STEP = """\
import fcntl, os, sys, time
directory, run_id, account, step, seconds, child_seconds = sys.argv[1:]
own = os.open(f"{directory}/lives/{run_id}.{account}.{step}.{os.getpid()}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
fcntl.flock(own, fcntl.LOCK_EX)
events = os.open(f"{directory}/events", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
def note(*words):
    os.write(events, (" ".join(map(str, words)) + "\\n").encode())
note("begin", run_id, account, step, os.getpid(), time.monotonic_ns())
for other in os.listdir(f"{directory}/lives"):
    if other.partition(".")[0] != run_id:
        probe = os.open(f"{directory}/lives/{other}", os.O_RDONLY)
        try:
            fcntl.flock(probe, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            note("overlap", run_id, other)
        os.close(probe)
# The child has the lock too, and a session of its own.
child = os.fork() if float(child_seconds) else 0
if not child and float(child_seconds):
    os.setsid()
    time.sleep(float(child_seconds))
    os._exit(0)
time.sleep(float(seconds) * float(os.environ.get("SLOWER", 1)))
if child:
    os.waitpid(child, 0)
note("end", run_id, account, step, os.getpid(), time.monotonic_ns())
"""

UNGUARDED = """\
import sys
from batchctl.batch import guards, start
from batchctl.cli.app import main
from batchctl.state import store

class NoLock:
    def release(self):
        pass
    def __enter__(self):
        return self
    def __exit__(self, *exception):
        pass

claim = store.Store.claim

def claim_anyway(self, request, decide):
    # Whatever is live is made to look dead, so that the unique index has nothing to decide.
    self.session.connection.execute("UPDATE batchctl.run SET outcome = 'crashed' WHERE outcome IS NULL")
    return claim(self, request, lambda job: None)

start.acquire = lambda *arguments: NoLock()
guards.Guards.alive = lambda *arguments: None
store.Store.claim = claim_anyway
main()
"""


@dataclass
class Attempt:
    """One call of run-batch."""

    host: Command
    process: subprocess.Popen
    killed: bool = False
    code: int | None = None
    result: dict | None = None

    def finish(self) -> Attempt:
        """Wait for its end and read what it printed."""
        if self.code is None:
            stdout, stderr = self.process.communicate(timeout=LONGEST_ROUND_SECONDS)
            self.code = self.process.returncode
            assert "Traceback" not in stderr, stderr
            # A signal may come before run-batch begins to handle it.
            expected = EXPECTED_CODES | ({-signal.SIGKILL, -signal.SIGTERM} if self.killed else set())
            assert self.code in expected, (self.code, stderr)
            self.result = json.loads(stdout) if stdout else None
        return self

    @property
    def ran(self) -> bool:
        """Tell whether it was a run, and came to an end that it printed."""
        return self.result is not None and self.result["run_id"] is not None


@dataclass
class Chaos:
    """Hosts, a server and what happened to them."""

    directory: Path
    server: EmbeddedServer
    data: Path
    random: random.Random
    program: tuple[str, ...] = (str(PROGRAM),)
    attempts: list[Attempt] = field(default_factory=list)
    hits: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Make the hosts and the step."""
        self.lives = self.directory / "lives"
        self.lives.mkdir()
        (self.directory / "step.py").write_text(STEP)
        url = make_conninfo(**self.server.connection_parameters())
        self.hosts = [Command(self.directory / name, url) for name in ("one", "two")]
        for host in self.hosts:
            host.directory.mkdir()
        self.configure()

    def configure(self) -> None:
        """Choose how long the steps take."""
        text = f'[batch.daily]\naccounts = {json.dumps(ACCOUNTS)}\nmax_parallel = 2\ntimeout = "5m"\ngrace = "1s"\n'
        for step in STEPS:
            seconds = self.random.uniform(0.1, 0.9)
            # What leaves its session ends before its run does, also if the step itself is killed: of what is left
            # after that another host cannot know.
            child = self.random.choice([0, self.random.uniform(0.05, 0.2)]) if step != STEPS[-1] else 0
            seconds = max(seconds, 0.3) if step == STEPS[-1] else seconds
            command = [sys.executable, "-I", "-S", str(self.directory / "step.py"), str(self.directory)]
            command += ["{run_id}", "{account}", "{step}", f"{seconds:.3f}", f"{child:.3f}"]
            text += f'[[batch.daily.step]]\nid = "{step}"\ncommand = {json.dumps(command)}\n'
        for host in self.hosts:
            host.configure(text)

    def start(self, host: Command, **environment: str) -> Attempt:
        """Start a run-batch whatever the gap is."""
        process = subprocess.Popen(
            [*self.program, "--config", str(host.config), "run-batch", "--force-gap", "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=host.directory,
            env={"PATH": "/usr/bin:/bin", "HOME": str(host.directory), **environment},
        )
        attempt = Attempt(host, process)
        self.attempts.append(attempt)
        return attempt

    def alive(self) -> list[int]:
        """Return the process ids of the steps that live, themselves or in a child."""
        return [int(path.suffix[1:]) for path in self.lives.iterdir() if held(path)]

    def kill_server(self) -> threading.Thread:
        """Kill the server; return who starts it again after a while."""
        kill_server(self.data)
        pause = self.random.uniform(0, 2)

        def again() -> None:
            time.sleep(pause)
            self.server.start()

        thread = threading.Thread(target=again)
        thread.start()
        return thread

    def first_steps(self, victim: Attempt) -> list[int]:
        """Wait until a step lives or the run is over."""
        deadline = time.monotonic() + 5
        while not (steps := self.alive()) and victim.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return steps

    def strike(self, fault: str, victim: Attempt) -> threading.Thread | None:
        """Do one of the things that must do no harm."""
        # What strikes a run that has ended already shows little.
        self.hits[fault] += victim.process.poll() is None
        if fault == "kill the server":
            return self.kill_server()
        # Half of the time batchctl is killed while a step runs for sure, so that there are orphans to be found.
        awaited = fault == "kill a step" or (fault == "kill batchctl" and self.random.random() < 1 / 2)
        steps = self.first_steps(victim) if awaited else []
        if fault == "kill a step":
            if steps:
                with suppress(ProcessLookupError):
                    os.kill(self.random.choice(steps), signal.SIGKILL)
            return None
        victim.killed = True
        with suppress(ProcessLookupError):
            victim.process.send_signal(signal.SIGKILL if fault == "kill batchctl" else signal.SIGTERM)
        return None

    def play(self, faults: tuple[str, ...]) -> None:
        """Play one round: a run, what happens to it, and starts on both hosts until one goes through."""
        self.configure()
        # A step that outlives its batchctl has to do so until the next start has got to the guards.
        slower = "3" if "kill batchctl" in faults else "1"
        victim = self.start(self.random.choice(self.hosts), SLOWER=slower)
        restarts = []
        for fault in faults:
            time.sleep(self.random.uniform(0.1, 1.4))
            restarts.append(self.strike(fault, victim))
        deadline = time.monotonic() + LONGEST_ROUND_SECONDS
        blocked = 0
        while True:
            assert time.monotonic() < deadline, "no start goes through"
            for thread in restarts:
                if thread is not None and not thread.is_alive():
                    thread.join()
            quiet = (
                gone(victim.process.pid)
                and not self.alive()
                and not any(thread is not None and thread.is_alive() for thread in restarts)
            )
            hosts = [*self.hosts, *self.random.choices(self.hosts, k=self.random.randrange(3))]
            self.random.shuffle(hosts)
            wave = self.wave(hosts)
            if any(attempt.ran for attempt in wave):
                break
            blocked += quiet
            assert not blocked, (
                f"nothing runs any more, and no start goes through: "
                f"{[(attempt.host.directory.name, attempt.code, attempt.result) for attempt in wave]}"
            )
            time.sleep(self.random.uniform(0, 0.3))
        for thread in restarts:
            if thread is not None:
                thread.join()
        victim.finish()

    def wave(self, hosts: list[Command]) -> list[Attempt]:
        """Start at once on several hosts, and wait for all."""
        return [attempt.finish() for attempt in [self.start(host) for host in hosts]]

    def results(self) -> Counter[str]:
        """Count outcomes and skip reasons; a start that printed nothing by its exit code."""
        printed = [(attempt.result, attempt.code) for attempt in self.attempts]
        return Counter(str(result["reason"] or result["outcome"]) if result else str(code) for result, code in printed)

    def events(self) -> list[list[str]]:
        """Return what the steps have noted, in order."""
        return [line.split() for line in (self.directory / "events").read_text().splitlines()]

    def overlaps(self) -> list[str]:
        """Say which runs were alive at the same time, or between each other's steps."""
        events = self.events()
        seen = [f"{words[1]} began while {words[2]} was alive" for words in events if words[0] == "overlap"]
        runs = [run_id for run_id, _ in groupby(words[1] for words in events if words[0] == "begin")]
        return seen + [f"{run_id} went on after another had begun" for run_id in runs if runs.count(run_id) > 1]

    def losses(self) -> list[str]:
        """Say what is recorded otherwise than it happened, once every host has recorded its journal."""
        for host in self.hosts:
            host("history")
        with psycopg.connect(self.hosts[0].url) as connection:
            rows = connection.execute("SELECT run_id, outcome, finished_at FROM batchctl.run").fetchall()
            steps = connection.execute("SELECT run_id, account, step, outcome FROM batchctl.step_run").fetchall()
            skips = connection.execute("SELECT sum(count) FROM batchctl.skip").fetchone()[0] or 0
        recorded = {run_id: (outcome, finished is not None) for run_id, outcome, finished in rows}
        found = []
        ran = {attempt.result["run_id"]: attempt.result for attempt in self.attempts if attempt.ran}
        for run_id, result in ran.items():
            if recorded.get(run_id) != (result["outcome"], True):
                found.append(f"{run_id} was {result['outcome']}, recorded: {recorded.get(run_id)}")
            expected = {(s["account"], s["step"], s["outcome"]) for s in result["steps"] if s["outcome"] != "not_run"}
            # A retry would have a row of its own; there are none here, so each step has one.
            noted = [(account, step, outcome) for of, account, step, outcome in steps if of == run_id]
            if sorted(noted) != sorted(expected):
                found.append(f"{run_id}: steps {expected}, recorded: {noted}")
        killed = sum(attempt.killed and not attempt.ran for attempt in self.attempts)
        ended = [run_id for run_id, (outcome, _) in recorded.items() if outcome != "crashed" and run_id not in ran]
        if len(ended) > killed:
            found.append(f"recorded as ended, but nobody said so: {ended}")
        found += [f"{run_id} has no end" for run_id, (outcome, _) in recorded.items() if outcome is None]
        found += [f"{run_id} ran unrecorded" for run_id in {words[1] for words in self.events()} - recorded.keys()]
        skipped = sum(
            attempt.result is not None and attempt.result["outcome"] == "skipped" for attempt in self.attempts
        )
        if not skipped <= skips <= skipped + killed:
            found.append(f"{skipped} starts were skipped, {skips} recorded")
        for host in self.hosts:
            for path in (host.directory / "state" / "journal").glob("*"):
                if path.suffix in (".jsonl", ".replaying", ".refused") and path.stat().st_size:
                    found.append(f"{path} is not empty: {path.read_text()}")
        return found


def held(path):
    with suppress(FileNotFoundError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def make_chaos(directory, server, **options):
    print(f"BATCHCTL_TEST_SEED={SEED}")  # noqa: T201 - shown with a failure, to play it again
    return Chaos(directory, server, server._data, random.Random(SEED), **options)


def play(chaos, rounds):
    """Play rounds with every fault equally often, and in each third a second one."""
    order: list[str] = []
    for number in range(rounds):
        order = order or chaos.random.sample(FAULTS, len(FAULTS))
        first = order.pop()
        others = [fault for fault in FAULTS if fault != first]
        faults = (first, chaos.random.choice(others)) if chaos.random.random() < 1 / 3 else (first,)
        print(f"round {number}: {faults}")  # noqa: T201 - shown with a failure
        chaos.play(faults)
        assert not chaos.overlaps() or chaos.program != (str(PROGRAM),), chaos.overlaps()


def test_nothing_that_is_killed_makes_two_runs_a_lost_completion_or_a_blocked_job(tmp_path, own_server, request):
    chaos = make_chaos(tmp_path, own_server)
    with psycopg.connect(chaos.hosts[0].url) as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert connection.execute(f"SHOW {setting}").fetchone() == ("on",)
    rounds = request.config.getoption("chaos_rounds")
    play(chaos, rounds)

    def everything():
        return all(chaos.hits[fault] for fault in FAULTS) and chaos.results().keys() >= EVERYTHING

    if rounds >= ENOUGH_ROUNDS:
        for _ in range(rounds):
            # Chance owes some of it now and then.
            if not everything():
                play(chaos, 1)
    print(f"hit: {dict(chaos.hits)}; came of it: {chaos.results()}")  # noqa: T201 - shown with a failure, or by -s
    assert everything() or rounds < ENOUGH_ROUNDS
    assert chaos.overlaps() == []
    assert chaos.losses() == []
    # Whichever host completed last, the gap holds on both.
    for host in chaos.hosts:
        assert host.json("run-batch", code=75)["reason"] == "gap"
    # The control: a completion that got lost would have been seen.
    with psycopg.connect(chaos.hosts[0].url) as connection:
        connection.execute("UPDATE batchctl.run SET outcome = 'crashed' WHERE outcome <> 'crashed'")
    assert any("recorded: ('crashed'" in found for found in chaos.losses())


def test_without_the_guards_the_same_rounds_show_runs_that_overlap(tmp_path, own_server):
    """The control: what looks for two live runs does find them when there are any."""
    unguarded = tmp_path / "unguarded.py"
    unguarded.write_text(UNGUARDED)
    chaos = make_chaos(tmp_path, own_server, program=(sys.executable, str(unguarded)))
    play(chaos, CONTROL_ROUNDS)
    assert chaos.overlaps()
