"""A signal asks for a last save; the last save is in time, or leaves nothing."""

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

import pytest
import torch

from aiockpt import CheckpointEngine, DeadlineError, EngineStateError, saver
from aiockpt.catalog import Catalog
from aiockpt.deadline import TimedSave
from aiockpt.errors import CheckpointError, InvalidArgumentError, StorageError
from aiockpt.staging import host
from aiockpt.storage import local_write
from aiockpt.sync import CheckpointEngine as BlockingEngine
from gates import (
    LIMIT_S,
    RING_8_MIB,
    EngineSide,
    cancelled_at,
    either,
    failing,
    happened,
    held,
    held_loop,
    in_thread,
    noted_waits,
    run_script,
    turns,
)

OLD = {"w": torch.arange(1000.0)}
# Larger than the ring.
NEW = {"w": torch.arange(9 << 18)}
AN_HOUR_S = 3600.0


@pytest.fixture(autouse=True)
def handlers_are_set_back():
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def before():
    """The signals that came to a handler that was there before the engine's."""
    came: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    yield came
    signal.signal(signal.SIGUSR1, previous)


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_a_signal_ends_the_waiting_under_a_running_loop(root, before):
    async with CheckpointEngine(root) as engine:
        engine.preempt_on(signal.SIGUSR1)
        async with asyncio.TaskGroup() as group:
            waiters = [group.create_task(engine.preempted()) for _ in range(2)]
            # Until it has been asked for on the engine's loop: by this task as well.
            await turns(1)
            await engine.latest()
            assert not engine.is_preempted
            assert not any(waiter.done() for waiter in waiters)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert engine.is_preempted
        await engine.preempted()
    assert before == [signal.SIGUSR1]


