"""A pickle is used again only where a new one would be the same."""

import gc
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import states
from aiockpt import pickle_templates, recent_pickles
from aiockpt.capture import capture
from aiockpt.errors import InvalidArgumentError
from aiockpt.pickle_templates import PickleTemplate
from aiockpt.pickling import Pickled, pickle_state
from aiockpt.recent_pickles import pickle_like_before
from aiockpt.testing.strategies import state_dicts


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    recent_pickles._kept.clear()
    yield
    recent_pickles._kept.clear()


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is pickled, and not taken from before."""
    pickled: list[object] = []

    def noting(tree: object) -> Pickled:
        pickled.append(tree)
        return pickle_state(tree)

    monkeypatch.setattr(recent_pickles, "pickle_state", noting)
    return pickled


def told(pickled: Pickled) -> tuple[object, ...]:
    """All of a pickle, and where its bytes are."""
    spans = [(each.storage._cdata, each.start, each.nbytes) for each in pickled.spans]
    return pickled.data, spans


def training(step: int = 0) -> dict[str, object]:
    """A state as those of one run are, of tensors of its own."""
    torch.manual_seed(step)
    weight = torch.rand(4, 6)
    buffer = torch.rand(100)
    return {
        "model": OrderedDict(
            weight=nn.Parameter(weight),
            frozen=nn.Parameter(torch.rand(3), requires_grad=False),
            twin=torch.rand(4, 6),
            tied=weight[1:],
            transposed=torch.rand(3, 2).t(),
            part=buffer[10:20],
            other_part=buffer[60:],
            none=torch.empty(0),
        ),
        "optimizer": {"step": torch.tensor(1.0), "betas": (0.9, 0.95)},
        "epoch": 3,
        "random": np.arange(10),
    }


def swapped(a: torch.Tensor, b: torch.Tensor) -> None:
    a.data, b.data = b.data, a.data


def tied(a: torch.Tensor, b: torch.Tensor) -> None:
    b.data = a.data


def cut_short(a: torch.Tensor, _: torch.Tensor) -> None:
    a.data = a.data[:1]


def turned(a: torch.Tensor, _: torch.Tensor) -> None:
    a.data = a.data.view(3, 2).t()


def trained(a: torch.Tensor, _: torch.Tensor) -> None:
    a.requires_grad_()


def annotated(a: torch.Tensor, _: torch.Tensor) -> None:
    a.note = "of the caller"


@pytest.mark.parametrize(
    "change", [swapped, tied, cut_short, turned, trained, annotated]
)
def test_what_changes_while_it_is_pickled_is_in_no_other_pickle(change, monkeypatch):
    a, b = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3) * 2
    state, kept = {"a": a, "b": b}, (a.data, b.data)

    def late(tree: object) -> Pickled:
        change(a, b)
        return pickle_state(tree)

    with monkeypatch.context() as patch:
        patch.setattr(recent_pickles, "pickle_state", late)
        pickle_like_before(state)
    a.data, b.data = kept
    a.requires_grad_(False)
    vars(a).clear()
    for _ in range(2):
        assert told(pickle_like_before(state)) == told(pickle_state(state))


def test_the_next_save_of_a_run_has_the_pickle_of_the_last(anew):
    first, second = training(1), training(2)
    pickle_like_before(first)
    again = pickle_like_before(second)
    assert anew == [first]
    assert told(again) == told(pickle_state(second))


def with_(**changes: Callable[[dict[str, object]], object]) -> list[object]:
    return [pytest.param(change, id=name) for name, change in changes.items()]


def in_model(change: Callable[[OrderedDict[str, object]], object]) -> object:
    def changed(state: dict[str, object]) -> None:
        change(state["model"])

    return changed


CHANGES = with_(
    a_value=lambda s: s.update(epoch=4),
    the_type_of_a_value=lambda s: s.update(epoch=3.0),
    a_key=lambda s: s.update(epochs=s.pop("epoch")),
    an_array=lambda s: s.update(random=np.arange(10) + 1),
    the_order=lambda s: s.update(model=s.pop("model")),
    one_more=lambda s: s.update(more=None),
    a_tensor_for_a_parameter=in_model(lambda m: m.update(frozen=torch.rand(3))),
    the_twin_s_storage=in_model(lambda m: m.update(tied=m["twin"][1:])),
    a_length=in_model(lambda m: m.update(part=m["part"][:9])),
    requires_grad=in_model(lambda m: m["frozen"].requires_grad_(True)),
    grad_of_a_tensor=in_model(lambda m: m["part"].requires_grad_(True)),
    dtype=in_model(lambda m: m.update(none=torch.empty(0, dtype=torch.int64))),
    dtype_of_one_length=lambda s: s["optimizer"].update(
        step=torch.tensor(1, dtype=torch.int32)
    ),
    shape=in_model(lambda m: m.update(frozen=m["frozen"].data.view(3, 1))),
    stride=in_model(lambda m: m.update(transposed=torch.rand(2, 3))),
    no_tie=in_model(lambda m: m.update(tied=m["tied"].clone())),
    another_tie=in_model(lambda m: m.update(transposed=m["weight"].data[:2, :3])),
    an_offset=in_model(lambda m: m.update(tied=m["weight"].data[:3])),
    the_length_of_a_storage=in_model(
        lambda m: m.update(frozen=nn.Parameter(torch.rand(9)[:3], requires_grad=False))
    ),
    an_object_twice=in_model(lambda m: m.update(transposed=m["tied"])),
    an_equal_object=lambda s: s["optimizer"].update(betas=[0.9, 0.95]),
)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_in_the_pickle_is_pickled_anew(change, anew):
    pickle_like_before(training())
    changed = training()
    change(changed)
    assert told(pickle_like_before(changed)) == told(pickle_state(changed))
    assert len(anew) == 2
    # And back.
    last = training()
    assert told(pickle_like_before(last)) == told(pickle_state(last))
    assert len(anew) == 2


@pytest.mark.parametrize("name", states.ALL_STATES)
def test_every_state_is_pickled_as_without_a_memory(name):
    state = states.ALL_STATES[name]()
    expected = pickle_state(state)
    for _ in range(2):
        pickled = pickle_like_before(state)
        assert pickled.data == expected.data
        assert [each[1:] for each in pickled.spans] == [e[1:] for e in expected.spans]


@given(st.lists(state_dicts(), min_size=2, max_size=4), st.randoms())
def test_no_two_states_are_taken_for_one(trees: list[object], chance: random.Random):
    for tree in chance.choices(trees, k=6):
        state = capture(tree).tree
        try:
            expected = pickle_state(state)
        except InvalidArgumentError:
            with pytest.raises(InvalidArgumentError):
                pickle_like_before(state)
            continue
        assert told(pickle_like_before(state)) == told(expected)


NUMBERS = (0, 1.0, -0.0, 0.0, 255, 256, -1, 65_536, 2**31, -(2**40), 2**64 - 1)


def counting(*numbers: object) -> dict[str, object]:
    first, second, third = numbers
    return {
        "model": OrderedDict(weight=torch.rand(4, 6), bias=torch.rand(6)),
        "step": first,
        "nested": [(second, "text"), {third: third}, {second}],
        "state": {7: torch.rand(2), 8: torch.rand(2)},
        "loss": 0.5,
    }


def test_after_two_saves_it_is_known_where_the_numbers_are_that_change(anew):
    for numbers in [(0, 0, 0), (1, 1.5, float("nan"))]:
        pickle_like_before(counting(*numbers))
    assert len(anew) == 2
    for first, second in zip(NUMBERS, reversed(NUMBERS), strict=True):
        state = counting(first, second, float("inf"))
        assert told(pickle_like_before(state)) == told(pickle_state(state))
    assert len(anew) == 2


def test_numbers_are_found_that_stand_far_apart(anew):
    for numbers in [(0, 0), (1, 1), (2, 2)]:
        state = [numbers[0], "text" * 10_000, numbers[1]]
        assert told(pickle_like_before(state)) == told(pickle_state(state))
    assert len(anew) == 2


@pytest.mark.parametrize("large", [2**64, -(2**2100)])
def test_a_large_integer_is_told_as_it_is(large, anew):
    for value in (large, large + 1, large):
        state = [value, torch.ones(2)]
        assert told(pickle_like_before(state)) == told(pickle_state(state))
    assert len(anew) == 2


def test_more_numbers_than_pay_are_pickled_anew(monkeypatch, anew):
    monkeypatch.setattr(pickle_templates, "_MAX_BLANKS", 3)
    for step in range(4):
        state = [step] * 4
        assert told(pickle_like_before(state)) == told(pickle_state(state))
    assert len(anew) == 4
    monkeypatch.setattr(recent_pickles, "_MAX_NUMBERS", 3)
    recent_pickles._kept.clear()
    pickle_like_before([7] * 3)
    assert recent_pickles._kept
    recent_pickles._kept.clear()
    pickle_like_before([7] * 4)
    assert not recent_pickles._kept


def test_a_number_that_changes_for_the_first_time_is_found_beside_the_others(anew):
    for numbers in [(0, 5, 5), (1, 5, 5), (2, 5, 5)]:
        pickle_like_before(counting(*numbers))
    assert len(anew) == 2
    for numbers in [(300, 6, 5), (301, 7, 5), (300, 6, 6), (302, 5, 6), (303, 9, 9)]:
        state = counting(*numbers)
        assert told(pickle_like_before(state)) == told(pickle_state(state))
    assert len(anew) == 4


@given(
    st.recursive(
        st.sampled_from([None, True, "text", torch.ones(2)]) | st.just(0),
        lambda parts: (
            st.lists(parts, max_size=4)
            | st.lists(parts, max_size=4).map(lambda items: [*items, items])
            | st.dictionaries(st.integers() | st.text(), parts, max_size=4)
        ),
    ),
    st.randoms(),
)
def test_wherever_numbers_change_the_pickle_is_a_new_one_s(
    tree: object, chance: random.Random
):
    def renumbered(part: object) -> object:
        if isinstance(part, list):
            return [renumbered(item) for item in part]
        if isinstance(part, dict):
            return {key: renumbered(value) for key, value in part.items()}
        if type(part) is int and chance.random() < 0.7:
            return chance.choice(NUMBERS)
        return part

    for _ in range(5):
        state = renumbered(tree)
        assert told(pickle_like_before(state)) == told(pickle_state(state))


class Fickle:
    """Its numbers stand in another order under another protocol."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __reduce_ex__(self, protocol: int) -> object:
        step = 1 if protocol == 2 else -1
        return Fickle, self.numbers[::step]


