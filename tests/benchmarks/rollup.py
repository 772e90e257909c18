"""What rollups cost, against hand-written SQL on the same data, from one run.

    python tests/benchmarks/rollup.py [--events 10000000] [--only backlog] [--json] [--aggregate-options "..."]

Needs a PostgreSQL server with pgbench; starts one of its own with default settings, and removes it. Both sides of each
pair run next to each other, in alternating order, and the median of the pairs' ratios counts. After each section every
grain is compared with a GROUP BY over the source. docs/explanation/measurements.md says what is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psycopg
from private_server import PrivateServer, Site, find_binaries

if TYPE_CHECKING:
    from collections.abc import Callable

DAYS = 10
BASE = "(date_trunc('day', now(), 'UTC') - interval '20 days')"
CONFIGURATION = """
[rollup.trend]
source = "fact_events"
time = "occurred_at"
dimensions = ["event_type", "item"]
budget = "1d"
[rollup.trend.measures]
events = "count(*)"
value_sum = "sum(value)"
value_min = "min(value)"
value_max = "max(value)"
"""
EVENTS = "(occurred_at timestamptz NOT NULL, event_type text NOT NULL, item text NOT NULL, value integer NOT NULL)"
DIMENSIONS = "'type_' || round(random() * 3), 'item_' || round(random() * 50), (random() * 1000)::integer"
ONE = "INSERT INTO {} VALUES (now() - interval '20 days', 'type_1', 'item_1', 5);\n"
GROUPS = "event_type, item, count(*), sum(value), min(value), max(value)"
UPSERT = """ON CONFLICT (bucket, event_type, item) DO UPDATE SET events = excluded.events,
    value_sum = excluded.value_sum, value_min = excluded.value_min, value_max = excluded.value_max"""
MINUTES = 30
"""So many pairs are compared, because a minute takes milliseconds."""
GRAINS = {"1m": "1 minute", "5m": "5 minutes", "1h": "1 hour"}


def bins(width: str) -> str:
    """Return the bucket of an event, in SQL."""
    return f"date_bin('{width}', occurred_at, timestamptz '2000-01-01 00:00:00+00')"


def by_hand(where: str = "") -> str:
    """Return the statement that a person would write for a table of minutes."""
    return f"INSERT INTO hand_1m SELECT {bins('1 minute')}, {GROUPS} FROM fact_events {where} GROUP BY 1, 2, 3 {UPSERT}"


@dataclass(frozen=True)
class Measured:
    """One line of the result: what batchctl took, what it is compared with, and the wanted bound of their ratio."""

    section: str
    what: str
    taken: float
    against: float
    unit: str
    ratio: float
    bound: float | None

    @property
    def good(self) -> bool:
        """Tell whether the ratio is within its bound."""
        return self.bound is None or self.ratio <= self.bound


def pairs(rounds: int, ours: Callable[[int], float], theirs: Callable[[int], float]) -> tuple[float, float, float]:
    """Run both sides next to each other, in alternating order; return both medians and that of the ratios."""
    taken: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            other = theirs(number)
            taken.append((ours(number), other))
        else:
            own = ours(number)
            taken.append((own, theirs(number)))
    return median(a for a, _ in taken), median(b for _, b in taken), median(a / b for a, b in taken)


class Rollups:
    """The sections.

    Args:
        server: An empty server.
        options: Of the command line.
    """

    def __init__(self, server: PrivateServer, options: argparse.Namespace) -> None:
        """Remember; nothing is loaded before a section needs it."""
        self.server = server
        self.events: int = options.events
        self.rounds: int = options.rounds
        self.seconds: int = options.seconds
        self.aggregate_options: list[str] = shlex.split(options.aggregate_options)
        self.results: list[Measured] = []
        self._main: Site | None = None

    def backlog(self) -> None:
        """Aggregate everything, from nothing: wall time of the command and of psql."""
        site = self._loaded(filled=False)

        def ours(_number: int) -> float:
            site.batchctl("migrate", "--drop", "trend")
            site.batchctl("migrate")
            site.psql("CHECKPOINT")
            return site.batchctl("aggregate", "--grain", "1m", *self.aggregate_options)

        def theirs(_number: int) -> float:
            site.psql("TRUNCATE hand_1m", "CHECKPOINT")
            return site.psql(by_hand())

        self._add("backlog", f"{self.events} events to 1m", pairs(self.rounds, ours, theirs), "s", 0.45)
        self._check(site)

    def minute(self) -> None:
        """Aggregate one new minute of 10,000 events: time in the server, of all statements of each side."""
        site = self._loaded()
        self._add("minute", "fresh sessions", self._minutes(site), "ms", 1.2)
        self._add("minute", "against a warm session", self._minutes(site, warm=True), "ms", 1.2)
        self._check(site)

    def late(self) -> None:
        """Aggregate 1,000 late events, scattered over everything: time in the server."""
        site = self._loaded()
        for many in (False, True):

            def bring(number: int, many: bool = many) -> None:
                site.psql(
                    "DROP TABLE IF EXISTS late_stage",
                    f"SELECT setseed({(number + many * 10) / 100})",
                    f"CREATE TABLE late_stage AS SELECT {BASE} + random() * interval '{DAYS} days' AS occurred_at,"
                    " 'type_1' AS event_type, 'item_1' AS item, 7 AS value FROM generate_series(1, 1000)",
                )
                if many:
                    with psycopg.connect(site.url, autocommit=True) as connection:
                        for row in connection.execute("SELECT * FROM late_stage").fetchall():
                            connection.execute("INSERT INTO fact_events VALUES (%s, %s, %s, %s)", row)
                else:
                    site.psql("INSERT INTO fact_events SELECT * FROM late_stage")

            what = "1,000 events in 1,000 statements" if many else "1,000 events in one statement"
            taken = []
            for number in range(self.rounds):
                bring(number)
                sides = {"ours": lambda: self._tick(site), "theirs": lambda: self._late_by_hand(site)}
                order = sorted(sides, reverse=number % 2 == 1)
                got = {side: sides[side]() for side in order}
                taken.append((got["ours"], got["theirs"]))
            figures = (median(a for a, _ in taken), median(b for _, b in taken), median(a / b for a, b in taken))
            self._add("late", what, figures, "ms", 1.3)
        self._check(site)

    def growth(self) -> None:
        """Compare the tick of one new minute over many and over few events: time in the server."""
        medians = []
        for name, count in (("few", self.events // 10), ("many", self.events * 2)):
            site = self._load(name, count)
            site.batchctl("migrate")
            site.batchctl("aggregate", *self.aggregate_options)
            medians.append(self._minutes(site, hand=False)[0])
            self._check(site, hand=False)
            self._drop(site)
        few, many = medians
        what = f"the tick over {self.events * 2} against {self.events // 10} events"
        self._add("growth", what, (many, few, many / few), "ms", 1.2)

    def ingest(self) -> None:
        """Insert with and without tracking: seconds for each row (pgbench, four clients), seconds for many rows."""
        site = self.server.site("ingest")
        self._tables(site)
        site.psql(f"CREATE TABLE plain_events {EVENTS}", "CREATE INDEX ON plain_events (occurred_at)")
        site.batchctl("migrate")
        site.batchctl("aggregate")
        rows = min(self.events, 1_000_000)

        def single(table: str, synchronous_commit: str) -> Callable[[int], float]:
            def run(_number: int) -> float:
                options = ("-c", "4", "-j", "2", "-T", str(self.seconds))
                script = ONE.format(table)
                return 1e6 / site.pgbench(script, *options, synchronous_commit=synchronous_commit)

            return run

        def bulk(table: str, statement: str) -> Callable[[int], float]:
            def run(_number: int) -> float:
                site.psql(f"TRUNCATE {table}", "CHECKPOINT")
                return site.psql(statement.format(table))

            return run

        for mode in ("on", "off"):
            figures = pairs(5, single("fact_events", mode), single("plain_events", mode))
            self._add("ingest", f"a row, synchronous_commit={mode}", figures, "us", 1 / (1 - 0.12))
        site.batchctl("aggregate")
        file = self.server.directory / "rows.copy"
        series = (
            f"SELECT {BASE} + number * interval '1 day' / {rows}, {DIMENSIONS}"
            f" FROM generate_series(1, {rows}) AS number"
        )
        site.psql(f"COPY ({series}) TO '{file}'")
        for what, statement in (("INSERT SELECT", f"INSERT INTO {{}} {series}"), ("COPY", f"COPY {{}} FROM '{file}'")):
            figures = pairs(5, bulk("fact_events", statement), bulk("plain_events", statement))
            self._add("ingest", f"{what} of {rows} rows", figures, "s", 1.08)
        site.batchctl("aggregate")
        self._check(site, hand=False)
        self._drop(site)

    def idle(self) -> None:
        """Run an idle `aggregate`: CPU seconds of the process, against a script that runs one query."""
        script = Path(__file__).with_name("idle.py")
        done = subprocess.run([sys.executable, str(script), "--json"], check=True, stdout=subprocess.PIPE)
        sides = json.loads(done.stdout)
        own, other = (sides[name]["cpu_seconds"] for name in ("aggregate, idle", "psycopg script"))
        self._add("idle", "CPU, all grains, against a bare psycopg script", (own, other, own / other), "s", None)

    def probe(self) -> None:
        """Look for work while another session keeps every dead row of the queue: the slowest statement of a tick."""
        site = self.server.site("probe")
        self._tables(site)
        site.batchctl("migrate")
        site.batchctl("aggregate")
        turns, clients = 10, 4
        each = max(self.events // 10 // turns // clients, 1)
        script = ONE.format("fact_events").replace("20 days'", "20 days' - random() * interval '1 hour'")
        before = self._slowest(site)
        with psycopg.connect(site.url) as holder:
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT count(*) FROM fact_events")
            for _ in range(turns):
                site.pgbench(script, "-c", str(clients), "-j", "2", "-t", str(each), synchronous_commit="off")
                site.batchctl("aggregate")
            own = self._slowest(site)
        self._add("probe", "the same, of an empty queue", (before, 5.0, before / 5.0), "ms", None)
        what = f"{turns * clients * each} queue rows gone, a snapshot held; at most 5 ms"
        self._add("probe", what, (own, 5.0, own / 5.0), "ms", 1.0)
        self._check(site, hand=False)
        self._drop(site)

    def _minutes(self, site: Site, *, warm: bool = False, hand: bool = True) -> tuple[float, float, float]:
        """Time the tick and the hand-written statement on minutes that come new; milliseconds in the server."""
        with psycopg.connect(site.url, autocommit=True) as connection:
            newest = connection.execute(f"SELECT max({bins('1 minute')}) FROM fact_events".encode()).fetchone()
        assert newest is not None
        taken = []
        # A session is warm when it has run the statement before, so the first pair only warms it.
        session = None
        try:
            for number in range(2 + MINUTES):
                low, high = (f"'{newest[0]}'::timestamptz + interval '{number + plus} minutes'" for plus in (1, 2))
                site.psql(
                    f"INSERT INTO fact_events SELECT {low} + number * interval '6 ms', {DIMENSIONS}"
                    " FROM generate_series(0, 9999) AS number"
                )
                statement = by_hand(f"WHERE occurred_at >= {low} AND occurred_at < {high}")
                if not hand:
                    taken.append((self._tick(site), 1.0))
                elif warm:
                    with self.server.statements() as spent:
                        session = session or psycopg.connect(site.url, autocommit=True)
                        session.execute(statement.encode())
                    taken.append((self._tick(site), sum(spent)))
                elif number % 2:
                    own = self._tick(site)
                    taken.append((own, self._spent(site, statement)))
                else:
                    other = self._spent(site, statement)
                    taken.append((self._tick(site), other))
        finally:
            if session is not None:
                session.close()
        taken = taken[2:]
        return median(a for a, _ in taken), median(b for _, b in taken), median(a / b for a, b in taken)

    def _slowest(self, site: Site) -> float:
        """Return the milliseconds of the slowest statement of an idle tick, which is the look at the queue."""
        slowest = []
        for _ in range(5):
            with self.server.statements() as taken:
                site.batchctl("aggregate", "--grain", "1m")
            slowest.append(max(taken))
        return median(slowest)

    def _tick(self, site: Site) -> float:
        with self.server.statements() as taken:
            site.batchctl("aggregate", "--grain", "1m", *self.aggregate_options)
        return sum(taken)

    def _spent(self, site: Site, *statements: str) -> float:
        with self.server.statements() as taken:
            site.psql(*statements)
        return sum(taken)

    def _late_by_hand(self, site: Site) -> float:
        """Recompute just the minutes of `late_stage`, which is what the queue would have to know."""
        kept = ", ".join(f"kept.{name}" for name in ("events", "value_sum", "value_min", "value_max"))
        return self._spent(
            site,
            "BEGIN",
            f"CREATE TEMP TABLE touched AS SELECT DISTINCT {bins('1 minute')} AS bucket FROM late_stage",
            "ANALYZE touched",
            f"""INSERT INTO hand_1m AS kept SELECT touched.bucket, found.* FROM touched CROSS JOIN LATERAL (
                SELECT {GROUPS} FROM fact_events
                WHERE occurred_at >= touched.bucket AND occurred_at < touched.bucket + interval '1 minute'
                GROUP BY 1, 2) AS found
            {UPSERT} WHERE ({kept}) IS DISTINCT FROM ({kept.replace("kept.", "excluded.")})""",
            "COMMIT",
        )

    def _loaded(self, *, filled: bool = True) -> Site:
        """Return the site that several sections share; filled: both sides are up to date."""
        if self._main is None:
            self._main = self._load("main", self.events)
            self._main.batchctl("migrate")
        if filled and not self._main.value("SELECT EXISTS (SELECT FROM hand_1m)"):
            self._main.psql(by_hand())
            self._main.batchctl("aggregate", *self.aggregate_options)
        return self._main

    def _tables(self, site: Site) -> None:
        site.configure(CONFIGURATION)
        site.psql(
            f"CREATE TABLE fact_events {EVENTS}",
            "CREATE INDEX ON fact_events (occurred_at)",
            "CREATE TABLE hand_1m (bucket timestamptz, event_type text, item text, events bigint, value_sum bigint,"
            " value_min integer, value_max integer, PRIMARY KEY (bucket, event_type, item))",
        )

    def _load(self, name: str, count: int) -> Site:
        site = self.server.site(name)
        self._tables(site)
        site.psql(
            "SELECT setseed(0.5)",
            f"INSERT INTO fact_events SELECT {BASE} + number * (interval '{DAYS} days' / {count}), {DIMENSIONS}"
            f" FROM generate_series(0, {count - 1}) AS number",
            "VACUUM ANALYZE fact_events",
        )
        return site

    def _drop(self, site: Site) -> None:
        with psycopg.connect(self.server.url("postgres"), autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{site.name}" WITH (FORCE)'.encode())

    def _check(self, site: Site, *, hand: bool = True) -> None:
        """Compare each grain with the source, row by row; end the script where they differ."""
        site.batchctl("aggregate", *self.aggregate_options)
        tables = {f"agg_{grain}": width for grain, width in GRAINS.items()}
        for table, width in tables.items() if not hand else [*tables.items(), ("hand_1m", GRAINS["1m"])]:
            columns = "bucket, event_type, item, events, value_sum, value_min, value_max"
            wanted = f"SELECT {bins(width)}, {GROUPS} FROM fact_events GROUP BY 1, 2, 3"
            differing = site.value(
                f"WITH wanted AS MATERIALIZED ({wanted}), found AS MATERIALIZED (SELECT {columns} FROM {table})"
                " SELECT count(*) FROM ((TABLE wanted EXCEPT ALL TABLE found)"
                " UNION ALL (TABLE found EXCEPT ALL TABLE wanted)) AS differing"
            )
            if differing:
                sys.exit(f"{site.name}: {table} differs from its source in {differing} rows")

    def _add(
        self, section: str, what: str, figures: tuple[float, float, float], unit: str, bound: float | None
    ) -> None:
        taken, against, ratio = figures
        self.results.append(Measured(section, what, taken, against, unit, ratio, bound))
        print(line(self.results[-1]), file=sys.stderr, flush=True)


SECTIONS = ("backlog", "minute", "late", "growth", "ingest", "idle", "probe")


def line(measured: Measured) -> str:
    """Return a result as a line of a table."""
    bound = "" if measured.bound is None else f"(at most {measured.bound:.2f}) {'' if measured.good else 'MISSED'}"
    return (
        f"{measured.section:8} {measured.what:58} {measured.taken:9.2f} {measured.unit:2}"
        f" {measured.against:9.2f} {measured.unit:2} {measured.ratio:6.2f} x {bound}"
    ).rstrip()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000, help="rows of the source")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section (repeatable); none for all")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of the long sections")
    parser.add_argument("--seconds", type=int, default=10, help="of each run of pgbench")
    parser.add_argument("--aggregate-options", default="", help="further options of batchctl aggregate")
    parser.add_argument("--binaries", type=Path, help="where PostgreSQL's programs are")
    parser.add_argument(
        "--directory", help="a directory on the disk that is to be measured; default: for temporary files"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    binaries = find_binaries(options.binaries)
    directory = Path(tempfile.mkdtemp(prefix="rollups-", dir=options.directory))
    begun = time.monotonic()
    server = None
    try:
        server = PrivateServer(directory, binaries)
        rollups = Rollups(server, options)
        for section in options.only or SECTIONS:
            getattr(rollups, section)()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        if server is not None:
            server.close()
        else:
            subprocess.run(["rm", "-rf", str(directory)], check=False)
    if options.json:
        document = {
            "events": options.events,
            "seconds": round(time.monotonic() - begun),
            "load": os.getloadavg()[1],
            "results": [{**asdict(measured), "good": measured.good} for measured in rollups.results],
        }
        print(json.dumps(document))
        return
    print(f"{'section':8} {'what':58} {'batchctl':>12} {'against':>12}    ratio")
    for measured in rollups.results:
        print(line(measured))


if __name__ == "__main__":
    main()
