"""Work for threads and loops to do in tests, and means to see what becomes of it."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio

from gates import Gate, turns
from interrupts import WAYS, Step, noted


class WorkError(Exception):
    """What the work in tests raises."""


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


class Tensor:
    """Stands for memory that must go when the last who needs it has gone."""

    def __init__(self) -> None:
        self.was_freed = freed = threading.Event()
        weakref.finalize(self, freed.set)


@contextlib.contextmanager
def no_cycle_collector() -> Iterator[None]:
    """Only reference counts free what is made in this block."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.asynccontextmanager
async def nothing_is_lost() -> AsyncIterator[None]:
    """No future of the running loop is thrown away with an error nobody looked at."""
    reports: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reports.append(context))
    yield
    await turns()
    gc.collect(1)  # all that the test made; the whole heap takes too long
    assert not reports


# --- being interrupted twice, by asyncio and by anyio ---------------------------------


async def by_anyio_scope_then_cancel(
    work: "asyncio.Future[object]", moment: Step, then: Step
) -> asyncio.CancelledError:
    """Of the two, the task's cancellation is the one that must not be dropped."""
    return await _by_both(work, moment, then, is_scope_first=True)


async def by_cancel_then_anyio_scope(
    work: "asyncio.Future[object]", moment: Step, then: Step
) -> asyncio.CancelledError:
    return await _by_both(work, moment, then, is_scope_first=False)


async def _by_both(
    work: "asyncio.Future[object]", moment: Step, then: Step, *, is_scope_first: bool
) -> asyncio.CancelledError:
    seen: list[asyncio.CancelledError] = []

    async def in_scope() -> None:
        with scope:
            await noted(work, seen)

    scope = anyio.CancelScope()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(in_scope())
        await moment()
        (scope if is_scope_first else task).cancel()
        await turns()
        (task if is_scope_first else scope).cancel()
        await then()
    assert task.cancelled()
    return seen[0]


ALL_WAYS = [*WAYS, by_anyio_scope_then_cancel, by_cancel_then_anyio_scope]
