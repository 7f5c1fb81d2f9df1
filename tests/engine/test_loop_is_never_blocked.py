"""No file-system call, pickle, checksum or lock runs on a loop, ours or the caller's."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import (
    CheckpointEngine,
    CheckpointError,
    CheckpointNotFoundError,
    TornSnapshotError,
    opening,
    runtime,
    saver,
)
from aiockpt.staging import host
from aiockpt.storage import local_write
from gates import RING_8_MIB, held
from optimizers import training


class Custom:
    """Is cloned by `save` and pickled by a worker."""


def rich_state() -> dict[str, Any]:
    trained = training("AdamW-foreach")
    large = torch.arange(9 << 18)
    many = [torch.full((3,), n) for n in range(500)]
    return trained.state() | {
        "large": large,
        "view": large[5:9],
        "many": many,
        "custom": Custom(),
    }


async def use_everything(engine: CheckpointEngine) -> None:
    """The whole life of tags: published, overwritten, deleted, aborted, failed."""
    state = rich_state()
    for tag in ("a", "b", "a"):
        await engine.create(tag, overwrite=True)
        handle = await engine.save(state, "deep/model.pt")
        await engine.save({"w": state["large"]}, "model.safetensors")
        await handle.staged()
        await engine.staged()
        await handle.written()
        await engine.commit(tag)
    await engine.load("deep/model.pt", weights_only=False)
    await engine.load("model.safetensors", tag="b")
    await engine.load("deep/model.pt", keys=["large"], mmap=True)
    with contextlib.suppress(CheckpointNotFoundError):
        await engine.load("missing.pt")
    await engine.latest()
    await engine.tags()
    await engine.delete("a")
    await engine.sweep()
    await engine.create("dropped")
    await engine.save(state, "model.pt")
    await engine.abort("dropped")


async def test_nothing_blocks_a_loop_in_the_life_of_an_engine(root, blocking_calls):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await use_everything(engine)
    assert blocking_calls == []


async def test_nothing_blocks_a_loop_when_things_go_wrong(
    root, monkeypatch, blocking_calls
):
    state = rich_state()
    with pytest.raises(CheckpointError):
        async with CheckpointEngine(root, RING_8_MIB | {"guard": False}) as engine:
            await engine.create("torn")
            with held(monkeypatch, host, "_fill") as gate:
                await engine.save(state, "model.pt")
                await gate.reached()
                state["large"].add_(1)
            with pytest.raises(TornSnapshotError):
                await engine.commit("torn")
            await engine.create("cancelled")
            # Published before it is cancelled, it would be no failure.
            with held(monkeypatch, local_write.LocalWriteFile, "_write"):
                await engine.save(state, "model.pt")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0):
                        await engine.commit("cancelled")
    assert blocking_calls == []


async def test_nothing_blocks_a_loop_in_the_life_of_one_file(tmp_path, blocking_calls):
    await aiockpt.save(rich_state(), tmp_path / "one.pt")
    await aiockpt.load(tmp_path / "one.pt", weights_only=False)
    assert blocking_calls == []


# --- the proof that the tests above would have seen it ---------------------------------


async def at_once(
    _: object, work: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A `run_blocking` that runs the work where it stands: on the loop."""
    return work(*args, **kwargs)


async def write_at_once(file: Any, offset: int, view: memoryview, _: object) -> None:
    file._write(offset, view, lambda: None)


async def sync_at_once(file: Any) -> None:
    file._sync()


def looks_at_the_disk(_: object) -> None:
    os.stat(".")


def waits(_: object) -> None:
    threading.Event().wait(0.001)


BROKEN = {
    "planning": (saver, "run_blocking", at_once, "Pickler.dump"),
    "checksumming": (local_write, "run_blocking", at_once, "aiockpt.checksums.crc32"),
    "writing": (local_write.LocalWriteFile, "write", write_at_once, "os.pwrite"),
    "syncing": (local_write.LocalWriteFile, "sync", sync_at_once, "os.ftruncate"),
    "opening": (opening, "run_blocking", at_once, "os.lstat"),
    "looking up": (runtime, "run_blocking", at_once, "os."),
    "capturing": (runtime, "capture", looks_at_the_disk, "os.stat"),
}


@pytest.mark.parametrize("where", BROKEN)
async def test_an_engine_that_blocks_a_loop_is_caught(
    where, root, monkeypatch, blocking_calls
):
    module, name, broken, call = BROKEN[where]
    monkeypatch.setattr(module, name, broken)
    with contextlib.suppress(Exception):
        async with CheckpointEngine(root, RING_8_MIB) as engine:
            await use_everything(engine)
    assert any(caught.startswith(call) for caught in blocking_calls), blocking_calls
    thread = "MainThread" if where == "capturing" else "aiockpt-engine"
    assert all(f"on {thread}" in caught.splitlines()[0] for caught in blocking_calls)
    blocking_calls.clear()


async def test_an_observer_that_waits_on_the_engines_loop_is_caught(
    root, blocking_calls
):
    async with CheckpointEngine(root, RING_8_MIB, observers=[waits]) as engine:
        await engine.create("a")
        await engine.save({}, "model.pt")
        await engine.commit("a")
    assert all("lock.acquire on aiockpt-engine" in caught for caught in blocking_calls)
    assert len(blocking_calls) == 5
    blocking_calls.clear()
