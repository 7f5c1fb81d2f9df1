"""Waiting for an answer that a cancellation may not stop any more."""

__all__ = ["answer"]

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from aiockpt.threads import settle

T = TypeVar("T")


async def answer(future: "asyncio.Future[T]", withdraw: Callable[[], object]) -> T:
    """Returns what `future`, which never raises, comes to.

    If cancelled: `withdraw` is called and the future is waited for. Where that came
    in time, the future is cancelled, and the cancellation is raised; else the
    cancellation is dropped and the answer returned.
    """
    task = asyncio.current_task()
    num_cancelled = 0 if task is None else task.cancelling()
    try:
        return await settle(future, partial(_ask, withdraw))
    except asyncio.CancelledError:  # noqa: ASYNC103 - what it came too late for stands
        if future.cancelled():
            task = None  # It will refer to the error, and the error to this frame.
            raise
    # Whoever drops a cancellation takes it back: the scopes around count them.
    while task is not None and task.cancelling() > num_cancelled:
        task.uncancel()
    return future.result()


def _ask(withdraw: Callable[[], object]) -> bool:
    withdraw()
    return False  # The answer is waited for.
