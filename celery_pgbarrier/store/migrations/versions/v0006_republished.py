"""Which messages were published more than once, in the order in which they are due again."""

from __future__ import annotations

from alembic import context, op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_CHANGES = """
CREATE INDEX pgbarrier_task_republished ON {s}pgbarrier_task (due_at)
    WHERE due_at IS NOT NULL AND publications > 1
"""


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    prefix = f'"{schema}".' if schema else ""
    op.execute(_CHANGES.format(s=prefix).strip())
