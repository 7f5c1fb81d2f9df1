"""What is captured stays as it was, and changes to tensors are noticed."""

import collections
import copy
import copyreg
import enum
import functools
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import states
from aiockpt.capture import Capture, capture
from aiockpt.capturing.marks import storage_ptrs
from aiockpt.errors import InvalidArgumentError
from aiockpt.outline import leaves, outline
from aiockpt.pickling import pickle_state
from equality import assert_same_state

EVERY_STATE = pytest.mark.parametrize("build", states.ALL_STATES.values())
ONE_PROCESS_GROUP = pytest.mark.leaks("gloo keeps its event loop open for good")


# ----------------------------------------------------------------- the private structure


@EVERY_STATE
def test_the_tree_equals_the_state(build: states.Builder) -> None:
    state = build()
    tree = capture(state).tree
    assert_same_state(tree, state)
    assert pickle_state(tree).data == pickle_state(state).data


@EVERY_STATE
def test_the_state_is_not_modified(build: states.Builder) -> None:
    state = build()
    before = pickle_state(state).data
    capture(state)
    assert pickle_state(state).data == before


@EVERY_STATE
def test_nothing_that_can_change_is_shared_with_the_caller(
    build: states.Builder,
) -> None:
    state = build()
    shared = set(mutable_parts(state)) & set(mutable_parts(capture(state).tree))
    assert not shared


def change_everything(state: states.State) -> None:
    state["dict"]["added"] = 1
    state["dict"]["a"] = 2
    state["list"].append(1)
    state["set"].add(9)
    state["deque"].append(1)
    state["od"].move_to_end("x")
    state["od"].extra.append(1)
    state["defaultdict"]["new"].append(1)
    state["counter"]["a"] += 1
    state["bytearray"][0] = 0
    state["array"][0] = 100
    state["objects"][0].append(1)
    state["in_tuple"][0].append(1)
    state["object"].rates.append(1)
    state["object"].last_epoch = 100
    state["slots"].history.append(1)
    state["dataclass"].loss.append(1)
    state["partial"].keywords["a"] = 2
    state["namedtuple"].y.append(1)
    state["named"].append(1)
    state["named"].name.append(1)
    state["config"]["a"].append(1)
    state["module"].first = None
    state["generator"].manual_seed(99)
    state["added"] = 1


def one_of_each() -> states.State:
    od = collections.OrderedDict(x=1, y=2)
    od.extra = [1]
    named = states.ListWithName([1])
    named.name = ["n"]
    return {
        "dict": {"a": 1},
        "list": [1],
        "set": {1},
        "deque": collections.deque([1]),
        "od": od,
        "defaultdict": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("ab"),
        "bytearray": bytearray(b"ab"),
        "array": np.arange(3),
        "objects": np.array([[1], None], dtype=object),
        "in_tuple": ([1], 2),
        "object": states.Schedule(),
        "slots": states.Slotted(1, [1]),
        "dataclass": states.Progress(1, [1.0], torch.ones(1)),
        "partial": functools.partial(states.data_of, a=1),
        "namedtuple": states.Point(1, [2]),
        "named": named,
        "config": states.Config(a=[1]),
        "module": states.SmallNet(),
        "generator": torch.Generator().manual_seed(1),
    }


def test_what_the_caller_changes_afterwards_is_not_seen() -> None:
    state = one_of_each()
    expected = copy.deepcopy(state)

    captured = capture(state)
    change_everything(state)

    assert_same_values(captured.tree, expected)


def assert_same_values(actual: states.State, expected: states.State) -> None:
    # The copies of modules have their own parameters; all else is compared in full.
    for net in (actual.pop("module"), expected.pop("module")):
        assert [name for name, _ in net.named_children()] == ["first", "second", "norm"]
    assert_same_state(actual, expected)


def test_tensors_and_raw_storages_are_the_callers() -> None:
    tensor, parameter = torch.ones(2), nn.Parameter(torch.ones(2))
    storage = tensor.untyped_storage()
    captured = capture({"t": [tensor], "p": (parameter,), "s": storage})
    assert captured.tree["t"][0] is tensor
    assert captured.tree["p"][0] is parameter
    assert captured.tree["s"] is storage
    assert len(captured.tensors) == 2


def test_a_tensor_met_twice_is_listed_once() -> None:
    tensor = torch.ones(2)
    assert len(capture([tensor, {"again": tensor}]).tensors) == 1


def test_a_tuple_without_anything_to_copy_stays_itself() -> None:
    shape = (1, "a", (2.0, None), torch.ones(1))
    assert capture([shape]).tree[0] is shape


