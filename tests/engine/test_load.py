"""Loading through an engine: what it reads, what it fills, and how it ends early."""

import asyncio
import logging
import weakref

import pytest
import torch

import aiockpt
from aiockpt.loading import arenas as arenas_module
from aiockpt.loading.bulk import BulkRead
from aiockpt.storage import local_read, local_write
from gates import LIMIT_S, RING_8_MIB, Gate, held, turns
from thread_work import no_cycle_collector

MIB = 1 << 20
# Each goes through the engine's threads; only a failing test looks so often.
NUM_LOOKS = 2000


@pytest.fixture
async def engine(root):
    config = {"host_cache_size": 8 * MIB / (1 << 30), "parser_threads": 3}
    async with aiockpt.CheckpointEngine(root, config) as engine:
        yield engine


def model_state(num_bytes=24 * MIB):
    generator = torch.Generator().manual_seed(5)
    large = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, generator=generator)
    small = [torch.randn(n + 1, generator=generator) for n in range(40)]
    return {"large": large, "small": small, "step": 7}


async def saved(engine, state, name="model.pt", tag="one"):
    await engine.create(tag)
    await engine.save(state, name)
    await engine.commit(tag)


class Reads:
    """Stands between a load and the file system."""

    def __init__(self, monkeypatch):
        self.blocks = []
        self.gate = None
        self.error = None
        read_block = local_read.LocalReadFile.read_block

        def watched(file, offset, view):
            if self.gate is not None:
                self.gate.pass_through()
            if self.error is not None:
                raise self.error
            self.blocks.append((offset, len(view)))
            read_block(file, offset, view)

        monkeypatch.setattr(local_read.LocalReadFile, "read_block", watched)

    def hold(self):
        self.gate = Gate()


@pytest.fixture
def reads(monkeypatch):
    return Reads(monkeypatch)


async def test_a_state_larger_than_the_ring_is_loaded_and_filled(engine):
    state = model_state()
    await saved(engine, state)
    made = await engine.load("model.pt")
    into = {
        "large": torch.zeros_like(state["large"]),
        "small": [torch.zeros_like(t) for t in state["small"]],
    }
    filled = await engine.load("model.pt", into=into)
    assert filled["step"] == 7
    for found in (made, into):
        assert torch.equal(found["large"], state["large"])
        assert all(map(torch.equal, found["small"], state["small"]))


async def test_a_verified_load_reads_every_byte_once(engine, root, reads):
    await saved(engine, model_state())
    await engine.load("model.pt")
    size = (root / "one" / "model.pt").stat().st_size
    read = sum(min(nbytes, size - offset) for offset, nbytes in reads.blocks)
    assert read <= size + 4096 * len(reads.blocks)


async def test_a_load_that_fails_while_filling_raises_and_ends(engine, reads):
    state = model_state()
    await saved(engine, state)
    reads.error = aiockpt.StorageError(5, "Input/output error", "model.pt")
    with pytest.raises(aiockpt.StorageError, match="Input/output"):
        await engine.load("model.pt", into={**state, "small": state["small"]})
    with pytest.raises(aiockpt.StorageError, match="Input/output"):
        await engine.load("model.pt")
    reads.error = None
    assert torch.equal((await engine.load("model.pt"))["large"], state["large"])


@pytest.mark.parametrize("is_filling", [False, True])
async def test_a_cancelled_load_writes_to_no_target_afterwards(
    engine, reads, monkeypatch, is_filling
):
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    class Stoppable(BulkRead):
        def stop(self):
            super().stop()
            loop.call_soon_threadsafe(stopped.set)

    monkeypatch.setattr("aiockpt.loading.reader.BulkRead", Stoppable)
    state = model_state()
    await saved(engine, state)
    target = torch.zeros_like(state["large"])
    into = {"large": target, "small": [torch.zeros_like(t) for t in state["small"]]}
    reads.hold()
    load = engine.load("model.pt", into=into if is_filling else None)
    task = asyncio.create_task(load)
    await reads.gate.reached()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=0)
    assert not done, "it must outlast the block that is being read"
    # A reader goes on to its next block without asking the loop.
    await asyncio.wait_for(stopped.wait(), LIMIT_S)
    reads.gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    num_read = len(reads.blocks)
    version = target.clone()
    assert num_read <= 2 * 3, "one block a reader, and no more"
    await engine.tags()
    assert len(reads.blocks) == num_read
    assert torch.equal(target, version)


async def test_a_reader_takes_short_blocks_where_bytes_pass_through_the_ring(
    root, reads
):
    config = {"host_cache_size": 64 * MIB / (1 << 30), "parser_threads": 1}
    state = model_state()
    into = {"large": torch.zeros_like(state["large"])}
    async with aiockpt.CheckpointEngine(root, config) as engine:
        await saved(engine, state)
        await engine.load("model.pt", into=into, strict=False)
        passing = {nbytes for _, nbytes in reads.blocks}
        reads.blocks.clear()
        await engine.load("model.pt")
        kept = {nbytes for _, nbytes in reads.blocks}
    assert torch.equal(into["large"], state["large"])
    assert max(passing) == 2 * MIB
    assert max(kept) == 8 * MIB


