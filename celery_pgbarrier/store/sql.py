"""Every statement, named, with a line of purpose.  ``{s}`` stands for the schema prefix."""

from __future__ import annotations

from sqlalchemy import TextClause, text

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
SELECT (SELECT count(*) FROM done) AS accepted,
       (SELECT id FROM closed WHERE state = 'ready') AS ready
"""

_DONE = """
    state = 'done', status = CASE WHEN CAST(:visible AS boolean) THEN :status ELSE 'PENDING' END,
    result = CAST(:result AS bytea), token = NULL, last_token = CAST(:write_token AS uuid),
    worker = NULL, message = NULL, due_at = NULL, done_at = clock_timestamp(),
    expires_at = CASE WHEN t.barrier_id IS NULL
                      THEN clock_timestamp() + make_interval(secs => CAST(:expires AS float8)) END
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

#: The outcome of a run without a claim: accepted unless another holder is running the task, the
#: message is an old copy, or an outcome stands that may not be replaced.
RECORD = (
    """
WITH done AS (
    INSERT INTO {s}pgbarrier_task AS t
           (id, call, state, status, result, last_token, done_at, expires_at)
    SELECT :id, CAST(:call AS uuid), 'done',
           CASE WHEN CAST(:visible AS boolean) THEN :status ELSE 'PENDING' END,
           CAST(:result AS bytea), CAST(:write_token AS uuid), clock_timestamp(),
           clock_timestamp() + make_interval(secs => CAST(:expires AS float8))
     WHERE CAST(:may_insert AS boolean)
        OR EXISTS (SELECT 1 FROM {s}pgbarrier_task WHERE id = :id)
    ON CONFLICT (id) DO UPDATE SET """
    + _DONE
    + """
     WHERE (t.state <> 'done' AND t.token IS NULL
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

_CLAIMED = """
    state = 'running', token = CAST(:token AS uuid), worker = CAST(:worker AS uuid), pid = :pid,
    thread = :thread, rerun = true, started_at = clock_timestamp(), due_at = NULL,
    call = CAST(:call AS uuid), seq = :seq, message = COALESCE(t.message, EXCLUDED.message),
    name = COALESCE(t.name, EXCLUDED.name), queue = COALESCE(t.queue, EXCLUDED.queue),
    attempt = CASE WHEN t.state = 'done' THEN 1
                   WHEN t.token = CAST(:token AS uuid) THEN t.attempt ELSE t.attempt + 1 END,
    crashes = CASE WHEN t.state = 'done' THEN 0 ELSE t.crashes END,
    published_at = CASE WHEN t.copies = :copy THEN t.published_at END,
    barrier_id = CASE WHEN t.state = 'done' THEN NULL ELSE t.barrier_id END,
    expires_at = NULL,
    result = CASE WHEN t.state = 'done' OR CAST(:status AS text) IS NOT NULL
                  THEN CAST(:result AS bytea) ELSE t.result END,
    status = COALESCE(CAST(:status AS text),
                      CASE WHEN t.state = 'done' THEN 'PENDING' ELSE t.status END)
"""

#: Who may have the row: its current stamp when queued, an expected row by whoever brings its
#: message, its own grant again (the answer was lost), a finished row by a new call only.
_CLAIMABLE = """
       (t.state = 'queued' AND t.call = CAST(:call AS uuid) AND t.seq = :seq)
    OR (t.state = 'expected' AND NOT CAST(:recorded AS boolean)
        AND (t.call IS DISTINCT FROM CAST(:call AS uuid) OR t.seq <= :seq))
    OR (t.state = 'running' AND (t.token = CAST(:token AS uuid)
        OR (t.worker = CAST(:worker AS uuid) AND t.pid = :pid AND t.thread = :thread
            AND t.call = CAST(:call AS uuid) AND t.seq = :seq)))
    OR (t.state IN ('done', 'untracked') AND NOT CAST(:recorded AS boolean)
        AND t.call IS DISTINCT FROM CAST(:call AS uuid)
        AND t.origin IS DISTINCT FROM CAST(:call AS uuid)
        AND NOT EXISTS (SELECT 1 FROM {s}pgbarrier_barrier b WHERE b.id = t.barrier_id
                        AND b.state IN ('waiting', 'ready')))
"""

#: A first grant may be lost in a crash of the server: the row is queued again, or was made by the
#: claim and is gone, and both are recognised.  Any other grant is flushed.
_GRANTED = """
SELECT attempt, crashes, barrier_id,
       set_config('synchronous_commit', CASE WHEN attempt = 1 AND fresh THEN 'off'
                  ELSE current_setting('synchronous_commit') END, true)
  FROM granted
"""

#: Grant a recorded task to this process.
CLAIM_RECORDED = (
    "WITH granted AS (UPDATE {s}pgbarrier_task AS t SET "
    + _CLAIMED.replace("EXCLUDED.", "t.")
    + """ WHERE t.id = :id
     AND EXISTS (SELECT 1 FROM {s}pgbarrier_worker w
                  WHERE w.id = CAST(:worker AS uuid) AND w.state <> 'dead')
     AND ("""
    + _CLAIMABLE
    + """)
    RETURNING t.attempt, t.crashes, t.barrier_id, true AS fresh)"""
    + _GRANTED
)

#: Grant a task that may have no row yet, storing its own message so that it can be put back.
CLAIM_NEW = (
    """
