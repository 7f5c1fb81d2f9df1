"""Gates and drivers: they put threads, loops and cancellations in an order, no sleeps.

A test holds a function of the engine at a gate, does what is to happen meanwhile,
and opens the gate. `cancelled_at` cancels a coroutine at one certain suspension.
"""

import asyncio
import contextlib
import functools
import queue
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from aiockpt.errors import CheckpointError
from aiockpt.guard import StagingGate
from aiockpt.loop_thread import Call
from aiockpt.machinery import Machinery
from aiockpt.runtime import Runtime

# Only a failing test ever waits this long.
LIMIT_S = 120.0

RING_8_MIB = {"host_cache_size": 8 / 1024, "parser_threads": 2}


class Gate:
    """Holds whoever comes until it is opened, and tells that somebody came."""

    def __init__(self) -> None:
        self._reached: Future[None] = Future()
        self._open = threading.Event()
        self._lock = threading.Lock()

    def pass_through(self) -> None:
        """Waits, on the thread that is to be held, until the gate is open."""
        with self._lock:
            if not self._reached.done():
                self._reached.set_result(None)
        assert self._open.wait(LIMIT_S), "nobody opened the gate"

    @property
    def is_reached(self) -> bool:
        """Whether anybody has come."""
        return self._reached.done()

    async def reached(self) -> None:
        """Returns when somebody stands at the gate."""
        await happened(self._reached)

    def wait_reached(self) -> None:
        """`reached`, for plain threads."""
        self._reached.result(LIMIT_S)

    def open(self) -> None:
        """Lets everyone through, from now on."""
        self._open.set()


async def happened(future: "Future[Any]") -> None:
    """Returns when `future` is done, whatever the outcome."""
    done, _ = await asyncio.wait([asyncio.wrap_future(future)], timeout=LIMIT_S)
    assert done, "what the test waits for did not happen"


@contextlib.contextmanager
def held(patch: pytest.MonkeyPatch, owner: object, name: str) -> Iterator[Gate]:
    """Every call of `owner.name` waits at a gate first; it opens when the block ends.

    The function must be one that runs on a worker thread.
    """
    original = getattr(owner, name)
    gate = Gate()

    @functools.wraps(original)
    def at_gate(*args: object, **kwargs: object) -> object:
        gate.pass_through()
        return original(*args, **kwargs)

    patch.setattr(owner, name, at_gate)
    try:
        yield gate
    finally:
        gate.open()
        patch.setattr(owner, name, original)


@contextlib.contextmanager
def held_loop(runtime: Runtime) -> Iterator[None]:
    """The engine's loop stands still until the block ends.

    What is asked of it meanwhile then happens in one turn of the loop.
    """
    release: queue.SimpleQueue[None] = queue.SimpleQueue()
    reached = threading.Event()

    def stand_still() -> None:
        reached.set()
        release.get(timeout=LIMIT_S)

    runtime._machinery._thread._loop.call_soon_threadsafe(stand_still)
    assert reached.wait(LIMIT_S)
    try:
        yield
    finally:
        release.put(None)


class Driven:
    """An awaitable that counts the suspensions of another, and acts at one of them.

    Attributes:
        num_suspensions: How often it has suspended so far.
    """

    def __init__(
        self, work: Awaitable[Any], at: int, act: Callable[[], object]
    ) -> None:
        self.num_suspensions = 0
        self._work = work
        self._at = at
        self._act = act

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._work.__await__()
        resume: Callable[[], Any] = functools.partial(next, steps)
        while True:
            try:
                awaited = resume()
            except StopIteration as end:
                return end.value
            self.num_suspensions += 1
            if self.num_suspensions == self._at:
                # Called back once the task really is suspended.
                asyncio.get_running_loop().call_soon(self._act)
            try:
                yield awaited
            except BaseException as error:  # noqa: BLE001 - passed on
                resume = functools.partial(steps.throw, error)
            else:
                resume = functools.partial(next, steps)


async def cancelled_at(at: int, work: Coroutine[Any, Any, Any]) -> bool:
    """Cancels `work` at its suspension number `at`; whether it came so far.

    The suspensions are those on the caller's loop.
    """
    driven = Driven(work, at, lambda: task.cancel())  # noqa: PLW0108 - made below

    async def main() -> None:
        await driven

    async with asyncio.TaskGroup() as group:
        task = group.create_task(main())
    return driven.num_suspensions >= at


class EngineSide:
    """Cancels what the engine runs for a caller, at one suspension on its own loop.

    Attributes:
        num_suspensions: How often the call suspended there, once it has ended.
        ended: Done when the last call has.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num_suspensions = 0
        self.ended: Future[None] = Future()
        self._patch = patch

    @contextlib.contextmanager
    def cancelling_at(self, at: int) -> Iterator[None]:
        """The next call is cancelled at its suspension number `at`."""
        original = Machinery.spawn
        ended = self.ended = Future()

        def spawn(machinery: Machinery, work: Coroutine[Any, Any, Any]) -> Call[Any]:
            self._patch.setattr(Machinery, "spawn", original)
            driven = Driven(work, at, lambda: call._cancel_task())  # noqa: PLW0108

            async def main() -> object:
                try:
                    return await driven
                finally:
                    self.num_suspensions = driven.num_suspensions
                    ended.set_result(None)

            # Before the loop can come to the suspension.
            call = Call(main())
            return original(machinery, call)

        self._patch.setattr(Machinery, "spawn", spawn)
        try:
            yield
        finally:
            self._patch.setattr(Machinery, "spawn", original)


async def turns(count: int = 10) -> None:
    """Lets what is ready on this loop run, `count` times over."""
    for _ in range(count):
        await asyncio.sleep(0)


def in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """Runs `work` on a thread of its own."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised by the future
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    threading.Thread(target=run, name="test").start()
    return outcome


def noted_waits(patch: pytest.MonkeyPatch) -> "Future[None]":
    """Done when somebody is at the guard."""
    waits: Future[None] = Future()
    original = StagingGate.wait

    def wait(gate: StagingGate, *args: Any, **kwargs: Any) -> bool:
        if not waits.done():
            waits.set_result(None)
        return original(gate, *args, **kwargs)

    patch.setattr(StagingGate, "wait", wait)
    return waits


def num_held(gate: StagingGate) -> int:
    """How many threads are held at a guard: they have seen that something is staged."""
    with gate._changed:
        return len(gate._changed._waiters)


async def either(one: "Future[None]", other: "Future[None]") -> None:
    """Returns when one of them is done."""
    futures = [asyncio.wrap_future(one), asyncio.wrap_future(other)]
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def run_script(script: str, *args: object, options: tuple[str, ...] = ()) -> Any:
    """A Python process that has run `script`; it has `returncode`, `stdout`, `stderr`."""
    command = [sys.executable, *options, "-c", script, *map(str, args)]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=LIMIT_S
    )


async def quietly(work: Coroutine[Any, Any, object]) -> CheckpointError | None:
    """The error that `work` raised, if it did."""
    try:
        await work
    except CheckpointError as error:
        return error
    return None


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def causes(error: BaseException | None) -> list[BaseException]:
    """`error` and what it was raised from, one from the other."""
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    return chain
