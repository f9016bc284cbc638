"""What happened, in tables of the campaign's own: written by tasks, read by the checker."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from typing import Any

import psycopg2

from tests.support.services import libpq_url

#: The environment variable that holds the SQLAlchemy URL of the ledger's database.
DATABASE = "CHAOS_LEDGER"

TABLES = """
CREATE TABLE chaos_event (
    key uuid PRIMARY KEY, task_id text NOT NULL, event text NOT NULL, label text, kind text,
    position integer, pid integer, grp integer, at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE INDEX ON chaos_event (label, kind);
CREATE INDEX ON chaos_event (task_id);
CREATE TABLE chaos_effect (
    label text NOT NULL, kind text NOT NULL, position integer NOT NULL, value bigint,
    at timestamptz NOT NULL DEFAULT clock_timestamp());
"""

#: Our backend tells of accepted outcomes by this; those of others do by :mod:`tests.chaos.peers`.
TRIGGER = """
CREATE FUNCTION chaos_stored() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO chaos_event (key, task_id, event)
    VALUES (gen_random_uuid(), NEW.id,
            CASE NEW.status WHEN 'SUCCESS' THEN 'stored' ELSE 'failed' END);
    RETURN NULL;
END $$;
CREATE FUNCTION chaos_claimed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO chaos_event (key, task_id, event, pid)
    VALUES (gen_random_uuid(), NEW.id, 'claimed', NEW.pid);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_claimed AFTER UPDATE ON pgbarrier_task FOR EACH ROW
    WHEN (NEW.state = 'running' AND NEW.token IS DISTINCT FROM OLD.token)
    EXECUTE FUNCTION chaos_claimed();
CREATE FUNCTION chaos_released() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO chaos_event (key, task_id, event, pid)
    VALUES (gen_random_uuid(), NEW.id, 'put back', OLD.pid);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_released AFTER UPDATE ON pgbarrier_task FOR EACH ROW
    WHEN (OLD.state = 'running' AND NEW.state = 'queued' AND NEW.seq = OLD.seq)
    EXECUTE FUNCTION chaos_released();
CREATE TRIGGER chaos_stored_new AFTER INSERT ON pgbarrier_task FOR EACH ROW
    WHEN (NEW.state = 'done') EXECUTE FUNCTION chaos_stored();
CREATE TRIGGER chaos_stored AFTER UPDATE ON pgbarrier_task FOR EACH ROW
    WHEN (NEW.state = 'done'
          AND (OLD.state <> 'done' OR NEW.last_token IS DISTINCT FROM OLD.last_token))
    EXECUTE FUNCTION chaos_stored();
"""

NOTE = """
INSERT INTO chaos_event (key, task_id, event, label, kind, position, pid, grp)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""

EFFECT = (
    "INSERT INTO chaos_effect (label, kind, position, value) "
    "VALUES (:label, :kind, :position, :value)"
)

#: Members of a chord that have stored their success.
STORED = """
SELECT count(DISTINCT s.task_id) FROM chaos_event s JOIN chaos_event m USING (task_id)
 WHERE s.event = 'stored' AND m.event = 'start' AND m.kind = 'member' AND m.label = %s
"""

_local = threading.local()


def note(task_id: str, event: str, label: str = "", kind: str = "", position: int = 0) -> None:
    """Write an event, once, whatever the database does meanwhile."""
    process = (os.getpid(), os.getpgrp())
    row = (str(uuid.uuid4()), task_id, event, label or None, kind or None, position, *process)
    patiently(lambda: _execute(NOTE, row))


def stored(label: str) -> int:
    """How many members of a chord have stored their success."""
    rows: list[tuple[int]] = patiently(lambda: _execute(STORED, (label,)))
    return rows[0][0]


def patiently(work: Callable[[], Any], errors: tuple[type[Exception], ...] = ()) -> Any:
    """Do work of the ledger until the database takes it."""
    pause = threading.Event()
    while True:
        try:
            return work()
        except (psycopg2.OperationalError, psycopg2.InterfaceError, *errors):
            _local.connection = None
            pause.wait(0.1)


def _execute(statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    connection = getattr(_local, "connection", None)
    if connection is None or _local.pid != os.getpid():
        connection = psycopg2.connect(libpq_url(os.environ[DATABASE]), connect_timeout=2)
        connection.autocommit = True
        _local.connection, _local.pid = connection, os.getpid()
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        return list(cursor.fetchall()) if cursor.description else []
