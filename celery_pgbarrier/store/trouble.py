"""Errors of the database, read: what passes, what the user has to mend, what nobody knows."""

from __future__ import annotations

import re

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_pgbarrier.errors import ConfigurationError, SchemaError
from celery_pgbarrier.store import schema as versions
from celery_pgbarrier.store.url import safe_url

#: SQLSTATE classes and codes that pass (PostgreSQL manual, appendix A).
_TRANSIENT_CLASSES = ("08", "53")
READ_ONLY = "25006"  # read_only_sql_transaction: a standby, or a primary that was one
_TRANSIENT_CODES = {
    READ_ONLY,
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "55P03",  # lock_not_available
    "57014",  # query_canceled: statement_timeout
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "57P05",  # idle_session_timeout
    "25P03",  # idle_in_transaction_session_timeout
}
_SCHEMA_CODES = {"42P01", "42703", "42883", "3F000"}  # undefined table, column, function; schema
_DENIED = "42501"  # insufficient_privilege
#: Codes with which a server or a pooler ends a connection, perhaps after it took a COMMIT.
_CUT_OFF = {"57P01", "57P02"}
#: What a refused login says; drivers give it no code.
_REFUSED = re.compile(
    r"password authentication failed|no password supplied|no pg_hba.conf entry"
    r'|(role|user|database) "[^"]*" does not exist'
)
#: What libpq says of a parameter in the URL's query that it does not know.
_UNKNOWN_OPTION = re.compile(r'invalid connection option "([^"]*)"')


def cut_off(error: Exception) -> bool:
    """Tell whether the connection ended with a statement or COMMIT under way."""
    if not isinstance(error, DBAPIError):
        return False
    code = sqlstate(error)
    return code is None or code[:2] == "08" or code in _CUT_OFF


def sqlstate(error: DBAPIError) -> str | None:
    """Return the SQLSTATE of a driver's error, None where the server sent none."""
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)


def is_transient(error: Exception) -> bool:
    """Tell whether the same work may succeed later."""
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = sqlstate(error)
    if _REFUSED.search(first_line(error)):
        return False
    if code is not None:
        return code[:2] in _TRANSIENT_CLASSES or code in _TRANSIENT_CODES
    return error.connection_invalidated or isinstance(error, (OperationalError, InterfaceError))


def explained(error: Exception, url: URL) -> Exception:
    """Return the error that names what is wrong and the remedy, the same error if nothing is."""
    if not isinstance(error, DBAPIError):
        return error
    code = sqlstate(error)
    if unknown := _UNKNOWN_OPTION.search(first_line(error)):
        return ConfigurationError(
            f"{safe_url(url)}: PostgreSQL's client library knows no connection option "
            f"{unknown[1]}: mend result_backend or database_engine_options"
        )
    if _REFUSED.search(first_line(error)):
        return ConfigurationError(
            f"{safe_url(url)} refuses the login ({first_line(error)}): "
            "mend the user, password or database in result_backend"
        )
    if code in _SCHEMA_CODES:
        return SchemaError(f"{first_line(error)}: {versions.MIGRATE}")
    if code == _DENIED:
        return SchemaError(
            f"{first_line(error)}: grant SELECT, INSERT, UPDATE and DELETE on the pgbarrier_* "
            f"tables, and EXECUTE on the pgbarrier_* functions, to this role (and USAGE on "
            f"their schema); to make or upgrade them, "
            f"{versions.MIGRATE}"
        )
    return error


def first_line(error: Exception) -> str:
    """Return the first line of what the driver said."""
    cause = getattr(error, "orig", None) or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)
