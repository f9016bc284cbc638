"""What has expired is deleted."""

from __future__ import annotations

from celery_pgbarrier.store.sql.fragments import READ

#: Workers that are gone, hold nothing and have been gone for long.
WORKERS_PURGE = """
DELETE FROM {s}pgbarrier_worker w
 WHERE w.state IN ('dead', 'stopped')
   AND w.beat_at < clock_timestamp() - make_interval(secs => :age)
   AND NOT EXISTS (SELECT 1 FROM {s}pgbarrier_task t WHERE t.worker = w.id)
"""

#: Where the next batch of expired rows ends: the expiry of the first row that is not of it.
PURGE_BOUND = """
SELECT expires_at FROM {s}pgbarrier_task
 WHERE expires_at < (SELECT clock_timestamp()) AND expires_at >= CAST(:since AS timestamptz)
 ORDER BY expires_at OFFSET :limit LIMIT 1
"""

#: Finished rows past their expiry that belong to no barrier.  Each batch begins where the last one
#: ended, not among the entries of the index that it left dead; and none is flushed, because a row
#: that a crash of the server brings back is deleted again.  Rows are not locked first, which costs
#: as much as deleting them: a row that somebody holds ends the batch after ``lock_timeout``, and
#: PURGE_UNLOCKED does it.
PURGE_TASKS = """
DELETE FROM {s}pgbarrier_task
 WHERE expires_at >= CAST(:since AS timestamptz) AND expires_at < CAST(:until AS timestamptz)
   AND state IN ('done', 'untracked') AND barrier_id IS NULL
   AND (SELECT set_config('lock_timeout', '20ms', true)
               || set_config('synchronous_commit', 'off', true)) IS NOT NULL
"""

#: The same without those that are locked, the last ones and those that expired at once included.
PURGE_UNLOCKED = """
WITH expired AS (
    SELECT ctid AS place, expires_at FROM {s}pgbarrier_task
     WHERE expires_at < (SELECT clock_timestamp()) AND expires_at >= CAST(:since AS timestamptz)
       AND state IN ('done', 'untracked') AND barrier_id IS NULL
     ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM {s}pgbarrier_task WHERE ctid = ANY(ARRAY(SELECT place FROM expired))
)
SELECT count(*) AS rows, max(expires_at) AS until, set_config('synchronous_commit', 'off', true)
  FROM expired
"""

PURGE_GROUPS = """
DELETE FROM {s}pgbarrier_group WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {s}pgbarrier_group WHERE expires_at < (SELECT clock_timestamp())
     ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED))
"""

#: The barrier that expired first and is not read any more; its members go before it.
EXPIRED_BARRIER = (
    """
SELECT id FROM {s}pgbarrier_barrier b WHERE expires_at < (SELECT clock_timestamp())
   AND NOT """
    + READ
    + """
 ORDER BY expires_at LIMIT 1 FOR UPDATE SKIP LOCKED
"""
)

PURGE_MEMBERS = """
DELETE FROM {s}pgbarrier_task WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {s}pgbarrier_task WHERE barrier_id = :id LIMIT :limit
       FOR UPDATE SKIP LOCKED))
"""

PURGE_BARRIER = """
WITH slots AS (DELETE FROM {s}pgbarrier_slot WHERE barrier_id = :id)
DELETE FROM {s}pgbarrier_barrier WHERE id = :id
   AND NOT EXISTS (SELECT 1 FROM {s}pgbarrier_task WHERE barrier_id = :id)
"""
