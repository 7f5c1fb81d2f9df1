"""Devices that refuse, fail and lack room: what callers see, and what goes on."""

import asyncio
import logging

import pytest
import torch

import aiockpt
from aiockpt import CheckpointEngine, InvalidArgumentError, StagingError
from aiockpt.loading import filling
from aiockpt.staging.driver import DeviceError
from aiockpt.testing.simulated_device import SimulatedDevices
from device_scenarios import (
    MIB,
    RING_8_MIB,
    RING_32_MIB,
    begun,
    check_saved,
    numbers,
    until,
)
from gates import turns


@pytest.fixture
def devices():
    """Two devices that everything was given back to, at the end."""
    devices = SimulatedDevices(2)
    with devices.installed():
        yield devices
    devices.finish()
    assert not devices.faults
    assert not devices.pinned
    assert not devices.num_own_streams


@pytest.mark.parametrize(
    ("method", "after"),
    [
        *((method, after) for method in ("copy", "run", "record") for after in (0, 5)),
        ("follow", 0),
        ("new_stream", 0),
    ],
)
async def test_a_device_that_fails_fails_the_tag_and_nothing_else(
    method, after, devices, root
):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        # Of the calls for a save, `record` is the first.
        devices.fail(method, after=after + (method == "record"))
        state = {"here": devices.tensor(numbers(12)), "host": numbers(1)}
        await engine.save(state, "model.pt")
        with pytest.raises(StagingError, match="simulated failure") as caught:
            await engine.commit("a")
        cause = caught.value
        while cause is not None and not isinstance(cause, DeviceError):
            cause = cause.__cause__
        assert cause is not None, "the cause is not chained"
        assert await engine.latest() is None
        assert engine.ring_bytes[0] == 0
        for stream in devices._own:
            stream.error = None  # as after a fault that has been repaired
        await engine.create("a")
        await engine.save(state, "model.pt")
        await engine.commit("a")
        await check_saved(engine, {"here": numbers(12), "host": numbers(1)})


