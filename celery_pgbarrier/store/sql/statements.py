"""Statements as SQLAlchemy clauses."""

from __future__ import annotations

from sqlalchemy import TextClause, text


class Statements:
    """Statements as SQLAlchemy clauses for one schema."""

    def __init__(self, schema: str | None) -> None:
        self._prefix = f'"{schema}".' if schema else ""
        self._clauses: dict[str, TextClause] = {}

    def __getitem__(self, template: str) -> TextClause:
        clause = self._clauses.get(template)
        if clause is None:
            clause = self._clauses[template] = text(template.replace("{s}", self._prefix))
        return clause
