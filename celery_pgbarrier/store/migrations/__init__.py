"""The Alembic environment of the ``pgbarrier_*`` tables."""
