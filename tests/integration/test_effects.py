"""``self.transaction()``: a block's writes, its value and its messages are committed once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord, group

from celery_pgbarrier import TransactionError, poison, reaper
from celery_pgbarrier.backend import BarrierBackend
from celery_pgbarrier.errors import DispatchConflict
from tests.support.charges import Died, charge, die
from tests.support.inline import InlineWorker
from tests.support.tables import Tables
from tests.support.tasks import add, hooked, noted, notes, xsum

Hook = Callable[[str], Callable[[Callable[..., Any]], Callable[..., Any]]]
Charges = Callable[[], list[str]]


def crashing_after_charge(task: Any, value: Any) -> Any:
    """Charge, then die in the first run; return what was stored in the second."""
    first = task.request.id not in _crashed
    with task.transaction("charge") as tx:
        if not tx.done:
            charge(tx, f"value {value}")
            tx.set({"charged": value, "first": first})
    if first:
        _crashed.add(task.request.id)
        raise Died
    return tx.value


_crashed: set[str] = set()


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    return emptied_database_url


# -- committed once


def test_writes_and_value_are_committed_with_the_marker(
    each_driver: Celery, make_worker: Callable[..., InlineWorker], tables: Tables, hook: Hook,
    charges: Charges,
) -> None:  # fmt: skip
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            assert not tx.done
            charge(tx, "a")
            tx.set(("amount", value))
        return tx.value

    result = hooked.delay(7, "charge")
    make_worker().drain()
    assert result.get(timeout=5) == ["amount", 7]  # as a second run would read it
    assert charges() == ["a"]
    (row,) = tables.ask("SELECT * FROM pgbarrier_effect")
    assert (row.task_id, row.step) == (result.id, "charge")


def test_hazard_07_a_run_after_a_crash_is_given_the_stored_value(
    each_driver: Celery, make_worker: Callable[..., InlineWorker], tables: Tables, hook: Hook,
    charges: Charges,
) -> None:  # fmt: skip
    hook("charge")(crashing_after_charge)
    worker, result = make_worker(), hooked.delay(7, "charge")
    die(worker)
    worker.drain()
    assert result.get(timeout=5) == {"charged": 7, "first": True}
    assert charges() == ["value 7"]
    row = tables.task(result.id)
    assert (row.attempt, row.crashes) == (2, 1)


@pytest.mark.parametrize("use", ["session", "connection", "message", "chord", "set"])
def test_a_done_block_is_left_at_its_first_use(
    worker: InlineWorker, hook: Hook, charges: Charges, use: str
) -> None:
    passed: list[str] = []
    uses: dict[str, Callable[[Any], Any]] = {
        "session": lambda tx: charge(tx, "a"),
        "connection": lambda tx: tx.connection,
        "message": lambda tx: add.delay(1, 1),
        "chord": lambda tx: chord([add.s(1, 1)])(xsum.s()),
        "set": lambda tx: tx.set(2),
    }

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            passed.append("entered")
            uses[use](tx)
            passed.append("used")
        if passed.count("entered") == 1:
            raise Died
        return len(passed)

    result = hooked.delay(7, "charge")
    die(worker)
    worker.drain()
    assert result.get(timeout=5) == 3
    assert passed == ["entered", "used", "entered"]


def test_the_marker_outlives_a_retry(worker: InlineWorker, hook: Hook, charges: Charges) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            if not tx.done:
                charge(tx)
                tx.set(task.request.retries)
        if task.request.retries < 3:
            raise task.retry(countdown=0)
        return tx.value

    result = hooked.delay(1, "charge")
    worker.drain()
    assert result.get(timeout=5) == 0
    assert charges() == ["once"]


def test_a_replacement_has_steps_of_its_own(
    worker: InlineWorker, hook: Hook, charges: Charges, tables: Tables
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx, f"value {value}")
        if value < 2:
            raise task.replace(hooked.s(value + 1, "charge"))

    result = hooked.delay(0, "charge")
    worker.drain()
    assert result.get(timeout=5) == 2
    assert charges() == ["value 0", "value 1", "value 2"]
    assert tables.count("effect", "task_id = :id", id=result.id) == 3


def test_a_new_call_of_a_finished_id_is_charged_again(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> None:
        with task.transaction("charge") as tx:
            charge(tx)

    for _ in range(2):
        hooked.apply_async((1, "charge"), task_id="the-same")
        worker.drain()
    assert charges() == ["once", "once"]


def test_a_duplicate_delivery_does_nothing(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> None:
        with task.transaction("charge") as tx:
            charge(tx)

    hooked.delay(1, "charge")
    (message,) = worker.take_all()
    for _ in range(3):
        worker.run(message)
    assert charges() == ["once"]


def test_steps_are_apart(worker: InlineWorker, hook: Hook, charges: Charges) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        for step in ("a", "b"):
            with task.transaction(step) as tx:
                charge(tx, step)
        if task.request.retries == 0:
            raise task.retry(countdown=0)
        with task.transaction("c") as tx:
            charge(tx, "c")

    hooked.delay(1, "charge")
    worker.drain()
    assert charges() == ["a", "b", "c"]


@pytest.mark.settings(pgbarrier_max_crashes=2)
def test_a_poison_task_that_is_put_back_is_not_charged_again(
    worker: InlineWorker, hook: Hook, charges: Charges, backend: BarrierBackend
) -> None:
    dies = [True, True]

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            if not tx.done:
                charge(tx)
                tx.set(len(dies))
        if dies and dies.pop():
            raise Died
        return tx.value

    result = hooked.delay(1, "charge")
    die(worker)
    die(worker)
    assert result.state == "FAILURE"
    poison.retry(backend, result.id)
    worker.drain()
    assert worker.app.AsyncResult(result.id).get(timeout=5) == 2
    assert charges() == ["once"]


# -- rolled back


def test_an_error_in_the_block_rolls_everything_back(
    worker: InlineWorker, hook: Hook, charges: Charges, tables: Tables, tmp_path: Path
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx)
            tx.session.flush()
            noted.delay(1, str(tmp_path / "told"))
            tx.set(1)
            if task.request.retries == 0:
                raise task.retry(countdown=0)
        return "charged"

    result = hooked.delay(1, "charge")
    worker.step()
    assert charges() == []
    assert tables.count("effect") == 0
    assert tables.count("task") == 1
    worker.drain()
    assert result.get(timeout=5) == "charged"
    assert charges() == ["once"]
    assert notes(tmp_path / "told") == ["1"]


def test_an_error_is_raised_as_it_is(
    worker: InlineWorker, hook: Hook, charges: Charges, tables: Tables
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx)
            add.delay(1, 1)
            raise ValueError("as told")

    result = hooked.delay(1, "charge")
    worker.drain()
    with pytest.raises(ValueError, match="as told"):
        result.get(timeout=5)
    assert (charges(), tables.count("effect"), tables.count("task")) == ([], 0, 1)


def test_a_value_that_the_serializer_refuses_rolls_back(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx)
            tx.set(object())

    result = hooked.delay(1, "charge")
    worker.drain()
    with pytest.raises(Exception, match="not JSON serializable"):
        result.get(timeout=5)
    assert charges() == []


# -- messages


def test_messages_are_published_at_the_commit(
    worker: InlineWorker, hook: Hook, tables: Tables, redis_broker: Any, tmp_path: Path
) -> None:
    seen: list[int] = []

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            noted.delay(1, str(tmp_path / "delay"))
            noted.apply_async((2, str(tmp_path / "async")), countdown=0)
            group(noted.s(n, str(tmp_path / "group")) for n in (3, 4)).delay()
            told = chord([add.s(5, 5), add.s(6, 6)])(xsum.s())
            empty = chord([], xsum.s()).delay()
            (add.s(1, 1) | noted.s(str(tmp_path / "chain"))).delay()
            seen.append(redis_broker.depth())
            tx.set([told.id, empty.id])
        seen.append(redis_broker.depth())
        return tx.value

    result = hooked.delay(1, "charge")
    worker.step()
    assert seen[0] == 0
    assert seen[1] >= 7
    worker.drain()
    told, empty = result.get(timeout=5)
    assert worker.app.AsyncResult(told).get(timeout=5) == 22
    assert worker.app.AsyncResult(empty).get(timeout=5) == 0
    lines = {path.name: sorted(notes(path)) for path in tmp_path.iterdir()}
    assert lines == {"delay": ["1"], "async": ["2"], "group": ["3", "4"], "chain": ["2"]}


def test_hazard_27_a_crash_after_the_commit_loses_no_message_and_doubles_none(
    worker: InlineWorker, hook: Hook, tables: Tables, backend: BarrierBackend, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from celery_pgbarrier import faults

    dies = iter([True, False])

    def point(name: str) -> None:
        if name == "effect.committed" and next(dies):
            raise Died

    monkeypatch.setattr(faults, "point", point)

    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge"):
            noted.delay(1, str(tmp_path / "told"))
            chord([add.s(5, 5)])(noted.s(str(tmp_path / "chord")))
        return "done"

    result = hooked.delay(1, "charge")
    die(worker)
    worker.drain()
    assert result.get(timeout=5) == "done"
    assert notes(tmp_path / "told") == []
    tables.overdue()
    reaper.run_once(backend)
    worker.drain()
    assert notes(tmp_path / "told") == ["1"]
    assert notes(tmp_path / "chord") == ["[10]"]


def test_an_id_that_is_in_use_rolls_the_block_back(
    worker: InlineWorker, hook: Hook, charges: Charges, make_worker: Callable[..., InlineWorker]
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        refused = False
        try:
            with task.transaction("charge") as tx:
                charge(tx)
                add.apply_async((1, 1), task_id="the-same")
        except DispatchConflict as error:
            refused = "the-same" in str(error)
        with task.transaction("charge"):  # nothing was committed under this name
            add.apply_async((1, 1), task_id="another")
        return refused

    chord([add.s(1, 1).set(task_id="the-same")])(xsum.s())
    result = hooked.delay(1, "charge")
    held = worker.take()
    worker.drain()
    assert result.get(timeout=5) is True
    assert charges() == []
    assert held is not None


# -- misuse


def misused(worker: InlineWorker, hook: Hook, body: Callable[[Any], Any]) -> None:
    errors: list[Exception] = []

    @hook("misuse")
    def run(task: Any, value: Any) -> None:
        try:
            body(task)
        except TransactionError as error:
            errors.append(error)
            raise

    result = hooked.delay(1, "misuse")
    worker.drain()
    assert len(errors) == 1
    raise errors[0] if not result.successful() else AssertionError("it succeeded")


def test_a_step_that_is_used_twice_is_an_error(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    def body(task: Any) -> None:
        for name in ("a", "b"):
            with task.transaction("charge") as tx:
                charge(tx, name)

    with pytest.raises(TransactionError, match=r"'charge' has been committed by this run.*a name"):
        misused(worker, hook, body)
    assert charges() == ["a"]


def test_a_nested_transaction_is_an_error(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    def body(task: Any) -> None:
        with task.transaction("outer") as outer:
            charge(outer)
            with task.transaction("inner") as inner:
                charge(inner)

    with pytest.raises(TransactionError, match=r"'inner'.*inside another.*begin_nested"):
        misused(worker, hook, body)
    assert charges() == []


def test_a_step_without_a_name_is_an_error(worker: InlineWorker, hook: Hook) -> None:
    def body(task: Any) -> None:
        with task.transaction(""):
            pass

    with pytest.raises(TransactionError, match="the name of a step"):
        misused(worker, hook, body)


def test_a_commit_of_the_connection_inside_is_an_error(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    def body(task: Any) -> None:
        with task.transaction("charge") as tx:
            charge(tx)
            tx.session.flush()
            tx.connection.commit()

    with pytest.raises(TransactionError, match="take the commit out of the block"):
        misused(worker, hook, body)
    assert charges() == []


def test_a_rollback_inside_is_an_error(worker: InlineWorker, hook: Hook, charges: Charges) -> None:
    def body(task: Any) -> None:
        with task.transaction("charge") as tx:
            charge(tx)
            tx.session.flush()
            tx.session.rollback()

    with pytest.raises(TransactionError, match="has ended the transaction"):
        misused(worker, hook, body)
    assert charges() == []


def test_savepoints_and_session_commits_stay_inside(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx, "a")
            tx.session.commit()
            with suppress(ValueError), tx.session.begin_nested():
                charge(tx, "b")
                tx.session.flush()
                raise ValueError("inner")
            with tx.session.begin_nested():
                charge(tx, "c")
            if task.request.retries == 0:
                raise task.retry(countdown=0)

    hooked.delay(1, "charge")
    worker.step()
    assert charges() == []
    worker.drain()
    assert charges() == ["a", "c"]


# -- hazard 12: the claim's row is free inside the block


def test_hazard_12_states_and_retries_inside_a_block_do_not_wait_for_it(
    worker: InlineWorker, hook: Hook, charges: Charges, tables: Tables
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx)
            tx.session.flush()
            task.update_state(state="HALF", meta={"done": 1})
            assert tables.task(task.request.id).status == "HALF"
            task.retry(countdown=0, throw=False)
        return "dropped"

    hooked.delay(1, "charge")
    worker.step()
    assert charges() == ["once"]
    worker.step()
    assert charges() == ["once"]


def test_hazard_12_replace_inside_a_block_rolls_it_back(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx)
            raise task.replace(add.s(2, 2))

    result = hooked.delay(1, "charge")
    worker.drain()
    assert result.get(timeout=5) == 4
    assert charges() == []


def test_hazard_12_members_added_inside_a_block_belong_to_the_outcome(
    worker: InlineWorker, hook: Hook, charges: Charges
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx)
            task.add_to_chord(add.s(10, 10))

    result = chord([hooked.s(1, "charge"), add.s(1, 1)])(xsum.s())
    worker.drain()
    assert result.get(timeout=5) == 23
    assert charges() == ["once"]


# -- outside a worker


def test_outside_a_worker_it_is_a_plain_transaction(
    app: Celery, hook: Hook, charges: Charges, tables: Tables, tmp_path: Path, worker: InlineWorker
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> Any:
        with task.transaction("charge") as tx:
            charge(tx)
            noted.delay(value, str(tmp_path / "told"))
            if value == 0:
                raise ValueError("as told")
            tx.set(value)
        assert not tx.done
        return tx.value

    assert hooked(7, "charge") == 7
    assert hooked.apply((8, "charge")).get() == 8
    with pytest.raises(ValueError, match="as told"):
        hooked(0, "charge")
    assert charges() == ["once", "once"]
    assert tables.count("effect") == 0
    worker.drain()
    assert notes(tmp_path / "told") == ["7", "8"]


# -- upkeep


def test_markers_go_after_their_tasks_and_not_before(
    worker: InlineWorker, hook: Hook, tables: Tables, backend: BarrierBackend
) -> None:
    @hook("charge")
    def run(task: Any, value: Any) -> None:
        with task.transaction("charge"):
            pass

    hooked.delay(1, "charge")
    worker.drain()
    hooked.delay(2, "charge")
    waiting = worker.take()
    assert waiting is not None
    tables.ask("UPDATE pgbarrier_effect SET created_at = created_at - interval '1 year'")
    reaper.purge(backend)
    assert tables.count("effect") == 1  # its task's row stands
    tables.expire()
    reaper.purge(backend)
    assert (tables.count("task"), tables.count("effect")) == (0, 0)


@pytest.mark.settings(pgbarrier_batch_size=2)
def test_markers_are_purged_in_batches(tables: Tables, backend: BarrierBackend) -> None:
    tables.ask("""
        INSERT INTO pgbarrier_effect (task_id, call, replaced, step, token, created_at)
        SELECT 'gone', gen_random_uuid(), 0, n::text, gen_random_uuid(), 'epoch'
          FROM generate_series(1, 5) AS n""")
    assert reaper.purge(backend, batches=1) == 2
    assert reaper.purge(backend) == 3
