"""What must hold where tensors are on devices, as steps that end well or raise.

Tests run them on the engine as it is, and see them fail on engines that were broken on
purpose. Each takes a root and devices that are as late as they may be.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt import CheckpointEngine, TornSnapshotError
from aiockpt.storage.local_write import LocalWriteFile
from aiockpt.testing.simulated_device import SimulatedDevices
from gates import LIMIT_S, happened, held, in_thread, num_held, turns

MIB = 1 << 20
RING_8_MIB = {"host_cache_size": 8 / 1024, "parser_threads": 2}
RING_32_MIB = {"host_cache_size": 32 / 1024, "parser_threads": 2}

limit_s = LIMIT_S
"""What is waited for has happened by then; else it never will."""

Scenario = Callable[[Path, SimulatedDevices], Awaitable[None]]


class Optimizer(torch.optim.Optimizer):
    """Its step is a kernel on the current stream, as that of a real one is."""

    def __init__(self, devices: SimulatedDevices, params: list[torch.Tensor]) -> None:
        super().__init__(params, {})
        self._devices = devices

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self._devices.launch(parameter, lambda data: data.add_(1))


def numbers(num_mib: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + num_mib * MIB // 8)


async def check_saved(engine: Any, expected: dict[str, torch.Tensor]) -> None:
    """The latest tag holds just this, by its checksums and for torch."""
    loaded = await engine.load("model.pt")
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(loaded[key], tensor), key
    path = Path(engine.root) / str(await engine.latest()) / "model.pt"
    by_torch = await in_a_thread(lambda: torch.load(path))
    assert all(torch.equal(by_torch[key], tensor) for key, tensor in expected.items())


async def check_torn(engine: Any) -> None:
    """The tag is refused, for the tensor that was changed."""
    with pytest.raises(TornSnapshotError) as caught:
        await engine.commit("a")
    assert caught.value.key == "weight"
    assert await engine.latest() is None


async def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, on a thread whose current streams are the default ones."""
    job = in_thread(work)
    await happened(job)
    return job.result()


async def until(is_so: Callable[[], bool]) -> None:
    """Returns when something that another thread brings about is so."""
    async with asyncio.timeout(limit_s):
        while not is_so():
            await turns(1)


async def begun(handle: Any) -> None:
    """Returns when all copies have been begun; the caller is not let go on."""
    await until(handle._save.begun.is_set)


async def what_was_enqueued_before_a_save_is_in_it(
    root: Path, devices: SimulatedDevices
) -> None:
    side = devices.stream(is_lazy=True)
    async with CheckpointEngine(root, RING_32_MIB) as engine:
        here, there = devices.tensor(numbers(3)), devices.tensor(numbers(2))
        await engine.create("a")
        with devices.on(side):
            devices.launch(here, lambda data: data.mul_(-1))
            devices.launch(there, lambda data: data.add_(7))
            await engine.save({"here": here, "there": there}, "model.pt")
        await engine.commit("a")
        await check_saved(engine, {"here": -numbers(3), "there": numbers(2) + 7})


