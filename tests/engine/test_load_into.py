"""Loading into targets that share memory, or that nobody would find again."""

import pytest
import torch
from torch import nn

import aiockpt
from aiockpt import InvalidArgumentError

NAMES = ["model.pt", "model.safetensors"]


@pytest.fixture
async def engine(root):
    async with aiockpt.CheckpointEngine(root, {"host_cache_size": 0.0625}) as engine:
        yield engine


async def saved(engine, state, name="model.pt"):
    await engine.create("one")
    await engine.save(state, name)
    await engine.commit("one")


class Pair(nn.Module):
    def __init__(self, *, is_tied):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        if is_tied:
            self.b.weight = self.a.weight


# --- targets that share memory -----------------------------------------------------


def one_twice():
    target = torch.zeros(6)
    return target, target


def two_that_meet():
    flat = torch.zeros(9)
    return flat[:6], flat[3:]


def one_seen_in_two_ways():
    flat = torch.zeros(12)
    return flat[::2], flat[:6]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [one_twice, two_that_meet, one_seen_in_two_ways])
async def test_what_would_be_filled_with_two_values_is_refused(engine, name, make):
    await saved(engine, {"a": torch.ones(6), "b": torch.full((6,), 2.0)}, name)
    a, b = make()
    with pytest.raises(InvalidArgumentError, match=r"\bb: shares memory .*'a'"):
        await engine.load(name, into={"a": a, "b": b})
    assert not a.any()
    assert not b.any()
    # One of them alone is fine.
    await engine.load(name, into={"a": a, "b": b}, keys=["a"])
    assert a.eq(1).all()


@pytest.mark.parametrize("name", NAMES)
async def test_targets_in_between_each_other_are_filled(engine, name):
    state = {key: torch.randn(50, 3) for key in "abc"}
    await saved(engine, state, name)
    base = torch.zeros(50, 9)
    into = {"a": base[:, 0::3], "b": base[:, 1::3], "c": base[:, 2::3]}
    await engine.load(name, into=into)
    assert all(torch.equal(into[key], state[key]) for key in state)


@pytest.mark.parametrize("name", NAMES)
async def test_a_target_that_overlaps_itself_is_refused(engine, name):
    await saved(engine, {"a": torch.arange(12.0).view(4, 3)}, name)
    base = torch.zeros(6)
    with pytest.raises(InvalidArgumentError, match="a: elements of the target share"):
        await engine.load(name, into={"a": base.unfold(0, 3, 1)})
    assert not base.any()


@pytest.mark.parametrize("name", NAMES)
async def test_a_module_with_tied_weights_is_not_filled_with_two(engine, name):
    await saved(engine, Pair(is_tied=False).state_dict(), name)
    module = Pair(is_tied=True)
    before = module.a.weight.clone()
    with pytest.raises(InvalidArgumentError, match=r"b\.weight: .*'a\.weight'"):
        await engine.load(name, into=module)
    assert torch.equal(module.a.weight, before)


@pytest.mark.parametrize("is_saved_whole", [True, False])
async def test_a_module_with_tied_weights_is_filled_with_tied_ones(
    engine, is_saved_whole
):
    source, module = Pair(is_tied=True), Pair(is_tied=True)
    state = source.state_dict()
    if not is_saved_whole:
        del state["b.weight"]
    await saved(engine, state)
    await engine.load("model.pt", into=module)
    assert torch.equal(module.a.weight, source.a.weight)
    assert module.a.weight is module.b.weight


async def test_views_of_one_buffer_are_filled_from_views_of_one_buffer(engine):
    flat = torch.arange(20.0)
    state = {"flat": flat, "a": flat[:8].view(2, 4), "b": flat[4:12]}
    await saved(engine, state)
    base = torch.zeros(20)
    into = {"flat": base, "a": base[:8].view(2, 4), "b": base[4:12]}
    await engine.load("model.pt", into=into)
    assert torch.equal(base, flat)


async def test_tied_tensors_of_other_kinds_are_filled_with_tied_ones(engine):
    # What is lazily conjugated is made with torch, and copied.
    one = torch.tensor([1 + 2j, 3 - 4j])
    state = {"a": one.conj(), "b": one.conj(), "c": one.clone().conj()}
    await saved(engine, state)
    target, other = torch.zeros_like(one), torch.zeros_like(one)
    await engine.load("model.pt", into={"a": target, "b": target, "c": other})
    assert torch.equal(target, one.conj())
    assert torch.equal(other, one.conj())
    with pytest.raises(InvalidArgumentError, match=r"c: .*'a'"):
        await engine.load("model.pt", into={"a": target, "b": other, "c": target})