WITH granted AS (
    INSERT INTO {s}pgbarrier_task AS t
           (id, call, seq, state, status, attempt, token, worker, pid, thread, name, queue,
            message, result, started_at)
    SELECT :id, CAST(:call AS uuid), :seq, 'running',
           COALESCE(CAST(:status AS text), 'PENDING'), 1, CAST(:token AS uuid),
           CAST(:worker AS uuid), :pid, :thread, CAST(:name AS text), CAST(:queue AS text),
           CAST(:message AS bytea), CAST(:result AS bytea), clock_timestamp()
     WHERE EXISTS (SELECT 1 FROM {s}pgbarrier_worker w
                    WHERE w.id = CAST(:worker AS uuid) AND w.state <> 'dead')
    ON CONFLICT (id) DO UPDATE SET """
    + _CLAIMED
    + """
     WHERE """
    + _CLAIMABLE
    + """
    RETURNING t.attempt, t.crashes, t.barrier_id, t.xmax = 0 AS fresh
)"""
    + _GRANTED
)

#: Why a claim was not granted.
INSPECT = """
SELECT (SELECT count(*) FROM {s}pgbarrier_worker
         WHERE id = CAST(:worker AS uuid) AND state <> 'dead') AS registered,
       t.state, t.status, CAST(t.call AS text) AS call, t.seq,
       CAST(t.token AS text) AS token, CAST(t.worker AS text) AS worker, t.pid, t.crashes,
       t.rerun, t.barrier_id, t.message
  FROM (SELECT 1) AS one LEFT JOIN {s}pgbarrier_task t ON t.id = :id
"""

#: A plain task with a row begins: never published again from here on.  Its worker is made known.
PLAIN_STARTED = """
WITH holder AS (
    INSERT INTO {s}pgbarrier_worker AS w (id, name, state)
    VALUES (CAST(:worker AS uuid), :worker_name, 'running')
    ON CONFLICT (id) DO UPDATE SET state = 'running', beat_at = clock_timestamp(),
        suspect_at = NULL WHERE w.state = 'dead'
)
UPDATE {s}pgbarrier_task
   SET state = 'running', worker = CAST(:worker AS uuid), pid = :pid, thread = :thread,
       started_at = clock_timestamp(), due_at = NULL, rerun = :rerun, attempt = attempt + 1
 WHERE id = :id AND state IN ('queued', 'expected') AND token IS NULL
"""

#: A plain task's retry: the run ends; should its next message, which is not recorded, be lost, the
#: recorded one is published again.
PLAIN_RETRIED = """
UPDATE {s}pgbarrier_task
   SET state = 'queued', worker = NULL, publications = 0, copies = copies + 1,
       due_at = GREATEST(clock_timestamp(), CAST(:eta AS timestamptz))
                + make_interval(secs => :after)
 WHERE id = :id AND state = 'running' AND token IS NULL AND message IS NOT NULL
   AND worker = CAST(:worker AS uuid) AND pid = :pid AND thread = :thread
"""

#: A plain task that replaced itself: its id waits for another message.
PLAIN_REPLACED = """
UPDATE {s}pgbarrier_task
   SET state = 'expected', worker = NULL, message = NULL, seq = seq + 1
 WHERE id = :id AND state = 'running' AND token IS NULL
   AND worker = CAST(:worker AS uuid) AND pid = :pid AND thread = :thread
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

#: Put a claimed (or, with no token, an unclaimed) task back, to be published by the caller.
RELEASE = """
UPDATE {s}pgbarrier_task
   SET state = 'queued', token = NULL, worker = NULL, crashes = crashes + :crash,
       due_at = clock_timestamp() + make_interval(secs => :grace), published_at = NULL,
       publications = 0, copies = copies + 1
 WHERE id = :id AND state = :state AND token IS NOT DISTINCT FROM CAST(:token AS uuid)
   AND crashes + :crash < :max_crashes AND message IS NOT NULL
RETURNING crashes
"""

