"""Celery's private names that are used here, in one place.

Checked against Celery 5.5.3, 5.6.3 and 5.7.0:

- ``Backend._errback_arity_greater`` (5.7) and :func:`celery.utils.functional.arity_greater`
  (before): how Celery tells errbacks that it runs inline, with ``(request, exc, traceback)``, from
  those that it sends as a task with the failed task's id.
- ``canvas._chord.run``: the method that publishes a chord; it is wrapped, not replaced.
- ``canvas.group.apply_async``: called by ``_chord.run`` for the header after ``apply_chord``; it is
  wrapped for the one chord call during which the backend, and with it this package, is loaded.
- ``kombu.transport.virtual.Channel._size``: how many messages wait in a queue of a transport like
  Redis; its public passive declaration leaves out ``global_keyprefix`` (kombu 5.5 to 5.6).
- ``kombu.Message._state``: set where acknowledgements of many messages are written together.
- ``Consumer.restart_count``: whether a consumer has lost its connection; each acknowledgement
  then raises the prefetch count again, as Celery wants it.
- ``Request._request_dict``: the headers of the message of a request, in a worker's parent.
- ``WorkController.semaphore`` and ``pool_start_method``: which pool a worker has.
- ``Task.request_stack``/``celery.current_task``: the request of the task that runs in this thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery
from celery._state import get_current_task
from celery.canvas import _chord, group
from celery.exceptions import NotRegistered, TaskRevokedError
from celery.utils.functional import _regen, arity_greater
from kombu.serialization import registry

Run = Callable[..., Any]


def is_lazy(results: Any) -> bool:
    """Tell whether a header's results come from a generator that must not be exhausted."""
    return isinstance(results, _regen)


def wrap_chord_run(wrapper: Callable[[Run], Run]) -> None:
    """Wrap the method that publishes every chord."""
    _chord.run = wrapper(_chord.run)


def wrap_group_apply(wrapper: Callable[[Run], Run]) -> None:
    """Wrap the method that publishes every group."""
    group.apply_async = wrapper(group.apply_async)


def split_errbacks(app: Celery, backend: Any, errbacks: Any) -> tuple[list[Any], list[Any]]:
    """Return the errbacks that Celery runs inline, and those that it sends as messages."""
    inline: list[Any] = []
    sent: list[Any] = []
    for errback in errbacks or ():
        signature = app.signature(errback)
        (inline if _runs_inline(backend, signature) else sent).append(errback)
    return inline, sent


def _runs_inline(backend: Any, errback: Any) -> bool:
    try:
        header = getattr(errback.type, "__header__", None)
    except NotRegistered:
        return False
    if header is None or isinstance(header, partial):
        return False
    counter = getattr(backend, "_errback_arity_greater", None)
    if counter is not None:
        return bool(counter(errback, 1))
    return bool(arity_greater(header, 1))


def request_header(request: Any, name: str) -> Any:
    """Return a header of the message that a worker's request was made of, None without it."""
    return request._request_dict.get(name)


def set_acknowledged(message: Any) -> None:
    """Take note that a kombu message is acknowledged."""
    message._state = "ACK"


def restarted(consumer: Any) -> bool:
    """Tell whether a worker's consumer has lost its connection before."""
    return bool(consumer.restart_count > 0)


def forks_with_event_loop(worker: Any) -> bool:
    """Tell whether a worker forks its pool and sends it requests from an event loop."""
    return worker.semaphore is not None and worker.pool_start_method == "fork"


def queue_depth(channel: Any, name: str) -> int:
    """Return how many messages wait in a queue; an error of the channel where it is gone."""
    size = getattr(channel, "_size", None)
    if size is not None:
        return int(size(name))
    return int(channel.queue_declare(name, passive=True).message_count)


def revoked(reason: str) -> TaskRevokedError:
    """Return the error that Celery stores for a revoked task."""
    return TaskRevokedError(reason)


def current_task() -> Any:
    """Return the task that runs in this thread, None where there is none."""
    return get_current_task()


def current_task_id() -> str | None:
    """Return the id of the task that runs in this thread."""
    task = get_current_task()
    return task.request.id if task else None


def serializer_for(content_type: str | None) -> str | None:
    """Return the name of the serializer of a content type."""
    name: str | None = registry.type_to_name.get(content_type)
    return name


#: The headers of a task message (protocol 2), as in ``celery.app.amqp.AMQP.as_task_v2``.
_HEADERS = (
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries",
    "timelimit", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result",
    "replaced_task_nesting", "stamped_headers", "stamps",
)  # fmt: skip


def message_headers(request: Any) -> dict[str, Any]:
    """Return the message headers that a running task's request was made of."""
    headers = dict(request.headers or {})
    for own in ("pgb_content", "pgb_attempt", "pgb_grant", "properties"):
        headers.pop(own, None)
    headers.update({key: getattr(request, key, None) for key in _HEADERS})
    headers.update(task=request.task, lang="py")
    return headers
