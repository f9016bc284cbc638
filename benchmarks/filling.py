"""Many rows, made of few real ones, so that tables need not be known here."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Connection, text

_COLUMNS = text("""
SELECT column_name FROM information_schema.columns
 WHERE table_name = :table AND is_generated = 'NEVER' AND table_schema = current_schema()
 ORDER BY ordinal_position
""")


def multiply(
    connection: Connection, table: str, times: int, changed: Mapping[str, str], source: str = ""
) -> None:
    """Insert ``times`` copies of every row that stands in ``table`` (or in ``source``).

    ``changed`` has SQL expressions for columns, of the row ``t`` and the number ``g`` of its copy;
    columns that the table does not have are left out.
    """
    columns = list(connection.execute(_COLUMNS, {"table": table}).scalars())
    values = ", ".join(changed.get(column, f"t.{column}") for column in columns)
    connection.exec_driver_sql(
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} "
        f"FROM {source or table} t CROSS JOIN generate_series(1, {times}) AS g"
    )


def tidy(connection: Connection) -> None:
    """Leave the tables as a long quiet time would: vacuumed, with statistics, all written."""
    connection.exec_driver_sql("VACUUM ANALYZE")
    connection.exec_driver_sql("CHECKPOINT")
