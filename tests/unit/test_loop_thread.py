"""`aiockpt.loop_thread`: coroutines on a loop of their own, and their callers."""

import asyncio
import contextlib
import inspect
import queue
import random
import signal
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from typing import Any

import pytest

import aiockpt.loop_thread
from aiockpt.loop_thread import Call, LoopThread
from aiockpt.threads import outlast
from gates import LIMIT_S, Gate, in_thread, turns
from thread_work import (
    ALL_WAYS,
    Tensor,
    WorkError,
    no_cycle_collector,
    nothing_is_lost,
)

interrupted = pytest.mark.parametrize("interrupted", ALL_WAYS)


@pytest.fixture
async def loses_nothing() -> AsyncIterator[None]:
    async with nothing_is_lost():
        yield


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread("test-loop", lambda: None)
    yield thread
    thread.stop()
    thread.join()


@contextlib.contextmanager
def standing_still(thread: LoopThread) -> Iterator[None]:
    """What is asked of the loop meanwhile happens in one turn of it, in that order."""
    reached, may_go_on = queue.SimpleQueue[None](), queue.SimpleQueue[None]()

    def stand_still() -> None:
        reached.put(None)
        may_go_on.get(timeout=LIMIT_S)

    thread.run_soon(stand_still)
    reached.get(timeout=LIMIT_S)
    try:
        yield
    finally:
        may_go_on.put(None)


async def blocked(call: Call[Any]) -> object:
    """What `call.result` gives to a caller that blocks its thread, which is not ours."""
    return await asyncio.wrap_future(in_thread(call.result))


async def give(value: object) -> object:
    await asyncio.sleep(0)
    return value


async def test_a_coroutine_runs_on_the_thread_and_its_result_comes_back(loop_thread):
    async def where() -> tuple[bool, str]:
        return loop_thread.is_current, threading.current_thread().name

    assert await loop_thread.spawn(where()).wait() == (True, "test-loop")
    assert await blocked(loop_thread.spawn(where())) == (True, "test-loop")
    assert not loop_thread.is_current


async def test_several_waiters_get_the_same_result(loop_thread):
    call = loop_thread.spawn(give(7))
    other = in_thread(call.result)
    assert await call.wait() == 7
    assert await asyncio.gather(call.wait(), call.wait()) == [7, 7]
    assert call.result() == 7
    assert other.result(LIMIT_S) == 7


async def test_an_error_reaches_the_caller_and_nobody_else(loop_thread, loses_nothing):
    error = WorkError("why")
    gate = asyncio.Event()

    async def fail() -> None:
        raise error

    other = loop_thread.spawn(gate.wait())
    with pytest.raises(WorkError) as raised:
        await loop_thread.spawn(fail()).wait()
    assert raised.value is error
    with pytest.raises(WorkError):
        await blocked(loop_thread.spawn(fail()))
    loop_thread.run_soon(gate.set)
    assert await other.wait()


def test_even_an_exit_in_a_coroutine_is_the_callers_affair(loop_thread):
    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        loop_thread.spawn(leave()).result()
    assert loop_thread.spawn(give(1)).result() == 1


def test_work_goes_on_while_the_callers_loop_stands_still(loop_thread):
    done = threading.Event()

    async def work() -> None:
        await asyncio.sleep(0)
        done.set()

    async def main() -> None:
        call = loop_thread.spawn(work())
        assert done.wait(LIMIT_S)  # blocks this loop
        await call.wait()

    asyncio.run(main())


class Undone:
    """A coroutine that takes its time to end when it is cancelled."""

    def __init__(self) -> None:
        self.began = Gate()
        self.began.open()
        self.undoing = Gate()
        self.undoing.open()
        self.may_end = asyncio.Event()
        self.has_ended = False
        self.num_cancellations = 0

    async def run(self, end: Callable[[], object]) -> object:
        self.began.pass_through()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.undoing.pass_through()
            task = asyncio.current_task()
            assert task is not None
            await outlast(self.may_end.wait())
            self.num_cancellations = task.cancelling()
            self.has_ended = True
            return end()
        raise AssertionError


