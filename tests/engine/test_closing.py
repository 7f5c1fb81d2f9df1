"""An engine that is closed finishes what it must, and says what is lost."""

import asyncio
from concurrent.futures import Future

import pytest
import torch

from aiockpt import (
    CheckpointEngine,
    CheckpointError,
    EngineStateError,
    events,
    saver,
)
from aiockpt.catalog import Catalog
from aiockpt.storage.local_write import LocalWriteFile
from gates import (
    RING_8_MIB,
    causes,
    failing,
    happened,
    held,
    quietly,
    turns,
)

STATE = {"w": torch.arange(5 << 20, dtype=torch.float32), "step": 7}


async def test_closing_with_an_uncommitted_tag_names_it(root):
    engine = CheckpointEngine(root, RING_8_MIB)
    for tag in ("first", "second"):
        await engine.create(tag)
        await engine.save(STATE, "model.pt")
    with pytest.raises(EngineStateError, match=r"'first'.*never committed") as lost:
        await engine.aclose()
    assert "'second'" in "".join(lost.value.__notes__)
    await engine.aclose()
    assert list((root / ".aiockpt" / "work").iterdir()) == []


async def test_closing_tells_a_failure_that_nobody_has_heard_of(root, monkeypatch):
    boom = ValueError("boom")
    monkeypatch.setattr(saver, "make_plan", failing(boom))
    has_failed: Future[events.Event] = Future()
    engine = CheckpointEngine(root, observers=[has_failed.set_result])
    await engine.create("a")
    await engine.save({}, "model.pt")
    await happened(has_failed)
    with pytest.raises(CheckpointError, match="boom") as failed:
        await engine.aclose()
    assert boom in causes(failed.value)
    await engine.aclose()


async def test_closing_is_silent_on_a_failure_that_was_told(root, monkeypatch):
    monkeypatch.setattr(saver, "make_plan", failing(ValueError("boom")))
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save({}, "model.pt")
        with pytest.raises(CheckpointError, match="boom"):
            await engine.staged()


async def test_an_error_of_the_body_is_not_masked(root):
    with pytest.raises(ZeroDivisionError) as raised:
        async with CheckpointEngine(root, RING_8_MIB) as engine:
            await engine.create("half-done")
            await engine.save(STATE, "model.pt")
            raise ZeroDivisionError
    assert "'half-done'" in "".join(raised.value.__notes__)


async def test_any_number_of_tasks_may_close_the_engine(root):
    engine = CheckpointEngine(root, RING_8_MIB)
    await engine.create("a")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(quietly(engine.aclose())) for _ in range(5)]
    assert [task.result() for task in tasks].count(None) == 4


async def test_a_commit_under_way_is_finished_by_closing(root, monkeypatch):
    engine = CheckpointEngine(root, RING_8_MIB)
    await engine.create("a")
    await engine.save(STATE, "model.pt")
    async with asyncio.TaskGroup() as group:
        with held(monkeypatch, LocalWriteFile, "_sync") as gate:
            commit = group.create_task(engine.commit("a"))
            await gate.reached()
            closing = group.create_task(engine.aclose())
            await turns()
            assert not closing.done()
    assert commit.result().tag == "a"
    assert torch.equal(torch.load(root / "a" / "model.pt")["w"], STATE["w"])


@pytest.mark.parametrize("step", ["open_work", "new_directory"])
async def test_a_tag_that_is_being_created_while_closing_leaves_nothing(
    step, root, monkeypatch
):
    engine = CheckpointEngine(root, RING_8_MIB)
    async with asyncio.TaskGroup() as group:
        with held(monkeypatch, Catalog, step) as gate:
            group.create_task(engine.create("late"))
            await gate.reached()
            closing = group.create_task(quietly(engine.aclose()))
            await turns()
    assert "'late'" in str(closing.result())
    assert list((root / ".aiockpt" / "work").iterdir()) == []


async def test_an_abort_that_comes_while_publishing_is_too_late_and_says_so(
    root, monkeypatch
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save(STATE, "model.pt")
        async with asyncio.TaskGroup() as group:
            with held(monkeypatch, Catalog, "publish") as gate:
                commit = group.create_task(engine.commit("a"))
                await gate.reached()
                aborting = group.create_task(quietly(engine.abort("a")))
                await turns()
                for _ in range(5):
                    await engine.latest()  # turns of the engine's loop
                assert not aborting.done()
        assert "'a' has been published already" in str(aborting.result())
        assert commit.result().tag == await engine.latest() == "a"
        assert torch.equal((await engine.load("model.pt"))["w"], STATE["w"])


async def test_an_abort_ends_a_commit_that_waits_for_files(root, monkeypatch):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        async with asyncio.TaskGroup() as group:
            with held(monkeypatch, LocalWriteFile, "_write") as gate:
                await engine.save(STATE, "model.pt")
                commit = group.create_task(quietly(engine.commit("a")))
                await gate.reached()
                group.create_task(engine.abort("a"))
                await turns()
        assert "'a' was aborted" in str(commit.result())
        assert await engine.tags() == []
        await engine.create("a")
        await engine.abort("a")
