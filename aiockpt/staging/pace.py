"""How many chunks devices may be at: few, unless somebody waits for them.

A copy that training needs queues behind those that are under way. Enough of them to
keep a link busy take it a millisecond or two; a whole ring would take many.
"""

__all__ = ["Pace"]

import asyncio
import collections
from contextlib import suppress
from typing import Final, Protocol

# 128 MiB in chunks of their usual size.
_MAX_CHUNKS: Final = 8


class Hasty(Protocol):
    """Whose chunks they are.

    Attributes:
        is_urgent: Whether somebody waits for the last of them to be begun.
    """

    is_urgent: bool


class Pace:
    """Lets chunks in, first come first served. For the engine's loop, but `hurry`."""

    def __init__(self, max_chunks: int = _MAX_CHUNKS) -> None:
        """Lets in `max_chunks` at a time, and any number of those that are urgent."""
        self._max_chunks = max_chunks
        self._num_in = 0
        self._queue: collections.deque[tuple[asyncio.Future[None], Hasty]] = (
            collections.deque()
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    async def enter(self, whose: Hasty) -> None:
        """Returns when a chunk may be begun; `leave` must follow.

        If cancelled: it has not entered.
        """
        self._loop = asyncio.get_running_loop()
        turn = self._loop.create_future()
        self._queue.append((turn, whose))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # Let in together with the cancellation.
                self.leave()
            raise

    def leave(self) -> None:
        """A chunk is done with, however it ended."""
        self._num_in -= 1
        self._admit()

    def hurry(self) -> None:
        """Looks again who is urgent; from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # The loop has ended: nobody waits there.
                self._loop.call_soon_threadsafe(self._admit)

    def _admit(self) -> None:
        while self._queue:
            turn, whose = self._queue[0]
            if not turn.done():
                if self._num_in >= self._max_chunks and not whose.is_urgent:
                    return
                self._num_in += 1
                turn.set_result(None)
            self._queue.popleft()
