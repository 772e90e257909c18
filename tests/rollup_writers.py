"""Writers that change a source in every way an application may, and the usual mistake, for comparison."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg

from batchctl.clock import SystemClock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

CLOCK = SystemClock()
START = datetime(2025, 11, 13, 6, tzinfo=UTC)
HOURS = 3
MICROSECOND = timedelta(microseconds=1)
ODD_TIMES = (
    None, "infinity", "-infinity", "1999-12-31 23:00:00Z", "1999-12-31 22:59:59.999999Z", "1969-12-31 23:59:59.5Z",
    "1582-10-15 00:00Z", "0044-03-15 12:00Z BC", "2099-01-01 00:00Z",
)  # fmt: skip
COLUMNS = "owner, occurred_at, event_type, item, value, weight"
TRUNCATE_PATIENCE = "100ms"
KINDS = {
    "insert": 3, "insert many": 2, "insert batch": 2, "copy": 1, "update": 1, "move": 1, "move far": 1,
    "change dimension": 1, "forget value": 1, "delete": 1,
}  # fmt: skip
"""What a statement may do, and how often."""
LEAVES = {"views_a": ("view", "a"), "views_rest": ("view", "b"), "rest": ("sale", "c")}
"""The leaves of the partitioned source, and dimensions that fit each."""


@dataclass
class Writer:
    """A session of the application. It changes rows of its owner only, so that writers never wait for each other.

    Args:
        url: The database.
        owner: Whose rows it changes.
        random: Makes its choices.
        partitioned: The source has leaves, which are written directly too.
    """

    url: str
    owner: int
    random: Random
    partitioned: bool = False
    committed: Counter[str] = field(default_factory=Counter)
    """What took effect."""
    _doing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Connect."""
        self.connection = psycopg.connect(self.url)

    def play(self, transactions: int) -> None:
        """Do some transactions, one after the other."""
        for _ in range(transactions):
            self.begin()
            self.end(commit=self.random.random() > 0.15)

    def begin(self) -> None:
        """Change something, in a transaction that stays open."""
        for _ in range(self.random.randint(1, 4)):
            if self.random.random() < 0.3:
                self._in_savepoint()
            self.change()
            if self.random.random() < 0.2:
                CLOCK.sleep(self.random.random() / 50)

    def end(self, *, commit: bool) -> None:
        """End the transaction that is open."""
        (self.connection.commit if commit else self.connection.rollback)()
        self.done(took_effect=commit)

    def done(self, *, took_effect: bool) -> None:
        """Note what came of the transaction."""
        self.committed.update(self._doing if took_effect else ["rollback"])
        self._doing.clear()

    def _in_savepoint(self) -> None:
        """Change something within two savepoints, of which none, the inner one or both are taken back."""
        before = len(self._doing)
        self.connection.execute("SAVEPOINT outer_one")
        self.change()
        kept = len(self._doing)
        self.connection.execute("SAVEPOINT inner_one")
        self.change()
        back = self.random.choice(["none", "inner", "outer"])
        if back == "none":
            self.connection.execute("RELEASE outer_one")
        else:
            self.connection.execute(f"ROLLBACK TO {back}_one")
            del self._doing[kept if back == "inner" else before :]
        self._doing.append(f"savepoint, {back} back")

    def change(self) -> None:
        """Execute one statement that changes the source."""
        (kind,) = self.random.choices(list(KINDS), list(KINDS.values()))
        own = f"owner = {self.owner} AND mod(id, 7) = {self.random.randrange(7)}"
        # An update of a leaf that had to move a row to another would be an error of the application.
        table = "fact_events"
        if self.partitioned and kind not in ("change dimension", "copy") and self.random.random() < 0.3:
            table = self.random.choice(list(LEAVES))
            self._doing.append("in a leaf")
        if kind == "insert batch":
            self._insert(table, self._batch())
        elif kind in ("insert", "insert many"):
            count = 1 if kind == "insert" else self.random.randint(2, 40)
            self._insert(table, [self._time() for _ in range(count)])
        elif kind == "copy":
            self._copy(self.random.randint(1, 200))
        elif kind == "update":
            self.connection.execute(f"UPDATE {table} SET value = value + 1, weight = weight / 2 WHERE {own}")
        elif kind == "move":
            step = self.random.choice([MICROSECOND, -MICROSECOND, timedelta(seconds=self.random.randint(-4000, 4000))])
            self.connection.execute(f"UPDATE {table} SET occurred_at = occurred_at + %s WHERE {own}", [step])
        elif kind == "move far":
            self.connection.execute(f"UPDATE {table} SET occurred_at = %s WHERE {own}", [self._time()])
        elif kind == "change dimension":
            self.connection.execute(f"UPDATE {table} SET event_type = %s, item = %s WHERE {own}", self._dimensions())
        elif kind == "forget value":
            value = self.random.choice([None, "NaN"])
            self.connection.execute(f"UPDATE {table} SET value = %s, weight = %s WHERE {own}", [value, value])
        else:
            self.connection.execute(f"DELETE FROM {table} WHERE {own}")
        self._doing.append(kind)

    def truncate(self) -> bool:
        """Truncate the source and write one row after it, unless some transaction is in the way for long."""
        with suppress(psycopg.errors.LockNotAvailable):
            self.connection.execute(f"SET LOCAL lock_timeout = '{TRUNCATE_PATIENCE}'")
            self.connection.execute("TRUNCATE fact_events")
            self._insert("fact_events", [self._time()])
            self._doing.append("truncate")
            self.end(commit=True)
            return True
        self.end(commit=False)
        return False

    def _insert(self, table: str, times: Sequence[datetime | str | None]) -> None:
        rows = [self._row(time, LEAVES.get(table)) for time in times]
        values = ", ".join(["(%s, %s, %s, %s, %s, %s)"] * len(rows))
        self.connection.execute(
            f"INSERT INTO {table} ({COLUMNS}) VALUES {values}", [value for row in rows for value in row]
        )

    def _copy(self, count: int) -> None:
        with self.connection.cursor().copy(f"COPY fact_events ({COLUMNS}) FROM STDIN") as copy:
            for _ in range(count):
                copy.write_row(self._row(self._time()))

    def _batch(self) -> list[datetime | str | None]:
        """Return times that lie within one minute, now and then with a straggler in any place."""
        minute = START + timedelta(minutes=self.random.randrange(HOURS * 60))
        spread = [minute + timedelta(microseconds=self.random.randrange(60 * 10**6)) for _ in range(20)]
        times: list[datetime | str | None] = spread[: self.random.randint(2, 20)]
        if self.random.random() < 0.5:
            times.insert(self.random.randint(0, len(times)), self._time())
        return times

    def _row(self, time: datetime | str | None, dimensions: tuple[str, str] | None = None) -> tuple:
        value = self.random.choice([None, "NaN", *[self.random.randint(-5, 5)] * 5, round(self.random.random(), 3)])
        weight = self.random.choice([None, "NaN", "Infinity", *[self.random.random()] * 9])
        return (self.owner, time, *(dimensions or self._dimensions()), value, weight)

    def _dimensions(self) -> tuple[str | None, str | None]:
        return self.random.choice(["view", "sale", None]), self.random.choice(["a", "b", "c", None])

    def _time(self) -> datetime | str | None:
        moment = START + timedelta(microseconds=self.random.randrange(HOURS * 3600 * 10**6))
        edge = moment.replace(minute=self.random.choice([0, 5, moment.minute]), second=0, microsecond=0)
        return self.random.choice([*[moment] * 6, edge, edge - MICROSECOND, edge + MICROSECOND, self._odd_time()])

    def _odd_time(self) -> str | None:
        return self.random.choice(ODD_TIMES)


