"""The end of a task, or of one attempt: outcomes, states, hand-overs.

As with claims, the usual cases have short statements, which are planned faster than the long ones
that decide what those refused.
"""

from __future__ import annotations

#: Counts a finished member: empties its slot, and the slot that empties last makes the barrier
#: ready.  A slot row is locked by the members of that slot only, the barrier row by the members
#: that empty a slot.
_COUNT = """
, slot AS (
    UPDATE {s}pgbarrier_slot AS s SET remaining = s.remaining - 1 FROM done
     WHERE s.barrier_id = done.barrier_id AND s.slot = done.slot
    RETURNING s.barrier_id, s.remaining
), closed AS (
    UPDATE {s}pgbarrier_barrier AS b
       SET open_slots = b.open_slots - 1,
           state = CASE WHEN b.open_slots = 1 AND b.state = 'waiting' THEN 'ready'
                        ELSE b.state END,
           ready_at = CASE WHEN b.open_slots = 1 THEN clock_timestamp() ELSE b.ready_at END
      FROM slot WHERE slot.remaining = 0 AND b.id = slot.barrier_id
    RETURNING b.id, b.state
)
SELECT (SELECT id FROM closed WHERE state = 'ready') AS ready FROM done
"""

_DONE = """
    state = 'done', status = :status, result = CAST(:result AS bytea), token = NULL,
    last_token = CAST(:write_token AS uuid), worker = NULL, message = NULL, due_at = NULL,
    done_at = clock_timestamp(),
    expires_at = CASE WHEN t.barrier_id IS NULL
                      THEN clock_timestamp() + make_interval(secs => CAST(:expires AS float8)) END
"""

#: What a task without a barrier is set to.
_DONE_ALONE = """
    state = 'done', status = :status, result = CAST(:result AS bytea), token = NULL,
    last_token = CAST(:write_token AS uuid), worker = NULL, message = NULL, due_at = NULL,
    done_at = clock_timestamp(),
    expires_at = clock_timestamp() + make_interval(secs => CAST(:expires AS float8))
"""

#: The outcome of a claimed attempt of a task in no chord.
FINISH_ALONE_BODY = (
    "UPDATE {s}pgbarrier_task SET "
    + _DONE_ALONE
    + """
 WHERE id = :id AND state = 'running' AND token = CAST(:token AS uuid) AND barrier_id IS NULL
RETURNING CAST(NULL AS text) AS ready
"""
)

#: The outcome of a claimed member, counted.  The same as FINISH, for a barrier that is known.
FINISH_MEMBER_BODY = """
WITH done AS (
    UPDATE {s}pgbarrier_task
       SET state = 'done', status = :status, result = CAST(:result AS bytea), token = NULL,
           last_token = CAST(:write_token AS uuid), worker = NULL, message = NULL, due_at = NULL,
           done_at = clock_timestamp(), expires_at = NULL
     WHERE id = :id AND state = 'running' AND token = CAST(:token AS uuid)
       AND barrier_id = :barrier
    RETURNING slot
), slot AS (
    UPDATE {s}pgbarrier_slot SET remaining = remaining - 1
     WHERE barrier_id = :barrier AND slot = (SELECT slot FROM done)
    RETURNING remaining
), closed AS (
    UPDATE {s}pgbarrier_barrier
       SET open_slots = open_slots - 1,
           state = CASE WHEN open_slots = 1 AND state = 'waiting' THEN 'ready' ELSE state END,
           ready_at = CASE WHEN open_slots = 1 THEN clock_timestamp() ELSE ready_at END
     WHERE id = :barrier AND (SELECT remaining FROM slot) = 0
    RETURNING id, state
)
SELECT (SELECT id FROM closed WHERE state = 'ready') AS ready FROM done
"""

#: The outcome of a claimed attempt: accepted only under its token, or where a crash of the server
#: took back the claim, which was not flushed, and nobody has claimed the task since.
FINISH = (
    "WITH done AS (UPDATE {s}pgbarrier_task AS t SET "
    + _DONE
    + """
     WHERE t.id = :id AND (
           (t.state = 'running' AND t.token = CAST(:token AS uuid))
        OR (t.state = 'queued' AND t.token IS NULL AND t.attempt < :attempt
            AND t.call = CAST(:call AS uuid) AND t.seq = :seq))
    RETURNING t.barrier_id, t.slot)"""
    + _COUNT
)

#: The outcome of a plain task that has no row, or one that only tells its state.
RECORD_ALONE = (
    """
INSERT INTO {s}pgbarrier_task AS t
       (id, call, state, status, result, last_token, done_at, expires_at)
VALUES (:id, CAST(:call AS uuid), 'done', :status, CAST(:result AS bytea),
        CAST(:write_token AS uuid), clock_timestamp(),
        clock_timestamp() + make_interval(secs => CAST(:expires AS float8)))
ON CONFLICT (id) DO UPDATE SET """
    + _DONE_ALONE
    + """
 WHERE t.state = 'untracked' AND t.token IS NULL AND t.barrier_id IS NULL AND t.call IS NULL
RETURNING NULL AS ready
"""
)

