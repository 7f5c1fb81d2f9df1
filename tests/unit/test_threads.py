"""`aiockpt.threads`: waiting for threads, worker pools and the loop's thread."""

import asyncio
import contextlib
import gc
import queue
import random
import signal
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import anyio
import pytest

import aiockpt.threads
from aiockpt.threads import Call, LoopThread, WorkerPool, outlast, run_blocking
from gates import LIMIT_S, Gate, happened, in_thread


class WorkError(Exception):
    """What the work in these tests raises; unlike a built-in, it can be weakly held."""


class Job:
    """Blocking work that stands at a gate, and says whether it has ended."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.gate = Gate()
        self.has_ended = False
        self._error = error

    def __call__(self) -> str:
        self.gate.pass_through()
        self.has_ended = True
        if self._error is not None:
            raise self._error
        return "result"


def raise_(error: BaseException) -> None:
    raise error


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    """One thread: what is submitted second waits for what was submitted first."""
    pool = WorkerPool(1, "test")
    yield pool
    pool.shutdown()


@pytest.fixture
async def reported() -> AsyncIterator[list[dict[str, Any]]]:
    """What asyncio has reported as lost on the test's loop: there must be nothing."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: reports.append(context)
    )
    yield reports
    await turns()
    gc.collect(1)  # all that the test made; the whole heap takes too long
    assert not reports


async def turns(num_turns: int = 10) -> None:
    """Lets everything happen on this loop that needs nothing but turns of it."""
    for _ in range(num_turns):
        await asyncio.sleep(0)


# --- being interrupted ----------------------------------------------------------------
#
# Each takes a coroutine, and what to await before and to do after it is interrupted.
# The interruption must come out of the coroutine, and arrive where it belongs.

Moment = Callable[[], Awaitable[object]]
Interruption = Callable[[Coroutine[Any, Any, object], Moment, Moment], Awaitable[None]]


@contextlib.asynccontextmanager
async def meanwhile(*moments: Moment) -> AsyncIterator[None]:
    async def meddle() -> None:
        for moment in moments:
            await moment()

    meddler = asyncio.create_task(meddle())
    try:
        yield
    finally:
        await meddler


async def by_timeout(work, ready, finish) -> None:
    loop = asyncio.get_running_loop()

    async def interrupt() -> None:
        deadline.reschedule(loop.time())
        await turns()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as deadline:
            async with meanwhile(ready, interrupt, finish):
                with pytest.raises(asyncio.CancelledError):
                    await work
                raise asyncio.CancelledError


async def by_cancelling(work, ready, finish, num_times: int = 1) -> None:
    task = asyncio.create_task(work)
    await ready()
    for _ in range(num_times):
        task.cancel()
        await turns()
    await finish()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def by_cancelling_twice(work, ready, finish) -> None:
    await by_cancelling(work, ready, finish, num_times=2)


async def by_a_failing_sibling(work, ready, finish) -> None:
    failing = asyncio.Event()

    async def fail() -> None:
        await ready()
        failing.set()
        raise WorkError

    with pytest.raises(ExceptionGroup) as failure:
        async with meanwhile(failing.wait, turns, finish), asyncio.TaskGroup() as group:
            group.create_task(fail())
            task = group.create_task(work)
    assert [type(error) for error in failure.value.exceptions] == [WorkError]
    assert task.cancelled()


async def by_an_anyio_scope(work, ready, finish) -> None:
    async def interrupt() -> None:
        scope.cancel()
        await turns()

    with anyio.CancelScope() as scope:
        async with meanwhile(ready, interrupt, finish):
            with pytest.raises(asyncio.CancelledError) as interrupted:
                await work
            raise interrupted.value
    assert scope.cancelled_caught
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def by_an_anyio_scope_then_a_task(work, ready, finish) -> None:
    """Of the two, the task's cancellation is the one that must not be dropped."""
    scope = anyio.CancelScope()

    async def in_scope() -> None:
        with scope:
            await work

    task = asyncio.create_task(in_scope())
    await ready()
    scope.cancel()
    await turns()
    task.cancel()
    await turns()
    await finish()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_a_task_then_an_anyio_scope(work, ready, finish) -> None:
    scope = anyio.CancelScope()

    async def in_scope() -> None:
        with scope:
            await work

    task = asyncio.create_task(in_scope())
    await ready()
    task.cancel()
    await turns()
    scope.cancel()
    await turns()
    await finish()
    with pytest.raises(asyncio.CancelledError):
        await task


