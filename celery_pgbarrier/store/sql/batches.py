"""Claims and outcomes of many tasks of one busy worker, in one statement each.

They know the usual cases only: what they leave out goes through the statements for one task.  Each
table is asked for the given keys as well as joined by them, and by no column on which a partial
index stands: whatever order a plan takes, it reads these rows and no others (:mod:`.functions`).
"""

from __future__ import annotations

#: Grant tasks that have no row yet, as CLAIM_FIRST does.  ``pid`` 0: no process runs them so far.
#: It is flushed, unlike other first claims: the row may be all there is of a task from then on.
CLAIM_FIRSTS_BODY = """
INSERT INTO {s}pgbarrier_task
       (id, call, seq, state, attempt, token, worker, pid, thread, name, queue, message,
        started_at)
SELECT g.id, g.call, g.seq, 'running', 1, g.token, w.id, 0, 0, g.name, g.queue, g.message,
       clock_timestamp()
  FROM unnest(CAST(:ids AS text[]), CAST(:calls AS uuid[]), CAST(:seqs AS integer[]),
              CAST(:tokens AS uuid[]), CAST(:names AS text[]), CAST(:queues AS text[]),
              CAST(:messages AS bytea[])) AS g (id, call, seq, token, name, queue, message),
       {s}pgbarrier_worker w
 WHERE w.id = CAST(:worker AS uuid) AND w.state <> 'dead'
ON CONFLICT (id) DO NOTHING
RETURNING CAST(token AS text) AS token, barrier_id
"""

#: Grant recorded tasks for the first time, as CLAIM_QUEUED does.
CLAIM_QUEUEDS_BODY = """
UPDATE {s}pgbarrier_task AS t
   SET state = 'running', token = g.token, worker = w.id, pid = 0, thread = 0, rerun = true,
       started_at = clock_timestamp(), due_at = NULL, attempt = 1, expires_at = NULL,
       published_at = CASE WHEN t.copies = g.copy THEN t.published_at END
  FROM unnest(CAST(:ids AS text[]), CAST(:calls AS uuid[]), CAST(:seqs AS integer[]),
              CAST(:copies AS integer[]), CAST(:tokens AS uuid[]))
       AS g (id, call, seq, copy, token),
       {s}pgbarrier_worker w
 WHERE t.id = ANY(CAST(:ids AS text[]))
   AND t.id = g.id AND t.state = 'queued' AND t.call = g.call AND t.seq = g.seq AND t.attempt = 0
   AND w.id = CAST(:worker AS uuid) AND w.state <> 'dead'
RETURNING CAST(t.token AS text) AS token, t.barrier_id,
          set_config('synchronous_commit', 'off', true)
"""

_GIVEN = """
  FROM unnest(CAST(:ids AS text[]), CAST(:tokens AS uuid[]), CAST(:statuses AS text[]),
              CAST(:results AS bytea[]), CAST(:write_tokens AS uuid[]))
       AS g (id, token, status, result, write_token)
 WHERE t.id = ANY(CAST(:ids AS text[]))
   AND t.id = g.id AND t.state = 'running' AND t.token = g.token
"""

_DONE = """
UPDATE {s}pgbarrier_task AS t
   SET state = 'done', status = g.status, result = g.result, token = NULL,
       last_token = g.write_token, worker = NULL, message = NULL, due_at = NULL,
       done_at = clock_timestamp(),
"""

#: The outcomes of claimed attempts of tasks in no chord.
FINISH_ALONES_BODY = (
    _DONE
    + """
       expires_at = clock_timestamp() + make_interval(secs => CAST(:expires AS float8))"""
    + _GIVEN
    + """   AND t.barrier_id IS NULL
RETURNING t.id, CAST(NULL AS text) AS ready
"""
)

#: The outcomes of claimed members, counted: each slot once for all its members, the slots, and
#: then the barriers, locked in one order for all who count many.
FINISH_MEMBERS_BODY = (
    "WITH done AS ("
    + _DONE
    + """
       expires_at = NULL"""
    + _GIVEN
    + """   AND COALESCE(t.barrier_id = ANY(CAST(:barriers AS text[])), false)
    RETURNING t.id, t.barrier_id, t.slot
), counted AS (
    SELECT barrier_id, slot, count(*) AS members FROM done GROUP BY barrier_id, slot
), held AS MATERIALIZED (
    SELECT s.barrier_id, s.slot, counted.members
      FROM counted JOIN {s}pgbarrier_slot s USING (barrier_id, slot)
     WHERE s.barrier_id = ANY(CAST(:barriers AS text[]))
     ORDER BY s.barrier_id, s.slot FOR UPDATE OF s
), slots AS (
    UPDATE {s}pgbarrier_slot AS s SET remaining = s.remaining - held.members FROM held
     WHERE s.barrier_id = ANY(CAST(:barriers AS text[]))
       AND s.barrier_id = held.barrier_id AND s.slot = held.slot
    RETURNING s.barrier_id, s.remaining
), emptied AS (
    SELECT barrier_id, count(*) AS slots FROM slots WHERE remaining = 0 GROUP BY barrier_id
), closing AS MATERIALIZED (
    SELECT b.id, emptied.slots FROM emptied JOIN {s}pgbarrier_barrier b ON b.id = emptied.barrier_id
     WHERE b.id = ANY(CAST(:barriers AS text[]))
     ORDER BY b.id FOR UPDATE OF b
), closed AS (
    UPDATE {s}pgbarrier_barrier AS b
       SET open_slots = b.open_slots - closing.slots,
           state = CASE WHEN b.open_slots = closing.slots AND b.state = 'waiting' THEN 'ready'
                        ELSE b.state END,
           ready_at = CASE WHEN b.open_slots = closing.slots THEN clock_timestamp()
                           ELSE b.ready_at END
      FROM closing WHERE b.id = ANY(CAST(:barriers AS text[])) AND b.id = closing.id
    RETURNING b.id, b.state
)
SELECT id, CAST(NULL AS text) AS ready FROM done
 UNION ALL SELECT NULL, id FROM closed WHERE state = 'ready'
"""
)

#: What was granted in advance is not going to run here: its message is at the broker again, or is
#: published as soon as this is committed, where it was acknowledged (``gone``).
RELEASE_AHEAD = """
UPDATE {s}pgbarrier_task AS t
   SET state = 'queued', token = NULL, worker = NULL,
       copies = t.copies + CAST(g.gone AS integer),
       publications = CASE WHEN g.gone THEN 0 ELSE t.publications END,
       published_at = CASE WHEN g.gone THEN NULL ELSE clock_timestamp() END,
       due_at = clock_timestamp()
                + make_interval(secs => CASE WHEN g.gone THEN CAST(:grace AS float8)
                                             ELSE CAST(:after AS float8) END)
  FROM (SELECT id, token, id = ANY(CAST(:gone AS text[])) AS gone
          FROM unnest(CAST(:ids AS text[]), CAST(:tokens AS uuid[])) AS given (id, token)) AS g
 WHERE t.id = g.id AND t.state = 'running' AND t.token = g.token
"""
