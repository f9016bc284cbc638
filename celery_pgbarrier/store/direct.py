"""One statement through the driver's own cursor: the path of every task.

SQLAlchemy keeps the pool, the connections and the reading of errors. What is left out is its
execution layer, which took twice as much of a process's time as the driver itself: the statements
are plain SQL and their rows need no types.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from celery_pgbarrier.store.sql import Statements

DRIVERS = ("psycopg2", "psycopg")


def run(
    connection: Connection, statement: str, parameters: Mapping[str, Any]
) -> tuple[list[Any], int]:
    """Run a statement on a connection in autocommit mode, in a transaction or as one.

    Parameters:
        statement: SQL in the driver's own style (``%(name)s``).

    Returns the rows, as named tuples, and the number of rows that were touched.

    Raises:
        sqlalchemy.exc.DBAPIError: as SQLAlchemy raises it, with ``connection_invalidated`` set
            where the connection is gone.
    """
    cursor: DBAPICursor | None = None
    if connection.invalidated:  # SQLAlchemy would go on with another one, outside the transaction
        raise PendingRollbackError("the connection was lost in the middle of a transaction")
    try:
        cursor = connection.connection.cursor()
        # Without parameters psycopg 3 sends several statements in one message, too.
        cursor.execute(statement, parameters or None)
        rows: list[Any] = []
        if cursor.description is not None:
            make = _makers.get(statement)
            if make is None:
                names = tuple(column[0] for column in cursor.description)
                make = _makers[statement] = _row(names)._make
            rows = list(map(make, cursor.fetchall()))
        touched = cursor.rowcount
        cursor.close()
    except connection.dialect.loaded_dbapi.Error as error:
        raise _read(connection, cursor, statement, parameters, error) from error
    except BaseException:
        # A soft time limit, say: the connection may be in the middle of an answer.
        connection.invalidate()
        raise
    return rows, touched


def rows(
    connection: Any, statements: Statements, template: str, parameters: Mapping[str, Any]
) -> list[Any]:
    """Run a statement in the caller's transaction and return its rows.

    A transaction of the user's code runs it by the means, and with the driver, that it has.
    """
    if isinstance(connection, Connection) and connection.dialect.driver in DRIVERS:
        return run(connection, statements.plain(template), parameters)[0]
    return list(connection.execute(statements[template], parameters))


def _row(names: tuple[str, ...]) -> Any:
    return namedtuple("Row", names, rename=True)


#: What makes the rows of a statement; there are as many as this package has statements.
_makers: dict[str, Any] = {}


def _read(
    connection: Connection,
    cursor: DBAPICursor | None,
    statement: str,
    parameters: Mapping[str, Any],
    error: Any,
) -> DBAPIError:
    """Return a driver's error as SQLAlchemy's.

    After a lost connection the other idle ones are taken for lost too, as SQLAlchemy does.
    """
    dialect, engine = connection.dialect, connection.engine
    driver: Any = dialect.loaded_dbapi
    used: Any = connection.connection.dbapi_connection
    gone = dialect.is_disconnect(error, used, cursor)
    if gone:
        connection.invalidate()
        engine.dispose()
    read = DBAPIError.instance(
        statement,
        dict(parameters),
        error,
        driver.Error,
        hide_parameters=engine.hide_parameters,
        connection_invalidated=gone,
        dialect=dialect,
    )
    assert isinstance(read, DBAPIError)
    return read
