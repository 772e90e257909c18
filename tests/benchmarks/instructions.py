"""What tracking adds to an insert, in instructions of the server: the same number on a busy machine as on a quiet one.

    python tests/benchmarks/instructions.py [--binaries DIRECTORY] [--json]

Needs valgrind. A source with batchctl's triggers is compared with the same table without any, and with triggers that
note nothing: one that only asks PostgreSQL for the table of new rows, one that reads that table to its end, and two
that look at each row as well. No trigger that sees every row can be cheaper than the second. What the system's kernel
does for the server (files, the disk) is not counted. docs/explanation/measurements.md tells what came out.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from private_server import PrivateServer, find_binaries
from rollup import EVENTS, bins

CONFIGURATION = """
[rollup.trend]
source = "fact_events"
time = "occurred_at"
dimensions = ["event_type", "item"]
[rollup.trend.measures]
events = "count(*)"
"""
TABLES = {
    "fact_events": "batchctl",
    "asking_events": "a trigger that only asks for the new rows",
    "reading_events": "a trigger that only reads the new rows",
    "comparing_events": "a trigger that compares their buckets with one",
    "spanning_events": "a trigger that finds the first and last time",
}
BODIES = {
    "asking_events": "",
    "reading_events": "PERFORM FROM new_rows OFFSET 1000000000;",
    "comparing_events": f"PERFORM FROM new_rows WHERE {bins('1 minute')} = '2000-01-01' OFFSET 1000000000;",
    "spanning_events": "PERFORM min(occurred_at), max(occurred_at) FROM new_rows;",
}
BULK, BULK_STEP = 100_000, "86.4 ms"
"""As dense as a million events a day."""


@dataclass(frozen=True)
class Counted:
    """One line of the result: the instructions of a statement with a trigger and without any."""

    what: str
    side: str
    instructions: int
    against: int
    ratio: float


def rows(count: int, step: str) -> str:
    """Return a query of so many events, each so long after the one before it."""
    return (
        f"SELECT timestamptz '2025-11-13 00:00Z' + number * interval '{step}', 'type_' || number % 4,"
        f" 'item_' || number % 51, number * 7 % 1000 FROM generate_series(0, {count - 1}) AS number"
    )


def shapes(file: Path) -> dict[str, tuple[int, str]]:
    """Return the statements that are counted, and how often each is run."""
    bulk = rows(BULK, BULK_STEP)
    return {
        "1 row": (300, "INSERT INTO {} VALUES ('2025-11-13 06:51Z', 'type_1', 'item_1', 5)"),
        "100 rows of a minute": (100, f"INSERT INTO {{}} {rows(100, '0.5 s')}"),
        "100 rows of five minutes": (100, f"INSERT INTO {{}} {rows(100, '3 s')}"),
        "3,000 rows of a minute": (20, f"INSERT INTO {{}} {rows(3000, '10 ms')}"),
        f"{BULK:,} rows of 144 minutes, INSERT": (1, f"INSERT INTO {{}} {bulk}"),
        f"{BULK:,} rows of 144 minutes, COPY": (1, f"COPY {{}} FROM '{file}'"),
    }


class Instructions:
    """Counts.

    Args:
        server: An empty server; it is ended.
    """

    def __init__(self, server: PrivateServer) -> None:
        """Make the tables, the rollup and the triggers."""
        self._server = server
        self._file = server.directory / "rows.copy"
        site = server.site("instructions")
        site.configure(CONFIGURATION)
        for table in ("plain_events", *TABLES):
            site.psql(f"CREATE TABLE {table} {EVENTS}", f"CREATE INDEX ON {table} (occurred_at)")
        for table, body in BODIES.items():
            site.psql(
                f"CREATE FUNCTION see_{table}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} RETURN NULL; END$$",
                f"CREATE TRIGGER see AFTER INSERT ON {table} REFERENCING NEW TABLE AS new_rows"
                f" FOR EACH STATEMENT EXECUTE FUNCTION see_{table}()",
            )
        site.batchctl("migrate")
        site.batchctl("aggregate")
        site.psql(f"COPY ({rows(BULK, BULK_STEP)}) TO '{self._file}'")
        server.stop()

    def run(self) -> list[Counted]:
        """Count each statement with each trigger."""
        found = []
        for what, (times, statement) in shapes(self._file).items():
            against = self._each(times, statement.format("plain_events"))
            for table, side in TABLES.items():
                own = self._each(times, statement.format(table))
                found.append(Counted(what, side, own, against, own / against))
                print(line(found[-1]), file=sys.stderr, flush=True)
        return found

    def _each(self, times: int, statement: str) -> int:
        """Return the instructions of a statement, without those of the first one where it is run several times."""
        # What is prepared once is what an application repeats.
        prepared = [f"PREPARE once AS {statement}", *["EXECUTE once"] * times] if times > 1 else [statement]
        few = prepared[:2] if times > 1 else ["SELECT 1"]
        return (self._count(prepared) - self._count(few)) // max(times - 1, 1)

    def _count(self, statements: list[str]) -> int:
        out = self._server.directory / "counted"
        wrapper = ("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}")
        said = self._server.single_user("instructions", statements, *wrapper)
        collected = re.search(r"Collected : (\d+)", said)
        if collected is None:
            sys.exit(f"valgrind did not count:\n{said}")
        return int(collected[1])


def line(counted: Counted) -> str:
    """Return a result as a line of a table."""
    return (
        f"{counted.what:38} {counted.side:42} {counted.instructions:13,} {counted.against:13,} {counted.ratio:6.3f} x"
    )


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, help="where PostgreSQL's programs are")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed; Debian's package is called the same")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    directory = Path(tempfile.mkdtemp(prefix="instructions-"))
    server = None
    try:
        server = PrivateServer(directory, find_binaries(options.binaries))
        found = Instructions(server).run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        if server is not None:
            server.close()
        shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        print(json.dumps({"results": [asdict(counted) for counted in found]}))
        return
    print(f"{'statement':38} {'trigger':42} {'with':>13} {'without':>13}  ratio")
    for counted in found:
        print(line(counted))


if __name__ == "__main__":
    main()