#: The outcome of a plain task whose message was recorded, counted where it is a member.
RECORD_ROW = (
    "WITH done AS (UPDATE {s}pgbarrier_task AS t SET "
    + _DONE
    + """
     WHERE t.id = :id AND t.state IN ('queued', 'running') AND t.token IS NULL
    RETURNING t.barrier_id, t.slot)"""
    + _COUNT
)

#: The outcome of a run without a claim: accepted unless another holder is running the task, the
#: message is an old copy, or an outcome stands that may not be replaced.
RECORD = (
    """
WITH done AS (
    INSERT INTO {s}pgbarrier_task AS t
           (id, call, state, status, result, last_token, done_at, expires_at)
    SELECT :id, CAST(:call AS uuid), 'done', :status, CAST(:result AS bytea),
           CAST(:write_token AS uuid), clock_timestamp(),
           clock_timestamp() + make_interval(secs => CAST(:expires AS float8))
     WHERE CAST(:may_insert AS boolean)
        OR EXISTS (SELECT 1 FROM {s}pgbarrier_task WHERE id = :id)
    ON CONFLICT (id) DO UPDATE SET """
    + _DONE
    + """
     WHERE (t.state <> 'done' AND t.token IS NULL
            AND (t.state <> 'running' OR CAST(:worker AS uuid) IS NULL
                 OR t.worker = CAST(:worker AS uuid))
            AND (CAST(:call AS uuid) IS NULL OR t.call IS NULL
                 OR (t.state = 'expected' AND (t.call <> CAST(:call AS uuid) OR t.seq <= :seq))
                 OR (t.call = CAST(:call AS uuid) AND t.seq = :seq)))
        OR (t.state = 'running' AND t.worker = CAST(:worker AS uuid) AND t.pid = :pid)
        OR (t.state = 'done' AND t.barrier_id IS NULL AND CAST(:worker AS uuid) IS NULL
            AND t.attempt = 0 AND t.status <> 'SUCCESS')
    RETURNING t.barrier_id, t.slot
)"""
    + _COUNT
)

#: Whether a write whose answer was lost took effect.
SETTLED = """
SELECT count(*) FROM {s}pgbarrier_task
 WHERE id = :id AND last_token = CAST(:write_token AS uuid)
"""

#: A state that is no outcome, written by the holder of the claim.
STATUS_CLAIMED = """
UPDATE {s}pgbarrier_task SET status = :status, result = CAST(:result AS bytea)
 WHERE id = :id AND state = 'running' AND token = CAST(:token AS uuid)
"""

#: A state that is no outcome, written without a claim.
STATUS_PLAIN = """
INSERT INTO {s}pgbarrier_task AS t (id, state, status, result, expires_at)
VALUES (:id, 'untracked', :status, CAST(:result AS bytea),
        clock_timestamp() + make_interval(secs => CAST(:expires AS float8)))
ON CONFLICT (id) DO UPDATE SET status = EXCLUDED.status, result = EXCLUDED.result
 WHERE t.token IS NULL AND t.status <> 'SUCCESS'
   AND (t.state <> 'done' OR (t.barrier_id IS NULL AND t.attempt = 0))
"""

#: A retry or replace: the row goes on to its next message, the claim ends.
HAND_OVER = """
UPDATE {s}pgbarrier_task
   SET state = CASE WHEN CAST(:message AS bytea) IS NULL THEN 'expected' ELSE 'queued' END,
       call = COALESCE(CAST(:call AS uuid), call), seq = :seq,
       token = NULL, last_token = CAST(:token AS uuid), worker = NULL,
       status = COALESCE(CAST(:status AS text), status),
       result = CASE WHEN CAST(:status AS text) IS NULL THEN result
                     ELSE CAST(:result AS bytea) END,
       message = CAST(:message AS bytea), queue = COALESCE(CAST(:queue AS text), queue),
       eta = CAST(:eta AS timestamptz),
       due_at = CASE WHEN CAST(:message AS bytea) IS NULL THEN NULL
                     ELSE clock_timestamp() + make_interval(secs => :grace) END,
       published_at = NULL, publications = 0, copies = 0
 WHERE id = :id AND (
       (state = 'running' AND token = CAST(:token AS uuid))
    OR (state = 'queued' AND token IS NULL AND attempt < :attempt
        AND call = CAST(:held_call AS uuid) AND seq = :held_seq))
"""

#: The claim of a task that ended without an outcome and is not to run again.
ABANDON = """
UPDATE {s}pgbarrier_task
   SET state = 'done', token = NULL, last_token = CAST(:token AS uuid), worker = NULL,
       message = NULL, due_at = NULL, done_at = clock_timestamp(),
       expires_at = clock_timestamp() + make_interval(secs => CAST(:expires AS float8))
 WHERE id = :id AND state = 'running' AND token = CAST(:token AS uuid)
"""
