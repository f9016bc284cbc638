"""A filter that no index serves earns a warning, with the CREATE INDEX that would."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BinaryExpression, ClauseElement, UnaryExpression

from celery_pgbarrier.sweeps.batches import Pick

logger = logging.getLogger(__name__)

#: Tables with fewer rows are read as a whole faster than by an index.
_FEW = 10_000
_ADVISED: WeakSet[Any] = WeakSet()

_EQUAL = {operators.eq, operators.in_op, operators.is_, operators.is_not_distinct_from}
_RANGE = {operators.lt, operators.le, operators.gt, operators.ge, operators.between_op}

#: With these off, the planner reads the table by a bitmap where an index serves the filter, and
#: whole only where none does.  A scan along an index that serves nothing is no candidate.
_OFF = ("enable_seqscan", "enable_indexscan", "enable_indexonlyscan")
_SIZE = "SELECT CAST(reltuples AS bigint) FROM pg_class WHERE oid = to_regclass(:table)"


class _Explain(sa.Executable, ClauseElement):
    inherit_cache = False

    def __init__(self, statement: Any) -> None:
        self.statement = statement


@compiles(_Explain)
def _compile_explain(element: _Explain, compiler: Any, **options: Any) -> str:
    return f"EXPLAIN (FORMAT JSON) {compiler.process(element.statement, **options)}"


def asked_before(sweep: Any) -> bool:
    """Tell whether a sweep's filters have been looked at in this process; from now on, yes."""
    known = sweep in _ADVISED
    _ADVISED.add(sweep)
    return known


def warn(connection: sa.Connection, name: str, pick: Pick) -> str | None:
    """Log (and return) the index that a filter over a large table lacks, None if none."""
    table = pick.target.table
    quoted = connection.dialect.identifier_preparer.format_table(table)
    size = connection.execute(sa.text(_SIZE), {"table": quoted}).scalar()
    if (size or 0) < _FEW or _served(connection, pick):
        return None
    columns = suggestion(pick)
    if not columns:
        return None
    index = f"CREATE INDEX CONCURRENTLY ON {quoted} ({', '.join(columns)})"
    logger.warning(
        "Sweep %s reads all of %s (about %s rows) in each batch; an index would serve its "
        "filter: %s", name, quoted, size, index,
    )  # fmt: skip
    return index


def _served(connection: sa.Connection, pick: Pick) -> bool:
    """Tell whether the planner finds an index for the filter when it is made to look for one."""
    for setting in _OFF:
        connection.execute(
            sa.text("SELECT set_config(:setting, 'off', true)"), {"setting": setting}
        )
    statement = sa.select(*pick.target.key).where(pick.condition)
    plan = connection.execute(_Explain(statement)).scalar()
    scans = [node for node in _nodes(plan) if node.get("Relation Name") == pick.target.table.name]
    return all(node["Node Type"] == "Bitmap Heap Scan" for node in scans)


def _nodes(plan: Any) -> Iterator[dict[str, Any]]:
    for entry in plan if isinstance(plan, list) else [plan]:
        node = entry.get("Plan", entry)
        yield node
        yield from _nodes(node.get("Plans", []))


def suggestion(pick: Pick) -> list[str]:
    """Return the columns of an index for a filter: those compared for equality, then one range."""
    table = pick.target.table
    equal: dict[str, None] = {}
    ranges: dict[str, None] = {}
    for element in visitors.iterate(pick.condition):
        operator = getattr(element, "operator", None)
        found = equal if operator in _EQUAL else ranges if operator in _RANGE else None
        if found is None or not isinstance(element, (BinaryExpression, UnaryExpression)):
            continue
        for part in visitors.iterate(element):
            if isinstance(part, sa.Column) and part.table is not None:
                column = table.c.get(part.key)
                if column is not None and part.table.description == table.description:
                    found[column.name] = None
    return [*equal, *[name for name in ranges if name not in equal][:1]]
