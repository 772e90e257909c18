"""One grain of one rollup in one database: the values and the pieces of SQL that its statements share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from batchctl.rollup import compose
from batchctl.state.database import sql

if TYPE_CHECKING:
    from batchctl.rollup.definition import Definition, Grain, Places
    from batchctl.state.database import Session

STATEMENT_TIMEOUT = "10min"
"""A statement of a chunk that takes longer is stuck: chunks are cut to take seconds."""
WORK_MEMORY = "128MB"
"""What sorting and grouping a chunk may use, unless the role has more."""
KILOBYTES = {"kB": 1, "MB": 1024, "GB": 1024**2, "TB": 1024**3}


@dataclass(frozen=True)
class Work:
    """One grain of one rollup in one database."""

    session: Session
    definition: Definition
    grain: Grain
    places: Places
    here: str
    """The cluster and the database, in which the numbers of transactions mean something."""
    follows: bool = False
    """True if it reads a source whose partitions are followed."""

    @property
    def job(self) -> str:
        """Name the row of the state table."""
        return self.definition.job(self.grain.name)

    @property
    def target(self) -> sql.SQL:
        """Name the table of the grain."""
        return compose.quoted(*self.places.targets[self.grain.name])

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Return the values that the statements share."""
        return {
            "rollup": self.definition.name,
            "grain": self.grain.name,
            "job": self.job,
            "here": self.here,
        }

    @property
    def described(self) -> str:
        """Write the definition as it is registered, so that nothing is computed by one that was replaced."""
        return json.dumps(self.definition.as_json())

    def run(self, name: str, /, **values: Any) -> list[Any]:
        """Execute a statement of the rollups by its name."""
        return self.execute(self.statement(name), **values)

    def statement(self, name: str, /, **parts: sql.Composable) -> sql.Composed:
        """Compose a statement of the rollups by its name, with further pieces."""
        return self.session.statement(f"rollup.{name}", **self._pieces, **parts)

    @cached_property
    def stored_types(self) -> dict[str, str]:
        """Return the type of each column of the table, with its collation."""
        table = compose.spelled(*self.places.targets[self.grain.name])
        return {row.name: row.type for row in self.session.fetch("rollup.stored_types", table=table)}

    @cached_property
    def _pieces(self) -> dict[str, sql.Composable]:
        return {
            "open": compose.open_bucket(self.session, self.definition, self.grain),
            "floor": compose.floor(self.definition, self.grain),
            "ended": self.session.statement("rollup.ended", snapshot=sql.SQL("pg_current_snapshot()")),
            "ended_before": self.session.statement("rollup.ended", snapshot=sql.SQL("%(snapshot)s::pg_snapshot")),
        }

    def reading(self, name: str, /, **parts: sql.Composable) -> sql.Composed:
        """Compose a statement that reads what the grain is built from, or its table."""
        source, time = compose.built_from(self.definition, self.grain, self.places)
        return self.statement(
            name,
            target=self.target,
            source=source,
            time=time,
            bucket=compose.bucket_of(self.session, self.grain, time),
            next=compose.next_bucket(self.session, self.grain, compose.quoted("bucket")),
            where=compose.condition(self.definition),
            **parts,
        )

    def compute(self, name: str, /, **values: Any) -> list[Any]:
        """Execute such a statement."""
        return self.execute(self.reading(name), **values)

    def execute(self, statement: sql.Composed, **values: Any) -> list[Any]:
        """Execute a composed statement that returns no instants."""
        return self.session.run_at_once(statement, {**self.parameters, **values})

    def steady(self, statement_timeout: str = STATEMENT_TIMEOUT) -> None:
        """Make the transaction that is open read the same whatever the role's settings are."""
        timeouts = {"statement_timeout": sql.Literal(statement_timeout), "unlimited": self.session.unlimited}
        memory = self.session.run(self.statement("steady", **timeouts))[0]
        if _kilobytes(memory.work_mem) < _kilobytes(WORK_MEMORY):
            self.session.run(self.statement("more_memory", work_memory=sql.Literal(WORK_MEMORY)))

    def hold(self, how: str = "hold", **parts: sql.Composable) -> Any:
        """Do the same and lock the job until the end of the transaction.

        Args:
            how: The statement that does it: `hold`, `hold_for_few`, `hold_for_workers` or `join_holder`.
            parts: Its pieces.

        Returns:
            The row of the job, None if it is held elsewhere.
        """
        self.steady()
        rows = self.execute(self.statement(how, **parts))
        return rows[0] if rows else None

    def occupied(self, low: sql.Composable, high: sql.Composable) -> sql.Composed:
        """Write whether the table holds anything from one bucket to another, given as seconds since 1970."""
        return self.statement("occupied", target=self.target, low=low, high=high)


def _kilobytes(memory: str) -> int:
    """Read a setting of memory as PostgreSQL shows it."""
    return int(memory[:-2]) * KILOBYTES[memory[-2:]]