def test_what_is_one_object_is_one_copy() -> None:
    shared: list[int] = [1]
    pair = (shared, shared)
    schedule = states.Schedule()
    state = {"a": shared, "b": pair, "c": pair, "s": schedule, "rates": schedule.rates}

    tree = capture(state).tree

    assert tree["b"] is tree["c"]
    assert tree["a"] is tree["b"][0] is tree["b"][1]
    assert tree["a"] is not shared
    assert tree["s"].rates is tree["rates"]
    assert tree["s"].weights is schedule.weights


def test_keys_that_are_objects_are_cloned_with_the_rest() -> None:
    class_key, link = (states.Colour.RED, 1), FrozenLink()
    tree = capture({class_key: 1, link: 2, "links": [link]}).tree
    (cloned,) = tree["links"]
    assert cloned is not link
    assert tree == {class_key: 1, cloned: 2, "links": [cloned]}


class FrozenLink:
    """Hashed by identity."""


class Numbered:
    """Makes its state, arguments and items anew for each reduction."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.items: list[object] = []

    def __reduce__(self):
        parts = [[self.number], [self.number + 1]]
        return Numbered, (self.number,), {"parts": parts}, iter([[self.number + 2]])

    def append(self, item: object) -> None:
        self.items.append(item)


def test_what_reductions_make_on_the_way_is_not_mixed_up() -> None:
    tree = capture([Numbered(number) for number in range(300)]).tree
    for number, clone in enumerate(tree):
        assert clone.number == number
        assert clone.parts == [[number], [number + 1]]
        assert clone.items == [[number + 2]]


class Noting:
    """Notes whatever it takes."""

    def note(self, taken: object) -> None:
        vars(self).setdefault("notes", []).append(taken)

    def __setitem__(self, key: object, value: object) -> None:
        self.note(key)
        super().__setitem__(key, value)

    def append(self, item: object) -> None:
        self.note(item)
        super().append(item)

    def extend(self, items: Iterable[object]) -> None:
        for item in items:
            self.append(item)


class NotingDict(Noting, dict):
    pass


class NotingOrderedDict(Noting, collections.OrderedDict):
    pass


class NotingDefaultDict(Noting, collections.defaultdict):
    def __reduce__(self):
        # Of its own accord it leaves attributes out.
        make, args, _, items, pairs = super().__reduce__()
        return make, args, vars(self), items, pairs


class NotingCounter(Noting, collections.Counter):
    pass


class NotingList(Noting, list):
    pass


class NotingDeque(Noting, collections.deque):
    pass


class NotingSetter(Noting, list):
    """Its state is set by a function."""

    def __reduce__(self):
        return NotingSetter, (), self.notes, iter(self), None, set_notes


def set_notes(target: NotingSetter, notes: list[object]) -> None:
    target.notes = [*notes, len(target)]


def filled(noting: Any) -> Noting:
    if isinstance(noting, dict):
        noting.update({"first": 1})
        noting["second"] = 2
    else:
        noting.extend(["first", "second"])
    noting.note("last")
    return noting


@pytest.mark.parametrize(
    "empty",
    [
        NotingDict,
        NotingOrderedDict,
        functools.partial(NotingDefaultDict, int),
        NotingCounter,
        NotingList,
        NotingDeque,
        NotingSetter,
    ],
)
def test_an_object_takes_its_items_before_its_state_as_from_a_pickle(empty) -> None:
    noting = filled(empty())
    (clone,) = capture([noting]).tree
    loaded = pickle.loads(pickle.dumps(noting, 2))
    assert type(clone) is type(noting)
    assert (clone, vars(clone)) == (loaded, vars(loaded))
    assert list(clone) == list(noting)


def test_a_reduction_registered_with_copyreg_is_used() -> None:
    class Registered:
        pass

    copyreg.pickle(Registered, lambda _: (states.Link, ("registered",)))
    try:
        assert capture([Registered()]).tree == [states.Link("registered")]
    finally:
        del copyreg.dispatch_table[Registered]


@given(
    st.recursive(
        st.integers() | st.text() | st.booleans() | st.builds(bytearray),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.text() | st.tuples(st.integers()), inner)
            | st.lists(inner).map(tuple)
            | st.lists(inner, max_size=3).map(collections.deque)
            | st.sets(st.integers())
        ),
    )
)
def test_any_containers_are_copied_equal_and_apart(state: object) -> None:
    tree = capture([state, state]).tree
    assert_same_state(tree, [state, state])
    assert not set(mutable_parts(tree)) & set(mutable_parts(state))


# ---------------------------------------------------------------------- what is refused


class Refuses:
    """An object whose class does not let itself be pickled."""

    def __init__(self, error: type[Exception] = ValueError) -> None:
        self.error = error

    def __reduce__(self):
        message = "not me"
        raise self.error(message)


class ReducesWrongly:
    """An object whose reduction is none."""

    def __reduce__(self):
        return [1]


class RefusesState:
    """An object that is made but does not take its state."""

    def __init__(self) -> None:
        self.value = 1

    def __setstate__(self, state):
        message = "no state"
        raise KeyError(message)


def refused_object(value: object) -> states.Link:
    link = states.Link()
    link.hook = value
    return link


def local_class() -> type:
    class Local:
        pass

    return Local


def local_object() -> object:
    return local_class()()


def generator() -> Iterator[int]:
    yield 1


def module_with_hook() -> nn.Module:
    net = states.SmallNet()
    net.register_forward_hook(lambda *_: None)
    return net


class FrozenKey:
    """A key that cannot be pickled."""

    def __reduce__(self):
        message = "no key"
        raise TypeError(message)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "lambda": (lambda: lambda: None, ""),
    "local class": (local_class, ""),
    "local object": (local_object, ""),
    "in a list": (lambda: [0, lambda: None], "[1]"),
    "in a tuple": (lambda: (0, (1, lambda: None)), "[1][1]"),
    "in a deque": (lambda: collections.deque([lambda: None]), "[0]"),
    "in a dict": (lambda: {"a": {2: lambda: None}}, '["a"][2]'),
    "a key": (lambda: {1: 2, FrozenKey(): 3}, "[1]"),
    "quoted": (lambda: {'say "é"': lambda: None}, '["say \\"é\\""]'),
    "tuple key": (lambda: {("a", 1): lambda: None}, '[("a", 1)]'),
    "enum key": (
        lambda: {states.Colour.RED: lambda: None},
        "[<Colour.RED: 1>]",
    ),
    "attribute": (lambda: refused_object(lambda: None), ".hook"),
    "inside of an attribute": (lambda: refused_object([lambda: None]), ".hook[0]"),
    "slot": (lambda: states.Slotted(lambda: None, history=[]), ".step"),
    "namedtuple": (lambda: states.Point(1, lambda: None), "[1]"),
    "list subclass": (lambda: states.ListWithName([lambda: None]), "[0]"),
    "factory": (lambda: collections.defaultdict(lambda: 1), ".default_factory"),
    "object array": (lambda: np.array([lambda: None], dtype=object), "[0]"),
    "module hook": (module_with_hook, "._forward_hooks"),
    "lock": (threading.Lock, ""),
    "generator": (generator, ""),
    "module": (lambda: sys, ""),
    "file": (Path(__file__).open, ""),
    "weak reference": (lambda: weakref.ref(states.SmallNet()), ""),
    "dict view": ({}.keys, ""),
    "error in __reduce__": (Refuses, ""),
    "wrong reduction": (ReducesWrongly, ""),
    "error in __setstate__": (RefusesState, ""),
    "local enum": (lambda: enum.Enum("Unknown", "A").A, ""),
}


@pytest.mark.parametrize(("build", "steps"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_pickled_is_refused_by_its_key(build, steps: str | None) -> None:
    value = build()
    try:
        with pytest.raises(InvalidArgumentError) as raised:
            capture({"fine": torch.ones(1), "model": {"odd": value}})
    finally:
        if hasattr(value, "close"):
            value.close()
    path = f'state["model"]["odd"]{steps or ""}'
    assert str(raised.value).startswith(path)
    if steps is not None and not steps.endswith("hooks"):
        assert str(raised.value).startswith(f"{path} cannot be saved: ")
    assert isinstance(raised.value.__cause__, Exception)


def test_the_error_of_the_values_class_is_the_cause() -> None:
    with pytest.raises(InvalidArgumentError, match="not me") as raised:
        capture([Refuses(OSError)])
    assert isinstance(raised.value.__cause__, OSError)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": x}, states.Link])
def test_too_deep_a_nesting_is_refused(wrap: Callable[[object], object]) -> None:
    state: object = 1
    for _ in range(sys.getrecursionlimit()):
        state = wrap(state)
    with pytest.raises(InvalidArgumentError, match="nested too deeply"):
        capture(state)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_not_the_values_fault_is_not_taken_for_a_refusal(error: type) -> None:
    with pytest.raises(error):
        capture([Refuses(error)])


# ------------------------------------------------------------------- changes of tensors


def base_state() -> states.State:
    return {"fine": torch.ones(2), "model": [{"w": torch.arange(6.0).view(2, 3)}]}


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(2, 3)),
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.tensor(1.0)),
    "setitem": lambda w: w.__setitem__((0, 0), 5.0),
    "zero_": lambda w: w.zero_(),
    "resize_": lambda w: w.resize_(100, 100),
    "set_": lambda w: w.set_(torch.zeros(2, 3)),
    "data": lambda w: setattr(w, "data", torch.zeros(2, 3)),
    "view": lambda w: w[1].mul_(2),
    "detach": lambda w: w.detach().add_(1),
    "out": lambda w: torch.add(torch.zeros(2, 3), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "no_grad": torch.no_grad()(lambda w: w.add_(1)),
    "inference_mode": torch.inference_mode()(lambda w: w.add_(1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_tensor_is_named(change: Callable[[torch.Tensor], object]) -> None:
    state = base_state()
    captured = capture(state)
    assert captured.changed() is None

    change(state["model"][0]["w"])

    assert captured.changed() == "model.0.w"


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_step_is_noticed(kind: type, *, foreach: bool) -> None:
    net = states.SmallNet()
    optimizer = kind(net.parameters(), lr=0.1, foreach=foreach)
    net.first(torch.ones(2, 4)).sum().backward()
    captured = capture({"model": net.state_dict()})

    optimizer.step()

    assert captured.changed() == "model.first.weight"


def test_the_state_of_an_optimizer_is_watched_too() -> None:
    net = states.SmallNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net.first(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    captured = capture(optimizer.state_dict())

    optimizer.step()

    assert captured.changed() == "state.0.step"


@EVERY_STATE
def test_what_is_only_read_is_not_taken_for_changed(build: states.Builder) -> None:
    captured = capture(build())
    pickle_state(captured.tree)
    capture(captured.tree)
    for tensor in captured.tensors:
        if type(tensor) in (torch.Tensor, nn.Parameter):
            tensor.detach()
    assert captured.changed() is None


def test_training_without_a_step_is_not_taken_for_a_change() -> None:
    net = states.SmallNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    captured = capture({"model": net.first.state_dict(), "o": optimizer.state_dict()})
    net.first(torch.ones(2, 4)).sum().backward()
    optimizer.zero_grad()
    assert captured.changed() is None


def test_the_first_of_many_changed_tensors_is_named_whatever_its_number() -> None:
    tensors = [torch.zeros(1) for _ in range(10_000)]
    captured = capture({"all": tensors})
    for number in (9_999, 5_000):
        tensors[number].add_(1)
        assert captured.changed() == f"all.{number}"


def test_tensors_of_every_other_kind_are_watched_as_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR, quantized and nested tensors
        kinds = [
            torch.eye(2).to_sparse(),
            torch.eye(2).to_sparse_csr(),
            torch.ones(3).as_subclass(states.Own),
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
            torch.nested.nested_tensor([torch.ones(2)]),
        ]
        for number, tensor in enumerate(kinds, 1):
            captured = capture([torch.ones(1), *kinds])
            assert captured.changed() is None
            tensor.copy_(tensor.clone())
            assert captured.changed() == f"{number}"


def test_inference_tensors_have_no_counter_but_are_watched_by_address() -> None:
    with torch.inference_mode():
        tensor = torch.ones(2)
        captured = capture({"plain": torch.ones(1), "inference": tensor})
        tensor.add_(1)
        assert captured.changed() is None
        tensor.resize_(1000)
        assert captured.changed() == "inference"


def test_a_tensor_inside_of_objects_is_named() -> None:
    schedule, net = states.Schedule(), states.SmallNet()
    captured = capture({"s": [schedule], "net": net})
    with torch.no_grad():
        net.norm.weight.add_(1)
    changed = captured.changed()
    schedule.weights.add_(1)

    assert changed == "net._modules.norm._parameters.weight"
    assert captured.changed() == "s.0.weights"


def test_a_tensor_inside_of_a_cycle_is_named() -> None:
    ring: list[object] = [1]
    ring += [ring, {"w": torch.ones(1)}]
    captured = capture(ring)
    ring[2]["w"].add_(1)
    assert captured.changed() == "2.w"


def test_no_path_leads_through_a_class() -> None:
    captured = capture({"class": WithTensor, "own": WithTensor.weight})
    assert captured.key_of(WithTensor.weight) == "own"


class WithTensor:
    """A class that holds a tensor."""

    weight = torch.ones(1)


def test_fake_tensors_are_captured_without_a_warning() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3)
    captured = capture([fake])
    assert captured.changed() is None
    assert captured.storage_ptrs() == set()


def test_a_tensor_in_a_slot_and_in_a_set_is_named() -> None:
    tensor, member = torch.ones(1), torch.ones(1)
    captured = capture([states.Slotted(tensor, []), {member}])
    assert captured.key_of(tensor) == "0.step"
    assert captured.key_of(member) == "1.<Tensor>"


def test_a_tensor_is_named_as_a_load_of_the_file_names_it() -> None:
    names = ["a", "b.c", 1, -1, 0.5, None, True, (1, "x")]
    state = {"by name": {name: torch.ones(1) for name in names}, "row": [torch.ones(1)]}
    captured = capture(state)
    keys = [leaf.key for leaf in leaves(outline(pickle_state(captured.tree).data))]
    assert [captured.key_of(tensor) for tensor in captured.tensors] == keys


def test_a_tensor_that_no_path_leads_to_is_described() -> None:
    captured = capture([torch.ones(1)])
    assert captured.key_of(torch.ones(1)) == "a tensor of an object in state"


def test_the_whole_state_may_be_one_tensor() -> None:
    tensor = torch.ones(1)
    captured = capture(tensor)
    tensor.add_(1)
    assert captured.changed() == "state"


@ONE_PROCESS_GROUP
def test_distributed_tensors_are_watched_outside_and_inside() -> None:
    with states.process_group():
        state = states.dtensors()
        captured = capture(state)
        assert captured.tree["sharded"] is state["sharded"]
        assert captured.changed() is None

        state["replicated"].add_(1)
        assert captured.changed() == "replicated"

        state["sharded"].to_local().add_(1)
        assert captured.changed() == "sharded._local_tensor"
        assert storage_ptrs([state["sharded"]]) == {state["local"].data_ptr()}
        assert state["local"].data_ptr() in captured.storage_ptrs()


# ------------------------------------------------------------------------- their memory


def test_the_memory_behind_a_state_is_that_of_its_tensors_and_storages() -> None:
    buffer, raw = torch.arange(10.0), torch.arange(3)
    captured = capture(
        {
            "part": buffer[4:6],
            "raw": raw.untyped_storage(),
            "typed": raw._typed_storage(),
            "meta": torch.empty(3, device="meta"),
            "empty": torch.empty(0),
        }
    )
    assert captured.storage_ptrs() == {buffer.data_ptr(), raw.data_ptr()}


def test_tensors_without_memory_have_none_behind_them() -> None:
    assert storage_ptrs([torch.empty(3, device="meta"), torch.empty(0)]) == set()


def test_the_memory_behind_sparse_tensors_is_that_of_their_parts() -> None:
    indices, values = torch.tensor([[0, 1]]), torch.ones(2)
    coo = torch.sparse_coo_tensor(indices, values, (2,))
    assert storage_ptrs([coo]) == {
        coo._indices().data_ptr(),
        coo._values().data_ptr(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sparse CSR is in beta
        for layout in (torch.sparse_csr, torch.sparse_csc):
            compressed = torch.eye(2).to_sparse(layout=layout)
            assert compressed.values().data_ptr() in storage_ptrs([compressed])
            assert len(storage_ptrs([compressed])) == 3


@EVERY_STATE
def test_every_kind_of_state_can_tell_its_memory(build: states.Builder) -> None:
    assert 0 not in capture(build()).storage_ptrs()


# ------------------------------------------------------------------------------ helpers


def mutable_parts(node: object, seen: set[int] | None = None) -> list[int]:
    """The ids of all containers and objects in a state that can change."""
    seen = set() if seen is None else seen
    shared = (torch.Tensor, torch.TypedStorage, torch.UntypedStorage, type, str, bytes)
    if id(node) in seen or isinstance(node, shared):
        return []
    seen.add(id(node))
    if isinstance(node, dict):
        parts = [*node.keys(), *node.values()]
    elif isinstance(node, (list, tuple, set, frozenset, collections.deque)):
        parts = list(node)
    else:
        parts = []
    mutable = (dict, list, set, collections.deque, bytearray, np.ndarray, nn.Module)
    mine = (states.Schedule, states.Link, states.Slotted, states.Progress)
    own = [id(node)] if isinstance(node, (*mutable, *mine, torch.Generator)) else []
    if isinstance(node, (*mutable, *mine)):
        parts += vars(node).values() if hasattr(node, "__dict__") else ()
    return own + [found for part in parts for found in mutable_parts(part, seen)]


def test_a_capture_says_what_it_holds() -> None:
    captured = capture({"a": torch.ones(1)})
    assert isinstance(captured, Capture)
    with pytest.raises(AttributeError):
        captured.other = 1
