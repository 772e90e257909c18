"""Starts a batch many times at the same instant: a parent that has imported everything forks one process per start.

    python forked_starts.py ROUNDS STARTS REMOVED CONFIG CONFIG...

The starts are spread over the configurations. REMOVED is what decides and is taken away as a control: `lock`, `table`,
or `nothing`. Prints one JSON document: for each round what each start came to, and which starts had a step that ran.
An installed command costs 0.4 s of CPU before it gets to the guards, so a thousand of them would measure the import of
Python; from the guards on everything here is the real thing.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from batchctl.batch import start
from batchctl.batch.guards import Guards
from batchctl.batch.plan import make_plan
from batchctl.batch.resume import Work
from batchctl.cli.session import Session
from batchctl.errors import BatchctlError
from batchctl.state import database, embedded, host, journal, store  # noqa: F401 - loaded before the fork

BATCH = "daily"
LONGEST_ROUND_SECONDS = 60
WINDOW_SECONDS = 0.3


class NoLock:
    """What stands for the file lock where that is taken away."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def take_away(removed: str) -> None:
    """Remove what decides.

    What is left is to look first and to act then; a moment between the two makes sure that it is seen to fail.
    """
    if removed == "lock":
        look = Guards.alive

        def look_slowly(self, *arguments):
            seen = look(self, *arguments)
            time.sleep(WINDOW_SECONDS)
            return seen

        start.acquire = lambda *_: NoLock()
        Guards.alive = look_slowly
    if removed == "table":
        original = database.named_queries

        def without_decision(file):
            queries = dict(original(file))
            if file == "run.sql":
                queries["lock_job"] = "SELECT %(job)s::text"
                for name, found, instead in (
                    ("claim", "ON CONFLICT (batch) WHERE outcome IS NULL DO NOTHING", ""),
                    ("job", "FROM (SELECT) AS always", f"FROM pg_sleep({WINDOW_SECONDS})"),
                ):
                    assert found in queries[name], queries[name]
                    queries[name] = queries[name].replace(found, instead)
            return queries

        database.named_queries = without_decision


def ready_session(config: Path) -> Session:
    """Read the configuration, and load all that a start will ask for."""
    session = Session(config=config)
    # Each start opens its own connection, but none has to import anything.
    assert session.configuration
    assert session.zone
    return session


def start_once(session: Session) -> dict:
    """Do what run-batch --force-gap does once its arguments and the configuration are read."""
    plan = make_plan(BATCH, session.configuration.batches[BATCH])
    guards = Guards(session.configuration, plan.job, True, session.zone, session.clock, session.logger(BATCH))
    try:
        with start.handled_signals() as interruption:
            result = start.Start(
                guards, Work(plan), session.load_state, lambda _: None, dict(os.environ), interruption
            ).run()
    except BatchctlError as error:
        return {"outcome": "error", "reason": str(error), "holder": None}
    return {
        "outcome": result.outcome,
        "reason": result.reason,
        "holder": result.holder and result.holder.pid,
    }


def fork_all(sessions: list[Session], starts: int, results: Path) -> list[int]:
    """Fork the starts, wait until all are ready, and let them go at once."""
    gate, opener = os.pipe()
    listener, ready = os.pipe()
    pids = []
    for number in range(starts):
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            os.close(listener)
            os.write(ready, b".")
            os.close(ready)
            os.read(gate, 1)
            os.close(gate)
            try:
                said = start_once(sessions[number % len(sessions)])
            except BaseException as error:  # noqa: BLE001 - told to the test
                said = {"outcome": "error", "reason": repr(error), "holder": None}
            line = json.dumps({"pid": os.getpid(), "host": number % len(sessions), **said}) + "\n"
            descriptor = os.open(results, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, line.encode())
            os._exit(0)
        pids.append(pid)
    os.close(gate)
    os.close(ready)
    for _ in range(starts):
        os.read(listener, 1)
    os.close(listener)
    os.close(opener)
    return pids


def play(sessions: list[Session], starts: int) -> dict:
    """Play one round: the steps run until nobody is left but the starts that they belong to."""
    directory = sessions[0].configuration.directory.parent
    ran, over, results = directory / "ran", directory / "over", directory / "results"
    for path in (ran, over, results):
        path.unlink(missing_ok=True)
    left = set(fork_all(sessions, starts, results))
    winners: set[int] = set()
    deadline = time.monotonic() + LONGEST_ROUND_SECONDS
    while left and time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            winners = {int(pid) for pid in ran.read_text().split()}
        if left <= winners:
            break
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.005)
    over.touch()
    for pid in left:
        os.waitpid(pid, 0)
    lines = results.read_text().splitlines()
    return {"results": [json.loads(line) for line in lines], "ran": ran.read_text().split() if ran.exists() else []}


def main() -> None:
    """Play the rounds and print what came of them."""
    rounds, starts, removed, *configs = sys.argv[1:]
    take_away(removed)
    sessions = [ready_session(Path(config)) for config in configs]
    # What the collector would write to in each child would have to be copied for it first.
    gc.collect()
    gc.freeze()
    gc.disable()
    played = [play(sessions, int(starts)) for _ in range(int(rounds))]
    sys.stdout.write(json.dumps(played))


if __name__ == "__main__":
    main()
