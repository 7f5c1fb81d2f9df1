"""Being told to go: a signal that asks for a last save, noted and no more.

Schedulers and clouds send a signal (mostly SIGTERM) some time before they kill. Its
handler sets a flag and wakes who waits for it; what had handled the signal before
is called as well, and handles it again once this is closed.
"""

__all__ = ["Preemption"]

import asyncio
import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from aiockpt.errors import EngineStateError, InvalidArgumentError


class Preemption:
    """Whether one of the signals that are watched has come.

    Attributes:
        is_signalled: Whether it has.
        is_closed: Whether `close` was called.
    """

    def __init__(self) -> None:
        """Watches nothing yet."""
        self.is_signalled = False
        self._is_ending = False
        self.is_closed = False
        # A signal that came when nobody could wait for it any more.
        self._late: int | None = None
        self._pid = os.getpid()
        # As it was before this; what `signal.signal` takes.
        self._previous: dict[int, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        # One object: a bound method is a new one each time that it is looked up.
        self._handler = self._handle

    def watch(self, signals: tuple[int, ...]) -> None:
        """From now on, one of `signals` is noted; in the main thread only.

        Raises:
            EngineStateError: Another thread, or a handler that was not installed by
                Python and so could not be set back.
            InvalidArgumentError: No signals, or one that cannot be handled.
        """
        if threading.current_thread() is not threading.main_thread():
            message = "signals can be watched from the main thread only"
            raise EngineStateError(message)
        if not signals:
            raise InvalidArgumentError("name the signals to watch, as signal.SIGTERM")
        for number in signals:
            if number not in self._previous:
                self._install(number)

    def _install(self, number: int) -> None:
        try:
            previous = signal.getsignal(number)
            if previous is None:
                message = f"signal {number} is handled by other code than Python's"
                raise EngineStateError(message)
            # First: the signal may come as soon as the handler is there.
            self._previous[number] = previous
            signal.signal(number, self._handler)
        except (OSError, ValueError, TypeError) as error:
            self._previous.pop(number, None)
            message = f"signal {number!r} cannot be watched: {error}"
            raise InvalidArgumentError(message) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous[number]
        # A forked child (a data loader's worker, say) has nothing to save: a signal is
        # to it what it was before.
        is_ours = not self.is_closed and os.getpid() == self._pid
        if is_ours:
            self.is_signalled = True
            self._wake()
        if callable(previous):
            previous(number, frame)
        elif is_ours:
            self._late = number if self._is_ending else None
            if self.is_closed:
                # `close` looked, on another thread, before there was anything.
                self._hand_on_late()
        elif signal.getsignal(number) is self._handler:
            self._set_back(number)
            signal.raise_signal(number)

    def _wake(self) -> None:
        # No lock: the thread that is interrupted may hold it.
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended, and its waiters
                loop.call_soon_threadsafe(self._changed.set)

    async def signalled(self) -> None:
        """Returns when a signal has come; on the engine's loop.

        Raises:
            EngineStateError: None is watched, or this was closed before one came.
        """
        if not self._previous:
            raise EngineStateError("no signal is watched: call `preempt_on` first")
        # Set before the flag is looked at: the handler does it in the other order.
        self._loop = asyncio.get_running_loop()
        if not (self.is_signalled or self._is_ending):
            await self._changed.wait()
        if not self.is_signalled:
            raise EngineStateError("the engine was closed before a signal came")

    def end_waiting(self) -> None:
        """Ends all waiting. What comes from now on is kept for the end, by `close`.

        So a signal does not kill while the last commits are finished.
        """
        self._is_ending = True
        self._wake()

    def close(self) -> None:
        """Sets the handlers back, once all else has ended. Idempotent; from any thread.

        Handlers that cannot be set back, which is done in the main thread only, hand
        on what comes to those before. So does this what has come since `end_waiting`.
        """
        self.is_closed = True
        if threading.current_thread() is threading.main_thread():
            for number in self._previous:
                # Another one may have been put before it meanwhile, and call it.
                if signal.getsignal(number) is self._handler:
                    self._set_back(number)
        self._hand_on_late()

    def _hand_on_late(self) -> None:
        late, self._late = self._late, None
        if late is not None:
            signal.raise_signal(late)

    def _set_back(self, number: int) -> None:
        signal.signal(number, self.handler_before(number))

    def handler_before(self, number: int) -> Any:
        """What is to handle a signal once this is closed."""
        previous = self._previous[number]
        # Engines may end in another order than they began in.
        other = getattr(previous, "__self__", None)
        if isinstance(other, Preemption) and other.is_closed:
            return other.handler_before(number)
        return previous
