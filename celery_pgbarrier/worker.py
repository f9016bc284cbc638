"""The worker's parent: lease, audit and reaper, each in a daemon thread with its own connection."""

from __future__ import annotations

import logging
import os
import random
import threading
from typing import Any

from celery import Celery, bootsteps
from celery.signals import task_received, worker_init, worker_process_init, worker_shutdown
from celery.worker import state as worker_state

from celery_pgbarrier import ahead, compat, lease, outbox, reaper
from celery_pgbarrier.errors import DatabaseUnavailable
from celery_pgbarrier.request import BarrierRequest
from celery_pgbarrier.store import sql
from celery_pgbarrier.unit import STAMP, Stamp

logger = logging.getLogger(__name__)

#: How long the end of a worker waits for outcomes that its processes left (seconds).
_SETTLING = 10.0
#: How long the end of a consumer waits for the release of what waits claimed (seconds).
_WITHDRAWING = 1.0
#: Looks at which a claim must be found idle before it is released.
_LOOKS = 2


class Keeper:
    """Keeps a worker's lease, audits its claims and runs the reaper until it is stopped."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._state = "running"
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads.

        Raises:
            ConfigurationError: PostgreSQL refuses the login.
            SchemaError: the tables are missing or of another version.
        """
        self._register()
        self._spawn("heartbeat", self._keep_lease)
        self._spawn("audit", self._keep_auditing)
        if self._backend.settings.reap_in_worker:
            self._spawn("reaper", self._keep_reaping)

    def _register(self) -> None:
        """Beat once; a worker that can never claim must not take messages."""
        host = self._backend.private()
        try:
            lease.beat(host, self._state)
        except DatabaseUnavailable as error:
            logger.warning("The first heartbeat waits for PostgreSQL: %s", error)
        finally:
            host.database.dispose()

    def stopping(self) -> None:
        """Go on beating while the pool drains; what dies from now on is no crash."""
        self._state = lease.boot.state = "stopping"

    def stop(self) -> None:
        """End the threads and give what is still claimed back at once."""
        if ahead.current is not None:
            ahead.current.clerk.stop(_SETTLING)
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=2.0)
        host = self._backend.private()
        try:
            lease.stopped(host)
        except Exception as error:
            logger.warning("The lease of this worker runs out by itself: %s", error)
        finally:
            host.database.dispose()

    def _spawn(self, name: str, target: Any) -> None:
        thread = threading.Thread(target=target, name=f"pgbarrier-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _keep_lease(self) -> None:
        """Beat and do nothing else: nothing that waits for the broker may delay a beat."""
        host = self._backend.private()
        while True:
            try:
                lease.beat(host, self._state, host.settings.heartbeat / 2)
            except Exception as error:
                logger.warning("Heartbeat missed: %s", error)
            if self._stop.wait(host.settings.heartbeat):
                host.database.dispose()
                return

    def _keep_auditing(self) -> None:
        host = self._backend.private()
        idle: dict[str, int] = {}
        held: set[tuple[str, str, int]] = set()
        while not self._stop.wait(host.settings.heartbeat):
            try:
                idle = audit(host, idle)
                held = hold(host, held)
            except Exception as error:
                logger.warning("Audit missed: %s", error)
        host.database.dispose()

    def _keep_reaping(self) -> None:
        host = self._backend.private()
        interval = host.settings.reap_interval
        pause = interval * random.random()
        while not self._stop.wait(pause):
            pause = interval * (0.9 + 0.2 * random.random())
            try:
                if reaper.take_turn(host, interval):
                    reaper.run_once(host)
            except Exception as error:
                logger.warning("Reaper pass missed: %s", error)
        host.database.dispose()


def audit(host: Any, idle: dict[str, int]) -> dict[str, int]:
    """Release claims of this worker that it has not been running for two looks.

    Parameters:
        idle: how often each claim token (or task id) was found idle in a row.

    Returns the same for the next look.
    """
    parameters = {"worker": lease.boot.current(), "limit": host.settings.batch_size}
    claims = host.database.statement(sql.CLAIMS_OF, parameters)
    running = _running()
    seen: dict[str, int] = {}
    settled = False
    for claim in claims:
        key = claim.token or claim.id
        if claim.id in running:
            continue
        seen[key] = idle.get(key, 0) + 1
        if seen[key] >= _LOOKS:
            if not settled and not _all_settled():
                return idle  # it may have left its outcome: the next look tells
            settled = True
            logger.warning("Task %s is claimed but not running, it is settled", claim.id)
            cancelled = claim.id in lease.boot.cancelled or lease.boot.state != "running"
            lease.boot.cancelled.discard(claim.id)
            crash = not (cancelled or _alive(claim.pid))  # 0: no process had begun
            reaper.settle_claim(host, claim, crash, reaper.Counts())
            del seen[key]
    return seen


def _all_settled() -> bool:
    """Tell whether nothing that pool processes left so far waits for its commit."""
    return ahead.current is None or ahead.current.clerk.flush(_WITHDRAWING)


def hold(host: Any, before: set[tuple[str, str, int]]) -> set[tuple[str, str, int]]:
    """Tell of messages that wait in this worker for a free process: the broker has not lost them.

    Parameters:
        before: what waited at the look before; what has come since costs no statement.

    Returns what waits now: id, call and sequence of each.
    """
    waiting = set()
    for request in _snapshot(worker_state.reserved_requests, worker_state.active_requests):
        stamp = Stamp.of(request.id, compat.request_header(request, STAMP))
        if stamp.recorded:
            waiting.add((request.id, stamp.call, stamp.seq))
    kept = sorted(waiting & before)
    if kept:
        ids, calls, seqs = (list(column) for column in zip(*kept, strict=True))
        after = host.settings.republish_after
        parameters = {"ids": ids, "calls": calls, "seqs": seqs, "after": after}
        host.database.count(sql.MESSAGES_HELD, parameters)
    return waiting


def _snapshot(requests: Any, without: Any) -> list[Any]:
    """Return the requests of a set that another thread changes, those of another left out."""
    for _ in range(10):
        try:
            left_out = {request.id for request in without}
            return [request for request in requests if request.id not in left_out]
        except RuntimeError:  # the set changed while it was copied
            continue
    return []


def _running() -> set[str]:
    """Return the ids of the tasks that this worker has handed to its pool and not seen end."""
    active = _snapshot(worker_state.active_requests, ())
    reserved = _snapshot(worker_state.reserved_requests, ())
    return {request.id for request in [*active, *reserved]}


def _alive(pid: int) -> bool:
    if not pid:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# -- hooks into the worker


class BarrierStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts the keeper after the pool; it goes on until the pool has been joined."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        lease.boot.begin(parent.hostname)
        self._keeper: Keeper | None = None

    def create(self, parent: Any) -> None:
        """Prepare what pool processes inherit; the pool starts after this."""
        settings = parent.app.backend.settings
        # Where a first crash is final, a claim must tell of a run.
        wanted = settings.claim_ahead and settings.max_crashes > 1
        if wanted and compat.forks_with_event_loop(parent):
            try:
                ahead.current = ahead.Ahead(settings.claim_ahead, parent.concurrency)
                outbox.marked_later = ahead.current.clerk.sent
            except OSError as error:  # sockets of this kind are Linux's
                logger.info("Each process claims for itself: %s", error)

    def start(self, parent: Any) -> None:
        """Start the keeper once the pool is up."""
        self._keeper = Keeper(parent.app.backend)
        self._keeper.start()
        if ahead.current is not None:
            ahead.current.clerk.start(parent.app.backend.private)
        worker_shutdown.connect(self._shut_down, sender=parent, weak=False)

    def stop(self, parent: Any) -> None:
        """Mark the worker as stopping; its pool still drains."""
        if self._keeper is not None:
            self._keeper.stopping()

    def terminate(self, parent: Any) -> None:
        """Settle what can be settled at once: no shutdown follows, and the pool is killed."""
        self.stop(parent)
        if ahead.current is not None:
            ahead.current.clerk.stop(_WITHDRAWING)

    def _shut_down(self, sender: Any = None, **_: Any) -> None:
        worker_shutdown.disconnect(self._shut_down, sender=sender)
        if self._keeper is not None:
            self._keeper.stop()
            self._keeper = None


class AheadStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Releases what waits claimed when the consumer stops: at shutdown, at a lost connection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Begin again; after a lost connection Celery wants to know of each acknowledgement."""
        if ahead.current is not None:
            ahead.current.resume(together=not compat.restarted(parent))

    def stop(self, parent: Any) -> None:
        """Release it before the broker brings the messages again."""
        if ahead.current is not None:
            ahead.current.withdraw(_WITHDRAWING)


def install(app: Celery) -> None:
    """Give every worker of an app the keeper; a second call changes nothing."""
    app.steps["worker"].add(BarrierStep)
    app.steps["consumer"].add(AheadStep)


def _on_worker_init(sender: Any = None, **_: Any) -> None:
    """Make the backend before the worker's blueprint, so that its step is part of it."""
    url = sender.app.conf.result_backend
    if isinstance(url, str) and url.startswith("pgbarrier"):
        sender.app.backend  # noqa: B018


def _on_task_received(request: Any = None, **_: Any) -> None:
    if ahead.current is not None and isinstance(request, BarrierRequest):
        ahead.current.received(request)


def _on_process_init(**_: Any) -> None:
    if ahead.current is not None:
        ahead.current.clerk.inherit()


worker_init.connect(_on_worker_init, weak=False)
task_received.connect(_on_task_received, weak=False)
worker_process_init.connect(_on_process_init, weak=False)
