"""Which steps of which tasks have been applied, with the values they left."""

from __future__ import annotations

from alembic import context, op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_TABLE = """
CREATE TABLE {s}pgbarrier_effect (
    task_id text NOT NULL,
    call uuid NOT NULL,
    replaced integer NOT NULL,
    step text NOT NULL,
    token uuid NOT NULL,
    value bytea,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (task_id, call, replaced, step)
)
"""
_EXPIRY = "CREATE INDEX pgbarrier_effect_expiry ON {s}pgbarrier_effect (created_at)"


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    prefix = f'"{schema}".' if schema else ""
    for statement in (_TABLE, _EXPIRY):
        op.execute(statement.format(s=prefix).strip())
