"""Tasks that are not run any more, and when a barrier's count was last compared with its rows."""

from __future__ import annotations

from alembic import context, op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_CHANGES = """
CREATE TABLE {s}pgbarrier_poison (
    id text PRIMARY KEY,
    call uuid,
    name text,
    queue text,
    barrier_id text,
    crashes integer NOT NULL,
    reason text NOT NULL,
    message bytea NOT NULL,
    poisoned_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz
);
CREATE INDEX pgbarrier_poison_expiry ON {s}pgbarrier_poison (expires_at)
    WHERE expires_at IS NOT NULL;
ALTER TABLE {s}pgbarrier_barrier
    ADD COLUMN checked_at timestamptz NOT NULL DEFAULT clock_timestamp();
CREATE INDEX pgbarrier_barrier_waiting ON {s}pgbarrier_barrier (checked_at)
    WHERE state = 'waiting';
"""


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    prefix = f'"{schema}".' if schema else ""
    for statement in filter(str.strip, _CHANGES.format(s=prefix).split(";\n")):
        op.execute(statement.strip().rstrip(";"))
