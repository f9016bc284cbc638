"""The statements of every task and of every small chord, as functions of the database.

To read and plan a statement takes PostgreSQL as long as to run it, and a plan that is kept in a
session is no use behind a pooler in transaction mode, where the next statement meets another one.
A function's plan is kept by whichever session runs it.  Such plans are made once for all values,
also while the tables are small, and go by indexes only: a statement qualifies if it finds all its
rows by keys that are given.  A plan that reads a table of ten rows from end to end would go on to
do so when it has a million.

Each function is a statement of this package with its parameters, and is called by that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from celery_pgbarrier.store.sql import barriers, batches, claims, messages, outcomes

_PARAMETER = re.compile(r"(?<![:\w]):([a-z_]+)")
_TYPES = {
    "id": "text", "call": "uuid", "seq": "integer", "copy": "integer", "token": "uuid",
    "worker": "uuid", "pid": "integer", "thread": "bigint", "status": "text", "result": "bytea",
    "name": "text", "queue": "text", "message": "bytea", "write_token": "uuid",
    "expires": "double precision", "barrier": "text",
    "ids": "text[]", "calls": "uuid[]", "seqs": "integer[]", "copies": "integer[]",
    "tokens": "uuid[]", "names": "text[]", "queues": "text[]", "messages": "bytea[]",
    "statuses": "text[]", "results": "bytea[]", "write_tokens": "uuid[]", "barriers": "text[]",
    "size": "integer", "slots": "integer", "state": "text", "body": "bytea", "structure": "bytea",
    "remaining": "integer[]", "body_ids": "text[]", "body_calls": "text[]",
    "grace": "double precision", "after": "double precision",
    "presumed": "double precision", "few": "integer", "inline": "bigint",
    "member_slots": "integer[]", "positions": "integer[]", "etas": "text[]", "reads": "text[]",
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
    def types(self) -> dict[str, str]:
        """The types of the parameters."""
        return {name: _TYPES[name] for name in self.parameters}

    @property
    def definition(self) -> str:
        """The statement that makes it; ``{s}`` stands for the schema prefix."""
        parameters = ", ".join(f"p_{name} {kind}" for name, kind in self.types.items())
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
        values = ", ".join(f"CAST(:{name} AS {kind})" for name, kind in self.types.items())
        return f"SELECT * FROM {{s}}pgbarrier_{self.name} ({values})"


_READY = {"ready": "text"}
_GRANTED = {"token": "text", "barrier_id": "text"}
_READIES = {"id": "text", "ready": "text"}
_CLOSING = {
    "id": "text", "call": "text", "body": "bytea", "structure": "bytea", "size": "integer",
    "members": "bigint", "bytes": "bigint", "doubtful": "bigint", "ids": "text[]",
    "results": "bytea[]", "closed": "boolean",
}  # fmt: skip
FUNCTIONS = {
    function.name: function
    for function in (
        Function("claim_first", claims.CLAIM_FIRST_BODY, _GRANT),
        Function("claim_queued", claims.CLAIM_QUEUED_BODY, _GRANT),
        Function("finish_alone", outcomes.FINISH_ALONE_BODY, _READY),
        Function("finish_member", outcomes.FINISH_MEMBER_BODY, _READY),
        Function("claim_firsts", batches.CLAIM_FIRSTS_BODY, _GRANTED),
        Function("claim_queueds", batches.CLAIM_QUEUEDS_BODY, {**_GRANTED, "unflushed": "text"}),
        Function("finish_alones", batches.FINISH_ALONES_BODY, _READIES),
        Function("finish_members", batches.FINISH_MEMBERS_BODY, _READIES),
        Function("open_barrier", barriers.BARRIER_OPEN_BODY, {"fresh": "boolean", "live": "text"}),
        Function("lock_barrier", barriers.BARRIER_LOCK_BODY, _CLOSING),
        Function("record_tasks", barriers.TASKS_RECORD, {"recorded": "bigint"}),
        Function("mark_published", messages.TASKS_PUBLISHED_FEW_BODY, {"marked": "bigint"}),
    )
}

CLAIM_FIRST = FUNCTIONS["claim_first"].call
CLAIM_QUEUED = FUNCTIONS["claim_queued"].call
FINISH_ALONE = FUNCTIONS["finish_alone"].call
FINISH_MEMBER = FUNCTIONS["finish_member"].call
CLAIM_FIRSTS = FUNCTIONS["claim_firsts"].call
CLAIM_QUEUEDS = FUNCTIONS["claim_queueds"].call
FINISH_ALONES = FUNCTIONS["finish_alones"].call
FINISH_MEMBERS = FUNCTIONS["finish_members"].call
BARRIER_OPEN = FUNCTIONS["open_barrier"].call
BARRIER_LOCK = FUNCTIONS["lock_barrier"].call
#: For a few rows; many are worth a plan of their own.
TASKS_RECORD_FEW = FUNCTIONS["record_tasks"].call
TASKS_PUBLISHED_FEW = FUNCTIONS["mark_published"].call
