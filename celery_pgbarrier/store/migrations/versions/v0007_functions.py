"""The hot statements as functions, in the form in which this release calls them.

Who changes one of them adds a migration that makes them again (drop it first where its parameters
or columns change), and moves ``DIGEST`` there.
"""

from __future__ import annotations

from alembic import context, op

from celery_pgbarrier.store.sql.functions import FUNCTIONS

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    make_functions(f'"{schema}".' if schema else "")


def make_functions(prefix: str) -> None:
    """Make all functions, or make them again."""
    for function in FUNCTIONS.values():
        op.execute(function.definition.replace("{s}", prefix).replace(":", r"\:"))
