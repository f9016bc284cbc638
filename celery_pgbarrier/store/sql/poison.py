"""Tasks that are not run any more: kept, listed, put back."""

from __future__ import annotations

#: Keep a task's message before its outcome drops it.
POISON_KEEP = """
INSERT INTO {s}pgbarrier_poison (id, call, name, queue, barrier_id, crashes, reason, message,
       expires_at)
SELECT id, call, name, queue, barrier_id, crashes, :reason, message,
       clock_timestamp() + make_interval(secs => CAST(:expires AS float8))
  FROM {s}pgbarrier_task WHERE id = :id AND state <> 'done' AND message IS NOT NULL
ON CONFLICT (id) DO UPDATE SET call = EXCLUDED.call, name = EXCLUDED.name, queue = EXCLUDED.queue,
    barrier_id = EXCLUDED.barrier_id, crashes = EXCLUDED.crashes, reason = EXCLUDED.reason,
    message = EXCLUDED.message, poisoned_at = clock_timestamp(), expires_at = EXCLUDED.expires_at
"""

POISON_LIST = """
SELECT p.id, p.name, p.queue, p.crashes, p.reason, p.poisoned_at, p.barrier_id,
       b.state AS barrier_state
  FROM {s}pgbarrier_poison p LEFT JOIN {s}pgbarrier_barrier b ON b.id = p.barrier_id
 ORDER BY p.poisoned_at DESC LIMIT :limit
"""

POISON_LOCK = """
SELECT id, CAST(call AS text) AS call, name, queue, message
  FROM {s}pgbarrier_poison WHERE id = :id FOR UPDATE
"""

POISON_DELETE = "DELETE FROM {s}pgbarrier_poison WHERE id = :id"

#: A later step of a task's chain that an open chord waits for, and has counted.
POISON_LATER = """
SELECT t.id FROM {s}pgbarrier_task t JOIN {s}pgbarrier_barrier b ON b.id = t.barrier_id
 WHERE t.id = ANY(CAST(:ids AS text[])) AND b.state IN ('waiting', 'ready') LIMIT 1
"""

#: Put a member back into its chord while that still waits for others: the row is queued again and
#: its slot has one more to wait for.  ``shut`` tells that the chord closed meanwhile.
POISON_REJOIN = """
WITH back AS (
    UPDATE {s}pgbarrier_task AS t
       SET state = 'queued', status = 'PENDING', result = NULL, call = CAST(:call AS uuid),
           seq = 0, attempt = 0, crashes = 0, message = :message, published_at = NULL,
           publications = 0, copies = 0, done_at = NULL, expires_at = NULL,
           due_at = clock_timestamp() + make_interval(secs => :grace)
     WHERE t.id = :id AND t.state = 'done' AND t.call IS NOT DISTINCT FROM CAST(:held AS uuid)
       AND EXISTS (SELECT 1 FROM {s}pgbarrier_barrier b
                    WHERE b.id = t.barrier_id AND b.state = 'waiting')
    RETURNING t.barrier_id, t.slot
), slot AS (
    UPDATE {s}pgbarrier_slot AS s SET remaining = s.remaining + 1 FROM back
     WHERE s.barrier_id = back.barrier_id AND s.slot = back.slot
    RETURNING s.barrier_id, s.remaining
), opened AS (
    UPDATE {s}pgbarrier_barrier AS b SET open_slots = b.open_slots + 1 FROM slot
     WHERE slot.remaining = 1 AND b.id = slot.barrier_id AND b.state = 'waiting'
    RETURNING b.id
)
SELECT (SELECT count(*) FROM slot) AS joined,
       EXISTS (SELECT 1 FROM slot WHERE remaining = 1) AND NOT EXISTS (SELECT 1 FROM opened)
       AS shut
"""

PURGE_POISON = """
DELETE FROM {s}pgbarrier_poison WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {s}pgbarrier_poison WHERE expires_at < (SELECT clock_timestamp())
     ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED))
"""
