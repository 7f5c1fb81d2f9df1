"""The only place that makes threads, and the only shield between them and tasks.

A coroutine that waits for a thread may be cancelled; the thread cannot. If the
coroutine then went on, the thread would still be reading a buffer that its owner
takes for free. So every wait here outlasts its thread: `run_blocking` and
`outlast` return, or raise the cancellation, only when the work has ended.
"""

__all__ = ["Call", "LoopThread", "WorkerPool", "outlast", "run_blocking"]

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, ParamSpec, TypeVar

from anyio import CancelScope
from typing_extensions import override

P = ParamSpec("P")
T = TypeVar("T")


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
    # Cancelling the wrapper withdraws a job that is still queued; `_settle` does
    # it only then, because a wrapper cancelled during the job forgets the job.
    return await _settle(asyncio.wrap_future(job), withdraw=job.cancel)


async def _settle(
    future: "asyncio.Future[T]", withdraw: Callable[[], bool] | None = None
) -> T:
    interrupted: asyncio.CancelledError | None = None
    # Inside the shield an anyio scope does not deliver its cancellation again at
    # every turn of this loop; a cancelled task is told once and remembered.
    with CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                interrupted = error
                if withdraw is not None and withdraw():
                    break
    if interrupted is None:
        return future.result()
    if future.done() and not future.cancelled():
        # Retrieved, so that asyncio does not report it as lost.
        interrupted.__context__ = future.exception()
    raise interrupted


class WorkerPool(concurrent.futures.Executor):
    """An executor of daemon threads, started as they are first needed.

    Unlike the standard pool it still works while the interpreter shuts down, so
    that saves in flight can be drained by an exit handler.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        """Starts no thread yet; at most `max_threads` will be called `name-i`."""
        self._max_threads = max_threads
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_idle = threading.Semaphore(0)
        self._is_shut_down = False

    @override
    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> "concurrent.futures.Future[T]":
        """Queues a call; jobs start in the order in which they were submitted.

        Raises:
            RuntimeError: The pool has been shut down.
        """
        if self._is_shut_down:
            raise RuntimeError(f"the worker pool {self._name!r} has been shut down")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._jobs.put(_Job(future, fn, args, kwargs))
        if not self._num_idle.acquire(blocking=False):
            self._start_thread()
        return future

    def _start_thread(self) -> None:
        if len(self._threads) < self._max_threads:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            job.run()
            # A reference kept while waiting would keep the job's tensors alive.
            del job

    def _next_job(self) -> "_Job | None":
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            self._num_idle.release()
            return self._jobs.get()

    @override
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads once the queue is empty; with `wait`, joins them."""
        self._is_shut_down = True
        while cancel_futures:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.future.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


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

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.fn(*self.args, **self.kwargs)
        except BaseException as error:  # noqa: BLE001 - it belongs to the waiter
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Call(Generic[T]):
    """One coroutine running on a `LoopThread`, as its callers elsewhere see it."""

    def __init__(self, thread: "LoopThread", work: Coroutine[Any, Any, T]) -> None:
        """Prepares the call; `LoopThread.spawn` starts it."""
        self._thread = thread
        self._work = work
        self._task: asyncio.Task[None] | None = None
        self._outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    async def wait(self) -> T:
        """The result, awaited from any event loop.

        If cancelled: the coroutine is cancelled on its own loop and waited for;
        if it completed all the same, the cancellation carries a note that says so.
        """
        waiter = asyncio.wrap_future(self._outcome)
        try:
            await asyncio.wait([waiter])
        except asyncio.CancelledError as interrupted:
            self._cancel()
            # What the work itself raised is the interruption's context.
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await outlast(waiter)
                interrupted.add_note("the operation completed before the cancellation")
            raise
        return waiter.result()

    def result(self) -> T:
        """The result, with the calling thread blocked until it is there.

        If interrupted (Ctrl-C): the coroutine is cancelled and waited for.
        """
        try:
            return self._outcome.result()
        except concurrent.futures.CancelledError:
            raise
        except BaseException:
            if not self._outcome.done():
                self._cancel()
                concurrent.futures.wait([self._outcome])
            raise

    def add_done_callback(self, callback: Callable[["Call[T]"], object]) -> None:
        """Calls `callback(self)` on the engine's loop when the coroutine has ended."""
        self._outcome.add_done_callback(lambda _: callback(self))

    def _cancel(self) -> None:
        self._thread.run_soon(self._cancel_task)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begins the coroutine; called on the loop that runs it."""
        self._task = group.create_task(self._run())

    async def _run(self) -> None:
        try:
            result = await self._work
        except asyncio.CancelledError:
            self._outcome.cancel()
            self._outcome.set_running_or_notify_cancel()
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(result)
        finally:
            # Neither side may keep the other's arguments and locals alive.
            del self._work


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
        self._early: list[Call[Any]] = []
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._is_stopping = False
        self._lock = threading.Lock()
        self._at_end = at_end
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

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
            for call in self._early:
                call.start(group)
            self._early.clear()
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
