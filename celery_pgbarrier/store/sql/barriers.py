"""Barriers and their members: opened, added to, released."""

from __future__ import annotations

from celery_pgbarrier.store.sql.fragments import NEEDED, READ

#: Open a barrier with its slots; a second time for the same call changes nothing, a new call needs
#: a closed one.  ``fresh`` tells whether there was none of this id, ``live`` names a task of its
#: body that runs for another call.
BARRIER_OPEN_BODY = (
    """
WITH opened AS (
    INSERT INTO {s}pgbarrier_barrier AS b
           (id, call, size, open_slots, state, ready_at, body, structure)
    VALUES (:id, CAST(:call AS uuid), :size, :slots, :state,
            CASE WHEN :state = 'ready' THEN clock_timestamp() END, :body,
            CAST(:structure AS bytea))
    ON CONFLICT (id) DO UPDATE SET call = EXCLUDED.call, size = EXCLUDED.size,
        open_slots = EXCLUDED.open_slots, state = EXCLUDED.state, ready_at = EXCLUDED.ready_at,
        body = EXCLUDED.body, structure = EXCLUDED.structure, created_at = clock_timestamp(),
        closed_at = NULL, expires_at = NULL
     WHERE b.call <> EXCLUDED.call AND b.state IN ('released', 'failed', 'cancelled')
       AND NOT """
    + READ
    + """
    RETURNING b.id, b.xmax = 0 AS fresh
), slots AS (
    INSERT INTO {s}pgbarrier_slot (barrier_id, slot, remaining)
    SELECT opened.id, x.place - 1, x.remaining
      FROM opened, unnest(CAST(:remaining AS integer[])) WITH ORDINALITY AS x (remaining, place)
    ON CONFLICT (barrier_id, slot) DO UPDATE SET remaining = EXCLUDED.remaining
), dispatch AS (
    INSERT INTO {s}pgbarrier_dispatch (barrier_id, call, due_at)
    SELECT opened.id, CAST(:call AS uuid), clock_timestamp() + make_interval(secs => :grace)
      FROM opened WHERE CAST(:presumed AS float8) IS NOT NULL
    ON CONFLICT (barrier_id) DO UPDATE SET call = EXCLUDED.call, due_at = EXCLUDED.due_at
)
SELECT (SELECT fresh FROM opened) AS fresh,
       (SELECT t.id FROM {s}pgbarrier_task t
          JOIN unnest(CAST(:body_ids AS text[]), CAST(:body_calls AS text[])) AS x (id, call)
            ON x.id = t.id
         WHERE t.id = ANY(CAST(:body_ids AS text[]))
           AND t.call IS DISTINCT FROM CAST(x.call AS uuid) AND t.state IN ('queued', 'running')
         LIMIT 1) AS live
"""
)

BARRIER_CALL = "SELECT CAST(call AS text) FROM {s}pgbarrier_barrier WHERE id = :id"

#: Slots and members of an earlier run of a barrier whose ids are used again.
BARRIER_RESET = """
WITH gone AS (DELETE FROM {s}pgbarrier_slot WHERE barrier_id = :id AND slot >= :slots)
UPDATE {s}pgbarrier_task SET barrier_id = NULL
 WHERE barrier_id = :id AND state = 'done'
"""

#: Record messages and expected tasks; rows that live under another call are left alone.  Members
#: of small chords are recorded as published (``presumed`` seconds from now, when their producer
#: will be through with them): should it die first, DISPATCH_DUE tells.
TASKS_RECORD = (
    """
WITH recorded AS (
INSERT INTO {s}pgbarrier_task AS t
       (id, call, barrier_id, slot, position, state, name, queue, message, eta, reads, due_at,
        published_at)
SELECT x.id, CAST(x.call AS uuid), x.barrier_id, x.slot, x.position,
       CASE WHEN x.message IS NULL THEN 'expected' ELSE 'queued' END,
       x.name, x.queue, x.message, CAST(x.eta AS timestamptz), x.reads,
       CASE WHEN x.message IS NULL THEN NULL
            WHEN x.barrier_id IS NULL OR CAST(:presumed AS float8) IS NULL
            THEN clock_timestamp() + make_interval(secs => :grace)
            ELSE GREATEST(clock_timestamp(), CAST(x.eta AS timestamptz))
                 + make_interval(secs => :after) END,
       CASE WHEN x.message IS NOT NULL AND x.barrier_id IS NOT NULL
            THEN clock_timestamp() + make_interval(secs => CAST(:presumed AS float8))
                 + x.position * interval '1 microsecond' END
  FROM unnest(CAST(:ids AS text[]), CAST(:calls AS text[]), CAST(:barriers AS text[]),
              CAST(:member_slots AS integer[]), CAST(:positions AS integer[]),
              CAST(:names AS text[]),
              CAST(:queues AS text[]), CAST(:messages AS bytea[]), CAST(:etas AS text[]),
              CAST(:reads AS text[]))
       AS x (id, call, barrier_id, slot, position, name, queue, message, eta, reads)
ON CONFLICT (id) DO UPDATE SET
    origin = CASE WHEN t.state = 'expected' THEN COALESCE(t.origin, t.call) END,
    call = EXCLUDED.call, seq = 0, state = EXCLUDED.state, name = EXCLUDED.name,
    queue = EXCLUDED.queue, message = EXCLUDED.message, eta = EXCLUDED.eta,
    reads = EXCLUDED.reads,
    due_at = EXCLUDED.due_at, published_at = EXCLUDED.published_at, publications = 0, copies = 0,
    attempt = 0, crashes = 0,
    status = CASE WHEN t.state = 'expected' THEN t.status ELSE 'PENDING' END,
    result = CASE WHEN t.state = 'expected' THEN t.result END,
    expires_at = NULL, done_at = NULL,
    barrier_id = COALESCE(EXCLUDED.barrier_id,
                          CASE WHEN t.state = 'expected' THEN t.barrier_id END),
    slot = COALESCE(EXCLUDED.slot, CASE WHEN t.state = 'expected' THEN t.slot END),
    position = COALESCE(EXCLUDED.position, CASE WHEN t.state = 'expected' THEN t.position END)
 WHERE (t.state = 'expected' AND EXCLUDED.message IS NOT NULL
        AND (t.barrier_id IS NULL OR EXCLUDED.barrier_id IS NULL
             OR t.barrier_id = EXCLUDED.barrier_id))
    OR (t.state IN ('done', 'untracked') AND t.call IS DISTINCT FROM EXCLUDED.call
        AND NOT """
    + NEEDED
    + """)
    RETURNING 1
)
SELECT count(*) AS recorded FROM recorded
"""
)

