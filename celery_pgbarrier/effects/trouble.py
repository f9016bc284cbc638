"""Errors of a driver, whether SQLAlchemy or Django has wrapped them."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from celery_pgbarrier.store import direct, trouble

_KINDS = {"OperationalError": OperationalError, "InterfaceError": InterfaceError}


def _wrapped(error: BaseException) -> DBAPIError | None:
    """Return an error as SQLAlchemy would have raised it, None where it is not a driver's."""
    if isinstance(error, DBAPIError):
        return error
    cause = error.__cause__
    if cause is None or type(cause).__module__.partition(".")[0] not in direct.DRIVERS:
        return None
    kind = _KINDS.get(type(cause).__name__, DBAPIError)
    return kind(None, None, cause)


def passes(error: Exception) -> bool:
    """Tell whether the same work may succeed later."""
    return trouble.is_transient(_wrapped(error) or error)


def answer_lost(error: Exception) -> bool:
    """Tell whether a connection ended with a statement or COMMIT under way."""
    wrapped = _wrapped(error)
    return wrapped is not None and trouble.cut_off(wrapped)


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of a driver's error, None where it has none."""
    wrapped = _wrapped(error)
    return None if wrapped is None else trouble.sqlstate(wrapped)