INTERRUPTIONS = [
    by_timeout,
    by_cancelling,
    by_cancelling_twice,
    by_a_failing_sibling,
    by_an_anyio_scope,
    by_an_anyio_scope_then_a_task,
    by_a_task_then_an_anyio_scope,
]
interrupted = pytest.mark.parametrize("interrupted", INTERRUPTIONS)
interrupted_once = pytest.mark.parametrize(
    "interrupted",
    [by_timeout, by_cancelling, by_a_failing_sibling, by_an_anyio_scope],
)


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
async def test_an_interrupted_call_waits_for_its_thread(pool, interrupted, reported):
    job = Job()
    was_running: list[bool] = []

    async def call() -> None:
        try:
            await run_blocking(pool, job)
        finally:
            was_running.append(not job.has_ended)

    async def finish() -> None:
        assert not was_running, "the call was over before its thread"
        job.gate.open()

    await interrupted(call(), job.gate.reached, finish)
    assert was_running == [False]


@interrupted
async def test_the_error_of_an_interrupted_call_is_its_context(
    pool, interrupted, reported
):
    error = WorkError("why")
    job = Job(error)
    contexts: list[BaseException | None] = []

    async def call() -> None:
        try:
            await run_blocking(pool, job)
        except asyncio.CancelledError as cancelled:
            contexts.append(cancelled.__context__)
            raise

    async def finish() -> None:
        job.gate.open()

    await interrupted(call(), job.gate.reached, finish)
    assert contexts == [error]


@interrupted_once
async def test_a_queued_call_that_is_interrupted_never_runs(
    pool, interrupted, reported
):
    first, second = Job(), Job()
    busy = pool.submit(first)
    has_left: list[bool] = []

    async def call() -> None:
        try:
            await run_blocking(pool, second)
        finally:
            has_left.append(True)

    async def finish() -> None:
        assert has_left, "it waited for a job that was never to run"

    async def queued() -> None:
        await first.gate.reached()
        await turns()

    try:
        await interrupted(call(), queued, finish)
    finally:
        first.gate.open()
        second.gate.open()
    await happened(busy)
    # The thread has looked at what was queued.
    await run_blocking(pool, int)
    assert not second.has_ended


async def test_a_cancellation_that_comes_with_the_result_is_raised(pool, reported):
    job = Job()
    task = asyncio.create_task(run_blocking(pool, job))
    await job.gate.reached()
    # The loop hears of both in one turn.
    job.gate.open()
    futures.wait([pool.submit(int)], LIMIT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_after_the_result_is_not_ours(pool):
    async def call() -> str:
        return await run_blocking(pool, str)

    task = asyncio.create_task(call())
    assert await task == ""
    assert not task.cancel()


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

    with anyio.CancelScope() as scope:
        async with meanwhile(interrupt):
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


async def test_calls_work_where_other_code_expects_an_executor(pool):
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(pool, divmod, 7, 2) == (3, 1)


# --- outlast --------------------------------------------------------------------------


async def test_outlast_gives_what_its_awaitable_gives(reported):
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
async def test_what_is_outlasted_goes_on_to_its_end(interrupted, error, reported):
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
        except asyncio.CancelledError as cancelled:
            assert cancelled.__context__ is error
            raise
        finally:
            steps.append("left")

    async def finish() -> None:
        may_end.set()

    await interrupted(call(), reached.wait, finish)
    assert steps == ["ended", "left"]


async def test_outlast_passes_on_the_end_of_what_was_cancelled_by_others():
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await outlast(work())


# --- what is kept alive ---------------------------------------------------------------


class Tensor:
    """Stands for memory that must go when the last who needs it has gone."""

    def __init__(self) -> None:
        self.was_freed = freed = threading.Event()
        weakref.finalize(self, freed.set)


@pytest.fixture
def no_cycle_collector() -> Iterator[None]:
    """Only reference counts free what is made here."""
    gc.disable()
    yield
    gc.enable()


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
async def test_an_error_that_was_dropped_keeps_nothing_alive(
    call, pool, loop_thread, no_cycle_collector
):
    async def use() -> threading.Event:
        tensor = Tensor()
        with contextlib.suppress(WorkError):
            await call(pool, loop_thread, tensor)
        return tensor.was_freed

    was_freed = await use()
    assert was_freed.wait(LIMIT_S)


def test_an_error_that_a_blocked_caller_dropped_keeps_nothing_alive(
    loop_thread, no_cycle_collector
):
    tensor = Tensor()
    was_freed = tensor.was_freed
    with contextlib.suppress(WorkError):
        loop_thread.spawn(fail_later_with(tensor)).result()
    del tensor
    assert was_freed.wait(LIMIT_S)


async def test_a_cancellation_that_was_dropped_keeps_nothing_alive(
    pool, no_cycle_collector
):
    job = Job()

    def work(_: Tensor) -> None:
        job()

    async def use(tensor: Tensor) -> threading.Event:
        with contextlib.suppress(asyncio.CancelledError):
            await run_blocking(pool, work, tensor)
        return tensor.was_freed

    task = asyncio.create_task(use(Tensor()))
    await job.gate.reached()
    task.cancel()
    await turns()
    job.gate.open()
    was_freed = await task
    del task
    assert was_freed.wait(LIMIT_S)


async def test_an_idle_worker_keeps_nothing_of_its_last_job(pool, no_cycle_collector):
    tensor = Tensor()
    was_freed = tensor.was_freed
    await run_blocking(pool, id, tensor)
    del tensor
    assert was_freed.wait(LIMIT_S)


async def test_a_call_keeps_nothing_of_its_coroutine(loop_thread, no_cycle_collector):
    async def use(tensor: Tensor) -> None:
        await asyncio.sleep(0)

    tensor = Tensor()
    was_freed = tensor.was_freed
    call = loop_thread.spawn(use(tensor))
    del tensor
    await call.wait()
    assert was_freed.wait(LIMIT_S)


# --- worker pools ---------------------------------------------------------------------


def threads_named(name: str) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(name)]