async def test_a_load_that_waits_for_its_turn_can_be_cancelled(engine, reads):
    await saved(engine, {"w": torch.ones(1000)})
    reads.hold()
    first = [asyncio.create_task(engine.load("model.pt")) for _ in range(2)]
    await reads.gate.reached()
    queued = asyncio.create_task(engine.load("model.pt"))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    reads.gate.open()
    for state in await asyncio.gather(*first):
        assert state["w"].eq(1).all()


async def test_loads_and_saves_share_the_ring(engine):
    state = model_state()
    await saved(engine, state)
    into = {
        "large": torch.zeros_like(state["large"]),
        "small": [torch.zeros_like(tensor) for tensor in state["small"]],
    }
    await engine.create("two")
    await engine.save(state, "model.pt")
    loads = [engine.load("model.pt", tag="one", into=into) for _ in range(3)]
    await asyncio.gather(*loads, engine.commit("two"))
    assert torch.equal(into["large"], state["large"])
    assert torch.equal((await engine.load("model.pt"))["large"], state["large"])


async def test_closing_waits_for_a_load(root, reads):
    engine = aiockpt.CheckpointEngine(root, {"host_cache_size": 8 * MIB / (1 << 30)})
    await saved(engine, {"w": torch.ones(1000)})
    reads.hold()
    load = asyncio.create_task(engine.load("model.pt"))
    await reads.gate.reached()
    close = asyncio.create_task(engine.aclose())
    reads.gate.open()
    await close
    assert (await load)["w"].eq(1).all()


# --- into --------------------------------------------------------------------------


def small_model():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))


async def test_a_module_and_its_optimizer_are_filled_in_place(engine):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    await saved(engine, state)
    wanted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weight = model[0].weight
    address = weight.data_ptr()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        optimizer.state[weight]["exp_avg"].zero_()

    await engine.load("model.pt", into={"model": model, "optimizer": optimizer})

    assert weight.data_ptr() == address
    assert all(torch.equal(model.state_dict()[key], wanted[key]) for key in wanted)
    assert optimizer.state[weight]["exp_avg"].any()


async def test_a_module_alone_is_filled_from_its_state_dict(engine):
    model = small_model()
    await saved(engine, model.state_dict(), "model.safetensors")
    other = small_model()
    with torch.no_grad():
        other[0].weight.zero_()
    await engine.load("model.safetensors", into=other)
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
async def test_misfits_are_all_listed_and_nothing_is_changed(engine, name):
    await saved(
        engine, {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)}, name
    )
    into = {"a": torch.zeros(3), "b": torch.zeros(3), "d": torch.zeros(1)}
    with pytest.raises(aiockpt.InvalidArgumentError) as caught:
        await engine.load(name, into=into)
    text = str(caught.value)
    assert "b: torch.float32 (2,)" in text
    assert "c: only in the file" in text
    assert "d: not in the file" in text
    assert not any(tensor.any() for tensor in into.values())


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
async def test_what_has_no_counterpart_can_be_left_out(engine, name, caplog):
    await saved(engine, {"a": torch.ones(3), "b": torch.ones(2)}, name)
    into = {"a": torch.zeros(3), "d": torch.zeros(1)}
    caplog.set_level(logging.WARNING)
    found = await engine.load(name, into=into, strict=False)
    assert found.keys() == {"a"}
    assert found["a"] is into["a"]
    assert into["a"].eq(1).all()
    assert not into["d"].any()
    assert "1 tensors have no target: b" in caplog.text
    assert "1 tensors are not in the file: d" in caplog.text


async def test_leniency_ends_at_shapes_and_dtypes(engine):
    await saved(engine, {"a": torch.ones(3)})
    with pytest.raises(aiockpt.InvalidArgumentError, match="float64"):
        await engine.load(
            "model.pt", into={"a": torch.zeros(3, dtype=torch.float64)}, strict=False
        )
    with pytest.raises(aiockpt.InvalidArgumentError, match="into"):
        await engine.load("model.pt", strict=False)


async def test_tied_tensors_fill_every_target_even_one_that_is_tied_too(engine):
    weight = torch.arange(3.0 * MIB)
    await saved(engine, {"a": weight, "b": weight})
    one, other = torch.zeros(3 * MIB), torch.zeros(3 * MIB)
    await engine.load("model.pt", into={"a": one, "b": other})
    assert torch.equal(one, weight)
    assert torch.equal(other, weight)
    one.zero_()
    await engine.load("model.pt", into={"a": one, "b": one})
    assert torch.equal(one, weight)


async def test_filling_is_seen_by_autograd(engine):
    await saved(engine, {"w": torch.ones(3)})
    target = torch.zeros(3, requires_grad=True)
    loss = (target * target).sum()
    await engine.load("model.pt", into={"w": target})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- what a review found -----------------------------------------------------------