#: The claim of a task that ended without an outcome and is not to run again.
ABANDON = """
UPDATE {s}pgbarrier_task
   SET state = 'done', token = NULL, last_token = CAST(:token AS uuid), worker = NULL,
       message = NULL, due_at = NULL, done_at = clock_timestamp(),
       expires_at = clock_timestamp() + make_interval(secs => CAST(:expires AS float8))
 WHERE id = :id AND state = 'running' AND token = CAST(:token AS uuid)
"""

#: What a worker holds (at most its concurrency, for a healthy one).
CLAIMS_OF = """
SELECT id, CAST(token AS text) AS token, CAST(worker AS text) AS worker, pid, rerun, name
  FROM {s}pgbarrier_task WHERE worker = CAST(:worker AS uuid) ORDER BY started_at LIMIT :limit
"""

#: Results of finished or reporting tasks.
RESULTS = """
SELECT id, status, result FROM {s}pgbarrier_task
 WHERE id = ANY(CAST(:ids AS text[])) AND status <> 'PENDING'
"""

#: Forget a result; the row goes on recognising late copies, and a live chord keeps the value.
FORGET = """
UPDATE {s}pgbarrier_task AS t
   SET status = 'PENDING',
       result = CASE WHEN EXISTS (SELECT 1 FROM {s}pgbarrier_barrier b WHERE b.id = t.barrier_id
                                  AND b.state IN ('waiting', 'ready')) THEN t.result END
 WHERE id = :id AND state IN ('done', 'untracked')
"""

GROUP_SAVE = """
INSERT INTO {s}pgbarrier_group (id, result, expires_at)
VALUES (:id, :result, clock_timestamp() + make_interval(secs => CAST(:expires AS float8)))
ON CONFLICT (id) DO UPDATE SET result = EXCLUDED.result, expires_at = EXCLUDED.expires_at
"""

GROUP_LOAD = "SELECT result FROM {s}pgbarrier_group WHERE id = :id"

GROUP_DELETE = "DELETE FROM {s}pgbarrier_group WHERE id = :id"

#: Open a barrier; a second time for the same call changes nothing, a new call needs a closed one.
BARRIER_OPEN = """
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
RETURNING id
"""

BARRIER_CALL = "SELECT CAST(call AS text) FROM {s}pgbarrier_barrier WHERE id = :id"

#: Members of an earlier run of a barrier whose ids are used again.
BARRIER_RESET = """
WITH gone AS (DELETE FROM {s}pgbarrier_slot WHERE barrier_id = :id)
UPDATE {s}pgbarrier_task SET barrier_id = NULL
 WHERE barrier_id = :id AND state = 'done'
"""

SLOTS_OPEN = """
INSERT INTO {s}pgbarrier_slot (barrier_id, slot, remaining)
SELECT :id, slot, remaining
  FROM unnest(CAST(:slots AS integer[]), CAST(:remaining AS integer[])) AS x (slot, remaining)
"""

#: Record messages and expected tasks; rows that live under another call are left alone.
TASKS_RECORD = """
INSERT INTO {s}pgbarrier_task AS t
       (id, call, barrier_id, slot, position, state, name, queue, message, eta, due_at)
SELECT x.id, CAST(x.call AS uuid), x.barrier_id, x.slot, x.position,
       CASE WHEN x.message IS NULL THEN 'expected' ELSE 'queued' END,
       x.name, x.queue, x.message, CAST(x.eta AS timestamptz),
       CASE WHEN x.message IS NULL THEN NULL
            ELSE clock_timestamp() + make_interval(secs => :grace) END
  FROM unnest(CAST(:ids AS text[]), CAST(:calls AS text[]), CAST(:barriers AS text[]),
              CAST(:slots AS integer[]), CAST(:positions AS integer[]), CAST(:names AS text[]),
              CAST(:queues AS text[]), CAST(:messages AS bytea[]), CAST(:etas AS text[]))
       AS x (id, call, barrier_id, slot, position, name, queue, message, eta)
ON CONFLICT (id) DO UPDATE SET
    origin = CASE WHEN t.state = 'expected' THEN COALESCE(t.origin, t.call) END,
    call = EXCLUDED.call, seq = 0, state = EXCLUDED.state, name = EXCLUDED.name,
    queue = EXCLUDED.queue, message = EXCLUDED.message, eta = EXCLUDED.eta,
    due_at = EXCLUDED.due_at, published_at = NULL, publications = 0, copies = 0, attempt = 0,
    crashes = 0,
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
        AND NOT EXISTS (SELECT 1 FROM {s}pgbarrier_barrier b WHERE b.id = t.barrier_id
                        AND b.state IN ('waiting', 'ready')))
RETURNING t.id
"""

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

