"""Row 8: interrupted at any await, a tag is wholly there or not, and nothing leaks."""

import asyncio
import contextlib
import functools
import itertools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import pytest
import torch

import aiockpt.sync
from aiockpt import CheckpointEngine, EngineStateError
from aiockpt.errors import CheckpointError
from aiockpt.testing.faults import Delay, Fault, inject
from aiockpt.testing.roots import assert_root_consistent
from aiockpt.testing.system_calls import Moment
from faults.matrix import Cases
from gates import (
    LIMIT_S,
    RING_8_MIB,
    Driven,
    EngineSide,
    Gate,
    happened,
    in_thread,
    turns,
)

# Of three chunks.
OLD = {"w": torch.arange(2.5 * (1 << 18))}
# Larger than the ring: its chunks are used again while callers are interrupted.
NEW = {"w": torch.arange(9.0 * (1 << 18)), "b": torch.ones(3)}
# Of the ring of 8 MiB.
CHUNK_BYTES = 1 << 20

Interrupt = Callable[[], object]


# --- the ways in which a caller is interrupted ------------------------------------


@contextlib.asynccontextmanager
async def cancelled() -> AsyncIterator[Interrupt]:
    task = asyncio.current_task()
    is_inside = True
    try:
        # What is interrupted may have ended by then.
        yield lambda: is_inside and task.cancel()
    except asyncio.CancelledError:
        task.uncancel()
    finally:
        is_inside = False


@contextlib.asynccontextmanager
async def timed_out() -> AsyncIterator[Interrupt]:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None) as scope:
            is_inside = True
            try:
                yield lambda: is_inside and scope.reschedule(0)
            finally:
                is_inside = False