def test_a_pool_without_work_has_no_threads():
    pool = WorkerPool(3, "lazy")
    assert threads_named("lazy") == []
    pool.shutdown()


def test_jobs_start_in_the_order_of_their_submission(pool):
    started: list[int] = []
    jobs = [pool.submit(started.append, number) for number in range(100)]
    futures.wait(jobs, LIMIT_S)
    assert started == list(range(100))


def test_jobs_that_follow_one_another_share_one_thread():
    pool = WorkerPool(4, "alone")
    for _ in range(20):
        pool.submit(int).result(LIMIT_S)
        pool.submit(raise_, WorkError()).exception(LIMIT_S)
        # Submitted at the very moment at which the other is done.
        following: futures.Future[futures.Future[int]] = futures.Future()
        pool.submit(int).add_done_callback(
            lambda _, following=following: following.set_result(pool.submit(int))
        )
        following.result(LIMIT_S).result(LIMIT_S)
    assert len(threads_named("alone")) == 1
    pool.shutdown()


def test_a_thread_is_free_for_others_after_a_job_that_was_withdrawn():
    pool = WorkerPool(2, "free")
    jobs = [Job(), Job()]
    running = [pool.submit(job) for job in jobs]
    for _ in range(3):
        pool.submit(int).cancel()
    for job in jobs:
        job.gate.open()
    futures.wait(running, LIMIT_S)
    pool.submit(int).result(LIMIT_S)
    assert pool._num_unfinished == 0
    pool.shutdown()


@pytest.mark.parametrize("max_threads", [1, 2, 8])
def test_as_many_jobs_run_at_once_as_there_may_be_threads(max_threads):
    pool = WorkerPool(max_threads, "full")
    for _ in range(50):
        # Jobs that end while others are submitted must not be taken for idle threads.
        passing = [pool.submit(int) for _ in range(max_threads)]
        everyone = threading.Barrier(max_threads)
        meeting = [pool.submit(everyone.wait, LIMIT_S) for _ in range(max_threads)]
        futures.wait([*passing, *meeting], LIMIT_S)
        assert all(job.exception() is None for job in meeting)
    names = {thread.name for thread in threads_named("full")}
    assert names == {f"full-{number}" for number in range(max_threads)}
    assert all(thread.daemon for thread in threads_named("full"))
    pool.shutdown()
    assert threads_named("full") == []