#: A task of a chord's body that is being run for another call.
BODY_LIVE = """
SELECT t.id FROM {s}pgbarrier_task t
  JOIN unnest(CAST(:ids AS text[]), CAST(:calls AS text[])) AS x (id, call) ON x.id = t.id
 WHERE t.call IS DISTINCT FROM CAST(x.call AS uuid) AND t.state IN ('queued', 'running') LIMIT 1
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

#: The broker has them, in this order; from now on they are overdue after republish_after.
TASKS_PUBLISHED = """
UPDATE {s}pgbarrier_task AS t
   SET published_at = now() + x.place * interval '1 microsecond',
       due_at = GREATEST(now(), t.eta) + make_interval(secs => :after)
  FROM unnest(CAST(:ids AS text[])) WITH ORDINALITY AS x (id, place)
 WHERE t.id = x.id AND t.state = 'queued' AND t.due_at IS NOT NULL AND t.published_at IS NULL
"""

#: Lock a barrier that is ready; none where another process is releasing it.
BARRIER_LOCK = """
SELECT id, CAST(call AS text) AS call, body, structure, size FROM {s}pgbarrier_barrier
 WHERE id = :id AND state = 'ready' FOR UPDATE SKIP LOCKED
"""

BARRIER_MEMBERS = """
SELECT id, result FROM {s}pgbarrier_task
 WHERE barrier_id = :id ORDER BY position, created_at, id
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
 WHERE state = 'ready' AND ready_at < clock_timestamp() - make_interval(secs => :grace)
 ORDER BY ready_at LIMIT :limit
"""

#: Renew a lease; a worker that was swept away inserts itself again.
WORKER_BEAT = """
INSERT INTO {s}pgbarrier_worker (id, name, state)
SELECT CAST(:id AS uuid), :name, :state
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS unflushed
ON CONFLICT (id) DO UPDATE SET beat_at = clock_timestamp(), suspect_at = NULL,
    state = EXCLUDED.state
"""

#: A clean end: what is still claimed is released at once, without counting a crash.
WORKER_STOPPED = """
UPDATE {s}pgbarrier_worker SET state = 'stopped', beat_at = clock_timestamp()
 WHERE id = CAST(:id AS uuid)
"""

#: First look: the lease is over.
WORKERS_SUSPECT = """
UPDATE {s}pgbarrier_worker SET suspect_at = clock_timestamp()
 WHERE state IN ('running', 'stopping') AND suspect_at IS NULL
   AND beat_at < clock_timestamp() - make_interval(secs => :lease)
"""

#: Second look: still silent two heartbeats later.
WORKERS_DEAD = """
UPDATE {s}pgbarrier_worker
   SET state = CASE WHEN state = 'stopping' THEN 'stopped' ELSE 'dead' END
 WHERE state IN ('running', 'stopping')
   AND suspect_at < clock_timestamp() - make_interval(secs => :patience)
"""

#: Claims whose worker is dead, stopped or unknown.
CLAIMS_LOST = """
SELECT t.id, CAST(t.token AS text) AS token, CAST(t.worker AS text) AS worker, t.pid, t.rerun,
       t.name, COALESCE(w.state, 'dead') AS holder
  FROM {s}pgbarrier_task t LEFT JOIN {s}pgbarrier_worker w ON w.id = t.worker
 WHERE t.worker IS NOT NULL AND (w.id IS NULL OR w.state IN ('dead', 'stopped'))
 ORDER BY random() LIMIT :limit
"""

#: Workers that are gone, hold nothing and have been gone for long.
WORKERS_PURGE = """
DELETE FROM {s}pgbarrier_worker w
 WHERE w.state IN ('dead', 'stopped')
   AND w.beat_at < clock_timestamp() - make_interval(secs => :age)
   AND NOT EXISTS (SELECT 1 FROM {s}pgbarrier_task t WHERE t.worker = w.id)
"""

#: Messages that should have been claimed by now.
TASKS_DUE = """
SELECT id, queue, published_at, publications, EXTRACT(epoch FROM clock_timestamp() - created_at)
       AS age
  FROM {s}pgbarrier_task
 WHERE due_at <= clock_timestamp() AND state = 'queued'
 ORDER BY due_at LIMIT :limit FOR UPDATE SKIP LOCKED
