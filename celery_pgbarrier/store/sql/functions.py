"""The statements that every single task needs, as functions of the database.

To read and plan a statement takes PostgreSQL as long as to run it, and a plan that is kept in a
session is no use behind a pooler in transaction mode, where the next statement meets another one.
A function's plan is kept by whichever session runs it.  Such plans are made once for all values,
also while the tables are small: so a statement qualifies only if it finds each row by a key that is
given, and its plan may go by indexes only.  One that joins a list of rows to a table of ten may be
planned to read the table from end to end, and would go on to do so when that has a million.

Each function is a statement of this package with its parameters, and is called by that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from celery_pgbarrier.store.sql import claims, outcomes

_PARAMETER = re.compile(r"(?<![:\w]):([a-z_]+)")
_TYPES = {
    "id": "text", "call": "uuid", "seq": "integer", "copy": "integer", "token": "uuid",
    "worker": "uuid", "pid": "integer", "thread": "bigint", "status": "text", "result": "bytea",
    "name": "text", "queue": "text", "message": "bytea", "write_token": "uuid",
    "expires": "double precision", "barrier": "text",
}  # fmt: skip
_GRANT = {"attempt": "integer", "crashes": "integer", "barrier_id": "text", "unflushed": "text"}


@dataclass(frozen=True)
class Function:
    """A statement that the database keeps; *columns* are its rows' names and types."""

    name: str
    statement: str
    columns: Mapping[str, str]

    @property
    def parameters(self) -> list[str]:
        """The names of the statement's parameters, in their order."""
        return list(dict.fromkeys(_PARAMETER.findall(self.statement)))

    @property
    def definition(self) -> str:
        """The statement that makes it; ``{s}`` stands for the schema prefix."""
        parameters = ", ".join(f"p_{name} {_TYPES[name]}" for name in self.parameters)
        columns = ", ".join(f"{name} {kind}" for name, kind in self.columns.items())
        body = _PARAMETER.sub(r"p_\1", self.statement).strip()
        return (
            f"CREATE OR REPLACE FUNCTION {{s}}pgbarrier_{self.name} ({parameters})\n"
            f"RETURNS TABLE ({columns}) LANGUAGE plpgsql\n"
            "SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off\n"
            "SET plan_cache_mode = force_generic_plan AS $pgbarrier$\n"
            f"#variable_conflict use_column\nBEGIN RETURN QUERY\n{body};\nEND $pgbarrier$"
        )

    @property
    def call(self) -> str:
        """The statement that calls it with the same parameters."""
        values = ", ".join(f"CAST(:{name} AS {_TYPES[name]})" for name in self.parameters)
        return f"SELECT * FROM {{s}}pgbarrier_{self.name} ({values})"


_READY = {"ready": "text"}
FUNCTIONS = {
    function.name: function
    for function in (
        Function("claim_first", claims.CLAIM_FIRST_BODY, _GRANT),
        Function("claim_queued", claims.CLAIM_QUEUED_BODY, _GRANT),
        Function("finish_alone", outcomes.FINISH_ALONE_BODY, _READY),
        Function("finish_member", outcomes.FINISH_MEMBER_BODY, _READY),
    )
}

CLAIM_FIRST = FUNCTIONS["claim_first"].call
CLAIM_QUEUED = FUNCTIONS["claim_queued"].call
FINISH_ALONE = FUNCTIONS["finish_alone"].call
FINISH_MEMBER = FUNCTIONS["finish_member"].call