#: Which of these ids belong to another call or barrier (an id that is used while its first run
#: goes on).
TASKS_FOREIGN = """
SELECT t.id FROM {s}pgbarrier_task t
  JOIN unnest(CAST(:ids AS text[]), CAST(:calls AS text[]), CAST(:barriers AS text[]))
       AS x (id, call, barrier_id) ON x.id = t.id
 WHERE (t.call IS DISTINCT FROM CAST(x.call AS uuid) AND t.state <> 'expected')
    OR (t.state = 'expected' AND t.barrier_id <> x.barrier_id)
 LIMIT 1
"""

#: One more member, in the slot of the member that adds it (never empty while that one runs).
MEMBER_ADD = """
WITH adder AS (
    SELECT t.slot, t.position FROM {s}pgbarrier_task t
     WHERE t.id = :adder AND t.barrier_id = :barrier
), slot AS (
    UPDATE {s}pgbarrier_slot s SET remaining = s.remaining + 1 FROM adder
     WHERE s.barrier_id = :barrier AND s.slot = adder.slot AND s.remaining > 0
       AND NOT EXISTS (SELECT 1 FROM {s}pgbarrier_task WHERE id = :id)
    RETURNING s.slot
)
INSERT INTO {s}pgbarrier_task (id, barrier_id, slot, position, state)
SELECT :id, :barrier, slot.slot, adder.position, 'expected' FROM slot, adder
"""

#: Lock a barrier that is ready, with what its members' results amount to, and of a small one these
#: results; none where another process is releasing it.  It is closed at once where all members have
#: succeeded, which leaves a statement less to the usual release.
BARRIER_LOCK_BODY = """
WITH held AS MATERIALIZED (
    SELECT b.id, b.call, b.body, b.structure, b.size, m.*
      FROM {s}pgbarrier_barrier b, LATERAL (
           SELECT count(*) AS members, COALESCE(sum(length(t.result)), 0) AS bytes,
                  count(*) FILTER (WHERE t.status <> 'SUCCESS' OR t.result IS NULL) AS doubtful
             FROM {s}pgbarrier_task t WHERE t.barrier_id = :id) AS m
     WHERE b.id = :id AND b.state = 'ready' FOR UPDATE OF b SKIP LOCKED
), closed AS (
    UPDATE {s}pgbarrier_barrier AS b
       SET state = 'released', closed_at = clock_timestamp(),
           expires_at = clock_timestamp() + make_interval(secs => CAST(:expires AS float8))
      FROM held
     WHERE b.id = :id AND b.id = held.id AND held.doubtful = 0 AND held.members >= held.size
    RETURNING b.id
)
SELECT h.id, CAST(h.call AS text) AS call, h.body, h.structure, h.size, h.members, h.bytes,
       h.doubtful, small.ids, small.results, EXISTS (SELECT 1 FROM closed) AS closed
  FROM held AS h LEFT JOIN LATERAL (
       SELECT array_agg(t.id ORDER BY t.position, t.created_at, t.id) AS ids,
              array_agg(t.result ORDER BY t.position, t.created_at, t.id) AS results
         FROM {s}pgbarrier_task t WHERE t.barrier_id = :id
            AND h.members <= :few AND h.bytes <= CAST(:inline AS bigint)) AS small
       ON true
"""

#: Results by position in the header; an added member has the position of the one that added it.
BARRIER_MEMBERS = """
SELECT id, result FROM {s}pgbarrier_task
 WHERE barrier_id = :id AND position >= :start AND position < :stop
 ORDER BY position, created_at, id
"""

#: The members among them that may have failed: their state is not shown, or is a failure.
BARRIER_DOUBTFUL = """
SELECT id, result FROM {s}pgbarrier_task
 WHERE barrier_id = :id AND position >= :start AND position < :stop
   AND (status <> 'SUCCESS' OR result IS NULL)
 ORDER BY position, created_at, id
"""

#: How the results of a chord are nested, for a task that reads them.
BARRIER_STRUCTURE = """
SELECT CAST(call AS text) AS call, structure FROM {s}pgbarrier_barrier WHERE id = :id
"""

BARRIER_CLOSE = """
UPDATE {s}pgbarrier_barrier
   SET state = :state, closed_at = clock_timestamp(),
       expires_at = clock_timestamp() + make_interval(secs => CAST(:expires AS float8))
 WHERE id = :id
"""

#: Barriers that were complete and whose finisher died before the release.
BARRIERS_READY = """
SELECT id FROM {s}pgbarrier_barrier
 WHERE state = 'ready' AND ready_at < (SELECT clock_timestamp()) - make_interval(secs => :grace)
 ORDER BY ready_at LIMIT :limit
"""