def reraise() -> None:
    raise asyncio.CancelledError


def complete() -> str:
    return "done"


def fail() -> None:
    raise WorkError("why")


def check_told(interruption: BaseException, end: Callable[[], object]) -> None:
    """An interruption says what became of the work in spite of it."""
    notes = getattr(interruption, "__notes__", [])
    completed = ["the operation completed before the cancellation"]
    assert notes == (completed if end is complete else [])
    assert isinstance(interruption.__context__, WorkError) == (end is fail)


@interrupted
@pytest.mark.parametrize("end", [reraise, complete, fail])
async def test_an_interrupted_caller_waits_until_its_call_has_been_undone(
    loop_thread, interrupted, end, loses_nothing
):
    undone = Undone()
    had_ended: list[bool] = []

    async def caller() -> None:
        try:
            await loop_thread.spawn(undone.run(end)).wait()
        finally:
            had_ended.append(undone.has_ended)

    async def finish() -> None:
        await undone.undoing.reached()
        await turns()
        loop_thread.run_soon(undone.may_end.set)

    cancelled = await interrupted(caller(), undone.began.reached, finish)
    assert had_ended == [True]
    assert undone.num_cancellations == 1
    check_told(cancelled, end)


async def test_a_call_cancelled_before_its_first_step_never_begins(
    loop_thread, loses_nothing
):
    begun: list[str] = []

    async def work() -> None:
        begun.append("work")

    coroutine = work()
    with standing_still(loop_thread):
        task = asyncio.create_task(loop_thread.spawn(coroutine).wait())
        await turns()
        task.cancel()
        await turns()
    _, waiting = await asyncio.wait([task], timeout=LIMIT_S)
    assert not waiting
    assert task.cancelled()
    assert begun == []
    # Otherwise Python would warn of it, whenever it comes to that.
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@pytest.fixture
def held_runner(monkeypatch) -> Iterator[Gate]:
    """A loop thread that is made now stands at the gate before its loop begins."""
    gate = Gate()
    runner = asyncio.Runner

    def late_runner(**kwargs: Any) -> asyncio.Runner:
        gate.pass_through()
        return runner(**kwargs)

    monkeypatch.setattr(aiockpt.loop_thread.asyncio, "Runner", late_runner)
    yield gate
    gate.open()


async def test_a_call_cancelled_before_the_loop_has_begun_never_begins(
    held_runner, loop_thread, loses_nothing
):
    begun: list[str] = []

    async def work() -> None:
        begun.append("work")

    task = asyncio.create_task(loop_thread.spawn(work()).wait())
    other = loop_thread.spawn(give(5))
    await turns()
    task.cancel()
    await turns()
    held_runner.open()
    _, waiting = await asyncio.wait([task], timeout=LIMIT_S)
    assert not waiting
    assert task.cancelled()
    assert begun == []
    assert await other.wait() == 5


async def test_a_call_made_before_the_loop_has_begun_is_not_kept(
    held_runner, loop_thread
):
    with no_cycle_collector():
        tensor = Tensor()
        was_freed = tensor.was_freed
        call = loop_thread.spawn(give(tensor))
        held_runner.open()
        assert await call.wait() is tensor
        del call, tensor
        assert was_freed.wait(LIMIT_S)


async def test_a_call_keeps_nothing_of_its_coroutine(loop_thread):
    async def use(tensor: Tensor) -> None:
        await asyncio.sleep(0)

    with no_cycle_collector():
        tensor = Tensor()
        was_freed = tensor.was_freed
        call = loop_thread.spawn(use(tensor))
        del tensor
        await call.wait()
        assert was_freed.wait(LIMIT_S)


async def test_a_result_that_was_fetched_is_the_callers_alone(loop_thread):
    told: queue.SimpleQueue[None] = queue.SimpleQueue()

    async def make() -> Tensor:
        return Tensor()

    with no_cycle_collector():
        call = loop_thread.spawn(make())
        call.add_done_callback(lambda _: told.put(None))
        was_freed = (await call.wait()).was_freed
        del call
        assert was_freed.wait(LIMIT_S)
    assert told.qsize() == 1


