"""URLs of the database: read, and shown without their passwords."""

from __future__ import annotations

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from celery_pgbarrier.errors import ConfigurationError
from celery_pgbarrier.store import direct


def parse_url(url: str) -> URL:
    """Return the SQLAlchemy URL behind a result backend URL.

    Raises:
        ConfigurationError: it is not a URL, not PostgreSQL, or names a driver that is not
            psycopg2 or psycopg (3).
    """
    try:
        parsed = make_url(url.replace("pgbarrier://", "postgresql+psycopg2://", 1))
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "the result backend is not a URL: use pgbarrier://user:password@host:port/database"
        ) from None
    dialect, _, driver = parsed.drivername.partition("+")
    if dialect not in ("postgresql", "postgres"):
        raise ConfigurationError(
            f"pgbarrier keeps results in PostgreSQL, not {dialect}: "
            "use pgbarrier://user:password@host:port/database"
        )
    if (driver or "psycopg2") not in direct.DRIVERS:
        raise ConfigurationError(
            f"pgbarrier works with the drivers psycopg2 and psycopg, not {driver}: "
            "use pgbarrier+postgresql+psycopg2://... or pgbarrier+postgresql+psycopg://..."
        )
    return parsed.set(drivername=f"postgresql+{driver or 'psycopg2'}")


def safe_url(url: URL) -> str:
    """Return a URL as text without its password, wherever in it the password stands."""
    query = {key: "***" if "pass" in key.lower() else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)
