"""Alembic environment: the caller gives a connection (online) or a URL and a buffer (``--sql``)."""

from __future__ import annotations

from typing import Any

from alembic import context

from celery_pgbarrier.store.schema import VERSION_TABLE

_attributes = context.config.attributes
_options: dict[str, Any] = {
    "version_table": VERSION_TABLE,
    "version_table_schema": _attributes.get("schema"),
    "transaction_per_migration": False,
}

if context.is_offline_mode():
    context.configure(
        url=context.config.get_main_option("sqlalchemy.url"),
        output_buffer=context.config.output_buffer,
        literal_binds=True,
        **_options,
    )
    with context.begin_transaction():
        context.run_migrations()
else:
    context.configure(connection=_attributes["connection"], **_options)
    context.run_migrations()
