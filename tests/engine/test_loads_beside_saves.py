"""A load into tensors that are being saved, and a save of those that are being filled."""

import asyncio
import contextlib
import os

import pytest
import torch

from aiockpt import CheckpointEngine, EngineStateError, TornSnapshotError, guard
from aiockpt.capture import capture
from aiockpt.guard import StagingGate
from aiockpt.staging import host
from aiockpt.storage import local_read
from gates import LIMIT_S, RING_8_MIB, held, noted_waits, turns

PATHS = pytest.mark.parametrize("path", ["model.pt", "model.safetensors"])
TARGETS = pytest.mark.parametrize("is_strided", [False, True], ids=["plain", "strided"])


def live(value: float, *, is_strided: bool = False) -> dict[str, torch.Tensor]:
    """A state of one value."""
    shape = (600, 512) if is_strided else (512, 600)
    made = {f"w{i}": torch.full(shape, float(value)) for i in range(3)}
    return {key: each.t() for key, each in made.items()} if is_strided else made


async def save(engine: CheckpointEngine, tag: str, path: str, state: object) -> None:
    await engine.create(tag)
    await engine.save(state, path)
    await engine.commit(tag)


def is_all(state: dict[str, torch.Tensor], value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in state.values())


@PATHS
@TARGETS
async def test_a_load_waits_until_what_it_fills_has_been_staged(
    path, is_strided, root, monkeypatch
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await save(engine, "good", path, live(1))
        state = live(2, is_strided=is_strided)
        waits = noted_waits(monkeypatch)
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save(state, "state.pt")
            await gate.reached()
            loading = asyncio.create_task(engine.load(path, tag="good", into=state))
            await asyncio.wait(
                [asyncio.wrap_future(waits), loading],
                return_when=asyncio.FIRST_COMPLETED,
                timeout=LIMIT_S,
            )
            assert not loading.done()
            assert is_all(state, 2)
        await loading
        assert is_all(state, 1)
        await engine.commit("a")
        assert is_all(await engine.load("state.pt", tag="a"), 2)


@PATHS
@TARGETS
async def test_without_the_guard_the_save_is_torn(path, is_strided, root, monkeypatch):
    async with CheckpointEngine(root, {**RING_8_MIB, "guard": False}) as engine:
        await save(engine, "good", path, live(1))
        state = live(2, is_strided=is_strided)
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save(state, "state.pt")
            await gate.reached()
            await engine.load(path, tag="good", into=state)
        with pytest.raises(TornSnapshotError):
            await engine.commit("a")


@PATHS
@TARGETS
async def test_what_is_being_filled_cannot_be_saved(
    path, is_strided, root, monkeypatch
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await save(engine, "good", path, live(1))
        state = live(2, is_strided=is_strided)
        await engine.create("a")
        with held(monkeypatch, local_read.LocalReadFile, "read_block") as gate:
            loading = asyncio.create_task(engine.load(path, tag="good", into=state))
            await gate.reached()
            with pytest.raises(EngineStateError, match=r"model\.w0 is being filled"):
                await engine.save({"model": state}, "state.pt")
            # Others can, and so can these once they have been filled.
            await engine.save(live(3), "other.pt")
        await loading
        await engine.save({"model": state}, "state.pt")
        await engine.commit("a")
        loaded = await engine.load("state.pt", tag="a")
        assert is_all(loaded["model"], 1)


async def test_loads_that_wait_for_staging_are_in_nobodys_way(root, monkeypatch):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await save(engine, "good", "model.pt", live(1))
        await engine.create("a")
        staging = engine._runtime._machinery.gate
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save(live(2), "state.pt")
            await gate.reached()
            waiting = [
                asyncio.create_task(engine.load("model.pt", tag="good", into=live(3)))
                for _ in range(2)
            ]
            while len(staging._changed._waiters) < len(waiting):
                await turns(1)
            assert is_all(await engine.load("model.pt", tag="good"), 1)
        for load in waiting:
            assert is_all(await load, 1)
        await engine.commit("a")


async def test_a_load_that_begins_with_a_save_is_found_by_it(root, monkeypatch):
    """Between the save's capture and its entry at the guard."""
    enter = StagingGate.enter

    def late(gate: StagingGate, save: object) -> None:
        filling.__enter__()
        enter(gate, save)

    async with CheckpointEngine(root, RING_8_MIB) as engine:
        state = live(2)
        filling = guard.changing([state["w1"]])
        await engine.create("a")
        with monkeypatch.context() as patch:
            patch.setattr(StagingGate, "enter", late)
            with pytest.raises(EngineStateError, match="w1 is being filled"):
                await engine.save(state, "state.pt")
        filling.__exit__(None, None, None)
        await engine.save(state, "state.pt")
        await engine.commit("a")


def test_a_forked_child_is_filling_nothing():
    state = live(2)
    captured = capture(state)
    with guard.changing(state.values()):
        if (child := os.fork()) == 0:
            with contextlib.suppress(EngineStateError):
                guard.check_at_rest(captured)
                guard.look_again()
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_save_that_came_in_between_is_torn_from_the_first_byte_on():
    state = live(2)
    captured = capture(state)
    with guard.changing([state["w1"]]):
        assert captured.changed() == "w1"


def test_tensors_that_two_loads_fill_are_at_rest_after_both():
    state = live(2)
    captured = capture(state)
    with guard.changing([state["w1"]]):
        with pytest.raises(ZeroDivisionError), guard.changing(state.values()):
            raise ZeroDivisionError
        with pytest.raises(EngineStateError, match="w1"):
            guard.check_at_rest(captured)
        guard.check_at_rest(capture({"w0": state["w0"]}))
    guard.check_at_rest(captured)
    assert not guard._filled