@contextlib.asynccontextmanager
async def beside_one_that_fails() -> AsyncIterator[Interrupt]:
    told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def fail() -> None:
        if await told:
            raise ZeroDivisionError

    with contextlib.suppress(BaseExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            try:
                yield lambda: told.done() or told.set_result(True)
            finally:
                if not told.done():
                    told.set_result(False)


@contextlib.asynccontextmanager
async def in_a_scope() -> AsyncIterator[Interrupt]:
    with anyio.CancelScope() as scope:
        yield scope.cancel


WAYS: dict[str, Callable[[], AbstractAsyncContextManager[Interrupt]]] = {
    "task.cancel": cancelled,
    "asyncio.timeout": timed_out,
    "failing sibling": beside_one_that_fails,
    "anyio scope": in_a_scope,
}


async def interrupted(way: str, at: int, work: Awaitable[object]) -> bool:
    """Interrupts `work` at its suspension number `at`, or just before it begins (0).

    Returns:
        Whether it came so far.
    """
    driven: Driven | None = None
    is_told = False
    async with WAYS[way]() as interrupt:
        if at == 0:
            interrupt()
        driven = Driven(work, at, interrupt)
        try:
            with contextlib.suppress(CheckpointError):
                await driven
            # What did not suspend is interrupted here, having been done.
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            is_told = True
            raise
    was_reached = driven.num_suspensions >= at
    # The other ways take some turns of the loop: by then the work may have ended.
    if was_reached and way == "task.cancel":
        assert is_told, "the cancellation was swallowed"
    return was_reached


# --- what is interrupted ----------------------------------------------------------


async def read_under_a_lease(engine: CheckpointEngine) -> None:
    async with engine.reading("old"):
        await engine.load("model.pt", tag="old")


OPERATIONS: dict[str, Callable[[CheckpointEngine], Awaitable[object]]] = {
    "create": lambda engine: engine.create("extra"),
    "save": lambda engine: engine.save(NEW, "more.pt", tag="new"),
    "save_bytes": lambda engine: engine.save_bytes("more", "more.txt", tag="new"),
    "save_sharded": lambda engine: engine.save_sharded(OLD, tag="new"),
    "save_before": lambda engine: engine.save_before(600, "timed", {"model.pt": NEW}),
    "staged": lambda engine: engine.staged("new"),
    "commit": lambda engine: engine.commit("new"),
    "load": lambda engine: engine.load("model.pt", tag="old"),
    "reading": read_under_a_lease,
    "wait_for": lambda engine: engine.wait_for("old"),
    "preflight": lambda engine: engine.preflight(),
    "delete": lambda engine: engine.delete("old"),
    "abort": lambda engine: engine.abort("new"),
    "aclose": lambda engine: engine.aclose(),
}
operations = pytest.mark.parametrize("name", OPERATIONS)
# These are done when they return.
NEVER_SUSPENDED = {"save", "save_bytes", "save_sharded"}
# Those of which the engine's loop has a call of its own, and one that is not shared.
OF_THE_ENGINE = (
    "create", "save", "staged", "commit", "load", "delete", "abort", "aclose",
)  # fmt: skip


@pytest.fixture
def places(memory: Path) -> Callable[[int], Path]:
    """A fresh root for each case; that of the case before goes: together they are GBs."""

    def place(at: int) -> Path:
        for before in memory.iterdir():
            shutil.rmtree(before)
        return memory / str(at)

    return place


@contextlib.asynccontextmanager
async def engine_at_work(root: Path) -> AsyncIterator[CheckpointEngine]:
    """An engine with a published tag, "old", and an open one, "new", being saved."""
    engine = CheckpointEngine(root, RING_8_MIB)
    await engine.create("old")
    await engine.save(OLD, "model.pt")
    await engine.commit("old")
    await engine.create("new")
    await engine.save(NEW, "model.pt")
    try:
        yield engine
    finally:
        with contextlib.suppress(EngineStateError):
            await engine.aclose()


def assert_wholly_there_or_not(root: Path, name: str) -> list[str]:
    """Every tag has what was saved in it, to the last byte; none has foreign bytes."""
    tags = assert_root_consistent(root)
    assert set(tags) <= {"old", "new", "timed"}
    # And nothing else has come to be there.
    assert {path.name for path in root.iterdir()} <= {*tags, "latest", ".aiockpt"}
    assert "old" in tags or name == "delete"
    for tag in tags:
        expected = undisturbed()["old" if tag == "old" else "new"]
        files = bytes_of(root / tag)
        assert "model.pt" in files
        assert files == {path: expected[path] for path in files}
    return tags


def bytes_of(tag: Path) -> dict[str, bytes]:
    """All that was saved into a tag."""
    return {path.name: path.read_bytes() for path in tag.iterdir() if path.is_file()}


@functools.cache
def undisturbed() -> dict[str, dict[str, bytes]]:
    """What is in the tags where nobody interrupts anything."""
    with TemporaryDirectory() as path:
        root = Path(path)
        with aiockpt.sync.CheckpointEngine(root, RING_8_MIB) as engine:
            for tag, state in ("old", OLD), ("new", NEW):
                engine.create(tag)
                engine.save(state, "model.pt")
                if tag == "new":
                    engine.save(NEW, "more.pt")
                    engine.save_bytes("more", "more.txt")
                    engine.save_sharded(OLD)
                engine.commit(tag)
            loaded = torch.load(root / "new" / "model.pt")
        assert all(torch.equal(loaded[key], value) for key, value in NEW.items())
        return {tag: bytes_of(root / tag) for tag in ("old", "new")}


async def off_loop(work: Callable[..., Any], *args: object, **options: object) -> Any:
    """Looks at files where no event loop is blocked by it."""
    outcome = in_thread(functools.partial(work, *args, **options))
    await happened(outcome)
    return outcome.result()


async def check(engine: CheckpointEngine, root: Path, name: str) -> None:
    """What there is, is whole; the engine goes on, and holds nothing."""
    tags = await off_loop(assert_wholly_there_or_not, root, name)
    if name == "aclose":
        with pytest.raises(EngineStateError, match="has been closed"):
            await engine.latest()
    elif name == "abort":
        with pytest.raises(EngineStateError, match="is not open"):
            await engine.commit("new")
    else:
        if "new" not in tags:
            # It is as open as before.
            await engine.commit("new")
        tags = await off_loop(assert_wholly_there_or_not, root, name)
        assert "new" in tags
        assert await engine.latest() == "new"
    if name != "aclose":
        with contextlib.suppress(EngineStateError):
            await engine.create("extra")
        await engine.save(NEW, "model.pt", tag="extra")
        await engine.commit("extra")
        assert torch.equal((await engine.load("model.pt"))["w"], NEW["w"])
        await engine.aclose()
    assert engine.ring_bytes[0] == 0
    await off_loop(assert_root_consistent, root, is_swept=True)


@operations
@pytest.mark.parametrize("way", WAYS)
async def test_interrupted_at_any_await_of_the_caller_nothing_breaks(
    cases: Cases, places, name, way
):
    for at in itertools.count():
        root = places(at)
        async with engine_at_work(root) as engine:
            was_reached = await interrupted(way, at, OPERATIONS[name](engine))
            if not was_reached:
                break
            with cases.case(8, way, f"{name}, await {at}"):
                await finish_abort(engine, name)
                await check(engine, root, name)
    assert (at == 1) == (name in NEVER_SUSPENDED)


async def finish_abort(engine: CheckpointEngine, name: str) -> None:
    """An abort that was interrupted before it began is asked for again."""
    if name == "abort":
        with contextlib.suppress(EngineStateError):
            await engine.abort("new")
    if name == "aclose":
        with contextlib.suppress(EngineStateError):
            await engine.aclose()


@pytest.mark.parametrize("name", OF_THE_ENGINE)
async def test_interrupted_at_any_await_of_the_engine_nothing_breaks(
    cases: Cases, places, name, monkeypatch
):
    side = EngineSide(monkeypatch)
    for at in itertools.count(1):
        root = places(at)
        async with engine_at_work(root) as engine:
            with side.cancelling_at(at):
                with contextlib.suppress(asyncio.CancelledError, EngineStateError):
                    await OPERATIONS[name](engine)
            if name == "save":
                # Its task is the engine's own: it fails the tag, and is told of.
                with contextlib.suppress(CheckpointError):
                    await engine.abort("new")
            await happened(side.ended)
            if side.num_suspensions < at:
                break
            with cases.case(8, "on the engine's loop", f"{name}, await {at}"):
                await finish_abort(engine, name)
                await check(engine, root, "abort" if name == "save" else name)
    assert at > 1


@operations
async def test_interrupted_during_any_call_to_the_system_nothing_breaks(
    cases: Cases, places, name
):
    """Where a thread is at work, and whoever waits for it goes."""
    loop = asyncio.get_running_loop()
    # In the ordinary run each call is met by one of the ways.
    num_ways = cases.pick(1, len(WAYS))
    for number in itertools.count(num_ways):
        at, way = number // num_ways, [*WAYS][number % len(WAYS)]
        root = places(number)
        async with engine_at_work(root) as engine:
            async with WAYS[way]() as interrupt:

                def call_later(moment: Moment, interrupt=interrupt) -> object:
                    loop.call_soon_threadsafe(interrupt)
                    # Whoever would go now has gone, while the thread goes on.
                    asyncio.run_coroutine_threadsafe(turns(), loop).result(LIMIT_S)
                    return moment.make()

                with inject(Fault((), call_later, nth=at)) as injection:
                    with contextlib.suppress(CheckpointError):
                        await OPERATIONS[name](engine)
                    await finish_writing(engine, name)
            if not injection.spoiled:
                break
            what = f"{name} by {way}, {injection.spoiled[0]}"
            with cases.case(8, "during a call to the system", what):
                await finish_abort(engine, name)
                await check(engine, root, name)


async def finish_writing(engine: CheckpointEngine, name: str) -> None:
    """A call that only enqueues is interrupted while the engine works for it."""
    if name.startswith("save_") or name in {"save", "staged"}:
        await engine.staged("new")


@pytest.mark.parametrize("name", ["abort", "aclose"])
async def test_what_ends_a_tag_waits_for_the_write_that_is_under_way(
    cases: Cases, places, name
):
    """Else its memory would be used again while a thread still reads it."""
    num_before = -(-OLD["w"].nbytes // CHUNK_BYTES)
    for at in range(1, 9):
        root = places(at)
        gate = Gate()
        with inject(Fault("pwrite", Delay(gate.pass_through), nth=num_before + at)):
            async with engine_at_work(root) as engine:
                with cases.case(8, "a write under way", f"{name}, write {at}"):
                    await gate.reached()
                    ending = asyncio.ensure_future(OPERATIONS[name](engine))
                    while engine.ring_bytes[0] > CHUNK_BYTES:
                        await turns()
                    for _ in range(20):
                        await engine._runtime._machinery.spawn(turns()).wait()
                    assert not ending.done()
                    assert engine.ring_bytes[0] == CHUNK_BYTES
                    gate.open()
                    with contextlib.suppress(EngineStateError):
                        await ending
                    assert engine.ring_bytes[0] == 0
                    await check(engine, root, name)
