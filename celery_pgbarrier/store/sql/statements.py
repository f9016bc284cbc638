"""Statements as SQLAlchemy clauses, and as the drivers take them."""

from __future__ import annotations

from sqlalchemy import TextClause, text
from sqlalchemy.dialects.postgresql.base import PGDialect

_DIALECT = PGDialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]


class Statements:
    """Statements for one schema."""

    def __init__(self, schema: str | None) -> None:
        self._prefix = f'"{schema}".' if schema else ""
        self._clauses: dict[str, TextClause] = {}
        self._plain: dict[str, str] = {}

    def __getitem__(self, template: str) -> TextClause:
        """Return a statement as a clause."""
        clause = self._clauses.get(template)
        if clause is None:
            clause = self._clauses[template] = text(template.replace("{s}", self._prefix))
        return clause

    def plain(self, template: str) -> str:
        """Return a statement in the parameter style of both drivers, ``%(name)s``."""
        plain = self._plain.get(template)
        if plain is None:
            plain = self._plain[template] = str(self[template].compile(dialect=_DIALECT))
        return plain
