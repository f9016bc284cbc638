"""The first version of all tables."""

from __future__ import annotations

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLES = """
CREATE TABLE {s}pgbarrier_barrier (
    id text PRIMARY KEY,
    call uuid NOT NULL,
    size integer NOT NULL,
    open_slots integer NOT NULL,
    state text NOT NULL
        CHECK (state IN ('waiting', 'ready', 'released', 'failed', 'cancelled')),
    body bytea NOT NULL,
    structure bytea,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ready_at timestamptz,
    closed_at timestamptz,
    expires_at timestamptz
) WITH (fillfactor = 70);

CREATE TABLE {s}pgbarrier_slot (
    barrier_id text NOT NULL,
    slot integer NOT NULL,
    remaining integer NOT NULL,
    PRIMARY KEY (barrier_id, slot)
) WITH (fillfactor = 50);

CREATE TABLE {s}pgbarrier_task (
    id text PRIMARY KEY,
    call uuid,
    origin uuid,
    seq integer NOT NULL DEFAULT 0,
    barrier_id text,
    slot integer,
    position integer,
    state text NOT NULL
        CHECK (state IN ('expected', 'queued', 'running', 'done', 'untracked')),
    status text NOT NULL DEFAULT 'PENDING',
    attempt integer NOT NULL DEFAULT 0,
    crashes integer NOT NULL DEFAULT 0,
    token uuid,
    last_token uuid,
    worker uuid,
    pid integer,
    thread bigint,
    rerun boolean NOT NULL DEFAULT true,
    name text,
    queue text,
    message bytea,
    eta timestamptz,
    due_at timestamptz,
    published_at timestamptz,
    publications integer NOT NULL DEFAULT 0,
    copies integer NOT NULL DEFAULT 0,
    result bytea,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz,
    done_at timestamptz,
    expires_at timestamptz
) WITH (fillfactor = 70);

CREATE TABLE {s}pgbarrier_worker (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    state text NOT NULL CHECK (state IN ('running', 'stopping', 'stopped', 'dead')),
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    beat_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    suspect_at timestamptz
) WITH (fillfactor = 50);

CREATE TABLE {s}pgbarrier_group (
    id text PRIMARY KEY,
    result bytea NOT NULL,
    saved_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz
);

CREATE TABLE {s}pgbarrier_queue (
    name text PRIMARY KEY,
    claimed_through timestamptz,
    probe_id text,
    probe_of timestamptz,
    probe_sent_at timestamptz
);

CREATE TABLE {s}pgbarrier_reaper (
    id integer PRIMARY KEY CHECK (id = 1),
    pass_at timestamptz NOT NULL
);
INSERT INTO {s}pgbarrier_reaper (id, pass_at) VALUES (1, 'epoch');
"""

_INDEXES = """
CREATE INDEX pgbarrier_barrier_ready ON {s}pgbarrier_barrier (ready_at) WHERE state = 'ready';
CREATE INDEX pgbarrier_barrier_expiry ON {s}pgbarrier_barrier (expires_at)
    WHERE expires_at IS NOT NULL;
CREATE INDEX pgbarrier_task_due ON {s}pgbarrier_task (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX pgbarrier_task_worker ON {s}pgbarrier_task (worker) WHERE worker IS NOT NULL;
CREATE INDEX pgbarrier_task_barrier ON {s}pgbarrier_task (barrier_id, position)
    WHERE barrier_id IS NOT NULL;
CREATE INDEX pgbarrier_task_expiry ON {s}pgbarrier_task (expires_at)
    WHERE expires_at IS NOT NULL;
CREATE INDEX pgbarrier_group_expiry ON {s}pgbarrier_group (expires_at)
    WHERE expires_at IS NOT NULL;
"""


def upgrade() -> None:
    schema = context.config.attributes.get("schema")
    prefix = f'"{schema}".' if schema else ""
    for statement in filter(str.strip, (_TABLES + _INDEXES).format(s=prefix).split(";\n")):
        op.execute(statement.strip().rstrip(";"))
