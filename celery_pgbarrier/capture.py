"""The one hook into Celery's publishing: task messages are caught on their way out.

Routing, serialisation and ``before_task_publish`` run as ever: only the producer that they end
in is another one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from celery import Celery, current_task
from celery.signals import before_task_publish
from celery.utils.log import get_logger
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.compression import compress
from kombu.serialization import dumps
from kombu.utils.encoding import ensure_bytes

from celery_pgbarrier import compat, plain, reference, stub
from celery_pgbarrier.envelope import Envelope
from celery_pgbarrier.lease import Attempt
from celery_pgbarrier.unit import GRANT, STAMP, Fence, Message, Stamp, Unit

logger = get_logger(__name__)

#: The request attribute that holds the running attempt.
ATTEMPT = "pgb_attempt"


@dataclass(frozen=True)
class _Scope:
    unit: Unit
    outcomes: bool = False
    body: bool = False


_scope: ContextVar[_Scope | None] = ContextVar("pgbarrier_scope", default=None)
_parent_fence: ContextVar[tuple[str, Callable[[], Fence]] | None] = ContextVar(
    "pgbarrier_fence", default=None
)


# -- what is going on in this thread


def attempt_of(request: Any) -> Attempt | None:
    """Return the attempt that a task request belongs to."""
    return getattr(request, ATTEMPT, None)


def current_attempt() -> Attempt | None:
    """Return the attempt that runs in this thread."""
    return attempt_of(getattr(current_task, "request", None)) if current_task else None


def unit_for(task_id: str | None = None) -> Unit | None:
    """Return the unit that a message sent now belongs to, None where it goes out at once.

    While a task's body runs, only its own retry or replacement and the members that it adds to
    its chord wait for its outcome; what is sent after the body belongs to the outcome.
    """
    scope, attempt = _scope.get(), current_attempt()
    if attempt is not None and attempt.phase == "closed":
        attempt = None
    own = (
        attempt is not None
        and task_id is not None
        and (task_id == attempt.task_id or task_id in attempt.added)
    )
    if scope is not None and not (scope.body and own):
        return scope.unit
    if attempt is None:
        return None
    return attempt.unit if attempt.phase == "ended" or own else None


def recording() -> Unit | None:
    """Return the unit that outcomes are being recorded into, None where they are written."""
    scope = _scope.get()
    return scope.unit if scope is not None and scope.outcomes else None


class into:
    """Catch messages of this context in *unit*.

    Parameters:
        outcomes: catch results too.
        body: the task's own code goes on: what carries the task itself on, a retry, stays with
            its attempt.
    """

    __slots__ = ("_scope", "_token")

    def __init__(self, unit: Unit, outcomes: bool = False, body: bool = False) -> None:
        self._scope = _Scope(unit, outcomes, body)

    def __enter__(self) -> Unit:
        self._token = _scope.set(self._scope)
        return self._scope.unit

    def __exit__(self, *_: object) -> None:
        _scope.reset(self._token)


class parent_fence:
    """Write outcomes of a task, if there are any, on the word of the worker's parent."""

    __slots__ = ("_token", "_word")

    def __init__(self, task_id: str, fence: Callable[[], Fence]) -> None:
        self._word = (task_id, fence)

    def __enter__(self) -> None:
        self._token = _parent_fence.set(self._word)

    def __exit__(self, *_: object) -> None:
        _parent_fence.reset(self._token)


def fence_for(task_id: str, request: Any) -> Fence:
    """Return on whose word an outcome that is written here and now stands."""
    attempt = attempt_of(request)
    if attempt is not None and attempt.task_id == task_id:
        return attempt.fence()
    parent = _parent_fence.get()
    if parent is not None and parent[0] == task_id:
        return parent[1]()
    return Fence(has_row=is_recorded(task_id, request))


def is_recorded(task_id: str | None, request: Any) -> bool:
    """Tell whether a task's message was recorded, so that its row waits for an outcome."""
    owner, stamp = Stamp.read(getattr(request, STAMP, None))
    return stamp is not None and stamp.recorded and owner == task_id


# -- the hook


class CapturingProducer:
    """Stands in for a :class:`kombu.Producer` and keeps what it is given to publish."""

    def __init__(self, app: Celery, producer: Any, unit: Unit) -> None:
        self._app = app
        self._producer = producer
        self._unit = unit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **options: Any) -> None:
        """Record a task message; any other message (a task-sent event) is sent after commit."""
        headers = options.get("headers") or {}
        if "task" in headers and "id" in headers:
            self._unit.events.append(self._message(body, headers, options))
        else:
            self._unit.sent_events.append(lambda producer: producer.publish(body, **options))

    def _message(self, body: Any, headers: dict[str, Any], options: dict[str, Any]) -> Message:
        args, kwargs, embed = body
        task_id = headers["id"]
        stamp = Stamp(self._unit.call_of(task_id), 0, True).header(task_id)
        stamped = {**headers, STAMP: stamp}
        stamped.pop(GRANT, None)  # of the run that retries itself
        return Message(
            task_id=task_id,
            name=headers["task"],
            envelope=_envelope(
                (args, kwargs, stub.in_embed(embed)),
                stamped,
                dict(options),
                self._producer.serializer,
            ),
            eta=_aware(self._app, headers.get("eta")),
            group=headers.get("group"),
            in_chord=bool(embed.get("chord")),
            chain=tuple(embed.get("chain") or ()),
            reads=reference.read_by(args),
        )


