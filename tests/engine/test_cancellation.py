"""Cancelling a caller ends its waiting; it never tears, leaks or loses anything."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import torch

from aiockpt import CheckpointEngine, EngineStateError, StorageError, saver
from aiockpt.catalog import Catalog
from aiockpt.staging import host
from aiockpt.storage import local_write
from gates import (
    RING_8_MIB,
    EngineSide,
    Gate,
    cancelled_at,
    held,
    held_loop,
    turns,
)
from interrupts import WAYS, by_cancel

OLD = {"w": torch.arange(1000.0)}
# Larger than the ring.
NEW = {"w": torch.randn(9 << 18)}


@contextlib.asynccontextmanager
async def engine_with_tags(root: Path) -> AsyncIterator[CheckpointEngine]:
    """An engine with a published tag "old" and an open one, "new", being saved."""
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


async def assert_whole(engine: CheckpointEngine, root: Path) -> None:
    """The engine works, nothing is held, and every tag is right or not there."""
    with contextlib.suppress(EngineStateError):
        await engine.commit("new")
    published = {info.tag for info in await engine.tags()}
    assert "new" in published
    for tag in published - {"extra"}:
        state = OLD if tag == "old" else NEW
        assert torch.equal((await engine.load("model.pt", tag=tag))["w"], state["w"])
        assert torch.equal(torch.load(root / tag / "model.pt")["w"], state["w"])
    await engine.create("next")
    await engine.save(NEW, "model.pt")
    await engine.commit("next")
    assert torch.equal((await engine.load("model.pt"))["w"], NEW["w"])
    assert engine.ring_bytes[0] == 0


async def assert_nothing_is_left(root: Path) -> None:
    """No work area and no lock remains of an engine that was closed."""
    assert list((root / ".aiockpt" / "work").iterdir()) == []


OPERATIONS: dict[str, Callable[[CheckpointEngine], Awaitable[object]]] = {
    "create": lambda engine: engine.create("extra"),
    "staged": lambda engine: engine.staged(),
    "staged of a tag": lambda engine: engine.staged("new"),
    "commit": lambda engine: engine.commit("new"),
    "load": lambda engine: engine.load("model.pt", tag="old"),
    "delete": lambda engine: engine.delete("old"),
    "latest": lambda engine: engine.latest(),
    "tags": lambda engine: engine.tags(),
    "sweep": lambda engine: engine.sweep(),
    "enter": lambda engine: engine._runtime.spawn(
        engine._runtime.sweep_at_start()
    ).wait(),
}
operations = pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)


@operations
async def test_cancelled_at_every_await_of_the_caller_nothing_breaks(operate, root):
    for at in itertools.count(1):
        async with engine_with_tags(root / str(at)) as engine:
            was_reached = await cancelled_at(at, operate(engine))
            await assert_whole(engine, root / str(at))
        await assert_nothing_is_left(root / str(at))
        if not was_reached:
            break
    assert at > 1


@operations
async def test_cancelled_at_every_await_of_the_engine_nothing_breaks(
    operate, root, monkeypatch
):
    side = EngineSide(monkeypatch)
    num_missed = 0
    for at in itertools.count(1):
        async with engine_with_tags(root / str(at)) as engine:
            with held_loop(engine._runtime):
                # The operation begins before anything of this has been staged.
                await engine.save(OLD, "late.pt", tag="new")
                with side.cancelling_at(at):
                    operation = asyncio.ensure_future(operate(engine))
                    await turns(1)
            with contextlib.suppress(asyncio.CancelledError):
                await operation
            await assert_whole(engine, root / str(at))
        await assert_nothing_is_left(root / str(at))
        num_missed = num_missed + 1 if side.num_suspensions < at else 0
        # In a single run there may have been less to wait for than in others.
        if num_missed == 2:
            break
    assert at > 2


async def test_closing_is_finished_first_wherever_the_caller_is_cancelled(root):
    for at in itertools.count(1):
        async with engine_with_tags(root / str(at)) as engine:
            await engine.commit("new")
            was_reached = await cancelled_at(at, engine.aclose())
            with pytest.raises(EngineStateError, match="has been closed"):
                await engine.latest()
        await assert_nothing_is_left(root / str(at))
        if not was_reached:
            break
    assert at > 1


async def test_closing_is_finished_first_wherever_the_engine_is_interrupted(
    root, monkeypatch
):
    side = EngineSide(monkeypatch)
    for at in itertools.count(1):
        engine = CheckpointEngine(root / str(at), RING_8_MIB)
        await engine.create("new")
        await engine.save(NEW, "model.pt")
        with side.cancelling_at(at):
            with contextlib.suppress(asyncio.CancelledError, EngineStateError):
                await engine.aclose()
        await assert_nothing_is_left(root / str(at))
        if side.num_suspensions < at:
            break
    assert at > 1


async def test_an_abort_that_was_begun_is_finished_first(root, monkeypatch):
    async with engine_with_tags(root) as engine:
        with held(monkeypatch, Catalog, "discard") as gate:
            await by_cancel(engine.abort("new"), gate.reached, opening(gate))
        with pytest.raises(EngineStateError, match="'new' is not open"):
            await engine.commit("new")
        await engine.create("new")
        await engine.save(NEW, "model.pt")
        await assert_whole(engine, root)


async def test_save_does_not_suspend_and_so_cannot_be_cancelled_half_way(root):
    async with engine_with_tags(root) as engine:
        assert not await cancelled_at(1, engine.save(OLD, "other.pt", tag="new"))
        await engine.commit("new")
        assert torch.equal((await engine.load("other.pt"))["w"], OLD["w"])


async def test_a_call_that_is_cancelled_before_it_begins_ends_all_the_same(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        async with asyncio.TaskGroup() as group:
            with held_loop(engine._runtime):
                task = group.create_task(engine.create("a"))
                await turns()
                task.cancel()
                await turns()
        assert task.cancelled()
        with pytest.raises(EngineStateError, match="no tag is open"):
            await engine.save({}, "f.pt")


async def test_entering_an_engine_that_is_cancelled_closes_it(root, monkeypatch):
    (root / ".aiockpt" / "work").mkdir(parents=True)
    engine = CheckpointEngine(root)

    async def use() -> None:
        async with engine:
            raise AssertionError("entered")

    async with asyncio.TaskGroup() as group:
        with held(monkeypatch, Catalog, "sweep") as gate:
            task = group.create_task(use())
            await gate.reached()
            task.cancel()
            await turns()
            assert not task.done()
    assert task.cancelled()
    with pytest.raises(EngineStateError, match="has been closed"):
        await engine.create("a")


ways = pytest.mark.parametrize("interrupt", WAYS)


def opening(gate: Gate) -> Callable[[], Awaitable[None]]:
    async def then() -> None:
        await turns()
        gate.open()

    return then


@ways
async def test_a_commit_cancelled_while_files_are_written_leaves_the_tag_open(
    interrupt, root, monkeypatch
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("new")
        with held(monkeypatch, local_write.LocalWriteFile, "_write") as gate:
            handle = await engine.save(NEW, "model.pt")
            error = await interrupt(engine.commit("new"), gate.reached, turns)
            assert not hasattr(error, "__notes__")
            assert handle.progress.written_bytes == 0
            assert await engine.tags() == []
            await engine.save(OLD, "late.pt")
        await assert_whole(engine, root)
        assert torch.equal((await engine.load("late.pt", tag="new"))["w"], OLD["w"])


@ways
async def test_a_commit_cancelled_while_publishing_is_finished_first_and_says_so(
    interrupt, root, monkeypatch
):
    async with engine_with_tags(root) as engine:
        with held(monkeypatch, Catalog, "publish") as gate:
            error = await interrupt(engine.commit("new"), gate.reached, opening(gate))
        assert error.__notes__ == ["the operation completed before the cancellation"]
        assert await engine.latest() == "new"
        with pytest.raises(EngineStateError, match="published already"):
            await engine.create("new")
        await assert_whole(engine, root)


@ways
async def test_a_cancelled_staged_leaves_the_tag_open(interrupt, root, monkeypatch):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("new")
        with held(monkeypatch, host, "_fill") as gate:
            handle = await engine.save(NEW, "model.pt")
            await interrupt(engine.staged("new"), gate.reached, turns)
            await interrupt(handle.staged(), gate.reached, turns)
            await interrupt(handle.written(), gate.reached, turns)
        await handle.written()
        await assert_whole(engine, root)


@ways
async def test_a_cancelled_load_ends_with_the_thread_that_reads(
    interrupt, root, monkeypatch
):
    async with engine_with_tags(root) as engine:
        with held(monkeypatch, Catalog, "open_file") as gate:
            work = engine.load("model.pt", tag="old")
            await interrupt(work, gate.reached, opening(gate))
        await assert_whole(engine, root)


async def test_what_is_queued_and_cancelled_never_runs(root, monkeypatch):
    asked = []
    open_file = Catalog.open_file

    def noted(catalog, path, tag, *rest):
        asked.append(tag)
        return open_file(catalog, path, tag, *rest)

    monkeypatch.setattr(Catalog, "open_file", noted)
    async with engine_with_tags(root) as engine:
        with held(monkeypatch, Catalog, "open_file") as gate:
            # As many as are loaded at once; the gate lets none of them end.
            loads = [asyncio.create_task(engine.load("model.pt")) for _ in range(2)]
            await gate.reached()
            await by_cancel(engine.load("model.pt", tag="never"), turns, turns)
        await asyncio.gather(*loads)
        assert asked == [None, None]


async def test_a_failure_that_outlives_a_cancelled_commit_is_told_to_the_next(
    root, monkeypatch
):
    def fail(*_: object, **__: object) -> None:
        raise StorageError(5, "the disk is gone", "f")

    async with engine_with_tags(root) as engine:
        with monkeypatch.context() as broken:
            broken.setattr(Catalog, "_show", fail)
            with held(broken, Catalog, "publish") as gate:
                work = engine.commit("new")
                error = await by_cancel(work, gate.reached, opening(gate))
            assert not hasattr(error, "__notes__")
        with pytest.raises(StorageError, match="the disk is gone"):
            await engine.commit("new")
        await engine.create("new")
        await engine.save(NEW, "model.pt")
        await assert_whole(engine, root)


async def test_a_tag_that_is_aborted_while_a_file_is_opened_leaves_nothing(
    root, monkeypatch
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        async with asyncio.TaskGroup() as group:
            with held(monkeypatch, local_write, "_open_new") as gate:
                await engine.save(NEW, "model.pt")
                await gate.reached()
                group.create_task(engine.abort("a"))
                await turns()
        assert engine.ring_bytes[0] == 0
        (area,) = (p for p in (root / ".aiockpt" / "work").iterdir() if p.is_dir())
        assert list(area.iterdir()) == []


@pytest.mark.parametrize("owner_name", ["fill", "write", "plan"])
async def test_a_tag_that_is_aborted_at_work_leaves_nothing(
    owner_name, root, monkeypatch
):
    owner, name = {
        "fill": (host, "_fill"),
        "write": (local_write.LocalWriteFile, "_write"),
        "plan": (saver, "make_plan"),
    }[owner_name]
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        async with asyncio.TaskGroup() as group:
            with held(monkeypatch, owner, name) as gate:
                await engine.save(NEW, "model.pt")
                await engine.save(NEW, "other.pt")
                await gate.reached()
                aborting = group.create_task(engine.abort("a"))
                await turns()
                assert not aborting.done()
        assert engine.ring_bytes[0] == 0
        await engine.create("new")
        await engine.save(NEW, "model.pt")
        await assert_whole(engine, root)


async def test_the_lease_of_a_write_under_way_ends_with_the_write(root, monkeypatch):
    one_worker = RING_8_MIB | {"parser_threads": 1}
    async with CheckpointEngine(root, one_worker) as engine:
        await engine.create("a")
        async with asyncio.TaskGroup() as group:
            with held(monkeypatch, local_write.LocalWriteFile, "_write") as gate:
                await engine.save(NEW, "model.pt")
                await gate.reached()
                aborting = group.create_task(engine.abort("a"))
                # What was only queued is given up; one chunk is at the gate.
                while engine.ring_bytes[0] > 1 << 20:
                    await turns()
                for _ in range(20):
                    await engine.latest()  # turns of the engine's loop
                assert engine.ring_bytes[0] == 1 << 20
                assert not aborting.done()
        assert engine.ring_bytes[0] == 0
