"""Saves and loads through the real bindings, in a process whose driver is pretended.

`LD_PRELOAD=LIBRARY python child.py SCENARIO`: tells what the driver noted, or fails.
"""

import asyncio
import ctypes
import json
import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import aiockpt
from aiockpt.staging.cuda_driver import CudaDriver
from aiockpt.testing.simulated_device import SimulatedDevices

LIBRARY = ctypes.CDLL("libcuda.so.1")
LEGACY_STREAM = 1
NOTED = (
    *("current", "contexts", "streams", "events", "pinned", "batches", "batched"),
    *("copies", "records", "follows", "stream_flags", "stream_priority"),
    *("event_flags", "pin_flags", "order"),
)
OUT_OF_MEMORY = 2


class BoundDevices(SimulatedDevices):
    """Memory that is pretended to be a device's; all else is asked of CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = CudaDriver()
        for name in (
            *("check_usable", "new_stream", "end_stream", "record", "follow", "wait"),
            *("drain", "settle", "to_host", "to_device", "pin", "unpin", "close"),
        ):
            setattr(self, name, getattr(self.driver, name))

    def current_stream(self, device: int) -> Any:
        return LEGACY_STREAM


class Pretended:
    """What the library notes, and how it is told to fail."""

    def __init__(self) -> None:
        LIBRARY.pretended_fault.restype = ctypes.c_char_p

    def fail(self, function: str, error: int = OUT_OF_MEMORY) -> None:
        LIBRARY.pretend_failing(function.encode(), error)

    def noted(self) -> dict[str, object]:
        told = {name: LIBRARY.pretended(name.encode()) for name in NOTED}
        return {**told, "fault": LIBRARY.pretended_fault().decode()}


def state_on(devices: BoundDevices) -> dict[str, torch.Tensor]:
    """Large and many small tensors of a device, strided ones, and one of the host."""
    large = {f"large {i}": torch.randn(3 << 20) for i in range(3)}
    small = {f"small {i}": torch.randn(i % 50 + 1) for i in range(3000)}
    state = {name: devices.tensor(each) for name, each in {**large, **small}.items()}
    return {
        **state,
        "turned": devices.tensor(torch.randn(64, 32)).t(),
        "host": torch.ones(9),
    }


async def save(
    engine: aiockpt.CheckpointEngine, tag: str, state: dict[str, torch.Tensor]
) -> None:
    await engine.create(tag)
    try:
        handle = await engine.save(state, "model.pt", tag=tag)
        await handle.staged()
        await engine.commit(tag)
    except aiockpt.CheckpointError:
        await engine.abort(tag)
        raise


def check(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


async def both_ways(root: Path, devices: BoundDevices) -> None:
    """A save that torch reads, and a load into tensors of the device."""
    with devices.installed():
        async with aiockpt.CheckpointEngine(
            root, {"host_cache_size": 0.0625}
        ) as engine:
            state = state_on(devices)
            await save(engine, "first", state)
            check(torch.load(root / "first" / "model.pt"), state)
            into = {
                name: devices.tensor(torch.zeros_like(tensor))
                for name, tensor in state.items()
            }
            await engine.load("model.pt", tag="first", into=into)
            check(into, state)


async def failing(
    root: Path, devices: BoundDevices, pretended: Pretended, name: str
) -> str:
    """A save during which a function fails; what it raised; then one that goes well."""
    with devices.installed():
        async with aiockpt.CheckpointEngine(
            root, {"host_cache_size": 0.0625}
        ) as engine:
            state = state_on(devices)
            pretended.fail(name)
            try:
                await save(engine, "first", state)
            except aiockpt.StagingError as error:
                told = str(error)
            else:
                check(torch.load(root / "first" / "model.pt"), state)
                told = ""
            pretended.fail("")
            # The bindings are looked for once.
            if name != "cuInit":
                await save(engine, "second", state)
                check(torch.load(root / "second" / "model.pt"), state)
    return told


def main() -> None:
    """Runs a scenario, and tells what was noted."""
    pretended, scenario = Pretended(), sys.argv[1]
    told: dict[str, object] = {}
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aiockpt").addHandler(handler)
    with TemporaryDirectory() as directory:
        devices = BoundDevices()
        if scenario == "both ways":
            asyncio.run(both_ways(Path(directory), devices))
        else:
            work = failing(Path(directory), devices, pretended, scenario)
            told["raised"] = asyncio.run(work)
    json.dump({**told, "warned": warned, **pretended.noted()}, sys.stdout)


if __name__ == "__main__":
    main()