def _envelope(
    body: Any, headers: dict[str, Any], options: dict[str, Any], serializer: Any
) -> Envelope:
    """Serialise a message as :meth:`kombu.Producer.publish` would."""
    for option in ("headers", "retry", "retry_policy", "timeout", "confirm_timeout"):
        options.pop(option, None)
    content_type, encoding, payload = dumps(body, options.pop("serializer", None) or serializer)
    payload = ensure_bytes(payload)
    compression = options.pop("compression", None)
    if compression:
        payload, headers["compression"] = compress(payload, compression)
    exchange = options.pop("exchange", None)
    declare = [queue.name for queue in options.pop("declare", None) or () if _is_queue(queue)]
    return Envelope(
        body=payload,
        content_type=content_type,
        content_encoding=encoding,
        exchange=getattr(exchange, "name", exchange) or "",
        routing_key=options.pop("routing_key", None) or "",
        headers=headers,
        declare=declare,
        properties={key: value for key, value in options.items() if value is not None},
    )


def _is_queue(entity: Any) -> bool:
    return hasattr(entity, "routing_key") and hasattr(entity, "name")


def _aware(app: Celery, eta: str | None) -> str | None:
    if eta is None:
        return None
    moment: str = maybe_make_aware(maybe_iso8601(eta), app.timezone).isoformat()
    return moment


def _stamp(headers: dict[str, Any] | None = None, **_: Any) -> None:
    """Give every task message a stamp; one that was passed on from another task is replaced."""
    if not headers or "id" not in headers:
        return
    if Stamp.read(headers.get(STAMP))[0] != headers["id"]:
        headers[STAMP] = Stamp(str(uuid.uuid4())).header(headers["id"])


before_task_publish.connect(_stamp, weak=False)


def install(app: Celery) -> None:
    """Hook into an app's publishing; a second call changes nothing."""
    sender = app.amqp.send_task_message
    if getattr(sender, "_pgbarrier", False):
        return

    @wraps(sender)
    def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
        unit = unit_for(message.headers.get("id"))
        if unit is not None:
            producer = CapturingProducer(app, producer, unit)
        else:
            plain.sends_itself(message.headers.get("id"), message.headers)
        return sender(producer, name, message, **options)

    send_task_message._pgbarrier = True  # type: ignore[attr-defined]
    app.amqp.send_task_message = send_task_message


def hold_revokes(app: Celery) -> None:
    """Let revokes that are sent while outcomes are recorded follow the commit.

    Celery revokes the tasks of a group body that it has failed: a worker that hears of it before
    their failures are there would store them as revoked.
    """
    revoke = app.control.revoke
    if getattr(revoke, "_pgbarrier", False):
        return

    @wraps(revoke)
    def held(*arguments: Any, **options: Any) -> Any:
        unit = recording()
        if unit is None:
            return revoke(*arguments, **options)
        unit.inline.append(partial(_try, revoke, *arguments, **options))
        return None

    held._pgbarrier = True  # type: ignore[attr-defined]
    app.control.revoke = held


def _try(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Do what may fail once all that matters is committed."""
    try:
        call(*arguments, **options)
    except Exception as error:
        logger.warning("A revoke was not sent, of tasks that have failed: %s", error)


Record = Callable[[Unit], None]


def wrap_chords(recorder: Callable[[Celery], Record | None]) -> None:
    """Record every chord as one unit.

    Parameters:
        recorder: given the app of a chord that starts, returns what records its unit, or None
            where the app has another result backend.
    """

    def wrap_run(original: compat.Run) -> compat.Run:
        @wraps(original)
        def run(self: Any, header: Any, body: Any, partial_args: Any, **options: Any) -> Any:
            record = recorder(options.get("app") or self._get_app(body))
            call = partial(original, self, header, body, partial_args, **options)
            return call() if record is None else _recorded(call, record)

        return run

    def wrap_apply(original: compat.Run) -> compat.Run:
        @wraps(original)
        def apply_async(self: Any, *args: Any, **options: Any) -> Any:
            call, waiting = partial(original, self, *args, **options), _waiting.get()
            if waiting is None or waiting.group_id != options.get("task_id"):
                return call()
            _waiting.set(None)
            return _recorded(call, waiting.record, waiting.unit)

        return apply_async

    compat.wrap_chord_run(wrap_run)
    compat.wrap_group_apply(wrap_apply)


def _recorded(call: Callable[[], Any], record: Record, unit: Unit | None = None) -> Any:
    """Call what publishes a canvas and record it, with the canvas around it if there is one."""
    if unit_for() is not None:
        return call()
    unit = unit or new_unit()
    with into(unit):
        result = call()
    record(unit)
    return result


def new_unit() -> Unit:
    """Return a unit for what is called here: on its own, or in the body of a claimed task."""
    attempt = current_attempt()
    return Unit(attempt.stamp.call if attempt else None)


@dataclass(frozen=True)
class _Waiting:
    group_id: str
    unit: Unit
    record: Record


_waiting: ContextVar[_Waiting | None] = ContextVar("pgbarrier_waiting", default=None)


def record_with_header(group_id: str, unit: Unit, record: Record) -> None:
    """Record a unit together with the header that is about to be published under *group_id*.

    For the chord whose call loaded this package: its ``run`` began before it could be wrapped.
    """
    _waiting.set(_Waiting(group_id, unit, record))
