"""The promises that are made for devices, on real ones. Skips itself without any."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import aiockpt
from aiockpt import CheckpointEngine, TornSnapshotError
from gates import turns

pytestmark = pytest.mark.gpu

MIB = 1 << 20
GIB = 1 << 30
RING_8_MIB = {"host_cache_size": 8 / 1024, "parser_threads": 4}
RING_1_GIB = {"host_cache_size": 1, "parser_threads": 4}
LONG = 2_000_000_000
"""Cycles of a kernel that runs for about a second."""


def random(nbytes: int, device: str = "cuda") -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (nbytes // 8,), device=device)


def pinned_bytes(engine: Any) -> int:
    return int(engine._runtime._machinery._devices.memory.pinned_bytes)


def same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == expected.keys() and all(
        torch.equal(loaded[key].cpu(), tensor.cpu()) for key, tensor in expected.items()
    )


async def begun(handle: Any) -> None:
    while not handle._save.begun.is_set():
        await turns(1)


@pytest.mark.parametrize("kind", ["foreach", "fused", "loop"])
@pytest.mark.parametrize("ring", [RING_8_MIB, RING_1_GIB], ids=["small", "large"])
async def test_saves_are_of_their_step_while_training_goes_on(kind, ring, root):
    ways = {"foreach": kind == "foreach", "fused": kind == "fused"}
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))
    model.to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **ways)
    inputs = torch.randn(256, 1024, device="cuda")
    expected: dict[str, dict[str, torch.Tensor]] = {}

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict[str, torch.Tensor]:
        moments = {
            f"{name}.{number}": value
            for number, parts in optimizer.state_dict()["state"].items()
            for name, value in parts.items()
        }
        return {**model.state_dict(), **moments}

    step()
    async with CheckpointEngine(root, ring) as engine:
        for number in range(5):
            tag = f"t{number}"
            await engine.create(tag)
            # Clones are made on the stream, behind the same work.
            expected[tag] = {key: value.clone() for key, value in state().items()}
            await engine.save(state(), "model.pt")
            for _ in range(3):
                step()
            await engine.commit(tag)
        for tag, tensors in expected.items():
            assert same(await engine.load("model.pt", "cpu", tag=tag), tensors)
    by_torch = torch.load(root / "t4" / "model.pt", map_location="cpu")
    assert same(by_torch, expected["t4"])


async def test_a_change_that_nobody_ordered_is_reported(root):
    async with CheckpointEngine(root, {**RING_8_MIB, "guard": False}) as engine:
        weight = random(512 * MIB)
        await engine.create("a")
        await engine.save({"weight": weight}, "model.pt")
        weight.add_(1)
        with pytest.raises(TornSnapshotError, match="weight"):
            await engine.commit("a")
        assert await engine.latest() is None


async def test_a_step_is_held_neither_by_kernels_nor_by_copies(root):
    parameter = torch.nn.Parameter(torch.randn(64 * MIB // 4, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    async with CheckpointEngine(root, RING_1_GIB) as engine:
        for tag in "ab":  # The ring is pinned with the first.
            before = parameter.detach().clone()
            await engine.create(tag)
            torch.cuda._sleep(LONG)
            busy = torch.cuda.Event()
            busy.record()
            handle = await engine.save({"weight": parameter}, "model.pt")
            await begun(handle)
            optimizer.step()
            await engine.staged()
            if tag == "b":
                assert not busy.query(), "the host waited for the device"
            await engine.commit(tag)
            loaded = await engine.load("model.pt", "cpu")
            assert torch.equal(loaded["weight"], before.cpu())


async def test_a_save_is_ordered_behind_the_stream_that_it_is_called_on(root):
    async with CheckpointEngine(root, RING_1_GIB) as engine:
        weight = random(64 * MIB)
        torch.cuda.synchronize()
        await engine.create("a")
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(LONG // 4)
            weight.fill_(7)
            await engine.save({"weight": weight}, "model.pt")
            await engine.staged()
            weight.fill_(9)
            del weight
            # What it had is given to others at once.
            random(64 * MIB).zero_()
        await engine.commit("a")
        loaded = await engine.load("model.pt", "cpu")
        assert (loaded["weight"] == 7).all()


async def test_a_ring_much_smaller_than_the_state_is_enough(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        state = {"large": random(GIB), "small": random(8 * 100)}
        await engine.create("a")
        await engine.save(state, "model.pt")
        report = await engine.commit("a")
        assert report.peak_ring_bytes <= 8 * MIB
        assert pinned_bytes(engine) <= 8 * MIB
        assert same(await engine.load("model.pt", "cpu"), state)


async def test_a_hundred_saves_hold_no_more_than_the_first(root):
    async with CheckpointEngine(root, RING_1_GIB) as engine:
        state = {f"k{i}": random(MIB) for i in range(32)}

        async def save(tag: str) -> tuple[object, ...]:
            await engine.create(tag)
            await engine.save(state, "model.pt")
            await engine.commit(tag)
            await engine.delete(tag)
            return (
                torch.cuda.memory_allocated(),
                torch.cuda.memory_reserved(),
                pinned_bytes(engine),
                len(os.listdir("/proc/self/fd")),
            )

        for number in range(5):
            first = await save(f"warm{number}")
        free, _ = torch.cuda.mem_get_info()
        for number in range(100):
            assert await save(f"t{number}") == first
        assert abs(torch.cuda.mem_get_info()[0] - free) <= 32 * MIB


async def test_many_small_and_strided_tensors_take_no_device_memory(root):
    async with CheckpointEngine(root, RING_1_GIB) as engine:
        base = torch.randn(4096, 4096, device="cuda")
        state = {
            f"k{i}": torch.full((7,), float(i), device="cuda") for i in range(10_000)
        }
        state |= {"transposed": base.t(), "strided": base[::3, ::5], "all": base}
        await engine.create("a")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        await engine.save(state, "model.pt")
        await engine.commit("a")
        assert torch.cuda.max_memory_allocated() == allocated
        assert same(await engine.load("model.pt", "cpu"), state)


async def test_nothing_is_kept_after_staging(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        before = torch.cuda.memory_allocated()
        await engine.create("a")
        await engine.save({"weight": random(64 * MIB)}, "model.pt")
        await engine.commit("a")
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("location", ["cuda", "cuda:0", None, {"cuda:0": "cuda:0"}])
@pytest.mark.parametrize("path", ["model.pt", "model.safetensors"])
async def test_loads_to_a_device_are_as_those_of_torch(path, location, root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        state = {f"k{i}": random(8 * (i + 1)) for i in range(50)}
        state["large"] = random(200 * MIB)
        await engine.create("a")
        await engine.save(state, path)
        await engine.commit("a")
        loaded = await engine.load(path, location)
        assert same(loaded, state)
        is_told = path == "model.pt" or isinstance(location, str)
        kind = "cuda" if is_told else "cpu"
        assert {tensor.device.type for tensor in loaded.values()} == {kind}
        some = await engine.load(path, location, keys=["large"])
        assert torch.equal(some["large"].cpu(), state["large"].cpu())
        if path == "model.pt":
            cpu = await engine.load(path, lambda storage, _: storage)
            assert {tensor.device.type for tensor in cpu.values()} == {"cpu"}


async def test_tensors_are_filled_where_they_are(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        state = {
            "weight": random(256 * MIB),
            "strided": random(64 * MIB).view(1024, 8 * 1024),
        }
        await engine.create("a")
        await engine.save(state, "model.pt")
        await engine.commit("a")
        into = {
            "weight": torch.zeros_like(state["weight"]),
            "strided": torch.zeros(1024, 8 * 1024, 2, dtype=torch.int64, device="cuda")[
                ..., 0
            ],
        }
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(LONG // 4)
            into["weight"].fill_(-1)
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        await engine.load("model.pt", into=into)
        # Beside the strided one, room for a part of it.
        assert torch.cuda.max_memory_allocated() - allocated <= 8 * MIB
        assert same(into, state)


async def test_one_file_doors_work(tmp_path):
    state = {"weight": random(20 * MIB), "host": random(MIB, "cpu")}
    await aiockpt.save(state, tmp_path / "one.pt")
    assert same(await aiockpt.load(tmp_path / "one.pt"), state)


async def test_the_ring_is_pinned_and_unpinned(root, caplog):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save({"weight": random(20 * MIB)}, "model.pt")
        await engine.commit("a")
        assert pinned_bytes(engine) == 8 * MIB
        memory = engine._runtime._machinery._devices.memory
        assert memory.pinned_bytes
    assert not memory.pinned_bytes
    assert not caplog.records


async def test_several_devices_save_together(root):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        state = {
            f"k{number}": random(64 * MIB, f"cuda:{number}")
            for number in range(torch.cuda.device_count())
        }
        await engine.create("a")
        await engine.save({**state, "host": random(MIB, "cpu")}, "model.pt")
        await engine.commit("a")
        loaded = await engine.load("model.pt")
        del loaded["host"]
        assert same(loaded, state)
        assert all(loaded[key].device == state[key].device for key in state)


def test_no_context_is_opened_on_other_devices(tmp_path: Path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    program = f"""
        import asyncio, torch, aiockpt
        from cuda.bindings import driver
        async def main():
            with torch.cuda.device(1):
                state = {{"weight": torch.ones(1 << 22, device="cuda:1")}}
                async with aiockpt.CheckpointEngine({str(tmp_path)!r}) as engine:
                    await engine.create("a")
                    await engine.save(state, "model.pt")
                    await engine.commit("a")
                    await engine.load("model.pt")
        asyncio.run(main())
        print(driver.cuDevicePrimaryCtxGetState(0)[2])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "0"
