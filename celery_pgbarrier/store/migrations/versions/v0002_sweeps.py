"""Whose turn a sweep is, and what its last run did."""

from __future__ import annotations

from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TABLE = """
CREATE TABLE {s}pgbarrier_sweep (
    name text PRIMARY KEY,
    token uuid,
    holder text,
    started_at timestamptz,
    expires_at timestamptz,
    finished_at timestamptz,
    batches bigint,
    rows bigint,
    failed bigint,
    left_over bigint,
    stopped text
) WITH (fillfactor = 50)
"""


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    prefix = f'"{schema}".' if schema else ""
    op.execute(_TABLE.format(s=prefix).strip())
