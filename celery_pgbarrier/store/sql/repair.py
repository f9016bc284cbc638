"""Barriers that cannot complete: looked at now and then, recounted from their rows."""

from __future__ import annotations

#: The waiting barriers that were looked at longest ago, marked as looked at now.
BARRIERS_UNCHECKED = """
UPDATE {s}pgbarrier_barrier SET checked_at = clock_timestamp()
 WHERE id = ANY(ARRAY(
    SELECT id FROM {s}pgbarrier_barrier
     WHERE state = 'waiting'
       AND checked_at < (SELECT clock_timestamp()) - make_interval(secs => :after)
     ORDER BY checked_at LIMIT :limit FOR UPDATE SKIP LOCKED))
RETURNING id
"""

_OPEN_BY_SLOT = """
    SELECT slot, count(*) FILTER (WHERE state <> 'done') AS open
      FROM {s}pgbarrier_task WHERE barrier_id = :id GROUP BY slot
"""

#: Whether a barrier's count differs from its rows.  One statement sees one moment, and outcomes
#: and counts are committed together: no lock is needed to compare them.
BARRIER_MISCOUNTED = (
    "WITH counted AS ("
    + _OPEN_BY_SLOT
    + """)
SELECT EXISTS (SELECT 1 FROM (SELECT slot, remaining FROM {s}pgbarrier_slot
                               WHERE barrier_id = :id) AS s
               FULL JOIN counted c ON c.slot = s.slot
               WHERE COALESCE(s.remaining, -1) <> COALESCE(c.open, 0))
    OR b.open_slots <> (SELECT count(*) FROM {s}pgbarrier_slot
                         WHERE barrier_id = :id AND remaining > 0) AS wrong
  FROM {s}pgbarrier_barrier b WHERE b.id = :id AND b.state = 'waiting'
"""
)

#: Every finisher passes its slot: who holds them all sees every outcome that is counted, and none
#: that is not.
SLOTS_LOCK = """
SELECT slot FROM {s}pgbarrier_slot WHERE barrier_id = :id ORDER BY slot FOR UPDATE
"""

BARRIER_LOCK_WAITING = """
SELECT size, (SELECT count(*) FROM {s}pgbarrier_task WHERE barrier_id = :id) AS members
  FROM {s}pgbarrier_barrier WHERE id = :id AND state = 'waiting' FOR UPDATE
"""

SLOTS_RECOUNT = (
    "WITH counted AS ("
    + _OPEN_BY_SLOT
    + """), emptied AS (
    UPDATE {s}pgbarrier_slot AS s SET remaining = 0
     WHERE s.barrier_id = :id AND NOT EXISTS (SELECT 1 FROM counted c WHERE c.slot = s.slot)
)
INSERT INTO {s}pgbarrier_slot (barrier_id, slot, remaining)
SELECT :id, slot, open FROM counted
ON CONFLICT (barrier_id, slot) DO UPDATE SET remaining = EXCLUDED.remaining
"""
)

BARRIER_RECOUNT = """
UPDATE {s}pgbarrier_barrier AS b
   SET open_slots = c.open, state = CASE WHEN c.open = 0 THEN 'ready' ELSE b.state END,
       ready_at = CASE WHEN c.open = 0 THEN clock_timestamp() ELSE b.ready_at END
  FROM (SELECT count(*) AS open FROM {s}pgbarrier_slot
         WHERE barrier_id = :id AND remaining > 0) AS c
 WHERE b.id = :id
"""

#: Members that nothing would ever touch again: waiting without a due time, run by nobody.
MEMBERS_REVIVE = """
UPDATE {s}pgbarrier_task
   SET state = 'queued', token = NULL, published_at = NULL, due_at = clock_timestamp()
 WHERE barrier_id = :id AND message IS NOT NULL
   AND ((state = 'queued' AND due_at IS NULL) OR (state = 'running' AND worker IS NULL))
"""
