"""Every way in which asyncio and anyio interrupt who awaits.

Each `by_*` runs `work`, interrupts it when `moment` has come, then awaits `then`. It
returns the cancellation as `work` saw it.
"""

import asyncio
from collections.abc import Awaitable, Callable

import anyio
import pytest

from gates import turns

Step = Callable[[], Awaitable[None]]


async def noted(work: Awaitable[object], seen: list[asyncio.CancelledError]) -> None:
    try:
        await work
    except asyncio.CancelledError as error:
        seen.append(error)
        raise


async def by_cancel(
    work: Awaitable[object], moment: Step, then: Step
) -> asyncio.CancelledError:
    seen: list[asyncio.CancelledError] = []
    async with asyncio.TaskGroup() as group:
        task = group.create_task(noted(work, seen))
        await moment()
        task.cancel()
        await then()
    return seen[0]


async def by_cancelling_twice(
    work: Awaitable[object], moment: Step, then: Step
) -> asyncio.CancelledError:
    seen: list[asyncio.CancelledError] = []
    async with asyncio.TaskGroup() as group:
        task = group.create_task(noted(work, seen))
        await moment()
        task.cancel()
        await turns()
        task.cancel()
        await then()
    return seen[0]


async def by_timeout(
    work: Awaitable[object], moment: Step, then: Step
) -> asyncio.CancelledError:
    seen: list[asyncio.CancelledError] = []

    async def expire() -> None:
        await moment()
        scope.reschedule(0)
        await then()

    async with asyncio.TaskGroup() as group:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as scope:
                group.create_task(expire())
                await noted(work, seen)
    return seen[0]


async def by_sibling(
    work: Awaitable[object], moment: Step, then: Step
) -> asyncio.CancelledError:
    seen: list[asyncio.CancelledError] = []

    async def fail() -> None:
        await moment()
        raise ZeroDivisionError

    async with asyncio.TaskGroup() as outer:
        with pytest.raises(ExceptionGroup) as failed:
            async with asyncio.TaskGroup() as group:
                group.create_task(noted(work, seen))
                group.create_task(fail())
                outer.create_task(after(moment, then))
    assert failed.group_contains(ZeroDivisionError)
    return seen[0]


async def after(moment: Step, then: Step) -> None:
    await moment()
    await then()


async def by_anyio_scope(
    work: Awaitable[object], moment: Step, then: Step
) -> asyncio.CancelledError:
    seen: list[asyncio.CancelledError] = []

    async def leave() -> None:
        await moment()
        scope.cancel()
        await then()

    async with asyncio.TaskGroup() as group:
        with anyio.CancelScope() as scope:
            group.create_task(leave())
            await noted(work, seen)
    assert scope.cancelled_caught
    return seen[0]


WAYS = [by_cancel, by_cancelling_twice, by_timeout, by_sibling, by_anyio_scope]