class ToldOfWaiting(asyncio.Event):
    """Tells other threads once somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_awaited = threading.Event()

    async def wait(self) -> Literal[True]:
        # Nothing else comes between this and the suspension.
        asyncio.get_running_loop().call_soon(self.is_awaited.set)
        return await super().wait()


def test_a_signal_ends_the_waiting_of_a_thread_that_blocks(root, before):
    with BlockingEngine(root) as engine:
        engine.preempt_on(signal.SIGUSR1, signal.SIGUSR2)
        pid, main = os.getpid(), threading.main_thread().ident
        assert main is not None
        engine._runtime.preemption._changed = changed = ToldOfWaiting()

        def kill() -> None:
            assert changed.is_awaited.wait(LIMIT_S)
            signal.pthread_kill(main, signal.SIGUSR1)

        killed = in_thread(kill)
        engine.preempted()
        killed.result(LIMIT_S)
        assert engine.is_preempted
        os.kill(pid, signal.SIGUSR2)
    assert before == [signal.SIGUSR1]


async def test_a_loops_own_handler_is_called_as_well(root):
    came = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, came.set)
    async with CheckpointEngine(root) as engine:
        engine.preempt_on(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        await engine.preempted()
        await came.wait()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR1)


def test_signals_after_the_close_go_to_the_handler_before(root, before):
    engine = BlockingEngine(root)
    engine.preempt_on(signal.SIGUSR1)
    engine.preempt_on(signal.SIGUSR1)
    engine.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not engine.is_preempted
    assert before == [signal.SIGUSR1]


def test_an_engine_closed_by_another_thread_hands_signals_on(root, before):
    engine = BlockingEngine(root)
    engine.preempt_on(signal.SIGUSR1)
    in_thread(engine.close).result()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not engine.is_preempted
    assert before == [signal.SIGUSR1]


def test_a_handler_that_came_later_keeps_its_place(root, before):
    engine = BlockingEngine(root)
    engine.preempt_on(signal.SIGUSR1)
    ours = signal.getsignal(signal.SIGUSR1)
    later: list[int] = []

    def handle(number, frame) -> None:
        later.append(number)
        ours(number, frame)

    signal.signal(signal.SIGUSR1, handle)
    engine.close()
    assert signal.getsignal(signal.SIGUSR1) is handle
    os.kill(os.getpid(), signal.SIGUSR1)
    assert later == before == [signal.SIGUSR1]


def test_two_engines_are_both_told(root, before):
    with BlockingEngine(root) as one, BlockingEngine(root) as other:
        one.preempt_on(signal.SIGUSR1)
        other.preempt_on(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert one.is_preempted
        assert other.is_preempted
    assert before == [signal.SIGUSR1]


def test_engines_that_end_in_the_order_in_which_they_began_leave_no_handler(
    root, before
):
    previous = signal.getsignal(signal.SIGUSR1)
    engines = [BlockingEngine(root) for _ in range(3)]
    for engine in engines:
        engine.preempt_on(signal.SIGUSR1)
    for engine in engines:
        engine.close()
    assert signal.getsignal(signal.SIGUSR1) is previous


@pytest.mark.parametrize("is_main", [True, False], ids=["main thread", "other thread"])
def test_a_signal_during_the_close_kills_when_all_has_ended(root, monkeypatch, is_main):
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    engine = BlockingEngine(root, RING_8_MIB)
    engine.preempt_on(signal.SIGUSR1)
    engine.create("a")
    engine.save(OLD, "model.pt")
    with held(monkeypatch, Catalog, "close_work") as gate:
        closing = in_thread(engine.close) if not is_main else None
        thread = in_thread(lambda: (gate.wait_reached(), os.kill(os.getpid(), 10)))
        thread.add_done_callback(lambda _: gate.open())
        with contextlib.suppress(EngineStateError):  # the tag was not committed
            engine.close() if closing is None else closing.result()
    assert raised == [signal.SIGUSR1]
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_signal_in_the_last_moment_of_a_close_elsewhere_is_not_lost(
    root, monkeypatch
):
    raised: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    engine, getpid = BlockingEngine(root), os.getpid
    engine.preempt_on(signal.SIGUSR1)

    def close_first() -> int:
        monkeypatch.setattr(os, "getpid", getpid)
        in_thread(engine.close).result(LIMIT_S)
        return getpid()

    # The handler has seen that the engine is open, and not yet noted the signal.
    monkeypatch.setattr(os, "getpid", close_first)
    os.kill(getpid(), signal.SIGUSR1)
    assert raised == [signal.SIGUSR1]
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_closed_engine_does_not_kill_for_a_handler_that_came_later(root):
    engine = BlockingEngine(root)
    engine.preempt_on(signal.SIGUSR1)
    ours, later = signal.getsignal(signal.SIGUSR1), []
    signal.signal(signal.SIGUSR1, lambda *came: (ours(*came), later.append(came[0])))
    engine.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert later == [signal.SIGUSR1]
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.mark.parametrize(
    "end",
    [
        "thread = threading.Thread(target=engine.close); thread.start(); thread.join()",
        "pid = os.fork()\nif pid: os._exit(-os.waitstatus_to_exitcode(os.wait()[1]))",
    ],
    ids=["closed by a thread", "forked child"],
)
def test_where_nobody_saves_any_more_the_signal_still_kills(root, end):
    script = f"""
