"""Which chord's results a task reads by reference."""

from __future__ import annotations

from alembic import context, op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_CHANGES = """
ALTER TABLE {s}pgbarrier_task ADD COLUMN reads text;
CREATE INDEX pgbarrier_task_reads ON {s}pgbarrier_task (reads) WHERE reads IS NOT NULL
"""


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    prefix = f'"{schema}".' if schema else ""
    for statement in _CHANGES.format(s=prefix).split(";\n"):
        op.execute(statement.strip())
