"""Recorded messages: published, overdue, probed for, published again."""

from __future__ import annotations

#: The broker has them, in this order; from now on they are overdue after republish_after.  What is
#: being claimed at this moment needs no mark, and who claims many waits for nobody who marks many.
#: Not flushed: what a crash of the server takes back is published once more.  Each row is found by
#: its id, whatever the statistics say of how many are queued or due.
TASKS_PUBLISHED = """
WITH sent AS MATERIALIZED (
    SELECT held.id, x.place
      FROM unnest(CAST(:ids AS text[])) WITH ORDINALITY AS x (id, place) CROSS JOIN LATERAL (
           SELECT t.id FROM {s}pgbarrier_task t
            WHERE t.id = x.id AND t.state = 'queued' AND t.published_at IS NULL
              AND COALESCE(t.due_at > 'epoch', false)
              FOR UPDATE SKIP LOCKED) AS held
), marked AS (
    UPDATE {s}pgbarrier_task AS t
       SET published_at = now() + sent.place * interval '1 microsecond',
           due_at = GREATEST(now(), t.eta) + make_interval(secs => :after)
      FROM (SELECT set_config('synchronous_commit', 'off', true)) AS unflushed, sent
     WHERE t.id = sent.id
    RETURNING 1
)
SELECT count(*) AS marked FROM marked
"""

#: The same for a few, asked for by their ids besides: see :mod:`.batches`.
TASKS_PUBLISHED_FEW_BODY = TASKS_PUBLISHED.replace(
    "t.id = sent.id", "t.id = ANY(CAST(:ids AS text[])) AND t.id = sent.id"
)

#: The same of messages that were published a moment ago: of tasks that nobody has claimed.  What
#: was claimed may have been put back since, with a message that is still to be published.
TASKS_PUBLISHED_BEFORE = TASKS_PUBLISHED.replace(
    "t.state = 'queued'", "t.state = 'queued' AND t.attempt = 0"
)

#: All messages of these barriers are with the broker.  Not flushed, like the mark.
DISPATCH_DONE = """
DELETE FROM {s}pgbarrier_dispatch AS d
 USING unnest(CAST(:ids AS text[]), CAST(:calls AS uuid[])) AS x (id, call)
 WHERE d.barrier_id = ANY(CAST(:ids AS text[])) AND d.barrier_id = x.id AND d.call = x.call
   AND (SELECT set_config('synchronous_commit', 'off', true)) IS NOT NULL
"""

#: The barrier whose producer should have published its messages first, and has not said so.
DISPATCH_DUE = """
DELETE FROM {s}pgbarrier_dispatch WHERE barrier_id = (
    SELECT barrier_id FROM {s}pgbarrier_dispatch WHERE due_at <= (SELECT clock_timestamp())
     ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING barrier_id
"""

#: Messages of such a barrier that nobody has claimed: the producer may not have published them.
MESSAGES_UNCONFIRMED = """
SELECT id FROM {s}pgbarrier_task
 WHERE barrier_id = :id AND state = 'queued' AND publications = 0
   AND published_at IS NOT NULL AND due_at IS NOT NULL
 ORDER BY position FOR UPDATE SKIP LOCKED
"""

#: Messages that should have been claimed by now.
TASKS_DUE = """
SELECT id, queue, published_at, publications, name, CAST(call AS text) AS call, seq
  FROM {s}pgbarrier_task
 WHERE due_at <= (SELECT clock_timestamp()) AND state = 'queued'
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

#: The broker refused these: they are tried again at doubling intervals, and counted.
TASKS_REFUSED = """
UPDATE {s}pgbarrier_task
   SET published_at = NULL,
       due_at = clock_timestamp()
                + make_interval(secs => :after * power(2, LEAST(publications - 1, 12)))
 WHERE id = ANY(CAST(:ids AS text[])) AND state = 'queued'
"""

#: Look at messages again later: their queue is a backlog.
TASKS_DEFER = """
UPDATE {s}pgbarrier_task SET due_at = clock_timestamp() + make_interval(secs => :after)
 WHERE id = ANY(CAST(:ids AS text[])) AND state = 'queued'
"""

#: The broker is away: these are due again.  Only what it refuses may come to its last publication
#: without having been published (the tenth, see :mod:`celery_pgbarrier.relay`).
TASKS_UNPUBLISHED = """
UPDATE {s}pgbarrier_task
   SET due_at = clock_timestamp() + make_interval(secs => :after), published_at = NULL,
       publications = LEAST(GREATEST(publications - 1, 0), 9)
 WHERE id = ANY(CAST(:ids AS text[])) AND state = 'queued'
"""

#: The messages that are due first, of all queues: of another queue's backlog ``scan`` rows at most
#: are looked through.  Those that were sent, or seen in a worker's hands, so long ago that a queue
#: which is empty has lost them.  What was published once or twice is read only as far as it can be
#: due for that; what was published more often has an index of its own.
_OUT = """
    SELECT id, queue, due_at FROM (
        (SELECT id, queue, due_at, publications, published_at FROM {s}pgbarrier_task
          WHERE due_at < (SELECT clock_timestamp()) + make_interval(secs => :after - :early)
            AND state = 'queued' AND publications <= 1 ORDER BY due_at LIMIT :scan)
        UNION ALL
        (SELECT id, queue, due_at, publications, published_at FROM {s}pgbarrier_task
          WHERE due_at IS NOT NULL AND publications > 1 AND state = 'queued'
          ORDER BY due_at LIMIT :scan)) AS first
     WHERE published_at IS NOT NULL
       AND due_at < clock_timestamp() + make_interval(secs =>
                :after * power(2, LEAST(GREATEST(publications - 1, 0), 12))
                - :early * power(2, LEAST(publications, 13)))
"""

QUEUES_OUT = "SELECT DISTINCT queue FROM (" + _OUT + ") AS messages"

#: Lock messages of queues that are empty, to publish them again.
MESSAGES_LOST = (
    """
SELECT t.id FROM {s}pgbarrier_task t JOIN ("""
    + _OUT
    + """ AND queue = ANY(CAST(:queues AS text[])) ORDER BY due_at LIMIT :limit) AS lost
    ON lost.id = t.id AND lost.due_at = t.due_at
 WHERE t.state = 'queued' ORDER BY t.due_at FOR UPDATE OF t SKIP LOCKED
"""
)

#: A worker has these messages in its hands, behind tasks that take long: they are not lost.
MESSAGES_HELD = """
UPDATE {s}pgbarrier_task AS t
   SET due_at = clock_timestamp() + make_interval(secs =>
            :after * power(2, LEAST(GREATEST(t.publications - 1, 0), 12)))
 WHERE t.id = ANY(ARRAY(
    SELECT h.id FROM {s}pgbarrier_task h
      JOIN unnest(CAST(:ids AS text[]), CAST(:calls AS text[]), CAST(:seqs AS integer[]))
           AS x (id, call, seq)
        ON h.id = x.id AND h.call = CAST(x.call AS uuid) AND h.seq = x.seq
     WHERE h.state = 'queued' AND h.published_at IS NOT NULL AND h.due_at IS NOT NULL
     ORDER BY h.id FOR UPDATE OF h SKIP LOCKED))
"""

MESSAGES = """
SELECT id, message, copies FROM {s}pgbarrier_task
 WHERE id = ANY(CAST(:ids AS text[])) AND state = 'queued' AND message IS NOT NULL
"""