@pytest.mark.parametrize("error", [WorkError(), KeyboardInterrupt(), SystemExit(3)])
def test_a_thread_survives_whatever_a_job_raises(pool, error):
    job = pool.submit(raise_, error)
    assert job.exception(LIMIT_S) is error
    assert pool.submit(int).result(LIMIT_S) == 0


def test_a_pool_that_was_shut_down_refuses_work():
    pool = WorkerPool(1, "ended")
    pool.shutdown()
    pool.shutdown()
    with pytest.raises(RuntimeError, match="'ended' has been shut down"):
        pool.submit(int)


def test_a_shutdown_waits_for_what_was_submitted(pool):
    job = Job()
    jobs = [pool.submit(job), *(pool.submit(int) for _ in range(5))]
    ending = in_thread(pool.shutdown)
    job.gate.wait_reached()
    assert not ending.done()
    job.gate.open()
    ending.result(LIMIT_S)
    assert [job.result() for job in jobs] == ["result", 0, 0, 0, 0, 0]


def test_a_shutdown_can_leave_the_threads_to_end_by_themselves():
    pool = WorkerPool(2, "left")
    job = Job()
    running = pool.submit(job)
    pool.shutdown(wait=False)
    job.gate.open()
    assert running.result(LIMIT_S) == "result"
    for thread in threads_named("left"):
        thread.join(LIMIT_S)
    assert threads_named("left") == []


def test_a_shutdown_can_withdraw_what_has_not_started(pool):
    job = Job()
    running = pool.submit(job)
    job.gate.wait_reached()
    queued = [pool.submit(Job()) for _ in range(3)]
    ending = in_thread(lambda: pool.shutdown(cancel_futures=True))
    futures.wait(queued, LIMIT_S)
    assert all(other.cancelled() for other in queued)
    job.gate.open()
    assert running.result(LIMIT_S) == "result"
    ending.result(LIMIT_S)


