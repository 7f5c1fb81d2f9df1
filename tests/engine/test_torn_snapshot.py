"""A tensor that changes before it was copied fails its tag, and is named."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from aiockpt import CheckpointEngine, TornSnapshotError, saver
from aiockpt.staging import host
from aiockpt.storage.local_write import LocalWriteFile
from equality import assert_same_state
from gates import RING_8_MIB, held
from optimizers import NAMES, training

UNGUARDED = RING_8_MIB | {"guard": False}


@pytest.mark.parametrize("name", NAMES)
async def test_without_the_guard_a_step_too_early_fails_the_tag(
    name, root, monkeypatch
):
    trained = training(name)
    async with CheckpointEngine(root, UNGUARDED) as engine:
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save(trained.state(), "model.pt")
            await gate.reached()
            trained.optimizer.step()
        with pytest.raises(TornSnapshotError) as torn:
            await engine.commit("a")
        assert torn.value.key.startswith(("model.", "optimizer."))
        assert torn.value.key in str(torn.value)
        assert "a/model.pt" in str(torn.value)
        assert await engine.latest() is None


@pytest.mark.parametrize("name", NAMES)
async def test_without_the_guard_a_step_after_staged_is_right(name, root, monkeypatch):
    trained = training(name)
    expected = trained.state_now()
    async with CheckpointEngine(root, UNGUARDED) as engine:
        await engine.create("a")
        with held(monkeypatch, LocalWriteFile, "_write"):
            await engine.save(trained.state(), "model.pt")
            await engine.staged()
            trained.optimizer.step()
        await engine.commit("a")
        assert_same_state(await engine.load("model.pt"), expected)


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "in-place operation": lambda tensor: tensor.add_(1),
    "item": lambda tensor: tensor.__setitem__(0, 5.0),
    "view": lambda tensor: tensor.view(2, 2)[1].zero_(),
    "detach": lambda tensor: tensor.detach().mul_(2),
    "copy_": lambda tensor: tensor.copy_(torch.zeros(4)),
    "init": torch.nn.init.ones_,
    "foreach": lambda tensor: torch._foreach_add_([tensor], 1),
    "out": lambda tensor: torch.add(torch.ones(4), 1, out=tensor),
    "data swapped": lambda tensor: setattr(tensor, "data", torch.ones(4)),
    "resized": lambda tensor: tensor.resize_(1 << 16),
}


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_any_change_before_the_copy_is_done_fails_the_tag(
    change, guard, root, monkeypatch
):
    state = {"deep": [{"w": torch.arange(4.0)}], "other": torch.ones(2)}
    async with CheckpointEngine(root, RING_8_MIB | {"guard": guard}) as engine:
        await engine.create("a")
        await engine.save({}, "harmless.pt")
        with held(monkeypatch, host, "_fill") as gate:
            handle = await engine.save(state, "model.pt")
            await gate.reached()
            change(state["deep"][0]["w"])
        key = "deep.0.w"
        for wait in (handle.staged, handle.written, engine.staged):
            with pytest.raises(TornSnapshotError) as torn:
                await wait()
            assert torn.value.key == key
        with pytest.raises(TornSnapshotError, match=r"deep.*await `staged` first"):
            await engine.commit("a")
        assert await engine.tags() == []
        await engine.create("a")
        await engine.save(state, "model.pt")
        await engine.commit("a")
        assert_same_state(await engine.load("model.pt"), state)


async def test_a_change_half_way_through_a_large_tensor_fails_the_tag(
    root, monkeypatch
):
    tensor = torch.zeros(5 << 20)
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with held(monkeypatch, LocalWriteFile, "_write") as gate:
            handle = await engine.save({"w": tensor}, "model.pt")
            await gate.reached()
            assert handle.progress.staged_bytes < tensor.nbytes
            tensor.add_(1)
        with pytest.raises(TornSnapshotError, match=": w was changed"):
            await engine.commit("a")
        assert engine.ring_bytes[0] == 0


@pytest.mark.parametrize("path", ["model.pt", "model.safetensors"])
async def test_a_tensor_freed_before_it_was_planned_was_changed_too_early(
    path, root, monkeypatch
):
    tensor = torch.ones(1000)
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with held(monkeypatch, saver, "make_plan") as gate:
            await engine.save({"w": tensor}, path)
            await gate.reached()
            tensor.untyped_storage().resize_(0)
        with pytest.raises(TornSnapshotError, match=": w was changed"):
            await engine.commit("a")
        assert await engine.latest() is None


async def test_changes_after_staged_do_not_matter(root, monkeypatch):
    tensor = torch.zeros(1 << 12)
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with held(monkeypatch, LocalWriteFile, "_write"):
            handle = await engine.save({"w": tensor}, "model.pt")
            await handle.staged()
            tensor.add_(1)
            tensor.data = torch.ones(3)
        await engine.commit("a")
        assert_same_state(await engine.load("model.pt"), {"w": torch.zeros(1 << 12)})


async def test_changes_of_what_is_not_saved_do_not_matter(root, monkeypatch):
    flat = torch.zeros(8)
    mine, foreign = flat.clone(), training("AdamW-fused")
    async with CheckpointEngine(root, UNGUARDED) as engine:
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save({"w": mine}, "model.pt")
            await gate.reached()
            flat.add_(1)
            foreign.optimizer.step()
        await engine.commit("a")
        assert_same_state(await engine.load("model.pt"), {"w": torch.zeros(8)})


async def test_a_fused_step_on_a_view_of_what_is_saved_is_seen(root, monkeypatch):
    flat = torch.zeros(8)
    weight = torch.nn.Parameter(flat[4:])
    weight.grad = torch.ones(4)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    async with CheckpointEngine(root, UNGUARDED) as engine:
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save({"flat": flat[:4]}, "model.pt")
            await gate.reached()
            optimizer.step()
        with pytest.raises(TornSnapshotError) as torn:
            await engine.commit("a")
    assert torn.value.key == "flat"


def odd_parameters() -> dict[str, Callable[[], torch.nn.Parameter]]:
    wrapper = functools.partial(TwoTensor, torch.ones(2), torch.ones(2))
    return {
        "wrapper": lambda: torch.nn.Parameter(wrapper()),
        "meta": lambda: torch.nn.Parameter(torch.empty(2, device="meta")),
        "sparse": lambda: torch.nn.Parameter(torch.eye(2).to_sparse()),
    }


@pytest.mark.parametrize("make", odd_parameters().values(), ids=odd_parameters())
async def test_the_hook_looks_at_every_kind_of_parameter(make, root, monkeypatch):
    optimizer = torch.optim.SGD([make()])
    async with CheckpointEngine(root, UNGUARDED) as engine:
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save({"w": torch.ones(2)}, "model.pt")
            await gate.reached()
            optimizer.step()
        await engine.commit("a")


async def test_the_hook_looks_at_every_kind_of_optimizer_state(root, monkeypatch):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight])
    optimizer.state["of its own"] = None

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = weight.square().sum()
        value.backward()
        return value

    async with CheckpointEngine(root, UNGUARDED) as engine:
        for tag in "ab":
            await engine.create(tag)
            with held(monkeypatch, host, "_fill") as gate:
                await engine.save({"w": torch.ones(2)}, "model.pt")
                await gate.reached()
                optimizer.step(loss)
            await engine.commit(tag)
