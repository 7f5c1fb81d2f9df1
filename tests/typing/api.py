"""The public types as a user's type checker meets them; checked, never run."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_type

import torch

import aiockpt
import aiockpt.sync
from aiockpt import CommitReport, EngineConfig, KeepEvery, KeepLast, TagInfo
from aiockpt.errors import CheckpointError, PeerError, StorageError
from aiockpt.events import Event, Failed, Progress, Published


def settings() -> EngineConfig:
    """A configuration is made by keyword, or from a mapping."""
    assert_type(EngineConfig.parse({"host_cache_size": 2}), EngineConfig)
    return EngineConfig(
        host_cache_size=0.5, parser_threads=2, retention=[KeepLast(3), KeepEvery(10)]
    )


def remedy(error: CheckpointError) -> str:
    """An error tells by its class and attributes what to do about it."""
    match error:
        case PeerError():
            assert_type(error.rank, int | None)
            return f"look at rank {error.rank}"
        case StorageError():
            assert_type(error.errno, int | None)
            return f"repair {error.filename}"
        case _:
            return "save again"


def observer(event: Event) -> None:
    """An observer is any callable that takes an event."""
    if isinstance(event, Published):
        assert_type(event.report, CommitReport)
    elif isinstance(event, Failed):
        assert_type(event.error, BaseException)
    else:
        assert_type(event.nbytes, int)


async def awaiting(root: Path, state: dict[str, torch.Tensor]) -> None:
    """The engine of coroutines, every method of it."""
    async with aiockpt.CheckpointEngine(
        root, {"host_cache_size": 2}, observers=[observer]
    ) as engine:
        assert_type(engine, aiockpt.CheckpointEngine)
        await engine.create("step-1", overwrite=True)
        handle = await engine.save(state, "model.pt", tag="step-1")
        assert_type(handle, aiockpt.SaveHandle)
        assert_type(handle.progress, Progress)
        await handle.staged()
        await handle.written()
        await engine.staged()
        engine.wait_staged()
        assert_type(await engine.commit("step-1"), CommitReport)
        assert_type(await engine.latest(), str | None)
        assert_type(await engine.tags(), list[TagInfo])
        assert_type(await engine.sweep(), list[str])
        assert_type(await engine.wait_for("step-1", newer_than="step-0"), TagInfo)
        async for info in engine.watch():
            assert_type(info, TagInfo)
            engine.watch(after=info)
        async with engine.reading("step-1") as held:
            assert_type(held, TagInfo)
        assert_type(await engine.save_bytes("text", "notes"), aiockpt.SaveHandle)
        assert_type(await engine.load_bytes("notes", tag="step-1"), bytes)
        sharded = await engine.save_sharded(torch.nn.Linear(1, 1), directory="hf")
        assert_type(sharded, list[aiockpt.SaveHandle])
        await engine.save_sharded(state, max_shard_bytes=1 << 30)
        assert_type(await engine.preflight(state), aiockpt.PreflightReport)
        engine.preempt_on(signal.SIGTERM, signal.SIGUSR1)
        await engine.preempted()
        assert_type(engine.is_preempted, bool)
        report = await engine.save_before(20, "last", {"model.pt": state})
        assert_type(report, CommitReport)
        assert_type(await engine.load("model.pt", "cpu", keys=["w"]), Any)
        assert_type(engine.ring_bytes, tuple[int, int])
        await engine.abort("step-2")
        await engine.delete("step-1")
    await engine.aclose()


async def reading(root: Path, module: torch.nn.Module) -> None:
    """Every way of reading what was saved."""
    async with aiockpt.CheckpointEngine(root) as engine:
        await engine.load("model.pt", into={"model": module}, strict=False)
        tag, states = await engine.load_latest_valid("model.pt", "optimizer.pt")
        assert_type(tag, str)
        assert_type(states, list[Any])
        async with engine.open("model.pt", tag="step-1") as file:
            assert_type(file, aiockpt.CheckpointFile)
            assert_type(file.keys, tuple[str, ...])
            assert_type(await file.tensor("w"), torch.Tensor)
            assert_type(await file.rows("w", 0, 8), torch.Tensor)
            assert_type(await file.load(["w*"]), dict[str, torch.Tensor])
    async with aiockpt.open(root / "model.pt", map_location="cpu") as file:
        assert_type([info.shape for info in file.tensors], list[tuple[int, ...]])
    with aiockpt.sync.open(root / "model.pt") as blocking_file:
        assert_type(blocking_file, aiockpt.sync.CheckpointFile)
        assert_type(blocking_file.rows("w"), torch.Tensor)


def blocking(root: str, states: Sequence[object]) -> None:
    """The blocking engine: the same names, the same types."""
    with aiockpt.sync.CheckpointEngine(root, EngineConfig()) as engine:
        assert_type(engine, aiockpt.sync.CheckpointEngine)
        engine.create("step-1")
        handle = engine.save(states, Path("model.pt"))
        assert_type(handle, aiockpt.sync.SaveHandle)
        handle.staged()
        handle.written()
        engine.staged("step-1")
        assert_type(engine.commit("step-1"), CommitReport)
        assert_type(engine.latest(), str | None)
        assert_type(engine.tags(), list[TagInfo])
        assert_type(engine.wait_for(newer_than=engine.tags()[0]), TagInfo)
        for info in engine.watch(after="step-0"):
            assert_type(info, TagInfo)
        with engine.reading() as held:
            assert_type(held, TagInfo)
        assert_type(engine.load("model.pt", into=states), Any)
    engine.close()


async def one_file(path: Path, state: object) -> None:
    """One file in, one file out, by either door."""
    await aiockpt.save(state, path)
    assert_type(await aiockpt.load(path, mmap=True), Any)
    aiockpt.sync.save(state, str(path), metadata={"step": "7"})
    assert_type(aiockpt.sync.load(path), Any)
