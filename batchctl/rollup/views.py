"""Composes the views beside each table: its values alone, and its values up to this moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from batchctl.errors import ConfigurationError
from batchctl.rollup import compose, values
from batchctl.rollup.definition import Table
from batchctl.state.database import sql

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from batchctl.rollup.definition import Definition, Grain
    from batchctl.rollup.source import Found
    from batchctl.state.database import Session


class Views(NamedTuple):
    """What stands beside the table of a grain."""

    values: Table
    """The view without the parts of measures."""
    live: Table
    """The view that also shows what is not aggregated yet."""
    function: str
    """Computes that part, with the rights of its owner; in our schema."""


def views(rollup: str, grain: str, target: Table) -> Views:
    """Name the views of a grain, and the function behind one of them."""
    return Views(
        Table(target.schema, compose.short(f"{target.name}_values")),
        Table(target.schema, compose.short(f"{target.name}_live")),
        compose.short(f"live_{rollup}_{grain}"),
    )


def missing(session: Session, definition: Definition, found: Found) -> tuple[sql.Composed, ...]:
    """List the statements that make what is missing of the views.

    Raises:
        ConfigurationError: something else has the name of a view.
    """
    return tuple(
        statement for grain in definition.grains for statement in _missing_of_grain(session, definition, found, grain)
    )


def creation(session: Session, definition: Definition, found: Found) -> tuple[sql.Composed, ...]:
    """List the statements that make all views, once those that are there are taken away.

    Raises:
        ConfigurationError: something else has the name of a view.
    """
    return tuple(
        statement
        for grain in definition.grains
        for statement in _missing_of_grain(session, definition, found, grain, anew=True)
    )


def removal(session: Session, rollup: str, grain: str, target: Table) -> Iterator[sql.Composed]:
    """List the statements that take the views of a grain away."""
    named = views(rollup, grain, target)
    for view in (named.live, named.values):
        if _is_ours(session, rollup, view):
            yield session.statement("views.drop_view", view=sql.Identifier(*view))
    yield session.statement("views.drop_function", function=sql.Identifier(named.function))


def existing(session: Session, rollup: str, grain: str, target: Table) -> tuple[Table, ...]:
    """List the views of a grain that are there and ours."""
    named = views(rollup, grain, target)
    return tuple(view for view in (named.values, named.live) if _is_ours(session, rollup, view))


def _is_ours(session: Session, rollup: str, view: Table) -> bool | None:
    """Tell whether a relation is a view that was made for the rollup; None if there is no such relation."""
    found = session.fetch_one("views.find_view", schema_name=view.schema, view=view.name)
    # A comment is in every dump, and nobody else writes this one.
    return None if found is None else found.kind == "v" and str(found.comment or "").startswith(_mark(rollup))


def _mark(rollup: str) -> str:
    return f"Rollup {rollup}: "


def _missing_of_grain(
    session: Session, definition: Definition, found: Found, grain: Grain, *, anew: bool = False
) -> Iterator[sql.Composed]:
    target = found.places.targets[grain.name]
    named = views(definition.name, grain.name, target)
    shown = [*definition.key, *(measure.name for measure in definition.measures)]
    kinds = dict(found.columns)
    body = _body(session, definition, found, grain)
    present = session.fetch_one("rollup.find_function", function=named.function, schema_name=session.schema_name)
    if anew or present is None or present.body != body:
        function = sql.Identifier(named.function)
        yield session.statement(
            "views.create_function",
            function=function,
            columns=compose.COMMA.join(
                sql.SQL("{} {}").format(sql.Identifier(column), compose.literally(_bare(kinds[column])[0]))
                for column in shown
            ),
            body=compose.dollar_quoted(body),
            path=compose.COMMA.join(map(sql.Identifier, session.fetch_one("views.find_path").path)),
        )
        yield session.statement("views.close_function", function=function)
    columns = compose.COMMA.join(map(sql.Identifier, shown))
    parts = {
        named.values: session.statement(
            "views.create_values", view=sql.Identifier(*named.values), columns=columns, target=sql.Identifier(*target)
        ),
        named.live: session.statement(
            "views.create_live",
            view=sql.Identifier(*named.live),
            columns=columns,
            target=sql.Identifier(*target),
            until=_plain(_until(session, definition, grain)),
            # A function's result has no collation of its own.
            computed=compose.COMMA.join(
                sql.SQL("{}{}").format(sql.Identifier(column), compose.literally(_bare(kinds[column])[1]))
                for column in shown
            ),
            function=sql.Identifier(named.function),
        ),
    }
    abouts = {
        named.values: f"the values of {target} without the columns they are computed from.",
        named.live: f"the values of {target}, and from there on to this moment those of {found.places.source}.",
    }
    for view, create in parts.items():
        ours = _is_ours(session, definition.name, view)
        if ours is False:
            raise ConfigurationError(
                f"rollup.{definition.name}.target: {view} exists and is no view that batchctl made for this rollup; "
                "expected a free name: rename it, or set another target"
            )
        if anew or ours is None:
            yield create
            yield from _comments(session, definition, found, view, abouts[view])


def _comments(
    session: Session, definition: Definition, found: Found, view: Table, about: str
) -> Iterator[sql.Composed]:
    name = sql.Identifier(*view)
    yield session.statement("views.comment_view", view=name, text=sql.Literal(_mark(definition.name) + about))
    texts = {"bucket": "Start of the bucket, which does not hold its end; UTC."}
    texts |= {dimension: f"Dimension {dimension} of {found.places.source}." for dimension in definition.dimensions}
    texts |= {measure.name: str(measure) for measure in definition.measures}
    for column, text in texts.items():
        yield session.statement(
            "rollup.comment_column", table=name, column=sql.Identifier(column), text=sql.Literal(text)
        )


def _body(session: Session, definition: Definition, found: Found, grain: Grain) -> str:
    """Write the values of the buckets that the table of a grain cannot have yet."""
    composed = session.statement(
        "views.live_body",
        key=compose.names(definition.key),
        values=compose.COMMA.join(values.shown(measure, found.places) for measure in definition.measures),
        parts=compose.names(part.column for part in definition.parts),
        open_rows=_open_rows(session, definition, found, grain),
    )
    return f"\n{_plain(composed).as_string()}\n"


def _open_rows(session: Session, definition: Definition, found: Found, grain: Grain) -> sql.Composed:
    """Compute buckets from the finer table as far as that goes, and from there on from what that is made of."""
    finer = definition.finer(grain.name)
    source, time = compose.built_from(definition, grain, found.places)
    until = _until(session, definition, grain)
    parts: dict[str, sql.Composable] = {
        "bucket": compose.bucket_of(session, grain, time),
        "dimensions": sql.Composed([sql.SQL(", {}").format(compose.quoted(name)) for name in definition.dimensions]),
        "values": compose.COMMA.join(values.every_part(definition, found.places, finest=finer is None)),
        "positions": compose.COMMA.join(sql.Literal(number) for number, _ in enumerate(definition.key, start=1)),
    }
    if finer is None:
        where = compose.condition(definition)
        return session.statement("views.open_rows", source=source, time=time, until=until, where=where, **parts)
    columns = [*definition.key, *(part.column for part in definition.parts)]
    return session.statement(
        "views.open_rows_of_finer",
        source=source,
        until=until,
        finer_until=_until(session, definition, finer),
        columns=compose.names(columns),
        open_rows=_open_rows(session, definition, found, finer),
        **parts,
    )


def _until(session: Session, definition: Definition, grain: Grain) -> sql.Composed:
    """Write the end of what a grain has aggregated; none has more than the one that it is built from."""
    jobs: Sequence[Grain] = _chain(definition, grain)
    ends = compose.COMMA.join(
        session.statement("views.aggregated_until", job=compose.text(definition.job(each.name))) for each in jobs
    )
    bucket = compose.bucket_of(session, grain, sql.SQL("reached.instant"))
    return session.statement("views.until", ends=ends, bucket=bucket)


def _chain(definition: Definition, grain: Grain) -> list[Grain]:
    finer = definition.finer(grain.name)
    return [grain, *(_chain(definition, finer) if finer else [])]


def _plain(composed: sql.Composable) -> sql.SQL:
    """Turn a statement for parameters into one that is run without."""
    return compose.literally(composed.as_string().replace("%%", "%"))


def _bare(kind: str) -> tuple[str, str]:
    """Split a column's type from its collation and constraint."""
    kind, _, collation = kind.removesuffix(" NOT NULL").partition(" COLLATE ")
    return kind, f" COLLATE {collation}" if collation else ""
