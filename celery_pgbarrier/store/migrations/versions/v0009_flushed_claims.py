"""Claims of many tasks without rows are flushed: their messages are acknowledged after it."""

from __future__ import annotations

from alembic import context, op

from celery_pgbarrier.store.migrations.versions.v0007_functions import make_functions

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

#: Of the definitions of the functions: a test tells when they have changed and no migration has.
DIGEST = "d47acb3a9fbcecda"

_OLD = "text[], uuid[], integer[], uuid[], text[], text[], bytea[], uuid"


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    prefix = f'"{schema}".' if schema else ""
    op.execute(f"DROP FUNCTION {prefix}pgbarrier_claim_firsts ({_OLD})")
    make_functions(prefix)