import os, signal, sys, threading, aiockpt.sync
engine = aiockpt.sync.CheckpointEngine(sys.argv[1])
engine.preempt_on(signal.SIGTERM)
{end}
os.kill(os.getpid(), signal.SIGTERM)
print("alive")
"""
    done = run_script(script, root)
    assert done.stdout == ""
    assert abs(done.returncode) == signal.SIGTERM


async def test_waiting_with_no_signal_to_come_is_refused(root):
    async with CheckpointEngine(root) as engine:
        with pytest.raises(EngineStateError, match="preempt_on"):
            await engine.preempted()


async def test_closing_ends_the_waiting(root, before):
    engine = CheckpointEngine(root)
    engine.preempt_on(signal.SIGUSR1)
    async with asyncio.TaskGroup() as group:
        waiter = group.create_task(raised(engine.preempted()))
        await engine.latest()
        await engine.aclose()
    assert isinstance(waiter.result(), EngineStateError)
    assert "closed before a signal" in str(waiter.result())
    with pytest.raises(EngineStateError, match="has been closed"):
        engine.preempt_on(signal.SIGUSR1)
    with pytest.raises(EngineStateError, match="closed"):
        await engine.preempted()


async def raised(work: Awaitable[object]) -> Exception | None:
    try:
        await work
    except Exception as error:  # noqa: BLE001 - it is what is asked for
        return error
    return None


def test_only_the_main_thread_can_watch_signals(root):
    with BlockingEngine(root) as engine:
        thread = in_thread(lambda: engine.preempt_on(signal.SIGUSR1))
        with pytest.raises(EngineStateError, match="main thread"):
            thread.result()


@pytest.mark.parametrize("signals", [(), (signal.SIGKILL,), (9999,), ("TERM",)])
def test_signals_that_nobody_can_handle_are_refused(root, signals):
    with BlockingEngine(root) as engine:
        with pytest.raises(InvalidArgumentError, match="watch"):
            engine.preempt_on(*signals)


def test_a_handler_that_could_not_be_set_back_is_left_alone(root, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    with BlockingEngine(root) as engine:
        with pytest.raises(EngineStateError, match="other code than Python's"):
            engine.preempt_on(signal.SIGUSR1)
        monkeypatch.undo()


# --- a save with a deadline -------------------------------------------------------


@pytest.fixture
async def engine(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("old")
        await engine.save(OLD, "model.pt")
        await engine.commit("old")
        yield engine


async def assert_dropped(engine: CheckpointEngine) -> None:
    """Nothing is left of the tag "new", and it can be saved again."""
    assert await engine.latest() == "old"
    assert [info.tag for info in await engine.tags()] == ["old"]
    with pytest.raises(EngineStateError, match="not open"):
        await engine.save(NEW, "model.pt", tag="new")
    work = Path(engine.root) / ".aiockpt" / "work"
    assert [path for path in work.glob("*/**/*") if not path.is_dir()] == []
    assert engine.ring_bytes[0] == 0
    await assert_published(engine)


async def assert_published(engine: CheckpointEngine) -> None:
    report = await engine.save_before(AN_HOUR_S, "again", {"model.pt": NEW})
    assert (report.tag, report.num_files) == ("again", 1)
    assert await engine.latest() == "again"
    assert torch.equal((await engine.load("model.pt"))["w"], NEW["w"])
    # Nothing of all this holds optimizers any more.
    engine.wait_staged()


async def test_a_save_in_time_is_a_tag_like_any_other(engine):
    files = {"model.pt": NEW, "sub/model.safetensors": torch.nn.Linear(2, 2)}
    report = await engine.save_before(AN_HOUR_S, "new", files)
    assert (report.tag, report.num_files) == ("new", 2)
    [_, info] = await engine.tags()
    assert {entry.path for entry in info.files} == set(files)
    with pytest.raises(EngineStateError, match="published already"):
        await engine.save_before(AN_HOUR_S, "new", files)
    await engine.save_before(AN_HOUR_S, "new", {"model.pt": OLD}, overwrite=True)
    assert torch.equal((await engine.load("model.pt", tag="new"))["w"], OLD["w"])


class Clock:
    """The limit of the next `save_before`; its time is over when the test says so."""

    def __init__(self, engine: CheckpointEngine, patch: pytest.MonkeyPatch) -> None:
        self._thread = engine._runtime._machinery._thread
        self._limits: list[asyncio.Timeout] = []
        self._missed: Future[None] = Future()
        timeout_at, missed = asyncio.timeout_at, TimedSave._missed

        def limit(when: float) -> asyncio.Timeout:
            self._limits.append(timeout_at(when))
            return self._limits[-1]

        def miss(timed: TimedSave) -> DeadlineError:
            try:
                return missed(timed)
            finally:
                self._missed.set_result(None)

        patch.setattr(asyncio, "timeout_at", limit)
        patch.setattr(TimedSave, "_missed", miss)

    def strike(self) -> None:
        """The time is over."""
        self._thread.run_soon(lambda: self._limits[0].reschedule(0))

    async def noticed(self) -> None:
        """Returns when `save_before` has taken note of it, before it undoes anything."""
        await happened(self._missed)


PHASES = {
    "create": (Catalog, "new_directory"),
    "plan": (saver, "make_plan"),
    "stage": (host, "_fill"),
    "write": (local_write.LocalWriteFile, "_write"),
}


@pytest.mark.parametrize("phase", PHASES)
async def test_a_save_that_is_late_leaves_nothing_and_says_how_late(
    engine, phase, monkeypatch
):
    with monkeypatch.context() as patch:
        clock = Clock(engine, patch)
        with held(patch, *PHASES[phase]) as gate:
            async with asyncio.TaskGroup() as group:
                # One chunk: when it is to be written, all has been staged.
                work = engine.save_before(AN_HOUR_S, "new", {"model.pt": OLD})
                task = group.create_task(raised(work))
                await gate.reached()
                clock.strike()
                if phase == "create":
                    # What is being created is waited for, and only then undone.
                    gate.open()
                await clock.noticed()
                gate.open()
    error = task.result()
    assert isinstance(error, DeadlineError)
    assert isinstance(error, TimeoutError)
    assert error.phase == phase
    whole = OLD["w"].nbytes
    assert whole <= error.missing_bytes <= whole + 4096
    assert f"{phase!r}" in str(error)
    assert f"{error.missing_bytes} bytes" in str(error)
    assert "3600.0 s" in str(error)
    await assert_dropped(engine)


async def test_publishing_that_has_begun_in_time_is_finished(engine, monkeypatch):
    with monkeypatch.context() as patch:
        clock = Clock(engine, patch)
        with held(patch, Catalog, "_show") as gate:
            async with asyncio.TaskGroup() as group:
                work = engine.save_before(AN_HOUR_S, "new", {"model.pt": NEW})
                task = group.create_task(work)
                await gate.reached()
                clock.strike()
                # It has been heard when this answers.
                await engine.staged()
                gate.open()
    assert task.result().tag == "new"
    assert await engine.latest() == "new"


def test_the_blocking_door_has_a_deadline_too(root, monkeypatch):
    with BlockingEngine(root, RING_8_MIB) as engine:
        with held(monkeypatch, local_write.LocalWriteFile, "_write") as gate:
            missed = TimedSave._missed

            def miss(timed: TimedSave) -> DeadlineError:
                gate.open()
                return missed(timed)

            monkeypatch.setattr(TimedSave, "_missed", miss)
            with pytest.raises(DeadlineError):
                engine.save_before(0.1, "new", {"model.pt": NEW})
        assert engine.tags() == []
        assert engine.save_before(AN_HOUR_S, "new", {"model.pt": NEW}).tag == "new"


FAILURES = {
    "create": (Catalog, "new_directory", StorageError(5, "injected", "f")),
    "plan": (saver, "make_plan", StorageError(5, "injected", "f")),
    "publish": (Catalog, "_show", StorageError(5, "injected", "f")),
}


@pytest.mark.parametrize("phase", FAILURES)
async def test_a_save_that_fails_leaves_nothing_either(engine, phase, monkeypatch):
    owner, name, error = FAILURES[phase]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error))
        with pytest.raises(CheckpointError, match="injected"):
            await engine.save_before(AN_HOUR_S, "new", {"model.pt": NEW})
    await assert_dropped(engine)


BAD_FILES = {
    "outside": {"ok.pt": OLD, "../model.pt": NEW},
    "no pickle": {"ok.pt": OLD, "model.pt": {"f": lambda: None}},
    "twice": {"model.pt": OLD, "model.pt/x": NEW},
}


@pytest.mark.parametrize("files", BAD_FILES.values(), ids=BAD_FILES.keys())
async def test_files_that_cannot_be_saved_leave_nothing(engine, files):
    with pytest.raises(InvalidArgumentError):
        await engine.save_before(AN_HOUR_S, "new", files)
    await assert_dropped(engine)


async def test_an_open_tag_of_that_name_is_not_touched(engine):
    await engine.create("new")
    await engine.save(NEW, "model.pt")
    with pytest.raises(EngineStateError, match="open already"):
        await engine.save_before(AN_HOUR_S, "new", {"model.pt": OLD})
    await engine.commit("new")
    assert torch.equal((await engine.load("model.pt"))["w"], NEW["w"])
    await assert_published(engine)


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), "5", None, True])
async def test_a_deadline_that_is_no_time_is_refused(engine, deadline_s):
    with pytest.raises(InvalidArgumentError, match="deadline"):
        await engine.save_before(deadline_s, "new", {"model.pt": NEW})
    await assert_dropped(engine)


async def test_states_are_as_they_were_when_it_was_called(engine, monkeypatch):
    state = {"step": 1, "w": torch.zeros(3)}
    with held(monkeypatch, Catalog, "new_directory") as gate:
        async with asyncio.TaskGroup() as group:
            work = engine.save_before(AN_HOUR_S, "new", {"model.pt": state})
            task = group.create_task(work)
            await gate.reached()
            state["step"] = 2
            gate.open()
    assert task.result().num_files == 1
    assert (await engine.load("model.pt"))["step"] == 1


async def test_optimizers_wait_from_the_call_on(engine, monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(9 << 18))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    waits = noted_waits(monkeypatch)
    with held(monkeypatch, Catalog, "new_directory") as gate:
        async with asyncio.TaskGroup() as group:
            files = {"model.pt": {"w": weight}}
            group.create_task(engine.save_before(AN_HOUR_S, "new", files))
            await gate.reached()
            stepping = in_thread(optimizer.step)
            await either(waits, stepping)
            assert not stepping.done()
            gate.open()
            await asyncio.wrap_future(stepping)
    saved = (await engine.load("model.pt"))["w"]
    assert torch.equal(saved, torch.zeros(9 << 18))
    assert torch.equal(weight.detach(), -torch.ones(9 << 18))


async def test_cancelled_before_it_begins_it_holds_nobody(engine):
    async with asyncio.TaskGroup() as group:
        with held_loop(engine._runtime):
            work = engine.save_before(AN_HOUR_S, "new", {"model.pt": NEW})
            task = group.create_task(work)
            await turns()
            task.cancel()
            await turns()
    assert task.cancelled()
    await assert_dropped(engine)


async def whole_or_gone(engine: CheckpointEngine) -> None:
    tags = [info.tag for info in await engine.tags()]
    if tags == ["old"]:
        await assert_dropped(engine)
    else:
        assert tags == ["old", "new"]
        loaded = await engine.load("model.pt", tag="new")
        assert torch.equal(loaded["w"], NEW["w"])
        await assert_published(engine)


async def test_cancelled_anywhere_the_tag_is_whole_or_gone(root, monkeypatch):
    side = EngineSide(monkeypatch)
    for at in itertools.count(1):
        async with CheckpointEngine(root / str(at), RING_8_MIB) as engine:
            await engine.save_before(AN_HOUR_S, "old", {"model.pt": OLD})
            work = engine.save_before(AN_HOUR_S, "new", {"model.pt": NEW})
            with side.cancelling_at(at):
                with contextlib.suppress(asyncio.CancelledError):
                    await work
            await whole_or_gone(engine)
            if side.num_suspensions < at:
                break
    assert at > 3


async def test_a_caller_that_is_cancelled_anywhere_leaves_it_whole_or_gone(root):
    for at in itertools.count(1):
        async with CheckpointEngine(root / str(at), RING_8_MIB) as engine:
            await engine.save_before(AN_HOUR_S, "old", {"model.pt": OLD})
            work = engine.save_before(AN_HOUR_S, "new", {"model.pt": NEW})
            was_reached = await cancelled_at(at, work)
            await whole_or_gone(engine)
        if not was_reached:
            break
    assert at > 1


def test_what_was_missing_crosses_process_boundaries():
    error = pickle.loads(
        pickle.dumps(DeadlineError("m", phase="plan", missing_bytes=3))
    )
    assert (str(error), error.phase, error.missing_bytes) == ("m", "plan", 3)