async def test_a_cancellation_that_comes_with_the_calls_result_is_raised(loop_thread):
    with standing_still(loop_thread):
        task = asyncio.create_task(loop_thread.spawn(give(1)).wait())
        await turns()
    # Blocks this loop until both are done.
    in_thread(loop_thread.spawn(give(2)).result).result(LIMIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    assert raised.value.__notes__ == ["the operation completed before the cancellation"]


async def test_a_caller_can_wait_under_any_loop(loop_thread):
    for _ in range(3):
        assert (
            in_thread(lambda: asyncio.run(loop_thread.spawn(give(4)).wait())).result(
                LIMIT_S
            )
            == 4
        )


@pytest.mark.parametrize("end", [reraise, complete, fail])
async def test_the_end_of_a_call_can_be_awaited_whatever_it_is(
    loop_thread, end, loses_nothing
):
    async def work() -> object:
        await asyncio.sleep(0)
        return end()

    call = loop_thread.spawn(work())
    await call.ended()
    await call.ended()


async def test_a_call_tells_when_it_has_ended(loop_thread):
    told: asyncio.Future[Call[object]] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    call = loop_thread.spawn(give(1))
    call.add_done_callback(lambda c: loop.call_soon_threadsafe(told.set_result, c))
    assert await told is call


@pytest.mark.parametrize("end", [reraise, complete, fail])
def test_ctrl_c_cancels_what_is_waited_for_and_waits_until_it_is_undone(
    loop_thread, end, monkeypatch
):
    undone = Undone()
    call = loop_thread.spawn(undone.run(end))
    undone.began.wait_reached()
    block = call._block

    def waits_again() -> None:
        loop_thread.run_soon(undone.may_end.set)
        block()

    def waits() -> None:
        monkeypatch.setattr(call, "_block", waits_again)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(call, "_block", waits)
    try:
        with pytest.raises(KeyboardInterrupt) as interrupted:
            call.result()
        assert undone.has_ended
    finally:
        loop_thread.run_soon(undone.may_end.set)
    check_told(interrupted.value, end)
    assert loop_thread.spawn(give(1)).result() == 1


@pytest.mark.parametrize("end", [reraise, complete, fail])
def test_ctrl_c_between_the_start_of_a_call_and_the_wait_for_it_cancels_it(
    loop_thread, end, monkeypatch
):
    undone = Undone()
    call = Call(undone.run(end))
    block = call._block

    def waits() -> None:
        loop_thread.run_soon(undone.may_end.set)
        block()

    def spawn(call: Call[object]) -> None:
        loop_thread.spawn(call)
        undone.began.wait_reached()
        monkeypatch.setattr(call, "_block", waits)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    try:
        with pytest.raises(KeyboardInterrupt) as interrupted:
            call.run(spawn)
        assert undone.has_ended
    finally:
        loop_thread.run_soon(undone.may_end.set)
    check_told(interrupted.value, end)


def test_ctrl_c_that_wakes_another_thread_is_heard_by_the_one_that_waits(loop_thread):
    waiting = threading.get_ident()

    def is_blocked() -> bool:
        stack = traceback.walk_stack(sys._current_frames()[waiting])
        return "_block" in [frame.f_code.co_name for frame, _ in stack]

    def interrupt_this_thread() -> None:
        while not is_blocked():
            pass
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    def spawn(call: Call[object]) -> None:
        loop_thread.spawn(call)
        in_thread(interrupt_this_thread)

    with pytest.raises(KeyboardInterrupt):
        Call(asyncio.Event().wait()).run(spawn)


@pytest.mark.filterwarnings("error")
def test_a_call_that_was_not_started_before_its_thread_ended_is_closed(loop_thread):
    def spawn(call: Call[object]) -> None:
        call.give_to(loop_thread)
        loop_thread.stop()
        loop_thread.join()
        signal.raise_signal(signal.SIGINT)

    work = give(1)
    with pytest.raises(KeyboardInterrupt):
        Call(work).run(spawn)
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("is_given", [False, True])
def test_a_call_that_ctrl_c_keeps_from_being_started_never_begins(
    loop_thread, is_given
):
    def spawn(call: Call[object]) -> None:
        if is_given:
            call.give_to(loop_thread)
        signal.raise_signal(signal.SIGINT)

    work = give(1)
    with pytest.raises(KeyboardInterrupt):
        Call(work).run(spawn)
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED


def test_a_call_cancelled_from_within_says_so_to_a_blocked_caller(loop_thread):
    async def give_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(futures.CancelledError):
        loop_thread.spawn(give_up()).result()


# --- its end --------------------------------------------------------------------------


async def test_a_thread_ends_when_its_tasks_have():
    ends: list[str] = []
    thread = LoopThread("ending", lambda: ends.append(threading.current_thread().name))
    may_end = asyncio.Event()

    async def work() -> str:
        await may_end.wait()
        ends.append("work")
        return "done"

    call = thread.spawn(work())
    thread.stop()
    thread.stop()
    ended = asyncio.create_task(thread.ended())
    await turns()
    assert not ended.done()
    thread.run_soon(may_end.set)
    await ended
    assert call.result() == "done"
    assert ends == ["work", "ending"]
    await thread.ended()
    in_thread(thread.join).result(LIMIT_S)


async def test_what_was_spawned_before_the_stop_runs_even_if_it_had_not_begun():
    thread = LoopThread("stopped", lambda: None)
    with standing_still(thread):
        call = thread.spawn(give(3))
        thread.stop()
    assert await call.wait() == 3
    await thread.ended()


def test_a_thread_that_is_ending_refuses_work_and_closes_it():
    thread = LoopThread("refusing", lambda: None)
    thread.stop()
    with pytest.raises(RuntimeError, match="ending"):
        thread.spawn(give(1))  # never awaited: unclosed, this would warn
    thread.join()
    with pytest.raises(RuntimeError, match="ending"):
        thread.spawn(give(1))
    thread.run_soon(int)
    thread.stop()
    thread.join()


async def test_waiting_for_the_end_outlasts_a_cancellation():
    gate = Gate()
    thread = LoopThread("slow", gate.pass_through)
    thread.stop()
    task = asyncio.create_task(thread.ended())
    await gate.reached()
    task.cancel()
    await turns()
    assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("seed", range(6))
def test_everything_spawned_is_answered_whenever_the_thread_is_stopped(seed):
    """Threads spawn and cancel while one stops: each call ends or was refused."""
    rng = random.Random(seed)
    thread = LoopThread("stress", lambda: None)
    start = threading.Barrier(4)
    num_ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    async def work(num_turns: int) -> int:
        await turns(num_turns)
        num_ended.put(1)
        return num_turns

    async def call(seed: int) -> int:
        rng = random.Random(seed)
        tasks: list[asyncio.Task[int]] = []
        start.wait(LIMIT_S)
        with contextlib.suppress(RuntimeError):
            for number in range(40):
                waited = thread.spawn(work(number % 7)).wait()
                tasks.append(asyncio.create_task(waited))
                await turns(rng.randrange(3))
                if rng.random() < 0.3:
                    rng.choice(tasks).cancel()
        if not tasks:
            return 0
        done, waiting = await asyncio.wait(tasks, timeout=LIMIT_S)
        assert not waiting
        return sum(not task.cancelled() for task in done)

    callers = [
        in_thread(lambda s=s: asyncio.run(call(seed * 10 + s))) for s in range(3)
    ]
    start.wait(LIMIT_S)
    for _ in range(rng.randrange(20)):
        thread.run_soon(int)
    thread.stop()
    num_answered = sum(caller.result(LIMIT_S) for caller in callers)
    thread.join()
    assert num_answered <= num_ended.qsize()
