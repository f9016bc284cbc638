"""Results and groups: stored, fetched, waited for, forgotten, expired."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery, states
from celery.backends.base import BaseBackend
from celery.exceptions import ImproperlyConfigured
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import ResultBase, result_from_tuple
from kombu.utils.encoding import ensure_bytes

from celery_pgbarrier import capture, compat, reaper
from celery_pgbarrier.settings import Settings, load
from celery_pgbarrier.store import looks as looking
from celery_pgbarrier.store import sql
from celery_pgbarrier.store.database import Database
from celery_pgbarrier.store.looks import Looks
from celery_pgbarrier.store.url import parse_url, safe_url
from celery_pgbarrier.unit import Outcome

_databases: dict[tuple[Any, ...], Database] = {}
_looks: WeakKeyDictionary[Database, Looks] = WeakKeyDictionary()


class Results(BaseBackend):  # type: ignore[misc]
    """The part of the backend that is a result store."""

    supports_native_join = True
    supports_autoexpire = False
    supports_result_compression = True
    persistent = True

    def __init__(self, app: Celery, url: str | None = None, **options: Any) -> None:
        super().__init__(app=app, url=url, **options)
        self._settings = load(app.conf)
        self._database = _database(app, url or "", self._settings)
        self._looks = _looks.setdefault(self._database, Looks())
        if app.conf.task_protocol != 2:
            raise ImproperlyConfigured("pgbarrier needs task_protocol = 2")

    def private(self) -> Results:
        """Return a backend like this one with a small pool of its own, for a keeper thread."""
        backend = type(self)(app=self.app, url=self.url)
        options = dict(self._database.engine_options)
        if "poolclass" not in options:
            options.update(pool_size=1, max_overflow=1)
        url, settings = self._database.url, self._settings
        backend._database = Database(
            url, settings.schema, settings.auto_migrate, options, _idle_timeout(settings)
        )
        backend._looks = Looks()
        return backend

    # -- what the services need

    @property
    def settings(self) -> Settings:
        """The checked ``pgbarrier_*`` settings."""
        return self._settings

    @property
    def database(self) -> Database:
        """The database of this backend, shared by all threads of the process."""
        return self._database

    @property
    def keep(self) -> float | None:
        """Seconds for which finished rows are kept: results readable, late copies recognised.

        None (for ever) where neither ``result_expires`` nor ``pgbarrier_dedup_expires`` is set.
        """
        expires = self.expires.total_seconds() if self.expires else 0.0
        return max(expires, self._settings.dedup_expires or 0.0) or None

    def prepare_expires(self, value: Any, type: Any = None) -> timedelta | None:
        """Return ``result_expires`` as a duration, None for results that do not expire."""
        seconds = super().prepare_expires(value)
        return timedelta(seconds=seconds) if seconds else None

    def as_uri(self, include_password: bool = False) -> str:
        """Return the backend's URL, without the password unless asked for."""
        url = self._database.url
        return "pgbarrier+" + (
            url.render_as_string(hide_password=False) if include_password else safe_url(url)
        )

    def __reduce__(self, args: Any = (), kwargs: Any = None) -> Any:
        return super().__reduce__(args, {**(kwargs or {}), "url": self.url})

    # -- results

    def _meta(self, result: Any, state: str, traceback: Any, request: Any) -> bytes:
        meta = self._get_result_meta(result, state, traceback, request)
        payload: bytes = ensure_bytes(self.encode(meta))
        return payload

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **options: Any,
    ) -> Any:
        unit = capture.recording()
        if unit is not None and state in states.READY_STATES:
            meta = self._meta(result, state, traceback, request)
            unit.outcomes[task_id] = Outcome(task_id, state, meta)
            return result
        attempt = capture.attempt_of(request)
        if attempt is not None and attempt.phase == "closed" and attempt.task_id == task_id:
            return result
        if attempt is None and _unclaimed(task_id, request):
            return result
        parameters: dict[str, Any] = {
            "id": task_id,
            "status": state,
            "result": self._meta(result, state, traceback, request),
        }
        fence = capture.fence_for(task_id, request)
        if fence.token is not None:
            statement = sql.STATUS_CLAIMED
            parameters["token"] = fence.token
        else:
            statement = sql.STATUS_PLAIN
            parameters["expires"] = self.keep
        self._database.count(statement, parameters, self._settings.dispatch_timeout)
        return result

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        return self._metas([task_id]).get(task_id) or {
            "status": states.PENDING,
            "result": None,
            "task_id": task_id,
        }

    def _metas(self, task_ids: Sequence[str], at: int | None = None) -> dict[str, dict[str, Any]]:
        """Return what is known of tasks; *at* a moment that is shared with other threads."""
        rows = self._rows(task_ids) if at is None else self._looks.look(self._rows, task_ids, at)
        return {row.id: self._read_meta(row.id, row.status, row.result) for row in rows}

    def _rows(self, task_ids: Sequence[str]) -> list[Any]:
        parameters = {"ids": list(task_ids)}
        return self._database.statement(sql.RESULTS, parameters, self._settings.dispatch_timeout)

    def _read_meta(self, task_id: str, status: str, payload: Any) -> dict[str, Any]:
        meta: dict[str, Any] = {"status": status, "result": None}
        if payload is not None:
            meta = self.decode_result(bytes(payload))
        return {**meta, "task_id": task_id}

    def metas(self, payloads: Sequence[bytes]) -> list[dict[str, Any]]:
        """Return the decoded metadata of finished tasks, of many at once where that is JSON."""
        if self.serializer == "json" and all(payload[:1] == b"{" for payload in payloads):
            found = self.decode(b"[" + b",".join(payloads) + b"]")
            return [self.meta_from_decoded(meta) for meta in found]
        return [self.decode_result(payload) for payload in payloads]

    def _forget(self, task_id: str) -> None:
        self._database.count(sql.FORGET, {"id": task_id}, self._settings.dispatch_timeout)

    def _save_group(self, group_id: str, result: ResultBase) -> ResultBase:
        parameters = {
            "id": group_id,
            "result": ensure_bytes(self.encode({"result": self.prepare_value(result)})),
            "expires": self.keep,
        }
        self._database.count(sql.GROUP_SAVE, parameters, self._settings.dispatch_timeout)
        return result

    def _restore_group(self, group_id: str) -> dict[str, Any] | None:
        rows = self._database.statement(
            sql.GROUP_LOAD, {"id": group_id}, self._settings.dispatch_timeout
        )
        if not rows:
            return None
        return {"task_id": group_id, "result": self.read_group(bytes(rows[0].result))}

    def read_group(self, payload: bytes) -> Any:
        """Return an encoded group result; serializers other than pickle hold it as a tuple."""
        value = self.decode(payload)["result"]
        return value if isinstance(value, ResultBase) else result_from_tuple(value, self.app)

    def _delete_group(self, group_id: str) -> None:
        self._database.count(sql.GROUP_DELETE, {"id": group_id}, self._settings.dispatch_timeout)

    def cleanup(self) -> None:
        """Delete expired rows in batches, each its own transaction (``celery.backend_cleanup``)."""
        reaper.purge(self)

    # -- waiting

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Callable[[dict[str, Any]], Any] | None = None,
        on_interval: Callable[[], Any] | None = None,
        max_iterations: int | None = None,
        READY_STATES: Any = states.READY_STATES,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(task_id, meta)`` of tasks as they finish, with one query a poll.

        Threads (or greenlets) that wait at the same time share their polls.

        Parameters:
            timeout: seconds to wait for all of them, None for ever.
            interval: the longest pause between polls in seconds; the first ones are shorter.

        Raises:
            celery.exceptions.TimeoutError: not all were ready in time.
        """
        pending, looks = dict.fromkeys(task_ids), 0
        began = time.monotonic()
        deadline, at = None if timeout is None else began + timeout, None
        while pending:
            for task_id, meta in self._ready(list(pending), READY_STATES, at):
                del pending[task_id]
                if on_message is not None:
                    on_message(meta)
                yield task_id, meta
            looks += 1
            if not pending or (max_iterations and looks >= max_iterations):
                return
            if on_interval is not None:
                on_interval()
            now = time.monotonic()
            wait = looking.pause(now - began, self._looks.took, interval)
            if deadline is not None:
                if now >= deadline:
                    raise CeleryTimeout(f"The operation timed out: {len(pending)} tasks not ready")
                wait = min(wait, deadline - now)
            at = looking.moment(now, wait)

    def _ready(
        self, ids: list[str], ready: Any, at: int | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        known = {task_id: self._cache[task_id] for task_id in ids if task_id in self._cache}
        fresh = self._metas([task_id for task_id in ids if task_id not in known], at)
        for task_id, meta in {**known, **fresh}.items():
            if meta["status"] not in ready:
                continue
            if meta["status"] == states.SUCCESS and task_id not in known:
                self._cache[task_id] = meta
            yield task_id, meta

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], Any] | None = None,
    ) -> dict[str, Any]:
        """Wait for a task and return its meta; parameters and errors as :meth:`get_many`."""
        self._ensure_not_eager()
        found = self.get_many([task_id], timeout, interval, on_interval=on_interval)
        meta = next(meta for _, meta in found)
        if on_interval is not None and meta["status"] in states.PROPAGATE_STATES:
            on_interval()  # the error of a parent that led to this one is raised instead
        return meta


def _database(app: Celery, url: str, settings: Settings) -> Database:
    """Return the process's one database for a URL; backends are made per thread."""
    options = _engine_options(app)
    key = (
        url,
        settings.schema,
        settings.auto_migrate,
        settings.lease,
        repr(sorted(options.items())),
    )
    if key not in _databases:
        _databases[key] = Database(
            parse_url(url), settings.schema, settings.auto_migrate, options, _idle_timeout(settings)
        )
    return _databases[key]


def _idle_timeout(settings: Settings) -> float:
    """Return how long a transaction may pause: a lease, but not less than making a body takes."""
    return max(settings.lease, 10.0)


def _engine_options(app: Celery) -> dict[str, Any]:
    """Return ``database_engine_options`` where the user set them; Celery's defaults ping."""
    if app.conf.value_set_for("database_engine_options"):
        return dict(app.conf.database_engine_options or {})
    return {}


def _unclaimed(task_id: str, request: Any) -> bool:
    """Tell whether a state comes from a claiming task that holds no claim (yet)."""
    task = compat.current_task()
    running = getattr(task, "pgbarrier_claims", False) and not task.request.called_directly
    return bool(running and request is not None and not request.is_eager
                and request.id == task_id and request is task.request)  # fmt: skip
