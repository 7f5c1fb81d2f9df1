"""The public types as a user's type checker meets them; checked, never run."""

from typing import assert_type

import torch

import aiockpt
import aiockpt.sync
from aiockpt.events import Event, Progress


def settings() -> aiockpt.EngineConfig:
    """A configuration is made by keyword, or from a mapping."""
    assert_type(
        aiockpt.EngineConfig.parse({"host_cache_size": 2}), aiockpt.EngineConfig
    )
    return aiockpt.EngineConfig(
        host_cache_size=0.5,
        parser_threads=2,
        retention=[aiockpt.KeepLast(3), aiockpt.KeepEvery(1000)],
    )


def observe(event: Event) -> None:
    """An observer takes any event."""
    del event


async def train(model: torch.nn.Module) -> None:
    """The life of a tag through the door for coroutines."""
    async with aiockpt.CheckpointEngine(
        "root", settings(), observers=[observe]
    ) as engine:
        assert_type(engine, aiockpt.CheckpointEngine)
        await engine.create("step-1")
        handle = await engine.save(model.state_dict(), "model.pt")
        assert_type(handle, aiockpt.SaveHandle)
        assert_type(handle.progress, Progress)
        await handle.staged()
        report = await engine.commit("step-1")
        assert_type(report, aiockpt.CommitReport)
        assert_type(report.nbytes, int)
        assert_type(await engine.latest(), str | None)
        assert_type(await engine.tags(), list[aiockpt.TagInfo])
        model.load_state_dict(await engine.load("model.pt", "cpu", tag="step-1"))


def train_without_a_loop(model: torch.nn.Module) -> None:
    """The same methods through the door that blocks."""
    with aiockpt.sync.CheckpointEngine("root", {"parser_threads": 2}) as engine:
        engine.create("step-1")
        handle = engine.save(model.state_dict(), "model.pt")
        assert_type(handle, aiockpt.sync.SaveHandle)
        assert_type(engine.commit("step-1"), aiockpt.CommitReport)


def remedy(error: aiockpt.CheckpointError) -> str:
    """An error tells by its class and attributes what to do about it."""
    match error:
        case aiockpt.PeerError():
            assert_type(error.rank, int | None)
            return f"look at rank {error.rank}"
        case aiockpt.StorageError():
            assert_type(error.errno, int | None)
            return f"repair {error.filename}"
        case aiockpt.CorruptCheckpointError():
            assert_type(error.key, str | None)
            return "load another tag"
        case _:
            return "save again"
