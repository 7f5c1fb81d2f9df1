"""What fails in the background ends its tag, and reaches every caller once."""

import asyncio
import threading
from typing import Any

import pytest
import torch

from aiockpt import (
    CheckpointEngine,
    CheckpointError,
    EngineStateError,
    StorageError,
    events,
    saver,
)
from aiockpt.catalog import Catalog
from aiockpt.guard import StagingGate
from aiockpt.storage.local_write import LocalWriteFile
from gates import (
    LIMIT_S,
    RING_8_MIB,
    causes,
    failing,
    held,
    held_loop,
    quietly,
    turns,
)

STATE = {"w": torch.arange(5 << 20, dtype=torch.float32), "step": 7}


async def test_a_failure_reaches_every_caller_with_its_cause(root, monkeypatch):
    boom = ValueError("boom")
    monkeypatch.setattr(saver, "make_plan", failing(boom))
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        handle = await engine.save({}, "model.pt")
        waits = [handle.staged, handle.written, engine.staged]
        errors = [await quietly(wait()) for wait in (*waits, *waits)]
        with pytest.raises(EngineStateError, match="'a' has failed") as refused:
            await engine.save({}, "other.pt")
        errors += [refused.value, await quietly(engine.commit("a"))]
    assert all(boom in causes(error) for error in errors)
    assert all("boom" in str(error) for error in errors)
    assert len(set(map(id, errors))) == len(errors)


async def test_a_failed_commit_ends_the_tag_which_can_be_created_again(
    root, monkeypatch
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        with monkeypatch.context() as broken:
            broken.setattr(LocalWriteFile, "_write", failing(StorageError(5, "x", "f")))
            await engine.create("a")
            await engine.save(STATE, "model.pt")
            with pytest.raises(StorageError) as failed:
                await engine.commit("a")
            assert (failed.value.errno, failed.value.filename) == (5, "f")
            with pytest.raises(EngineStateError, match="'a' is not open"):
                await engine.commit("a")
        assert engine.ring_bytes[0] == 0
        await engine.create("a")
        await engine.save(STATE, "model.pt")
        await engine.commit("a")
        assert (await engine.load("model.pt"))["step"] == 7


@pytest.mark.parametrize("how", ["written", "staged", "save"])
async def test_a_tag_is_created_again_by_who_was_told_that_it_failed(
    root, monkeypatch, how
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        with monkeypatch.context() as broken:
            broken.setattr(saver, "make_plan", failing(StorageError(5, "x", "f")))
            await engine.create("a")
            handle = await engine.save(STATE, "model.pt")
            attempt = engine._runtime.open_tags.get("a")
            while attempt.failure is None:
                await turns(1)
        with pytest.raises(EngineStateError, match="'a' is open already"):
            await engine.create("a")
        with pytest.raises((StorageError, EngineStateError)):
            if how == "save":
                await engine.save(STATE, "other.pt")
            else:
                await getattr(handle, how)()

        await engine.create("a")
        await engine.save(STATE, "model.pt")
        await engine.commit("a")
        assert (await engine.load("model.pt"))["step"] == 7


async def test_a_failed_write_gives_back_a_ring_that_was_full(root, monkeypatch):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with monkeypatch.context() as broken:
            broken.setattr(LocalWriteFile, "_write", failing(StorageError(5, "x", "f")))
            with held(broken, LocalWriteFile, "_write") as gate:
                await engine.save(STATE, "model.pt")
                await gate.reached()
                assert engine.ring_bytes == (8 << 20, 8 << 20)
            with pytest.raises(StorageError):
                await engine.commit("a")
        assert engine.ring_bytes == (0, 8 << 20)


async def test_a_failed_publication_fails_the_commit_and_hides_the_tag(
    root, monkeypatch
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save(STATE, "model.pt")
        with monkeypatch.context() as broken:
            broken.setattr(Catalog, "_show", failing(StorageError(28, "full", "f")))
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(quietly(engine.commit("a"))) for _ in range(3)
                ]
        assert [task.result().errno for task in tasks] == [28, 28, 28]
        assert await engine.tags() == []
        await engine.create("a")
        await engine.abort("a")


async def test_two_saves_that_fail_at_once_are_one_failure(root, monkeypatch):
    seen: list[events.Event] = []
    left = threading.Semaphore(0)
    original = StagingGate.leave

    def leave(gate: StagingGate, save: Any) -> None:
        original(gate, save)
        left.release()

    monkeypatch.setattr(StagingGate, "leave", leave)
    monkeypatch.setattr(saver, "make_plan", failing(ValueError("boom")))
    async with CheckpointEngine(root, observers=[seen.append]) as engine:
        await engine.create("a")
        with held(monkeypatch, StagingGate, "leave") as gate:
            await engine.save({}, "one.pt")
            await engine.save({}, "two.pt")
            await gate.reached()
            while engine._runtime._machinery._copiers._num_unfinished < 2:
                await turns()
            with held_loop(engine._runtime):
                gate.open()
                assert left.acquire(timeout=LIMIT_S)
                assert left.acquire(timeout=LIMIT_S)
        with pytest.raises(CheckpointError, match="boom"):
            await engine.commit("a")
    assert [type(event).__name__ for event in seen] == ["Failed"]


async def test_the_other_files_of_a_failed_tag_stop_and_are_removed(root, monkeypatch):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with held(monkeypatch, LocalWriteFile, "_write") as gate:
            large = await engine.save(STATE, "large.pt")
            await gate.reached()
            with monkeypatch.context() as broken:
                broken.setattr(saver, "make_plan", failing(ValueError("boom")))
                small = await engine.save({}, "small.pt")
                assert await quietly(small.staged()) is not None
        assert "boom" in str(await quietly(large.written()))
        assert "boom" in str(await quietly(engine.commit("a")))
        assert large.progress.written_bytes < large.progress.planned_bytes
        assert engine.ring_bytes[0] == 0
        (area,) = (p for p in (root / ".aiockpt" / "work").iterdir() if p.is_dir())
        assert list(area.iterdir()) == []


async def test_a_failing_retention_policy_is_worth_a_warning(root, caplog):
    class Broken:
        def keeps(self, tags: object) -> set[str]:
            raise ZeroDivisionError("policy")

    settings = RING_8_MIB | {"retention": [Broken()]}
    async with CheckpointEngine(root, settings) as engine:
        await engine.create("a")
        await engine.save({}, "model.pt")
        await engine.commit("a")
    assert "old tags of" in caplog.text
    assert [path.name for path in (root / ".aiockpt" / "work").iterdir()] == []
