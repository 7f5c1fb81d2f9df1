"""The engine's own thread: an event loop with one task group, and its callers' side."""

__all__ = ["Call", "LoopThread", "Work"]

import asyncio
import collections
import concurrent.futures
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from aiockpt.threads import outlast, settle

T = TypeVar("T")

_SIGNAL_CHECK_S = 0.5


class Call(Generic[T]):
    """One coroutine running on a `LoopThread`, as its callers elsewhere see it."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        """Prepares the call; `LoopThread.spawn` starts it."""
        # None until a thread has it, or may have it.
        self._thread: LoopThread | None = None
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
            return await settle(asyncio.wrap_future(self._outcome), self._cancel)
        except asyncio.CancelledError as interrupted:
            self._tell_outcome(interrupted)
            raise
        finally:
            del self  # as in `settle`

    def result(self) -> T:
        """The result, with the calling thread blocked until it is there.

        If interrupted (Ctrl-C): as `wait` if cancelled.
        """
        try:
            return self.run(lambda _: None)
        finally:
            del self  # as in `settle`

    def run(self, spawn: Callable[["Call[T]"], object]) -> T:
        """The result, once `spawn` has started the call and it has ended.

        If interrupted (Ctrl-C): as `wait` if cancelled, also while it is being started.
        The loop may have begun the work before its thread lets `spawn` return.
        """
        try:
            try:
                spawn(self)
                self._block()
            except BaseException as interrupted:
                if self._thread is None:
                    self.close()
                else:
                    self._cancel()
                    self._block()
                    self._tell_outcome(interrupted)
                raise
            return self._outcome.result()
        finally:
            del self  # as in `settle`

    def _block(self) -> None:
        # On a lock of its own: a signal that comes while a future or a condition waits can
        # leave their locks as they should not be. Not for ever: Python's handler runs when
        # the wait ends, and a signal that comes in the instant before the thread falls
        # asleep does not end it.
        ended = threading.Lock()
        ended.acquire()
        self._outcome.add_done_callback(lambda _: ended.release())
        while not ended.acquire(timeout=_SIGNAL_CHECK_S):
            pass

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
        assert self._thread is not None
        if not self._thread.run_soon(self._cancel_task):
            self._cancel_task()
        return False

    def _cancel_task(self) -> None:
        # Once: a second cancellation would interrupt what the first one undoes.
        if self._is_cancelled:
            return
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()
        else:
            # It has not begun, or its caller was interrupted before the loop heard of it.
            self._work.close()
            self._outcome.cancel()

    def give_to(self, thread: "LoopThread") -> None:
        """Notes that `thread` may run it from here on."""
        self._thread = thread

    def close(self) -> None:
        """Ends it unstarted: no thread runs it."""
        self._thread = None
        self._work.close()

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begins the coroutine; called on the loop that runs it."""
        group.create_task(self._run())

    async def _run(self) -> None:
        self._task = asyncio.current_task()
        outcome = self._outcome
        try:
            if self._is_cancelled:
                return
            result = await self._work
        except asyncio.CancelledError:
            outcome.cancel()
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller
            outcome.set_exception(error)
        else:
            outcome.set_result(result)
        finally:
            del self, outcome  # as in `settle`


Work = Coroutine[Any, Any, T] | Call[T]


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

    def spawn(self, work: Work[T]) -> Call[T]:
        """Starts `work` on the loop, from any thread, without waiting for it.

        Raises:
            RuntimeError: The thread is ending.
        """
        call = work if isinstance(work, Call) else Call(work)
        with self._lock:
            if not self._is_stopping:
                call.give_to(self)
                self._loop.call_soon_threadsafe(self._start, call)
                return call
        call.close()
        raise RuntimeError("the loop's thread is ending")

    def run_soon(self, callback: Callable[[], object]) -> bool:
        """Runs `callback` on the loop soon; returns at once, and whether it still runs."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            return False
        return True

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
