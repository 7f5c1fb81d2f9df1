"""Workers, and the only shield between threads and the tasks that wait for them.

A coroutine that waits for a thread may be cancelled; the thread cannot. If the
coroutine then went on, the thread would still be reading a buffer that its owner
takes for free. So every wait here outlasts its thread: `run_blocking` and
`outlast` return, or raise the cancellation, only when the work has ended.
"""

__all__ = [
    "WorkerPool",
    "finish",
    "outlast",
    "run_blocking",
    "run_interruptibly",
    "settle",
    "watch",
]

import asyncio
import concurrent.futures
import contextlib
import os
import queue
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from anyio import CancelScope
from typing_extensions import override

P = ParamSpec("P")
T = TypeVar("T")

# Workers copy and checksum in bursts of milliseconds. At equal priority an event
# loop or a training step waits for the end of a burst when the cores are taken; at
# this one, measured on two cores, the loops' 99th percentile gap halves and nothing
# is lost in throughput.
_NICENESS = 5


async def outlast(awaitable: Awaitable[T]) -> T:
    """Awaits `awaitable` to its end, whatever happens to the caller.

    If cancelled: the cancellation is raised once `awaitable` has ended.
    """
    return await settle(asyncio.ensure_future(awaitable))


async def finish(awaitable: Awaitable[T]) -> T:
    """Awaits `awaitable` to its end and returns, or raises, what came of it.

    If cancelled: as if it had not been; the cancellation is dropped.
    """
    task, _ = await _to_its_end(awaitable, lambda _task: None)
    try:
        return task.result()
    finally:
        del task  # as in `settle`; a task refers to what it raised


async def watch(awaitable: Awaitable[T]) -> "tuple[asyncio.Future[T], bool]":
    """How `awaitable` ended, and whether that was asked for.

    If cancelled: `awaitable` is cancelled, and waited for; the cancellation is
    dropped, for the caller to raise where it was not in vain.
    """
    return await _to_its_end(awaitable, lambda task: task.cancel())


async def _to_its_end(
    awaitable: Awaitable[T], interrupt: "Callable[[asyncio.Future[T]], object]"
) -> "tuple[asyncio.Future[T], bool]":
    caller, task = asyncio.current_task(), asyncio.ensure_future(awaitable)
    num_cancelled = caller.cancelling() if caller else 0
    is_interrupted = False

    def interrupt_once() -> bool:
        nonlocal is_interrupted
        if not is_interrupted:
            is_interrupted = True
            interrupt(task)
        return False

    waiting = asyncio.ensure_future(asyncio.wait([task]))
    with contextlib.suppress(asyncio.CancelledError):
        await settle(waiting, interrupt_once)
    # Whoever drops a cancellation takes it back: the scopes around count them.
    while caller and caller.cancelling() > num_cancelled:
        caller.uncancel()
    return task, is_interrupted


async def run_blocking(
    pool: concurrent.futures.Executor,
    work: Callable[P, T],
    *args: P.args,
    **kw: P.kwargs,
) -> T:
    """Runs blocking `work` in `pool` and returns what it returns.

    If cancelled: work that has not started never does; work that has is waited
    for, then the cancellation is raised.
    """
    job = pool.submit(work, *args, **kw)
    try:
        # Cancelling the wrapper withdraws a job that is still queued; `settle` does
        # it only then, because a wrapper cancelled during the job forgets the job.
        return await settle(asyncio.wrap_future(job), job.cancel)
    finally:
        del job  # as in `settle`


async def run_interruptibly(
    pool: concurrent.futures.Executor,
    stop: Callable[[], object],
    work: Callable[[], T],
) -> T:
    """As `run_blocking`, for work that can be asked to end early.

    If cancelled: calls `stop` where the work has started, waits for its end, and
    raises the cancellation.
    """
    job = pool.submit(work)
    try:
        return await settle(asyncio.wrap_future(job), partial(_withdraw, job, stop))
    finally:
        del job  # as in `settle`


def _withdraw(
    job: "concurrent.futures.Future[Any]", stop: Callable[[], object]
) -> bool:
    """Whether the job was still queued; else it is asked to end."""
    if job.cancel():
        return True
    stop()
    return False