@pytest.fixture
def no_more_threads(monkeypatch) -> Callable[[], None]:
    """Called, no thread can be started any more."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(threading.Thread, "start", refuse)


def test_work_is_done_by_fewer_threads_where_the_system_has_no_more(no_more_threads):
    pool = WorkerPool(2, "few")
    first = Job()
    running = pool.submit(first)
    first.gate.wait_reached()
    no_more_threads()
    second = pool.submit(divmod, 7, 2)
    first.gate.open()
    assert running.result(LIMIT_S) == "result"
    assert second.result(LIMIT_S) == (3, 1)
    pool.shutdown()


def test_work_that_no_thread_can_do_is_refused_and_never_done(
    no_more_threads, monkeypatch
):
    pool = WorkerPool(1, "none")
    done: list[str] = []
    no_more_threads()
    with pytest.raises(RuntimeError, match="can't start"):
        pool.submit(done.append, "refused")
    monkeypatch.undo()
    pool.submit(done.append, "accepted").result(LIMIT_S)
    assert done == ["accepted"]
    pool.shutdown()


@pytest.mark.parametrize("seed", range(20))
def test_every_job_runs_once_or_is_withdrawn_whatever_happens_around_it(seed):
    """Several threads submit and cancel, one ends the pool; nothing is lost or hangs."""
    rng = random.Random(seed)
    num_threads = rng.randint(1, 8)
    pool = WorkerPool(num_threads, "stress")
    runs: queue.SimpleQueue[object] = queue.SimpleQueue()
    start = threading.Barrier(4)

    def submit(seed: int) -> list[tuple[object, futures.Future[None]]]:
        rng = random.Random(seed)
        jobs: list[tuple[object, futures.Future[None]]] = []
        start.wait(LIMIT_S)
        with contextlib.suppress(RuntimeError):
            for _ in range(200):
                key = object()
                jobs.append((key, pool.submit(runs.put, key)))
                if rng.random() < 0.3:
                    rng.choice(jobs)[1].cancel()
        return jobs

    submitters = [in_thread(lambda s=s: submit(seed * 10 + s)) for s in range(3)]
    start.wait(LIMIT_S)
    for _ in range(rng.randrange(300)):
        pool_is_busy = not runs.empty()
        del pool_is_busy
    pool.shutdown(cancel_futures=rng.random() < 0.5)
    jobs = [job for submitter in submitters for job in submitter.result(LIMIT_S)]
    done, waiting = futures.wait([future for _, future in jobs], LIMIT_S)
    assert not waiting
    ran = [runs.get_nowait() for _ in range(runs.qsize())]
    assert sorted(map(id, ran)) == sorted(
        id(key) for key, future in jobs if not future.cancelled()
    )
    assert all(future.exception() is None for future in done if not future.cancelled())
    assert threads_named("stress") == []


def test_a_pool_works_while_the_interpreter_ends():
    script = """
        import atexit, sys, types
        package = types.ModuleType("aiockpt")  # its parts, without torch
        package.__path__ = [sys.argv[1]]
        sys.modules["aiockpt"] = package
        from aiockpt.threads import WorkerPool
        pool = WorkerPool(2, "late")

        @atexit.register
        def drain():
            jobs = [pool.submit(divmod, 7, 2) for _ in range(3)]
            print([job.result(30) for job in jobs])
            pool.shutdown()
    """
    package = Path(aiockpt.threads.__file__).parent
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), package],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (ended.stdout, ended.stderr) == (f"{[(3, 1)] * 3}\n", "")


# --- the loop's thread ----------------------------------------------------------------


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


async def test_an_error_reaches_the_caller_and_nobody_else(loop_thread, reported):
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


@interrupted
@pytest.mark.parametrize("end", [reraise, complete, fail])
async def test_an_interrupted_caller_waits_until_its_call_has_been_undone(
    loop_thread, interrupted, end, reported
):
    undone = Undone()
    ended_first: list[bool] = []
    seen: list[BaseException] = []

    async def caller() -> None:
        try:
            await loop_thread.spawn(undone.run(end)).wait()
        except asyncio.CancelledError as cancelled:
            seen.append(cancelled)
            raise
        finally:
            ended_first.append(undone.has_ended)

    async def finish() -> None:
        await undone.undoing.reached()
        loop_thread.run_soon(undone.may_end.set)

    await interrupted(caller(), undone.began.reached, finish)
    assert ended_first == [True]
    assert undone.num_cancellations == 1
    notes = getattr(seen[0], "__notes__", [])
    completed = ["the operation completed before the cancellation"]
    assert notes == (completed if end is complete else [])
    assert isinstance(seen[0].__context__, WorkError) == (end is fail)


async def test_a_call_cancelled_before_its_first_step_never_begins(
    loop_thread, reported
):
    begun: list[str] = []

    async def work() -> None:
        begun.append("work")

    with standing_still(loop_thread):
        task = asyncio.create_task(loop_thread.spawn(work()).wait())
        await turns()
        task.cancel()
        await turns()
    _, waiting = await asyncio.wait([task], timeout=LIMIT_S)
    assert not waiting
    assert task.cancelled()
    assert begun == []


@pytest.fixture
def held_runner(monkeypatch) -> Iterator[Gate]:
    """A loop thread that is made now stands at the gate before its loop begins."""
    gate = Gate()
    runner = asyncio.Runner

    def late_runner(**kwargs: Any) -> asyncio.Runner:
        gate.pass_through()
        return runner(**kwargs)

    monkeypatch.setattr(aiockpt.threads.asyncio, "Runner", late_runner)
    yield gate
    gate.open()


async def test_a_call_cancelled_before_the_loop_has_begun_never_begins(
    held_runner, loop_thread, reported
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
    held_runner, loop_thread, no_cycle_collector
):
    tensor = Tensor()
    was_freed = tensor.was_freed
    call = loop_thread.spawn(give(tensor))
    held_runner.open()
    assert await call.wait() is tensor
    del call, tensor
    assert was_freed.wait(LIMIT_S)


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
    outcome = call._outcome.exception

    def waits_again(timeout: float | None = None) -> object:
        loop_thread.run_soon(undone.may_end.set)
        return outcome(timeout)

    def waits(timeout: float | None = None) -> object:
        monkeypatch.setattr(call._outcome, "exception", waits_again)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(call._outcome, "exception", waits)
    try:
        with pytest.raises(KeyboardInterrupt) as interrupted:
            call.result()
        assert undone.has_ended
    finally:
        loop_thread.run_soon(undone.may_end.set)
    notes = getattr(interrupted.value, "__notes__", [])
    completed = ["the operation completed before the cancellation"]
    assert notes == (completed if end is complete else [])
    assert isinstance(interrupted.value.__context__, WorkError) == (end is fail)
    assert loop_thread.spawn(give(1)).result() == 1


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