def test_numbers_of_an_object_are_not_filled_in(anew):
    states = [[Fickle(number, number), torch.ones(2)] for number in (1, 2)]
    states.append([Fickle(3, 4), torch.ones(2)])
    for state in states:
        assert pickle_like_before(state).data == pickle_state(state).data
    assert len(anew) == 3


def test_pickles_that_differ_in_more_than_numbers_teach_nothing():
    template = PickleTemplate(b"a K\x01 b K\x02 c", [1, 2])
    for data in (
        b"a K\x03 b K\x02 d",
        b"a K\x03 b K\x04 c",
        b"x K\x03 b K\x02 c",
        b"a K\x03",
    ):
        learnt = template.learnt(data, [3, 2])
        assert learnt == PickleTemplate(data, [3, 2], {})
    learnt = template.learnt(b"a K\x03 b K\x02 c", [3, 2])
    assert learnt.blanks == {0: 2}
    assert learnt.learnt(b"b K\x04 b K\x02 c", [4, 2]).blanks == {}
    assert learnt.learnt(b"a K\x05 b K\x02 c", [4, 2]).blanks == {}


class ToldByProtocol:
    """It says less of itself under a later protocol."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __reduce_ex__(self, protocol: int) -> object:
        return ToldByProtocol, (self.value if protocol == 2 else None,)


def test_an_object_that_tells_less_under_another_protocol_is_pickled_each_time(anew):
    for value in "ab":
        state = [ToldByProtocol(value)]
        assert pickle_like_before(state).data == pickle_state(state).data
    assert not recent_pickles._kept


class Zero:
    def __reduce__(self) -> object:
        return int, ()


class Holding:
    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __reduce__(self) -> object:
        return Holding, tuple(part or Zero() for part in self.parts)


def test_no_object_is_taken_for_a_tensor():
    tensor = torch.ones(())
    for state in [Holding(tensor, 0)], [Holding(0, tensor)]:
        assert pickle_like_before(state).data == pickle_state(state).data


@pytest.mark.parametrize("text", ["storage", "cpu", "latin1"])
def test_a_text_of_pickling_s_own_is_told_from_an_equal_one(text):
    for part in (text, text.encode().decode(), text):
        state = [b"ab", part, torch.ones(2)]
        assert pickle_like_before(state).data == pickle_state(state).data


def test_what_is_refused_is_refused_after_one_like_it():
    pickle_like_before([torch.ones(4), torch.ones(4, dtype=torch.int32)])
    array = np.ones(4, np.float32)
    shared = [torch.from_numpy(array), torch.from_numpy(array.view(np.int32))]
    with pytest.raises(InvalidArgumentError, match="view"):
        pickle_like_before(shared)
    pickle_like_before([torch.zeros(3)])
    with pytest.raises(InvalidArgumentError):
        pickle_like_before([torch._efficientzerotensor(3)])


@pytest.mark.parametrize("nbytes_left", [0, 20])
@pytest.mark.parametrize("key", ["frozen", "tied", "part"])
def test_a_storage_that_was_freed_since_the_last_save_is_noticed(key, nbytes_left):
    state = training()
    pickle_like_before(state)
    pickle_like_before(state)
    tensor = state["model"][key]
    storage = tensor.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(min(nbytes_left, nbytes - 1))
    with pytest.raises(InvalidArgumentError, match="was shrunk or freed"):
        pickle_like_before(state)
    storage.resize_(nbytes)
    assert told(pickle_like_before(state)) == told(pickle_state(state))


def test_a_tensor_of_a_transform_is_refused_by_name():
    def save(tensor: torch.Tensor) -> torch.Tensor:
        with pytest.raises(InvalidArgumentError, match=r"\[0\]"):
            pickle_like_before([tensor])
        return tensor.sum()

    torch.func.grad(save)(torch.ones(3))


class Subclass(torch.Tensor):
    pass


def hooked() -> torch.Tensor:
    tensor = torch.ones(2, requires_grad=True)
    tensor.register_hook(lambda grad: grad)
    return tensor


def with_attributes() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.note = "mine"
    return tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2).as_subclass(Subclass),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.ones(2).untyped_storage(),
        lambda: torch.ones(2, device="meta"),
        with_attributes,
        lambda: np.zeros(recent_pickles._MAX_BYTES // 8 + 1),
    ],
    ids=["subclass", "conj", "sparse", "storage", "meta", "attributes", "large"],
)
def test_what_tells_nothing_of_its_pickle_is_pickled_each_time(make, anew):
    for _ in range(2):
        state = {"odd": make(), "plain": torch.ones(2)}
        assert pickle_like_before(state).data == pickle_state(state).data
    assert len(anew) == 2
    assert not recent_pickles._kept


def test_torch_s_warning_of_hooks_comes_each_time(anew):
    for _ in range(2):
        with pytest.warns(UserWarning, match="hooks"):
            pickle_like_before([hooked()])


class Making:
    """Its reduction makes a tensor."""

    def __reduce__(self) -> object:
        return Making._made, (torch.arange(3),)

    @staticmethod
    def _made(tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_tensors_that_are_made_by_pickling_are_those_that_are_saved(anew):
    for _ in range(2):
        pickled = pickle_like_before([Making()])
        (span,) = pickled.spans
        assert bytes(span.storage) == torch.arange(3).numpy().tobytes()


def test_the_last_few_are_kept_and_no_tensor_with_them(anew):
    sizes = range(1, recent_pickles._NUM_KEPT + 3)
    for size in sizes:
        pickle_like_before([torch.ones(size)])
    assert len(recent_pickles._kept) == recent_pickles._NUM_KEPT
    pickle_like_before([torch.ones(sizes[-1])])
    assert len(anew) == len(sizes)
    tensor = torch.ones(sizes[-1])
    pickle_like_before([tensor])
    gone = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None


def test_no_more_is_kept_than_has_its_room(monkeypatch, anew):
    states = [["text" * 100, size, torch.ones(size)] for size in range(1, 4)]
    nbytes = max(len(pickle_state(state).data) for state in states)
    monkeypatch.setattr(recent_pickles, "_MAX_BYTES", 2 * nbytes)
    for state in (*states, *reversed(states)):
        pickle_like_before(state)
    assert len(recent_pickles._kept) == 2
    assert len(anew) == 4