async def settle(
    future: "asyncio.Future[T]", interrupt: Callable[[], bool] = lambda: False
) -> T:
    """What `future` comes to; cancelled, it calls `interrupt` and waits on.

    It waits no longer where `interrupt` says that nothing runs any more.
    """
    interrupted: asyncio.CancelledError | None = None
    try:
        with CancelScope() as scope:
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError as error:
                    interrupted = error
                    # An anyio scope cancels what it holds again at every turn of the
                    # loop. It has been heard: from here on it is kept out.
                    scope.shield = True
                    if interrupt():
                        break
        if interrupted is None:
            return future.result()
        if future.done() and not future.cancelled():
            # Retrieved, so that asyncio does not report it as lost.
            interrupted.__context__ = future.exception()
        raise interrupted
    finally:
        # An error's traceback refers to this frame. Were the frame to refer to the
        # error, the cycle would keep all that the work had in hand (tensors) alive.
        del future, interrupt, interrupted


class WorkerPool(concurrent.futures.Executor):
    """An executor of daemon threads, started as they are first needed.

    Unlike the standard pool it still works while the interpreter shuts down, so
    that saves in flight can be drained by an exit handler.
    """

    def __init__(
        self, max_threads: int, name: str, *, is_background: bool = True
    ) -> None:
        """Starts no thread yet.

        Args:
            max_threads: At most so many will be started.
            name: They will be called `name-i`.
            is_background: Whether others go first where the cores are taken.
        """
        self._is_background = is_background
        self._max_threads = max_threads
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_unfinished = 0
        self._is_shut_down = False
        self._lock = threading.Lock()

    @override
    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> "concurrent.futures.Future[T]":
        """Queues a call; jobs start in the order in which they were submitted.

        Raises:
            RuntimeError: The pool has been shut down, or the system has no thread
                for it. Nothing was queued.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self._is_shut_down:
                raise RuntimeError(f"the worker pool {self._name!r} has been shut down")
            # Before the job is queued: a caller that sees this fail goes on to free
            # what the job would have worked on.
            if len(self._threads) <= self._num_unfinished:
                self._add_thread()
            self._num_unfinished += 1
            self._jobs.put(_Job(future, fn, args, kwargs))
        return future

    def _add_thread(self) -> None:
        if len(self._threads) == self._max_threads:
            return
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
            # Those that there are do the work.
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        if self._is_background:
            _yield_to_others()
        while (job := self._jobs.get()) is not None:
            job.run(self._count_finished)
            # A reference kept while waiting would keep the job's tensors alive.
            del job

    def _count_finished(self) -> None:
        with self._lock:
            self._num_unfinished -= 1

    @override
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads once the queue is empty; with `wait`, joins them."""
        with self._lock:
            self._is_shut_down = True
        while cancel_futures:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.future.cancel()
                job.run(self._count_finished)  # which only tells those who wait
        for _ in self._threads:
            self._jobs.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def _yield_to_others() -> None:
    """Gives the calling thread less of a busy machine than trainers and loops get."""
    # Linux keeps a nice value for each thread; elsewhere this would slow the process.
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    # Some sandboxes refuse this. A worker that died of it would be waited for in vain.
    with contextlib.suppress(OSError):
        # Not less nice than it was: that takes a privilege.
        niceness = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


class _Job:
    __slots__ = ("args", "fn", "future", "kwargs")

    def __init__(
        self,
        future: "concurrent.futures.Future[Any]",
        fn: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> None:
        self.future = future
        self.fn = fn
        self.args = args
        self.kwargs = kwargs

    def run(self, at_end: Callable[[], object]) -> None:
        """Does the work; calls `at_end` before any waiter can know that it is done."""
        if not self.future.set_running_or_notify_cancel():
            at_end()
            return
        try:
            result = self.fn(*self.args, **self.kwargs)
        except BaseException as error:  # noqa: BLE001 - it belongs to the waiter
            at_end()
            self.future.set_exception(_carried(error))
            del self  # as in `settle`
        else:
            at_end()
            self.future.set_result(result)


def _carried(error: BaseException) -> BaseException:
    """`error`, or what stands for it where asyncio's futures refuse it."""
    if not isinstance(error, StopIteration):
        return error
    stand_in = RuntimeError("the work raised StopIteration")
    stand_in.__cause__ = error
    return stand_in
