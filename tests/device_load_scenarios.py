"""As `device_scenarios`, of loads."""

import asyncio
from pathlib import Path
from unittest import mock

import torch

import aiockpt
from aiockpt import CheckpointEngine
from aiockpt.testing.simulated_device import SimulatedDevices
from device_scenarios import MIB, RING_8_MIB, Scenario, numbers, until


async def a_load_fills_tensors_behind_what_uses_them(
    root: Path, devices: SimulatedDevices
) -> None:
    side = devices.stream(is_lazy=True)
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save({"weight": numbers(12)}, "model.pt")
        await engine.commit("a")
        target = devices.tensor(torch.zeros_like(numbers(12)))
        with devices.on(side):
            devices.launch(target, lambda data: data.fill_(-1))
        allocated = devices.allocated_bytes
        await engine.load("model.pt", into={"weight": target})
        assert devices.peak_allocated_bytes == allocated, "memory was taken"
        devices.finish()
        assert torch.equal(target, numbers(12))


async def a_load_to_a_device_is_there_when_it_returns(
    root: Path, devices: SimulatedDevices
) -> None:
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        expected = {f"k{i}": torch.randn(1000 + i) for i in range(200)}
        expected |= {"large": torch.randn(4 * MIB), "none": torch.zeros(0)}
        state = {**expected, "tied": expected["large"][5:9]}
        for path in ("model.pt", "model.safetensors"):
            is_torch = path.endswith("pt")
            await engine.create(path)
            await engine.save(state if is_torch else expected, path)
            await engine.commit(path)
            before = devices.allocated_bytes
            loaded = await engine.load(path, map_location="cuda:1")
            for key, tensor in expected.items():
                assert torch.equal(loaded[key], tensor), key
                assert devices.device_of(loaded[key]) == (1 if len(tensor) else None)
            if is_torch:
                assert torch.equal(loaded["tied"], expected["large"][5:9])
            nbytes = sum(tensor.nbytes for tensor in expected.values())
            assert devices.allocated_bytes - before == nbytes
            loaded.clear()
            del tensor
            some = await engine.load(path, map_location="cuda:0", keys=["k3", "large"])
            assert torch.equal(some["large"], expected["large"])
            assert devices.device_of(some["k3"]) == 0
            del some


async def a_load_reads_on_while_a_device_copies(
    root: Path, devices: SimulatedDevices
) -> None:
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save({"weight": numbers(12)}, "model.pt")
        await engine.commit("a")
        devices.hold()
        loading = asyncio.create_task(engine.load("model.pt", map_location="cuda:1"))
        try:
            # One of each lane has been read; none of them has been copied.
            await until(lambda: devices.num_queued == 4)
            assert not devices.copied
        finally:
            devices.release()
            loaded = await loading
        assert torch.equal(loaded["weight"], numbers(12))


def save_as_of(
    path: Path, state: dict[str, torch.Tensor], locations: list[str]
) -> None:
    """As torch saves tensors that are at these places, one each, in this order."""
    with mock.patch.object(torch.serialization, "location_tag", side_effect=locations):
        torch.save(state, path)


async def a_load_goes_where_map_location_says(
    root: Path, devices: SimulatedDevices
) -> None:
    path = root.with_name("one.pt")
    state = {"here": numbers(3), "there": numbers(2, 5), "host": numbers(1, 9)}
    save_as_of(path, state, ["cuda:0", "cuda:1", "cpu"])

    def move(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        if location == "cpu":
            return storage
        moved = devices.allocate(1 - int(location[-1]), storage.nbytes())
        return moved.copy_(storage, non_blocking=False)

    for map_location, places in (
        (None, (0, 1, None)),
        ({"cuda:0": "cuda:1"}, (1, 1, None)),
        ({"cuda:0": "cpu", "cuda:1": "cuda:0", "cpu": "cuda:1"}, (None, 0, 1)),
        (torch.device("cuda:1"), (1, 1, 1)),
        (move, (1, 0, None)),
    ):
        for keys in (None, [*state]):
            devices.copied.clear()
            loaded = await aiockpt.load(path, map_location=map_location, keys=keys)
            found = tuple(devices.device_of(loaded[key]) for key in state)
            assert found == places, map_location
            for key, tensor in state.items():
                assert torch.equal(loaded[key], tensor), (map_location, key)
            through_ring = sum(
                tensor.nbytes
                for tensor, place in zip(state.values(), places, strict=True)
                if place is not None and map_location is not move
            )
            assert sum(devices.copied) == through_ring, map_location
            del loaded


LOAD_SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        a_load_fills_tensors_behind_what_uses_them,
        a_load_to_a_device_is_there_when_it_returns,
        a_load_reads_on_while_a_device_copies,
        a_load_goes_where_map_location_says,
    )
}