async def test_a_target_whose_memory_was_taken_away_is_refused(engine):
    await saved(engine, {"w": torch.ones(1000)})
    for nbytes in (0, 64):
        target = torch.zeros(1000)
        target.untyped_storage().resize_(nbytes)
        with pytest.raises(aiockpt.InvalidArgumentError, match="smaller than"):
            await engine.load("model.pt", into={"w": target})


async def test_a_target_that_gets_other_memory_meanwhile_harms_nobody(engine, reads):
    state = model_state()
    await saved(engine, state)
    target = torch.zeros_like(state["large"])
    into = {"large": target, "small": [torch.zeros_like(t) for t in state["small"]]}
    reads.hold()
    load = asyncio.create_task(engine.load("model.pt", into=into))
    await reads.gate.reached()
    target.data = torch.zeros(5, dtype=torch.uint8)
    others = [torch.zeros_like(state["large"]) for _ in range(3)]
    reads.gate.open()
    await load
    assert not any(other.any() for other in others)


async def test_a_failed_fill_is_seen_by_autograd_too(engine, root):
    await saved(engine, {"w": torch.arange(5000.0)})
    path = root / "one" / "model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    target = torch.zeros(5000)
    before = target._version
    with pytest.raises(aiockpt.CorruptCheckpointError):
        await engine.load("model.pt", into={"w": target})
    assert target._version > before


@pytest.mark.parametrize("fault", ["corrupt", "unplaced", "keys", "cancelled"])
async def test_a_load_that_ends_badly_keeps_no_memory(
    engine, root, reads, monkeypatch, fault
):
    arenas = []

    class Arena(arenas_module.Arena):
        def __init__(self, nbytes):
            super().__init__(nbytes)
            arenas.append(weakref.ref(self))

    monkeypatch.setattr("aiockpt.loading.runs.Arena", Arena)
    await saved(engine, model_state())
    path = root / "one" / "model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1

    def refuse(storage, location):
        raise KeyError(location)

    with no_cycle_collector():
        match fault:
            case "corrupt" | "keys":
                path.write_bytes(data)
                keys = ["large"] if fault == "keys" else None
                with pytest.raises(aiockpt.CorruptCheckpointError):
                    await engine.load("model.pt", keys=keys)
            case "unplaced":
                with pytest.raises(KeyError):
                    await engine.load("model.pt", map_location=refuse)
            case "cancelled":
                reads.hold()
                task = asyncio.create_task(engine.load("model.pt"))
                await reads.gate.reached()
                task.cancel()
                reads.gate.open()
                with pytest.raises(asyncio.CancelledError):
                    await task
                del task
        assert arenas
        # The worker that read last may yet have to let go of its job.
        for _ in range(NUM_LOOKS):
            if all(arena() is None for arena in arenas):
                break
            await engine.tags()
        assert all(arena() is None for arena in arenas)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("options", [{}, {"verify": False}, {"keys": ["*"]}])
async def test_tensors_without_elements_are_loaded_wherever_they_stand(
    engine, name, options
):
    state = {
        "a": torch.zeros(1024),
        "b": torch.zeros(0, 3),
        "c": torch.zeros(1024),
        "d": torch.zeros(0),
    }
    await saved(engine, state, name)
    found = await engine.load(name, **options)
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == {
        key: tuple(tensor.shape) for key, tensor in state.items()
    }


async def test_what_map_location_raises_is_raised_once_and_as_it_is(engine):
    await saved(engine, {"w": torch.ones(10)})
    error = ValueError("not there")
    asked = []

    def refuse(storage, location):
        asked.append(location)
        raise error

    with pytest.raises(ValueError, match="not there") as caught:
        await engine.load("model.pt", map_location=refuse)
    assert caught.value is error
    assert asked == ["cpu"]


@pytest.mark.parametrize("guard", [True, False], ids=["staging", "ring"])
async def test_a_load_that_waits_for_a_save_can_be_cancelled(guard, root, monkeypatch):
    state = model_state()
    async with aiockpt.CheckpointEngine(root, {**RING_8_MIB, "guard": guard}) as engine:
        await saved(engine, state)
        into = {
            "large": torch.zeros_like(state["large"]),
            "small": [torch.zeros_like(t) for t in state["small"]],
        }
        with held(monkeypatch, local_write.LocalWriteFile, "_write") as gate:
            await engine.create("two")
            await engine.save(state, "model.pt")
            await gate.reached()
            while engine.ring_bytes[0] < engine.ring_bytes[1]:
                await turns(1)
            task = asyncio.create_task(engine.load("model.pt", tag="one", into=into))
            staging = engine._runtime._machinery.gate
            while guard and not staging._changed._waiters:
                await turns(1)
            await turns(20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(task), LIMIT_S)
        await engine.commit("two")


async def test_any_iterable_names_keys(engine):
    await saved(engine, {"a": torch.ones(3), "b": torch.ones(2)})
    assert (await engine.load("model.pt", keys=(key for key in "a"))).keys() == {"a"}
    with pytest.raises(aiockpt.CheckpointNotFoundError):
        await engine.load("model.pt", keys=(key for key in "x"))