@dataclass
class Prepared:
    """Transactions that were prepared and wait for their second phase, each of an owner of its own."""

    url: str
    first_owner: int
    random: Random
    partitioned: bool = False
    places: int = 4
    committed: Counter[str] = field(default_factory=Counter)
    waiting: dict[str, Writer] = field(default_factory=dict)

    def prepare(self) -> None:
        """Prepare one more, if there is a place."""
        for place in range(self.places):
            name = f"place_{place}"
            if name not in self.waiting:
                writer = Writer(self.url, self.first_owner + place, self.random, self.partitioned)
                try:
                    writer.begin()
                    writer.connection.execute(f"PREPARE TRANSACTION '{name}'")
                    # Its session may end before it does.
                    writer.connection.commit()
                finally:
                    writer.connection.close()
                self.waiting[name] = writer
                return

    def finish(self, share: float = 1.0) -> None:
        """Do the second phase of some."""
        for name in [name for name in self.waiting if self.random.random() < share]:
            writer = self.waiting.pop(name)
            commit = self.random.random() < 0.7
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute(f"{'COMMIT' if commit else 'ROLLBACK'} PREPARED '{name}'")
            self.committed["commit prepared" if commit else "rollback prepared"] += 1
            writer.done(took_effect=commit)
            self.committed.update(writer.committed)


@dataclass
class HighWaterMark:
    """The usual incremental aggregation, as a control: it reads what has a higher id than the last it saw.

    It is asked for the inserted rows that it never reads, and for nothing else: that it misses updates and deletes
    as well is not held against it.
    """

    url: str
    mark: int = 0
    lost: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Connect and make the place for what it has read."""
        self.connection = psycopg.connect(self.url, autocommit=True)
        self.connection.execute("CREATE TABLE read_by_mark (id bigint)")

    def advance(self) -> None:
        """Read what is new by the mark."""
        self.mark = self.connection.execute(
            "WITH new AS (INSERT INTO read_by_mark SELECT id FROM fact_events WHERE id > %(mark)s RETURNING id) "
            "SELECT greatest(max(id), %(mark)s) FROM new",
            {"mark": self.mark},
        ).fetchone()[0]

    def count_losses(self) -> int:
        """Count the rows that are there and will never be read, now or at an earlier count."""
        rows = self.connection.execute(
            "SELECT id FROM fact_events WHERE id <= %s EXCEPT SELECT id FROM read_by_mark", [self.mark]
        ).fetchall()
        self.lost.update(row[0] for row in rows)
        return len(self.lost)