async def a_step_after_a_save_is_not_in_it(
    root: Path, devices: SimulatedDevices
) -> None:
    async with CheckpointEngine(root, RING_32_MIB) as engine:
        weight = torch.nn.Parameter(devices.tensor(torch.randn(3 * MIB // 4)))
        optimizer = Optimizer(devices, [weight])
        before = weight.detach().clone()
        for name in "ab":
            await engine.create(name)
            devices.hold()
            try:
                handle = await engine.save({"weight": weight}, "model.pt")
                await begun(handle)
                optimizer.step()
            finally:
                devices.release()
            await engine.commit(name)
            expected = {"weight": before}
            loaded = await engine.load("model.pt", tag=name)
            assert torch.equal(loaded["weight"], expected["weight"])
            devices.finish()
            before = before + 1


async def every_device_has_an_order_of_its_own(
    root: Path, devices: SimulatedDevices
) -> None:
    here, there = (devices.stream(number, is_lazy=True) for number in (0, 1))
    async with CheckpointEngine(root, RING_32_MIB) as engine:
        weights = [
            torch.nn.Parameter(devices.tensor(torch.zeros(MIB), number))
            for number in (0, 1)
        ]
        optimizer = Optimizer(devices, weights)
        await engine.create("a")
        state = {"here": weights[0], "there": weights[1]}
        devices.hold()
        try:
            with devices.on(here), devices.on(there):
                devices.launch(weights[0], lambda data: data.add_(5))
                devices.launch(weights[1], lambda data: data.add_(7))
                handle = await engine.save(state, "model.pt")
            await begun(handle)
            optimizer.step()
        finally:
            devices.release()
        await engine.commit("a")
        expected = {"here": torch.full((MIB,), 5.0), "there": torch.full((MIB,), 7.0)}
        await check_saved(engine, expected)


async def a_step_is_not_held_by_copies_that_have_been_begun(
    root: Path, devices: SimulatedDevices
) -> None:
    async with CheckpointEngine(root, RING_32_MIB) as engine:
        weight = torch.nn.Parameter(devices.tensor(torch.zeros(2 * MIB)))
        optimizer = Optimizer(devices, [weight])
        await engine.create("a")
        devices.hold()
        try:
            await engine.save({"weight": weight}, "model.pt")
            await in_a_thread(optimizer.step)
            assert not devices.copied, "the step waited for copies"
        finally:
            devices.release()
        await engine.commit("a")
        await check_saved(engine, {"weight": torch.zeros(2 * MIB)})


async def a_state_larger_than_the_ring_holds_a_step_as_long_as_need_be(
    root: Path, devices: SimulatedDevices
) -> None:
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        weight = torch.nn.Parameter(devices.tensor(torch.randn(10 * MIB)))
        optimizer = Optimizer(devices, [weight])
        before = weight.detach().clone()
        gate = engine._runtime._machinery.gate
        await engine.create("a")
        with pytest.MonkeyPatch.context() as patch:
            # No chunk comes back, so not all copies can be begun before the step comes.
            with held(patch, LocalWriteFile, "_write"):
                await engine.save({"weight": weight}, "model.pt")
                stepping = in_thread(optimizer.step)
                await until(lambda: stepping.done() or num_held(gate) > 0)
        await happened(stepping)
        stepping.result()
        await engine.commit("a")
        await check_saved(engine, {"weight": before})


async def after_staged_everything_may_be_changed_and_dropped(
    root: Path, devices: SimulatedDevices
) -> None:
    side = devices.stream()
    async with CheckpointEngine(root, RING_32_MIB) as engine:
        first, second = devices.tensor(numbers(4)), devices.tensor(numbers(4, 5))
        on_host = numbers(1)
        await engine.create("a")
        devices.hold()
        try:
            state = {"first": first, "second": second, "host": on_host}
            await engine.save(state, "model.pt")
            with devices.on(side):
                await engine.staged()
                assert not devices.copied, "the caller waited for copies"
                devices.launch(first, lambda data: data.zero_())
                on_host.zero_()
                del second, state
                # What has been dropped is given to others.
                devices.launch(devices.tensor(numbers(4)), lambda data: data.zero_())
        finally:
            devices.release()
        await engine.commit("a")
        await check_saved(
            engine, {"first": numbers(4), "second": numbers(4, 5), "host": numbers(1)}
        )


async def a_change_that_nobody_ordered_is_reported(
    root: Path, devices: SimulatedDevices
) -> None:
    async with CheckpointEngine(root, {**RING_32_MIB, "guard": False}) as engine:
        weight = devices.tensor(numbers(2))
        await engine.create("a")
        devices.hold()
        try:
            handle = await engine.save({"weight": weight}, "model.pt")
            await begun(handle)
            devices.launch(weight, lambda data: data.zero_())
        finally:
            devices.release()
        await check_torn(engine)


async def a_change_between_begun_and_staged_is_reported(
    root: Path, devices: SimulatedDevices
) -> None:
    """The guard comes second: what was changed before it is torn."""
    async with CheckpointEngine(root, RING_32_MIB) as engine:
        weight = torch.nn.Parameter(devices.tensor(torch.zeros(MIB)))
        optimizer = Optimizer(devices, [weight])
        await engine.create("a")
        devices.hold()
        try:
            handle = await engine.save({"weight": weight}, "model.pt")
            await begun(handle)
            devices.launch(weight, lambda data: data.fill_(9))
            optimizer.step()
        finally:
            devices.release()
        await check_torn(engine)


async def an_aborted_tag_keeps_its_chunks_until_devices_have_done_with_them(
    root: Path, devices: SimulatedDevices
) -> None:
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        devices.hold()
        handle = await engine.save({"weight": devices.tensor(numbers(3))}, "model.pt")
        await begun(handle)
        leased_bytes, _ = engine.ring_bytes
        aborting = asyncio.create_task(engine.abort("a"))
        try:
            # The attempt fails first of all, and then waits for its saves.
            attempt = engine._runtime.open_tags._attempts["a"]
            await until(lambda: attempt.failure is not None)
            await engine._runtime.spawn(turns(100)).wait()
            assert leased_bytes > 0
            assert engine.ring_bytes[0] == leased_bytes, "chunks were given away"
            assert not aborting.done()
        finally:
            devices.release()
            await aborting
        assert engine.ring_bytes[0] == 0
        await engine.create("b")
        await engine.save({"weight": devices.tensor(numbers(5, 3))}, "model.pt")
        await engine.commit("b")
        await check_saved(engine, {"weight": numbers(5, 3)})


async def nothing_is_kept_after_staging(root: Path, devices: SimulatedDevices) -> None:
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        before = devices.allocated_bytes
        for name in ("a", "b", "c"):
            await engine.create(name)
            base = devices.tensor(torch.randn(512, 512))
            state = {"turned": base.t(), "step": base[::7, ::5]}
            allocated = devices.allocated_bytes
            devices.copied.clear()
            await engine.save(state, "model.pt")
            nbytes = base.nbytes
            del state, base
            await engine.commit(name)
            assert devices.peak_allocated_bytes <= allocated, "copied on the device"
            # What torch makes of them would be host memory here, and come from there.
            assert sum(devices.copied) == nbytes, "something else was copied"
            assert devices.allocated_bytes == before, "a tensor is still referred to"


async def mixed_states_come_from_where_they_are(
    root: Path, devices: SimulatedDevices
) -> None:
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        expected = {f"k{i}": torch.randn(1000 + i) for i in range(600)}
        expected["large"] = torch.randn(3 * MIB)
        state = {
            key: tensor if i % 3 == 2 else devices.tensor(tensor, device=i % 3)
            for i, (key, tensor) in enumerate(expected.items())
        }
        await engine.create("a")
        await engine.save(state, "model.pt")
        await engine.commit("a")
        await check_saved(engine, expected)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        what_was_enqueued_before_a_save_is_in_it,
        a_step_after_a_save_is_not_in_it,
        every_device_has_an_order_of_its_own,
        a_step_is_not_held_by_copies_that_have_been_begun,
        a_state_larger_than_the_ring_holds_a_step_as_long_as_need_be,
        after_staged_everything_may_be_changed_and_dropped,
        a_change_that_nobody_ordered_is_reported,
        a_change_between_begun_and_staged_is_reported,
        an_aborted_tag_keeps_its_chunks_until_devices_have_done_with_them,
        nothing_is_kept_after_staging,
        mixed_states_come_from_where_they_are,
    )
}


async def run(
    scenario: Scenario, root: Path, *, is_lazy: bool = True, is_eager: bool = True
) -> SimulatedDevices:
    """Runs a scenario, and looks whether the devices were treated as they must be."""
    devices = SimulatedDevices(2, is_lazy=is_lazy, is_eager=is_eager)
    with devices.installed():
        await scenario(root, devices)
    devices.finish()
    assert not devices.faults, devices.faults
    assert not devices.pinned, "memory is still pinned"
    assert not devices.num_own_streams, "a stream was not ended"
    assert not devices.num_queued
    return devices
