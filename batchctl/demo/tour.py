"""The demo: a real batch and a real rollup on one day of sales, each shown as it happens."""

from __future__ import annotations

import shlex
import shutil
from contextlib import suppress
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchctl import config_file
from batchctl.demo.commands import Commands, Ended, Interrupted, own_settings
from batchctl.demo.place import DATABASE, EVENTS, SCRIPTS, Place
from batchctl.demo.sample import SHIPPED, Sample, read_sample
from batchctl.demo.totals import GRAINS, compare, counted, events_since, make_source
from batchctl.errors import ExitCode
from batchctl.logs import elapsed
from batchctl.state.database import open_database
from batchctl.state.embedded import NAME, PACKAGE, PORT

if TYPE_CHECKING:
    from collections.abc import Callable

    from batchctl.clock import Clock
    from batchctl.demo.totals import Comparison
    from batchctl.state.database import Database

    Say = Callable[[str], None]

SETTLED = timedelta(seconds=10)
"""Longer than the rollup's `settle`: what ended this long ago is closed."""
BATCH = "daily"
LATE = (
    "INSERT INTO fact_events (occurred_at, event_type, item, quantity, value, country)",
    "VALUES ('2011-01-01 12:00+00', 'sale', 'MINE', 1, 9.99, 'Korea')",
)


def run(directory: Path, data: Path | None, clock: Clock, say: Callable[[str], None]) -> int:
    """Show everything once; return the exit code.

    Args:
        directory: Where; made if it is not there, used again if it is a demo's.
        data: A CSV file of sales (plain or gzip) instead of the shipped day.
        clock: Waits and measures.
        say: Prints a line, at once.

    Raises:
        UsageError: the data is not there.
        ConfigurationError: the data or the directory cannot be used.
        DatabaseUnavailableError: the embedded database does not start.
    """
    place = Place(directory)
    closed = (clock.now() - SETTLED).replace(minute=0, second=0, microsecond=0)
    try:
        with own_settings(), read_sample(data or SHIPPED, closed) as sample:
            place.make()
            with place.locked():
                place.claim()
                return _Tour(place, clock, say).run(sample, data, closed)
    except Interrupted as interrupted:
        say("")
        say("Interrupted. The next demo in this directory begins anew.")
        return interrupted.exit_code


def stop(directory: Path, clock: Clock, say: Callable[[str], None]) -> int:
    """End the embedded server of a demo; return the exit code.

    Raises:
        ConfigurationError: the directory is not a demo's.
        DatabaseUnavailableError: the server cannot be stopped.
    """
    place = Place(directory)
    if not place.exists():
        say(f"There is no demo in {directory}.")
        return ExitCode.DONE
    place.check()
    with place.locked():
        _stop(place, clock, say)
    return ExitCode.DONE


def clean(directory: Path, clock: Clock, say: Callable[[str], None]) -> int:
    """End the embedded server of a demo and remove the directory with all that is in it; return the exit code.

    Raises:
        ConfigurationError: the directory is not a demo's.
        DatabaseUnavailableError: the server cannot be stopped.
        BatchctlError: something cannot be removed.
    """
    place = Place(directory)
    if not place.exists():
        say(f"There is no demo in {directory}.")
        return ExitCode.DONE
    place.check()
    with place.locked():
        _stop(place, clock, say)
        place.remove()
    say(f"Removed {directory}.")
    return ExitCode.DONE


def _stop(place: Place, clock: Clock, say: Say) -> None:
    server = place.server(clock)
    if server.running():
        server.stop()
        say(f"Stopped the embedded database in {place.shown / DATABASE}.")
    else:
        say(f"The embedded database in {place.shown / DATABASE} is not running.")


