"""Loading into targets that share memory, or that nobody would find again."""

import collections
import dataclasses
import logging
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("verify", [True, False])
async def test_a_module_with_tied_weights_is_filled_with_equal_copies(
    engine, name, verify
):
    state = Pair(is_tied=True).state_dict()
    await saved(engine, {key: each.clone() for key, each in state.items()}, name)
    module = Pair(is_tied=True)
    await engine.load(name, into=module, verify=verify)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[key])


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


# --- targets that nobody would find again ------------------------------------------


class Odd(nn.Module):
    """A module whose state dict has more than parameters and buffers."""

    def __init__(self, extra):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self):
        return self.extra()

    def set_extra_state(self, state):
        raise AssertionError


def made_for_the_state_dict():
    return Odd(lambda: torch.zeros(1))


def in_a_dict_made_for_the_state_dict():
    return Odd(lambda: {"scale": torch.zeros(1)})


def cloned_by_a_hook():
    def clone(_, state, prefix, __):
        for key in list(state):
            state[key] = state[key].clone()

    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_state_dict_post_hook(clone)
    return module


def sparse():
    # What a state dict has is detached, and is filled by giving it other parts.
    module = nn.Module()
    module.w = nn.Parameter(torch.eye(2).to_sparse())
    return module


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (made_for_the_state_dict, "_extra_state"),
        (in_a_dict_made_for_the_state_dict, r"_extra_state\.scale"),
        (cloned_by_a_hook, r"0\.bias', 'model\.0\.weight"),
        (sparse, "w"),
    ],
)
async def test_a_module_that_hands_out_copies_is_refused(engine, make, key):
    await saved(engine, {"model": make().state_dict()})
    module = make()
    before = [parameter.to_dense().clone() for parameter in module.parameters()]
    with pytest.raises(InvalidArgumentError, match=rf"copies.*: 'model\.{key}'$"):
        await engine.load("model.pt", into={"model": module})
    after = [parameter.to_dense() for parameter in module.parameters()]
    assert all(map(torch.equal, before, after))


async def test_what_is_not_a_copy_can_be_chosen(engine):
    source, module = made_for_the_state_dict(), made_for_the_state_dict()
    nn.init.ones_(source.w)
    await saved(engine, source.state_dict())
    await engine.load("model.pt", into=module, keys=["w"])
    assert module.w.eq(1).all()
    with pytest.raises(InvalidArgumentError, match="_extra_state"):
        await engine.load("model.pt", into=module, strict=False)


async def test_a_module_may_hand_out_what_it_keeps_elsewhere(engine):
    def make(value):
        kept = torch.full((2,), value)
        hidden = nn.Linear(2, 2)
        nn.init.constant_(hidden.weight, value)
        module = Odd(lambda: {"kept": kept, "part": hidden.weight[1:].detach()})
        module.keeps = {"kept": kept, "hidden": [hidden]}
        return module

    await saved(engine, make(1.0).state_dict())
    module = make(0.0)
    await engine.load("model.pt", into=module)
    assert module.keeps["kept"].eq(1).all()
    assert module.keeps["hidden"][0].weight[1].eq(1).all()


class Hidden(nn.Module):
    """Has extra state in an object that nobody looks into."""

    class Average:
        def __init__(self):
            self.shadow = torch.zeros(3)

    def __init__(self):
        super().__init__()
        self.average = self.Average()

    def get_extra_state(self):
        return self.average.shadow

    def set_extra_state(self, _):
        raise NotImplementedError


async def test_a_module_may_hand_out_what_it_keeps_where_nobody_looks(engine):
    await saved(engine, {"_extra_state": torch.arange(3.0)})
    module = Hidden()
    await engine.load("model.pt", into=module)
    assert torch.equal(module.average.shadow, torch.arange(3.0))


async def test_wrappers_and_what_has_no_memory_yet_are_no_copies(engine):
    def make(value):
        module = nn.Module()
        parts = torch.full((2,), value), torch.full((2,), value)
        module.wrapper = nn.Parameter(TwoTensor(*parts))
        module.empty = nn.Parameter(torch.zeros(0))
        return module

    source, module = make(1.0), make(0.0)
    await saved(engine, source.state_dict())
    await engine.load("model.pt", into=module, weights_only=False)
    assert module.wrapper.a.eq(1).all()
    assert module.wrapper.b.eq(1).all()


class Point(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass(frozen=True)
class Parts:
    inner: object


@pytest.mark.parametrize(
    "close",
    [
        lambda item: Point(0, item),
        lambda item: collections.deque([{"x": item}]),
        lambda item: Parts([item]),
        lambda item: {Parts((item,))},
    ],
)
@pytest.mark.parametrize("make", [lambda: torch.zeros(2), lambda: nn.Linear(2, 2)])
async def test_tensors_in_containers_that_have_no_keys_are_refused(
    engine, caplog, close, make
):
    await saved(engine, {"k": torch.ones(2)})
    into = {"k": torch.zeros(2), "odd": [close(make())]}
    with pytest.raises(InvalidArgumentError, match=r"'odd\.0' \("):
        await engine.load("model.pt", into=into)
    assert not into["k"].any()
    caplog.set_level(logging.WARNING)
    await engine.load("model.pt", into=into, strict=False)
    assert "'odd.0' (" in caplog.text
    caplog.clear()
    await engine.load("model.pt", into=into, keys=["k"])
    assert not caplog.text
    assert into["k"].eq(1).all()


async def test_containers_and_objects_that_are_nobodys_target_may_be_there(engine):
    await saved(engine, {"k": torch.ones(2)})
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    loop = collections.deque([1])
    loop.append(loop)
    into = {
        "k": torch.zeros(2),
        "shape": torch.Size([2]),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "point": Point(1, {"two": 2}),
        "class": Parts,
        "loop": loop,
    }
    await engine.load("model.pt", into=into)
    assert into["k"].eq(1).all()
