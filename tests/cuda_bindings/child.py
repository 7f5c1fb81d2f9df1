"""Saves and loads through the real bindings, in a process whose driver is pretended.

`LD_PRELOAD=LIBRARY python child.py SCENARIO ARGUMENTS`: tells what the driver noted, or
fails.
"""

import asyncio
import ctypes
import json
import logging
import sys
from collections.abc import Sequence
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
    *("event_flags", "pin_flags", "order", "ever_0", "ever_1"),
)
OUT_OF_MEMORY = 2
NOBODY = -1
Tensors = dict[str, torch.Tensor]


class BoundDevices(SimulatedDevices):
    """Memory that is pretended to be a device's; all else is asked of CUDA."""

    def __init__(self) -> None:
        super().__init__(2)
        self.driver = CudaDriver()
        for name in (
            *("check_usable", "new_stream", "end_stream", "record", "follow", "wait"),
            *("drain", "settle", "to_host", "to_device", "pin", "unpin", "close"),
        ):
            setattr(self, name, getattr(self.driver, name))

    def current_stream(self, device: int) -> Any:
        return LEGACY_STREAM

    def allocate(self, device: int, nbytes: int) -> torch.UntypedStorage:
        storage = super().allocate(device, nbytes)
        LIBRARY.pretend_owned(storage.data_ptr(), nbytes, device)
        return storage

    def _free(self, block: Any) -> None:
        LIBRARY.pretend_owned(block.address, block.nbytes, NOBODY)
        super()._free(block)


class Pretended:
    """What the library notes, and how it is told to fail."""

    def __init__(self) -> None:
        LIBRARY.pretended_fault.restype = ctypes.c_char_p
        LIBRARY.pretend_owned.argtypes = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int

    def fail(self, functions: str, error: int = OUT_OF_MEMORY) -> None:
        LIBRARY.pretend_failing(f" {functions} ".encode(), error)

    def noted(self) -> dict[str, object]:
        told = {name: LIBRARY.pretended(name.encode()) for name in NOTED}
        return {**told, "fault": LIBRARY.pretended_fault().decode()}


def state_on(devices: BoundDevices, numbers: Sequence[int]) -> Tensors:
    """Large and many small tensors of each device, strided ones, one of the host."""
    large = {f"large {i}": torch.randn(3 << 20) for i in range(4)}
    small = {f"small {i}": torch.randn(i % 50 + 1) for i in range(3000)}
    state = {
        name: devices.tensor(tensor, numbers[i % len(numbers)])
        for i, (name, tensor) in enumerate({**large, **small}.items())
    }
    turned = devices.tensor(torch.randn(64, 32), numbers[0]).t()
    return {**state, "turned": turned, "host": torch.ones(9)}


async def save(engine: aiockpt.CheckpointEngine, tag: str, state: Tensors) -> None:
    await engine.create(tag)
    try:
        handle = await engine.save(state, "model.pt", tag=tag)
        await handle.staged()
        await engine.commit(tag)
    except aiockpt.CheckpointError:
        await engine.abort(tag)
        raise


def check(found: Tensors, state: Tensors) -> None:
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


async def load(
    engine: aiockpt.CheckpointEngine, devices: BoundDevices, state: Tensors
) -> None:
    """Fills tensors that are where those of the state are."""
    into: Tensors = {}
    for name, tensor in state.items():
        device, zeros = devices.device_of(tensor), torch.zeros_like(tensor)
        into[name] = zeros if device is None else devices.tensor(zeros, device)
    await engine.load("model.pt", tag="first", into=into)
    check(into, state)


async def both_ways(
    engine: aiockpt.CheckpointEngine, devices: BoundDevices, numbers: Sequence[int]
) -> None:
    """A save that torch reads, and a load into tensors of the devices."""
    state = state_on(devices, numbers)
    await save(engine, "first", state)
    check(torch.load(Path(engine.root) / "first" / "model.pt"), state)
    await load(engine, devices, state)


async def failing_save(
    engine: aiockpt.CheckpointEngine,
    devices: BoundDevices,
    pretended: Pretended,
    names: str,
) -> str:
    """A save during which functions fail; what it raised; then one that goes well."""
    state, root = state_on(devices, (0,)), Path(engine.root)
    pretended.fail(names)
    try:
        await save(engine, "first", state)
    except aiockpt.StagingError as error:
        told = str(error)
    else:
        check(torch.load(root / "first" / "model.pt"), state)
        told = ""
    pretended.fail("")
    # The bindings are looked for once.
    if names != "cuInit":
        await save(engine, "second", state)
        check(torch.load(root / "second" / "model.pt"), state)
    return told


async def failing_load(
    engine: aiockpt.CheckpointEngine,
    devices: BoundDevices,
    pretended: Pretended,
    names: str,
) -> str:
    """A load during which functions fail; what it raised; then one that goes well."""
    state = state_on(devices, (0,))
    await save(engine, "first", state)
    pretended.fail(names)
    try:
        await load(engine, devices, state)
    except aiockpt.StagingError as error:
        told = str(error)
    else:
        told = ""
    pretended.fail("")
    await load(engine, devices, state)
    return told


async def play(scenario: Sequence[str], root: Path, pretended: Pretended) -> str:
    """Plays a scenario in an engine of its own; what was raised, if that was asked."""
    devices = BoundDevices()
    with devices.installed():
        async with aiockpt.CheckpointEngine(
            root, {"host_cache_size": 0.0625}
        ) as engine:
            match scenario:
                case "both ways", *numbers:
                    await both_ways(engine, devices, [*map(int, numbers)])
                case "save", *names:
                    names = " ".join(names)
                    return await failing_save(engine, devices, pretended, names)
                case "load", *names:
                    names = " ".join(names)
                    return await failing_load(engine, devices, pretended, names)
    return ""


def main() -> None:
    """Plays a scenario, and tells what was noted."""
    pretended, warned = Pretended(), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aiockpt").addHandler(handler)
    with TemporaryDirectory() as directory:
        raised = asyncio.run(play(sys.argv[1:], Path(directory), pretended))
    told = {"raised": raised, "warned": warned, **pretended.noted()}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
