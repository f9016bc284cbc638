"""Results of a chord by reference: the body's message names the chord, the body's task reads it.

A chord's body gets the list of its members' results as its first argument.  Where that list is
large, the argument is a reference, a small dict, until the task runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, overload

from celery import Celery
from celery.exceptions import Reject
from celery.result import GroupResult

from celery_pgbarrier.errors import DatabaseUnavailable, ResultsGone
from celery_pgbarrier.store import sql
from celery_pgbarrier.unit import Host

#: Ids of tasks with their encoded metadata.
Page = list[tuple[str, bytes | None]]


@dataclass(frozen=True)
class Reference:
    """Which chord's results an argument stands for.

    ``size`` is the number of positions of its header, ``count`` that of its members: more where
    members were added while it ran.
    """

    pgbarrier_results: str
    call: str
    size: int
    count: int

    def argument(self) -> dict[str, Any]:
        """Return the reference as it stands in a message."""
        return asdict(self)

    @classmethod
    def of(cls, value: Any) -> Reference | None:
        """Return the reference that an argument is, None for any other argument."""
        if not isinstance(value, dict) or value.keys() != _FIELDS:
            return None
        return cls(**value)


_FIELDS = set(Reference.__dataclass_fields__)


class Reading(Host, Protocol):
    """A host that can read encoded metadata and group results."""

    def metas(self, payloads: Sequence[bytes]) -> list[dict[str, Any]]: ...

    def read_group(self, payload: bytes) -> Any: ...


def read_by(args: Sequence[Any]) -> str | None:
    """Return the id of the chord whose results a task with these arguments reads."""
    found = Reference.of(args[0]) if args else None
    return found.pgbarrier_results if found else None


def windows(size: int, page: int) -> Iterator[tuple[int, int]]:
    """Yield the pages of a header of *size* positions as half-open ranges."""
    for start in range(0, size, page):
        yield start, min(start + page, size)


# -- who can read


def readable(app: Celery, body: Any) -> bool:
    """Tell whether all tasks that get a body's first argument can read a reference.

    A task that is not registered here may be a plain one elsewhere: it cannot.
    """
    tasks = app.tasks
    return all(getattr(tasks.get(name), "pgbarrier_claims", False) for name in _receivers(body))


def _receivers(signature: Any) -> Iterator[str]:
    """Yield the names of the tasks that the first argument of a canvas goes to."""
    kind, kwargs = signature.get("subtask_type"), signature.get("kwargs") or {}
    if kind == "group":
        yield from _all_receivers(kwargs.get("tasks"))
    elif signature.get("immutable"):
        return
    elif kind == "chain":
        yield from _all_receivers(list(kwargs.get("tasks") or ())[:1])
    elif kind == "chord":
        header = kwargs.get("header")
        yield from _all_receivers([header] if isinstance(header, Mapping) else header)
    else:
        yield signature["task"]


def _all_receivers(tasks: Any) -> Iterator[str]:
    for task in tasks or ():
        yield from _receivers(task)


# -- reading


class LazyResults(Sequence[Any]):
    """Results of a chord in header order, read page by page as they are asked for.

    It keeps the page that was read last.  Reading waits for a database that is away, and in the
    end puts the task back.

    Parameters:
        fetch: returns the results of a range of positions.
        count: how many there are.
        page: how many are read at once.
    """

    def __init__(self, fetch: Callable[[int, int], list[Any]], count: int, page: int) -> None:
        self._fetch = fetch
        self._count = count
        self._page = page
        self._start = 0
        self._values: list[Any] = []

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for start, stop in windows(self._count, self._page):
            yield from self._fetch(start, stop)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        positions = range(self._count)[index]
        if isinstance(positions, int):
            return self._at(positions)
        return [self._at(position) for position in positions]

    def _at(self, position: int) -> Any:
        if not 0 <= position - self._start < len(self._values):
            self._start = position - position % self._page
            stop = min(self._start + self._page, self._count)
            self._values = self._fetch(self._start, stop)
        return self._values[position - self._start]

    def __repr__(self) -> str:
        return f"<LazyResults: {self._count} results>"


def read(host: Reading, found: Reference, lazy: bool) -> Sequence[Any]:
    """Return the results that a reference stands for, as a list.

    Parameters:
        lazy: whether to return :class:`LazyResults` where the header was flat and no member was
            added to it.

    Raises:
        ResultsGone: the chord, or the result of a member, is no more in the database.
        celery.exceptions.Reject: PostgreSQL was away for ``pgbarrier_outcome_timeout``.
    """
    rows = _rows(host, sql.BARRIER_STRUCTURE, {"id": found.pgbarrier_results})
    if not rows or rows[0].call != found.call:
        raise _gone(found)
    structure, page = rows[0].structure, host.settings.batch_size
    if lazy and structure is None and found.size == found.count:
        return LazyResults(partial(_values, host, found), found.count, page)
    values: dict[str, Any] = {}
    for start, stop in windows(found.size, page):
        values.update(_window(host, found, start, stop))
    if len(values) != found.count:
        raise _gone(found)
    return shaped(values, None if structure is None else host.read_group(bytes(structure)))


def shaped(values: dict[str, Any], structure: Any) -> list[Any]:
    """Return results by id in header order, nested as the header was; *values* may be emptied."""
    if structure is None:
        return list(values.values())
    return _nested(structure, values) + list(values.values())


def _nested(result: Any, values: dict[str, Any]) -> list[Any]:
    """Return values in the shape of a group result; they are taken out of *values*."""
    return [
        _nested(child, values) if isinstance(child, GroupResult) else values.pop(child.id)
        for child in result.results
    ]


def _values(host: Reading, found: Reference, start: int, stop: int) -> list[Any]:
    values = [value for _, value in _window(host, found, start, stop)]
    if len(values) != stop - start:
        raise _gone(found)
    return values


def _window(host: Reading, found: Reference, start: int, stop: int) -> Iterator[tuple[str, Any]]:
    window = {"id": found.pgbarrier_results, "start": start, "stop": stop}
    rows = _rows(host, sql.BARRIER_MEMBERS, window)
    if any(row.result is None for row in rows):
        raise _gone(found)
    metas = host.metas([bytes(row.result) for row in rows])
    return zip((row.id for row in rows), (meta["result"] for meta in metas), strict=True)


def _rows(host: Reading, statement: str, parameters: dict[str, Any]) -> list[Any]:
    try:
        return host.database.statement(statement, parameters, host.settings.outcome_timeout)
    except DatabaseUnavailable as error:
        raise Reject(error, requeue=True) from error


def _gone(found: Reference) -> ResultsGone:
    return ResultsGone(
        f"the results of chord {found.pgbarrier_results} are not in the database any more: its "
        "rows were deleted by hand, or the task was called with a reference that it had not got "
        "from the chord"
    )