"""

#: How far each queue has got: the youngest message that is being run (a claim through an old copy
#: of a message that was published again has no time of publication), or that was a probe and has
#: been claimed since.  A probe keeps the time of its earlier publication.
QUEUES_MOVED = """
SELECT queue, max(published_at) AS through FROM {s}pgbarrier_task
 WHERE worker IS NOT NULL AND queue = ANY(CAST(:queues AS text[])) GROUP BY queue
UNION ALL
SELECT q.name, CASE WHEN t.state <> 'queued' AND t.published_at = q.probe_of
                    THEN GREATEST(q.claimed_through, q.probe_of) ELSE q.claimed_through END
  FROM {s}pgbarrier_queue q LEFT JOIN {s}pgbarrier_task t ON t.id = q.probe_id
 WHERE q.name = ANY(CAST(:queues AS text[]))
"""

#: Whether a queue's probe still waits in it; a probe may be lost too, so it counts for a while.
PROBES_OUT = """
SELECT q.name FROM {s}pgbarrier_queue q JOIN {s}pgbarrier_task t ON t.id = q.probe_id
 WHERE q.name = ANY(CAST(:queues AS text[])) AND t.state = 'queued'
   AND q.probe_sent_at > clock_timestamp() - make_interval(secs => :after)
"""

PROBE_SENT = """
INSERT INTO {s}pgbarrier_queue (name, probe_id, probe_of, probe_sent_at, claimed_through)
VALUES (:queue, :id, :of, clock_timestamp(), CAST(:through AS timestamptz))
ON CONFLICT (name) DO UPDATE SET probe_id = EXCLUDED.probe_id, probe_of = EXCLUDED.probe_of,
    probe_sent_at = EXCLUDED.probe_sent_at,
    claimed_through = GREATEST({s}pgbarrier_queue.claimed_through, EXCLUDED.claimed_through)
"""

#: Take messages up: their next due time is set before they are published.
TASKS_ADVANCE = """
UPDATE {s}pgbarrier_task AS t
   SET publications = t.publications + 1, copies = t.copies + 1,
       published_at = CASE WHEN t.id = ANY(CAST(:probes AS text[])) THEN t.published_at
                           ELSE now() + x.place * interval '1 microsecond' END,
       due_at = GREATEST(now(), t.eta)
                + make_interval(secs => :after * power(2, LEAST(t.publications, 12)))
  FROM unnest(CAST(:ids AS text[])) WITH ORDINALITY AS x (id, place)
 WHERE t.id = x.id
RETURNING t.id, t.message, t.copies, x.place
"""

#: Look at messages again later (their queue is a backlog, or the broker is away).
TASKS_DEFER = """
UPDATE {s}pgbarrier_task SET due_at = clock_timestamp() + make_interval(secs => :after),
       published_at = CASE WHEN CAST(:unpublished AS boolean) THEN NULL ELSE published_at END,
       publications = CASE WHEN CAST(:unpublished AS boolean) THEN GREATEST(publications - 1, 0)
                           ELSE publications END
 WHERE id = ANY(CAST(:ids AS text[])) AND state = 'queued'
"""

MESSAGE = "SELECT message, copies FROM {s}pgbarrier_task WHERE id = :id AND state = 'queued'"

#: One pass an interval, whichever worker comes first.
REAPER_TURN = """
UPDATE {s}pgbarrier_reaper SET pass_at = clock_timestamp()
 WHERE id = 1 AND pass_at < clock_timestamp() - make_interval(secs => :interval)
"""

#: Finished rows past their expiry that belong to no barrier.
PURGE_TASKS = """
DELETE FROM {s}pgbarrier_task WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {s}pgbarrier_task WHERE expires_at < clock_timestamp()
     AND state IN ('done', 'untracked') AND barrier_id IS NULL
     ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED))
"""

PURGE_GROUPS = """
DELETE FROM {s}pgbarrier_group WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {s}pgbarrier_group WHERE expires_at < clock_timestamp()
     ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED))
"""

#: The barrier that expired first; its members go before it.
EXPIRED_BARRIER = """
SELECT id FROM {s}pgbarrier_barrier WHERE expires_at < clock_timestamp()
 ORDER BY expires_at LIMIT 1 FOR UPDATE SKIP LOCKED
"""

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


class Statements:
    """The statements of this module as SQLAlchemy clauses for one schema."""

    def __init__(self, schema: str | None) -> None:
        self._prefix = f'"{schema}".' if schema else ""
        self._clauses: dict[str, TextClause] = {}

    def __getitem__(self, template: str) -> TextClause:
        clause = self._clauses.get(template)
        if clause is None:
            clause = self._clauses[template] = text(template.replace("{s}", self._prefix))
        return clause