async def test_a_device_that_refuses_at_once_refuses_the_save(devices, root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        devices.fail("record")
        state = {"here": devices.tensor(numbers(1))}
        with pytest.raises(StagingError, match="device 0"):
            await engine.save(state, "model.pt")
        await engine.save(state, "model.pt")
        await engine.commit("a")
        await check_saved(engine, {"here": numbers(1)})


async def test_a_caller_waits_itself_where_its_stream_cannot(devices, root):
    async with CheckpointEngine(root, RING_32_MIB) as engine:
        await engine.create("a")
        devices.hold()
        try:
            weight = devices.tensor(numbers(2))
            handle = await engine.save({"weight": weight}, "model.pt")
            await begun(handle)
            devices.fail("follow")
            waiting = asyncio.create_task(engine.staged())
            await turns(1)
            # Asked for later: by its answer the stream has refused to wait.
            await engine.latest()
            assert not waiting.done()
            assert not devices.copied
        finally:
            devices.release()
        await waiting
        devices.launch(weight, lambda data: data.zero_())
        await engine.commit("a")
        await check_saved(engine, {"weight": numbers(2)})


async def test_without_a_driver_tensors_on_devices_are_refused_in_clear_words(
    devices, root
):
    devices.unusable = "cuda-python cannot be used here: no driver"
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        state = {"here": devices.tensor(numbers(1), device=1)}
        with pytest.raises(StagingError, match=r"device 1 cannot be staged.*no driver"):
            await engine.save(state, "model.pt")
        with pytest.raises(StagingError, match="no driver"):
            await engine.preflight(state)
        with pytest.raises(StagingError, match="no driver"):
            await aiockpt.save(state, root / "one.pt")
        # What is in host memory is saved, and torch loads what is not.
        await engine.save({"host": numbers(1)}, "model.pt")
        await engine.commit("a")
        with pytest.raises(InvalidArgumentError, match="cuda"):
            await engine.load("model.pt", map_location="cuda:0")
        await check_saved(engine, {"host": numbers(1)})


@pytest.mark.parametrize("limit_mib", [0, 70])
async def test_a_ring_that_cannot_be_pinned_is_slower_and_says_so_once(
    limit_mib, devices, root, caplog
):
    devices.pin_limit_bytes = limit_mib * MIB
    caplog.set_level(logging.WARNING, "aiockpt")
    ring = {"host_cache_size": 80 / 1024, "parser_threads": 2}
    async with CheckpointEngine(root, ring) as engine:
        for name in "ab":
            await engine.create(name)
            state = {"here": devices.tensor(numbers(90))}
            await engine.save(state, "model.pt")
            await engine.commit(name)
        await check_saved(engine, {"here": numbers(90)})
        loaded = await engine.load("model.pt", map_location="cuda:1")
        assert torch.equal(loaded["here"], numbers(90))
    assert len(caplog.records) == 1
    assert "cannot be pinned" in caplog.text
    assert "host_cache_size" in caplog.text


async def test_no_more_is_pinned_than_is_used_and_a_segment(devices, root):
    big = {"host_cache_size": 1, "parser_threads": 2}
    async with CheckpointEngine(root, big) as engine:
        assert not devices.pinned
        await engine.create("a")
        await engine.save({"host": numbers(1)}, "host.pt")
        assert not devices.pinned, "nothing needed it"
        await engine.save({"here": devices.tensor(numbers(3))}, "model.pt")
        await engine.commit("a")
        assert sum(devices.pinned.values()) <= 2 * 64 * MIB
        assert all(nbytes == 64 * MIB for nbytes in devices.pinned.values())


async def test_preflight_pins_what_the_first_save_needs(devices, root):
    big = {"host_cache_size": 1, "parser_threads": 2}
    async with CheckpointEngine(root, big) as engine:
        await engine.preflight({"host": numbers(100)})
        assert not devices.pinned
        state = {"here": devices.tensor(numbers(100))}
        await engine.preflight(state)
        # And one segment more, which is not waited for.
        await until(lambda: len(devices.pinned) == 3)
        pinned = dict(devices.pinned)
        assert sum(pinned.values()) >= 100 * MIB
        await engine.create("a")
        await engine.save(state, "model.pt")
        await engine.commit("a")
        assert devices.pinned == pinned


async def test_the_last_segment_is_pinned_to_its_end_and_no_further(devices, root):
    ring = {"host_cache_size": 80 / 1024, "parser_threads": 2}
    async with CheckpointEngine(root, ring) as engine:
        await engine.create("a")
        await engine.save({"here": devices.tensor(numbers(3))}, "model.pt")
        await engine.commit("a")
        # The second is not waited for: nothing is copied into it.
        await until(lambda: len(devices.pinned) == 2)
        # Of chunks of 10 MiB: none of them is in two segments.
        assert sorted(devices.pinned.values()) == [20 * MIB, 60 * MIB]


async def test_few_copies_are_queued_until_somebody_waits(devices, root):
    ring = {"host_cache_size": 24 * 8 / 1024, "parser_threads": 2}
    async with CheckpointEngine(root, ring) as engine:
        await engine.create("a")
        devices.hold()
        try:
            state = {"here": devices.tensor(numbers(160))}
            handle = await engine.save(state, "model.pt")
            await until(lambda: devices.num_queued == 8)
            await engine._runtime.spawn(asyncio.sleep(0)).wait()
            assert not handle._save.begun.is_set()
            await engine.staged()
            assert devices.num_queued == 11
            assert not devices.copied
        finally:
            devices.release()
        await engine.commit("a")
        await check_saved(engine, {"here": numbers(160)})


async def test_small_tensors_are_copied_in_one_batch_a_chunk(
    devices, root, monkeypatch
):
    batches: list[int] = []
    copy = SimulatedDevices.to_host

    def to_host(devices, device, stream, copies, *, is_pinned):
        batches.append(len(copies))
        copy(devices, device, stream, copies, is_pinned=is_pinned)

    monkeypatch.setattr(SimulatedDevices, "to_host", to_host)
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        expected = {f"k{i}": torch.full((7,), float(i)) for i in range(2000)}
        state = {key: devices.tensor(tensor) for key, tensor in expected.items()}
        await engine.create("a")
        await engine.save(state, "model.pt")
        await engine.commit("a")
        await check_saved(engine, expected)
    assert sum(batches) >= 2000
    assert len(batches) <= 2


async def test_what_a_class_makes_for_its_pickle_is_copied_after_it_was_made(root):
    devices = SimulatedDevices(1, is_lazy=False, is_eager=False)

    class Lazy(torch.Tensor):
        def __reduce_ex__(self, protocol: object) -> object:
            made = devices.tensor(torch.zeros(4))
            devices.launch(made, lambda data: data.add_(3))
            return made.__reduce_ex__(2)

    with devices.installed():
        async with CheckpointEngine(root, RING_8_MIB) as engine:
            await engine.create("a")
            lazy = devices.tensor(torch.ones(4)).as_subclass(Lazy)
            await engine.save({"lazy": lazy}, "model.pt")
            await engine.commit("a")
            await check_saved(engine, {"lazy": torch.full((4,), 3.0)})


async def test_many_saves_hold_no_more_than_a_few(devices, root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        weight = devices.tensor(numbers(2))
        before = devices.allocated_bytes, devices.num_own_streams
        pinned: set[int] = set()
        for number in range(20):
            await engine.create(f"t{number}")
            await engine.save({"weight": weight}, "model.pt")
            await engine.commit(f"t{number}")
            pinned.add(sum(devices.pinned.values()))
        assert len(pinned) == 1
        assert (devices.allocated_bytes, devices.num_own_streams) == (before[0], 1)


@pytest.mark.parametrize("method", ["copy", "run", "settle", "record"])
async def test_a_device_that_fails_fails_the_load(method, devices, root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save({"weight": numbers(5)}, "model.pt")
        await engine.commit("a")
        devices.fail(method)
        with pytest.raises(StagingError, match="simulated failure"):
            await engine.load("model.pt", map_location="cuda:0")
        assert engine.ring_bytes[0] == 0
        for stream in devices._own:
            stream.error = None
        loaded = await engine.load("model.pt", map_location="cuda:0")
        assert torch.equal(loaded["weight"], numbers(5))


async def test_bytes_that_rotted_do_not_reach_the_caller(devices, root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save({"weight": numbers(5)}, "model.pt")
        await engine.commit("a")
        with (root / "a" / "model.pt").open("r+b") as file:
            file.seek(2 * MIB)
            file.write(b"rotten")
        with pytest.raises(aiockpt.CorruptCheckpointError, match="weight"):
            await engine.load("model.pt", map_location="cuda:0")
        assert devices.allocated_bytes == 0


@pytest.mark.parametrize("path", ["model.pt", "model.safetensors"])
async def test_strided_targets_are_filled_in_parts(path, devices, root, monkeypatch):
    copied: list[int] = []
    copy = torch.Tensor.copy_

    def note(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        copied.append(target.nbytes)
        return copy(target, source)

    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save({"weight": torch.arange(12.0).view(3, 4)}, path)
        await engine.commit("a")
        target = devices.tensor(torch.zeros(4, 3)).t()
        monkeypatch.setattr(filling, "_PART_BYTES", 16)
        monkeypatch.setattr(torch.Tensor, "copy_", note)
        await engine.load(path, into={"weight": target})
        assert torch.equal(target, torch.arange(12.0).view(3, 4))
    assert sum(copied) == 48
    assert max(copied) <= 16


async def test_preflight_plans_a_state_on_a_device(devices, root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        report = await engine.preflight({"here": devices.tensor(numbers(1))})
        assert report.planned_bytes > MIB


async def test_one_file_doors_save_from_devices_and_load_to_them(devices, tmp_path):
    path = tmp_path / "one.pt"
    await aiockpt.save({"here": devices.tensor(numbers(3))}, path)
    loaded = await aiockpt.load(path, map_location="cuda:1")
    assert devices.device_of(loaded["here"]) == 1
    assert torch.equal(loaded["here"], numbers(3))


def test_the_sync_door_lets_the_caller_go_on_as_well(devices, root):
    from aiockpt.sync import CheckpointEngine as BlockingEngine

    with BlockingEngine(root, RING_32_MIB) as engine:
        weight = devices.tensor(numbers(2))
        engine.create("a")
        devices.hold()
        try:
            handle = engine.save({"weight": weight}, "model.pt")
            handle.staged()
            engine.staged()
            engine.wait_staged()
            assert not devices.copied
            devices.launch(weight, lambda data: data.zero_())
        finally:
            devices.release()
        engine.commit("a")
        assert torch.equal(engine.load("model.pt")["weight"], numbers(2))
