"""The only place that makes threads, and the only shield between them and tasks.

A coroutine that waits for a thread may be cancelled; the thread cannot. If the
coroutine then went on, the thread would still be reading a buffer that its owner
takes for free. So every wait here outlasts its thread: `run_blocking` and
`outlast` return, or raise the cancellation, only when the work has ended.
"""

__all__ = [
    "Call",
    "LoopThread",
    "WorkerPool",
    "outlast",
    "run_blocking",
    "run_interruptibly",
]

import asyncio
import collections
import concurrent.futures
import contextlib
import os
import queue
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

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
    return await _settle(asyncio.ensure_future(awaitable))


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
        # Cancelling the wrapper withdraws a job that is still queued; `_settle` does
        # it only then, because a wrapper cancelled during the job forgets the job.
        return await _settle(asyncio.wrap_future(job), job.cancel)
    finally:
        del job  # as in `_settle`


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
        return await _settle(asyncio.wrap_future(job), partial(_withdraw, job, stop))
    finally:
        del job  # as in `_settle`


def _withdraw(
    job: "concurrent.futures.Future[Any]", stop: Callable[[], object]
) -> bool:
    """Whether the job was still queued; else it is asked to end."""
    if job.cancel():
        return True
    stop()
    return False


async def _settle(
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
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


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
            del self  # as in `_settle`
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


class Call(Generic[T]):
    """One coroutine running on a `LoopThread`, as its callers elsewhere see it."""

    def __init__(self, thread: "LoopThread", work: Coroutine[Any, Any, T]) -> None:
        """Prepares the call; `LoopThread.spawn` starts it."""
        self._thread = thread
        self._work = work
        # None until it runs: a task that is cancelled before its first step never
        # enters its coroutine, and nobody would learn how it ended.
        self._task: asyncio.Task[None] | None = None
        self._is_cancelled = False
        self._outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    async def wait(self) -> T:
        """The result, awaited from any event loop.

        If cancelled: the coroutine is cancelled on its own loop and waited for;
        if it completed all the same, the cancellation carries a note that says so.
        """
        try:
            return await _settle(asyncio.wrap_future(self._outcome), self._cancel)
        except asyncio.CancelledError as interrupted:
            self._tell_outcome(interrupted)
            raise
        finally:
            del self  # as in `_settle`

    def result(self) -> T:
        """The result, with the calling thread blocked until it is there.

        If interrupted (Ctrl-C): as `wait` if cancelled.
        """
        try:
            try:
                self._block()
            except BaseException as interrupted:
                self._cancel()
                self._block()
                self._tell_outcome(interrupted)
                raise
            return self._outcome.result()
        finally:
            del self  # as in `_settle`

    def _block(self) -> None:
        # Not `concurrent.futures.wait`: a signal could make it leave its locks locked.
        with contextlib.suppress(concurrent.futures.CancelledError):
            self._outcome.exception()

    def _tell_outcome(self, interrupted: BaseException) -> None:
        if self._outcome.cancelled():
            return
        interrupted.__context__ = self._outcome.exception()
        if interrupted.__context__ is None:
            interrupted.add_note("the operation completed before the cancellation")

    async def ended(self) -> None:
        """Returns when the coroutine has ended, whatever came of it."""
        waiter = asyncio.wrap_future(self._outcome)
        await asyncio.wait([waiter])
        if not waiter.cancelled():
            waiter.exception()  # Retrieved: it is somebody else's, and not lost.

    def add_done_callback(self, callback: Callable[["Call[T]"], object]) -> None:
        """Calls `callback(self)` on the engine's loop when the coroutine has ended."""
        # The outcome keeps its callbacks. One that refers to this call makes a cycle,
        # which would keep the result (a whole loaded state) alive.
        this = weakref.ref(self)

        def call_back(_: object) -> None:
            call = this()
            assert call is not None
            callback(call)

        self._outcome.add_done_callback(call_back)

    def _cancel(self) -> bool:
        self._thread.run_soon(self._cancel_task)
        return False

    def _cancel_task(self) -> None:
        # Once: a second cancellation would interrupt what the first one undoes.
        if not self._is_cancelled:
            self._is_cancelled = True
            if self._task is not None:
                self._task.cancel()

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begins the coroutine; called on the loop that runs it."""
        group.create_task(self._run())

    async def _run(self) -> None:
        self._task = asyncio.current_task()
        outcome = self._outcome
        try:
            if self._is_cancelled:
                self._work.close()
                raise asyncio.CancelledError  # noqa: TRY301 - it ends as any other
            result = await self._work
        except asyncio.CancelledError:
            outcome.cancel()
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller
            outcome.set_exception(error)
        else:
            outcome.set_result(result)
        finally:
            del self, outcome  # as in `_settle`


class LoopThread:
    """A daemon thread that runs one event loop with one task group.

    Its tasks go on whatever other threads and loops do, which is the point: a
    training step blocks the trainer's loop, and must not block these.
    """

    def __init__(self, name: str, at_end: Callable[[], object]) -> None:
        """Starts the thread; its loop takes work at once.

        Args:
            name: The thread's name.
            at_end: Called on the thread when its loop has ended; may block.
        """
        # Made here, so that work can be queued before the thread has begun.
        self._loop = asyncio.SelectorEventLoop()
        self._stop = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._early: collections.deque[Call[Any]] = collections.deque()
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._is_stopping = False
        self._lock = threading.Lock()
        self._at_end = at_end
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._loop.close()
            raise

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        finally:
            try:
                self._at_end()
            finally:
                self._ended.set_result(None)

    async def _main(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            while self._early:
                self._early.popleft().start(group)
            await self._stop.wait()

    def _start(self, call: "Call[Any]") -> None:
        if self._group is None:
            self._early.append(call)
        else:
            call.start(self._group)

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread

    def spawn(self, work: Coroutine[Any, Any, T]) -> Call[T]:
        """Starts `work` on the loop, from any thread, without waiting for it.

        Raises:
            RuntimeError: The thread is ending.
        """
        call = Call(self, work)
        with self._lock:
            if not self._is_stopping:
                self._loop.call_soon_threadsafe(self._start, call)
                return call
        work.close()
        raise RuntimeError("the loop's thread is ending")

    def run_soon(self, callback: Callable[[], object]) -> None:
        """Runs `callback` on the loop soon, where it still runs; returns at once."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def stop(self) -> None:
        """Lets the thread end when its tasks have; returns at once. Idempotent."""
        # Whatever was spawned before is queued before the stop, and so is waited for.
        with self._lock:
            self._is_stopping = True
        self.run_soon(self._stop.set)

    async def ended(self) -> None:
        """Returns when the loop has ended, on any event loop."""
        await outlast(asyncio.wrap_future(self._ended))

    def join(self) -> None:
        """Blocks until the thread has ended."""
        self._thread.join()
