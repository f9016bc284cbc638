"""Whose messages are being published: a row a barrier, instead of a mark on each message."""

from __future__ import annotations

from alembic import context, op

from celery_pgbarrier.store.migrations.versions.v0007_functions import make_functions

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_TABLE = """
CREATE TABLE {s}pgbarrier_dispatch (
    barrier_id text PRIMARY KEY,
    call uuid NOT NULL,
    due_at timestamptz NOT NULL
)
"""
_DUE = "CREATE INDEX pgbarrier_dispatch_due ON {s}pgbarrier_dispatch (due_at)"

#: As a development version left it, with other columns.
_OLD = """
DROP FUNCTION IF EXISTS {s}pgbarrier_claim_firsts
       (text[], uuid[], integer[], uuid[], text[], text[], bytea[], uuid)
"""


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    prefix = f'"{schema}".' if schema else ""
    for statement in (_TABLE, _DUE, _OLD):
        op.execute(statement.format(s=prefix).strip())
    make_functions(prefix)
