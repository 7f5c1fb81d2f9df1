"""`aiockpt.threads`: tasks that wait for threads, and outlast their cancellation."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import anyio
import pytest

from aiockpt.loop_thread import Call, LoopThread
from aiockpt.threads import WorkerPool, outlast, run_blocking
from gates import LIMIT_S, Gate, happened, turns
from interrupts import WAYS
from thread_work import (
    ALL_WAYS,
    Job,
    Tensor,
    WorkError,
    no_cycle_collector,
    nothing_is_lost,
    raise_,
)

interrupted = pytest.mark.parametrize("interrupted", ALL_WAYS)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    """One thread: what is submitted second waits for what was submitted first."""
    pool = WorkerPool(1, "test")
    yield pool
    pool.shutdown()


@pytest.fixture
async def loses_nothing() -> AsyncIterator[None]:
    async with nothing_is_lost():
        yield


# --- run_blocking ---------------------------------------------------------------------


async def test_a_blocking_call_returns_what_its_work_returns(pool):
    assert await run_blocking(pool, divmod, 17, 5) == (3, 2)
    assert await run_blocking(pool, "{a}{b}".format, a=1, b=2) == "12"


async def test_a_blocking_call_raises_the_very_error_of_its_work(pool):
    error = WorkError("why")
    with pytest.raises(WorkError) as raised:
        await run_blocking(pool, raise_, error)
    assert raised.value is error


@interrupted
@pytest.mark.parametrize("error", [None, WorkError("why")])
async def test_an_interrupted_call_waits_for_its_thread(
    interrupted, error, pool, loses_nothing
):
    job = Job(error)
    had_ended: list[bool] = []

    async def call() -> None:
        try:
            await run_blocking(pool, job)
        finally:
            had_ended.append(job.has_ended)

    async def finish() -> None:
        await turns()
        assert not had_ended, "the call was over before its thread"
        job.gate.open()

    cancelled = await interrupted(call(), job.gate.reached, finish)
    assert had_ended == [True]
    assert cancelled.__context__ is error


@pytest.mark.parametrize("interrupted", WAYS)
async def test_a_queued_call_that_is_interrupted_never_runs(
    interrupted, pool, loses_nothing
):
    first, second = Job(), Job()
    busy = pool.submit(first)
    is_over = False

    async def call() -> None:
        nonlocal is_over
        try:
            await run_blocking(pool, second)
        finally:
            is_over = True

    async def queued() -> None:
        await first.gate.reached()
        await turns()

    async def finish() -> None:
        await turns()
        assert is_over, "it waits for a job that is never to run"

    try:
        await interrupted(call(), queued, finish)
    finally:
        first.gate.open()
        second.gate.open()
    await happened(busy)
    # The thread has looked at what was queued.
    await run_blocking(pool, int)
    assert not second.has_ended


async def test_a_cancellation_that_comes_with_the_result_is_raised(pool, loses_nothing):
    job = Job()
    task = asyncio.create_task(run_blocking(pool, job))
    await job.gate.reached()
    # The loop, blocked meanwhile, hears of both in one turn.
    job.gate.open()
    futures.wait([pool.submit(int)], LIMIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_scope_does_not_spin_while_its_thread_runs(pool):
    # The loop is idle while the thread works. The thread waits until the loop has
    # turned very often, which must not happen: this is the one test that waits in vain.
    num_turns = 0
    has_spun = threading.Event()
    loop: Any = asyncio.get_running_loop()
    run_once = loop._run_once

    def counted() -> None:
        nonlocal num_turns
        num_turns += 1
        if num_turns > 100:
            has_spun.set()
        run_once()

    entered = Gate()
    spun: list[bool] = []

    def work() -> None:
        entered.pass_through()
        spun.append(has_spun.wait(0.05))

    async def interrupt() -> None:
        await entered.reached()
        scope.cancel()
        loop._run_once = counted
        entered.open()

    async with asyncio.TaskGroup() as group:
        with anyio.CancelScope() as scope:
            group.create_task(interrupt())
            try:
                await run_blocking(pool, work)
            finally:
                del loop._run_once
    assert scope.cancelled_caught
    assert spun == [False]
    assert num_turns < 50


async def test_work_that_raises_stop_iteration_is_an_error_and_not_a_hang(pool):
    # asyncio refuses to take it over: whoever waited would wait for ever.
    error = pool.submit(next, iter(())).exception(LIMIT_S)
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, StopIteration)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await run_blocking(pool, next, iter(()))


# --- outlast --------------------------------------------------------------------------


async def test_outlast_gives_what_its_awaitable_gives(loses_nothing):
    async def give() -> int:
        await asyncio.sleep(0)
        return 3

    async def fail() -> None:
        raise WorkError

    assert await outlast(give()) == 3
    with pytest.raises(WorkError):
        await outlast(fail())


@interrupted
@pytest.mark.parametrize("error", [None, WorkError("why")])
async def test_what_is_outlasted_goes_on_to_its_end(interrupted, error, loses_nothing):
    reached, may_end = asyncio.Event(), asyncio.Event()
    steps: list[str] = []

    async def work() -> None:
        reached.set()
        await may_end.wait()
        await asyncio.sleep(0)
        steps.append("ended")
        if error is not None:
            raise error

    async def call() -> None:
        try:
            await outlast(work())
        finally:
            steps.append("left")

    async def moment() -> None:
        await reached.wait()

    async def finish() -> None:
        await turns()
        may_end.set()

    cancelled = await interrupted(call(), moment, finish)
    assert steps == ["ended", "left"]
    assert cancelled.__context__ is error


async def test_outlast_passes_on_the_cancellation_of_what_it_waits_for():
    waited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(outlast(waited))
    await turns()
    waited.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- what is kept alive ---------------------------------------------------------------


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread("test-loop", lambda: None)
    yield thread
    thread.stop()
    thread.join()


def fail_with(tensor: Tensor) -> None:
    raise WorkError(tensor)


async def fail_later_with(tensor: Tensor) -> None:
    await asyncio.sleep(0)
    raise WorkError(tensor)


async def blocking_call(pool: WorkerPool, thread: LoopThread, tensor: Tensor) -> None:
    await run_blocking(pool, fail_with, tensor)


async def outlasting(pool: WorkerPool, thread: LoopThread, tensor: Tensor) -> None:
    await outlast(fail_later_with(tensor))


async def call_waited(pool: WorkerPool, thread: LoopThread, tensor: Tensor) -> None:
    await thread.spawn(fail_later_with(tensor)).wait()


@pytest.mark.parametrize("call", [blocking_call, outlasting, call_waited])
async def test_an_error_that_was_dropped_keeps_nothing_alive(call, pool, loop_thread):
    async def use() -> threading.Event:
        tensor = Tensor()
        with contextlib.suppress(WorkError):
            await call(pool, loop_thread, tensor)
        return tensor.was_freed

    with no_cycle_collector():
        was_freed = await use()
        assert was_freed.wait(LIMIT_S)


@pytest.mark.parametrize("is_run", [False, True])
def test_an_error_that_a_blocked_caller_dropped_keeps_nothing_alive(
    loop_thread, is_run
):
    with no_cycle_collector():
        tensor = Tensor()
        was_freed = tensor.was_freed
        with contextlib.suppress(WorkError):
            if is_run:
                Call(fail_later_with(tensor)).run(loop_thread.spawn)
            else:
                loop_thread.spawn(fail_later_with(tensor)).result()
        del tensor
        assert was_freed.wait(LIMIT_S)


async def test_a_cancellation_that_was_dropped_keeps_nothing_alive(pool):
    job = Job()

    def work(_: Tensor) -> None:
        job()

    async def use(tensor: Tensor) -> threading.Event:
        with contextlib.suppress(asyncio.CancelledError):
            await run_blocking(pool, work, tensor)
        return tensor.was_freed

    with no_cycle_collector():
        task = asyncio.create_task(use(Tensor()))
        await job.gate.reached()
        task.cancel()
        await turns()
        job.gate.open()
        was_freed = await task
        del task
        assert was_freed.wait(LIMIT_S)