class _Tour:
    def __init__(self, place: Place, clock: Clock, say: Say) -> None:
        self._place = place
        self._clock = clock
        self._say = say
        self._commands = Commands(place.configuration, place.shown / config_file.FILE_NAME, say)

    def run(self, sample: Sample, data: Path | None, closed: datetime) -> int:
        say = self._say
        self._prepare(sample, data)
        database = self._start()
        with database.connect() as session:
            make_source(session)
        self._heading("3. The schema of the state, the rollup's tables, triggers on the source")
        migrated = self._commands.run("migrate", "-v")
        if migrated.code:
            return self._failed("migrate", migrated.code)
        code = self._batch() or self._skip() or self._aggregate()
        if code:
            return code
        with database.connect() as session:
            comparisons = {grain: compare(session, grain, closed) for grain in GRAINS}
            left_out = events_since(session, closed)
        self._what_next()
        self._heading("Compared with fact_events: totals, and every bucket by event type and item")
        if left_out:
            say(f"({left_out:,} events since {closed:%Y-%m-%d %H:%M} UTC are left out: that hour is not over.)")
        return self._verdict(comparisons)

    def _prepare(self, sample: Sample, data: Path | None) -> None:
        say, shown = self._say, self._place.shown
        say(f"batchctl demo in {shown}")
        self._heading("1. Files, to read and to change")
        kept = self._place.write(sample.file, shipped=data is None)
        first, last = (f"{at:%Y-%m-%d %H:%M}" for at in (sample.first, sample.last))
        about = {
            config_file.FILE_NAME: "the configuration: a batch of six steps, a rollup",
            SCRIPTS[0]: "steps 31, 32, 33: each loads a third of the events",
            SCRIPTS[1]: "steps 61, 62, 63: each exports the top items to out/",
            EVENTS: f"{counted(sample.events, 'event')}, {first} to {last} UTC",
        }
        for name, text in about.items():
            say(f"  {name:<14} {text}{' (changed, kept)' if name in kept else ''}")
        if data is None:
            say("  The events are one day of the Online Retail data set, see SOURCE.txt.")

    def _start(self) -> Database:
        say = self._say
        self._heading("2. The embedded PostgreSQL, on a socket in this directory, no port")
        configuration = config_file.load(self._place.configuration, {})
        began = self._clock.monotonic()
        if configuration.database.url is None:
            server = self._place.server(self._clock)
            running = server.running()
            server.start()
            took = elapsed(self._clock.monotonic() - began)
            say("  It runs already." if running else f"  It has started ({took}) and goes on after the demo.")
        return open_database(configuration, self._clock)

    def _batch(self) -> int:
        say = self._say
        self._heading("4. The batch, for real: 31-33 load, 61-63 export")
        ended = self._commands.run("run-batch", BATCH, "--json", "-v")
        if ended.result.get("reason") in ("gap", "not_due"):
            say("  This batch ran a short time ago. --force-gap lifts that guard, no other:")
            ended = self._commands.run("run-batch", BATCH, "--json", "-v", "--force-gap")
        steps = ended.result.get("steps", ())
        if steps:
            say("  What the steps wrote (their log files are below state/log):")
        for step in steps:
            for line in _last_lines(step):
                say(f"  | {line}")
        return self._failed("the batch", ended.code) if ended.code else ExitCode.DONE

    def _skip(self) -> int:
        say = self._say
        self._heading("5. A second start, as an impatient crontab would make it")
        ended = self._commands.run("run-batch", BATCH, "--json", "-v")
        if ended.code not in (ExitCode.DONE, ExitCode.SKIPPED):
            return self._failed("the second start", ended.code)
        if ended.code == ExitCode.DONE:
            say("  It was not skipped: batchctl.toml asks for no gap.")
            return ExitCode.DONE
        say(f"  Skipped ({ended.result.get('reason')}), exit code {ended.code}, at once: nothing waits, nothing runs.")
        if eligible := ended.result.get("next_eligible_at"):
            left = datetime.fromisoformat(eligible) - self._clock.now()
            say(f"  Time left until it may start: {elapsed(max(left, timedelta(0)))}.")
        return ExitCode.DONE

    def _aggregate(self) -> int:
        say = self._say
        self._heading("6. The rollup: 1m from the events, 5m from 1m, 1h from 5m")
        remaining: int | None = None
        while True:
            ended = self._commands.run("aggregate", "--json", "-v")
            grains = ended.result.get("rollups", ())
            if ended.code or any(grain["outcome"] == "skipped" for grain in grains):
                return self._failed("aggregate", ended.code or ExitCode.SKIPPED)
            before, remaining = remaining, _remaining(ended)
            if not remaining or (before is not None and remaining >= before):
                return ExitCode.DONE
            say(f"  {remaining:,} buckets remain: a call stops after its budget, the next one goes on.")

    def _verdict(self, comparisons: dict[str, Comparison]) -> int:
        say = self._say
        for grain, comparison in comparisons.items():
            say(comparison.line(grain))
        *most, last = comparisons
        if differing := [grain for grain, comparison in comparisons.items() if not comparison.equal]:
            say(f"NOT equal to the source: {', '.join(differing)}.")
            return ExitCode.FAILED
        say(f"The totals of {', '.join(most)} and {last} equal the source.")
        return ExitCode.DONE

    def _what_next(self) -> None:
        say, line, psql = self._say, self._commands.line, self._psql()
        demo = shlex.join(["batchctl", "demo", "--directory", str(self._place.shown)])
        self._heading("What to try next")
        say("  What ran, what was skipped and why; when the batch may start again:")
        for command in (("history",), ("status",), ("next", BATCH)):
            say(f"    {line(*command)}")
        say("  Look into the database (fact_events, agg_1m, agg_5m, agg_1h):")
        say(f"    {psql}")
        say("  Add an event that comes late; only its buckets are computed again:")
        say(f'    {psql} -c "')
        say(f"      {LATE[0]}")
        say(f'      {LATE[1]}"')
        say(f"    {line('aggregate', '-v')}")
        say("  Change batchctl.toml, collect.py or export.py, then show it all again:")
        say(f"    {demo}")
        say("  End the embedded database; or end it and remove the directory:")
        say(f"    {demo} --stop")
        say(f"    {demo} --clean")

    def _psql(self) -> str:
        program = "psql" if shutil.which("psql") else next(map(str, _bundled()), "psql")
        client = shlex.join([program, "-h", self._place.socket_directory, "-p", PORT, "-U", NAME, NAME])
        where = f"cd {shlex.quote(str(self._place.directory))} && " if self._place.needs_working_directory else ""
        return where + client

    def _heading(self, text: str) -> None:
        self._say("")
        self._say(text)

    def _failed(self, what: str, code: int) -> int:
        self._say("")
        self._say(f"The demo ends here: {what} ended with exit code {code}; see above.")
        return code


def _remaining(ended: Ended) -> int:
    return sum(grain["remaining_buckets"] for grain in ended.result.get("rollups", ()))


def _last_lines(step: dict[str, Any]) -> list[str]:
    with suppress(OSError, TypeError):
        return Path(step["log"]).read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    return []


def _bundled() -> list[Path]:
    spec = find_spec(PACKAGE)
    places = (spec.submodule_search_locations if spec else None) or ()
    return sorted(path for place in places for path in Path(place).glob("pginstall*/bin/psql"))
