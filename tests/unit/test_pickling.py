"""The pickle is torch's own, and only bytes that are referred to are kept."""

import copyreg
import gc
import io
import itertools
import pickle
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import UntypedStorage, nn

import states
from aiockpt.capture import capture
from aiockpt.capturing.marks import _parts
from aiockpt.errors import InvalidArgumentError
from aiockpt.pickling import Pickled, Span, _StatePickler, pickle_state
from aiockpt.storage_spans import StorageLedger
from equality import assert_same_state

EVERY_STATE = pytest.mark.parametrize("build", states.ALL_STATES.values())

ONE_PROCESS_GROUP = pytest.mark.leaks("gloo keeps its event loop open for good")


@EVERY_STATE
def test_the_pickle_is_byte_for_byte_that_of_torch_save(build: states.Builder) -> None:
    state = all_of_it_referred_to(build())

    pickled = pickle_state(state)

    assert all(is_whole(span) for span in pickled.spans)
    assert pickled.data == pickle_of_torch(state)


@pytest.mark.parametrize("num_before", [0, 300], ids=["short", "long"])
@pytest.mark.parametrize(
    "before",
    [[], [torch.FloatStorage, OrderedDict], [OrderedDict(a=OrderedDict())]],
    ids=["nothing", "the classes", "a dict of the class"],
)
def test_many_tensors_are_pickled_as_torch_does_wherever_their_classes_are_known(
    before: list[object], num_before: int
) -> None:
    dtypes = [torch.float32, torch.int64, torch.bool, torch.uint16, torch.uint32]
    tensors = [
        states.data_of(dtype, 2 * number)
        for number in range(40)
        for dtype in [*dtypes, torch.complex64]
    ]
    parameters = [nn.Parameter(tensor, requires_grad=False) for tensor in tensors]
    names = [f"before {number}" for number in range(num_before)]
    ties = [tensor.view(2, -1) for tensor in tensors[12:]]
    for state in (
        [names, before, tensors, parameters, ties, tensors],
        [names, before, parameters, tensors],
    ):
        assert pickle_state(state).data == pickle_of_torch(state)


def test_no_tensor_adds_to_what_the_garbage_collector_traverses() -> None:
    tensors = [torch.ones(2, 3) for _ in range(500)]
    ledger = StorageLedger({})
    pickler = _StatePickler(ledger)  # Holds all that it has written.
    gc.collect()
    gc.disable()
    try:
        before = {id(known) for known in gc.get_objects()}
        pickler.pickled(tensors)
        gc.collect(0)
        added = [new for new in gc.get_objects() if id(new) not in before]
    finally:
        gc.enable()
    # The spans, and the storages in them, are the outcome, and stay.
    of_pickle = [new for new in added if not isinstance(new, Span | UntypedStorage)]
    assert len(of_pickle) < 50


@ONE_PROCESS_GROUP
def test_the_pickle_of_distributed_tensors_is_that_of_torch_save() -> None:
    with states.process_group():
        state = all_of_it_referred_to(states.dtensors())
        assert pickle_state(state).data == pickle_of_torch(state)


@EVERY_STATE
def test_what_torch_loads_is_what_torch_would_have_saved(build: states.Builder) -> None:
    state = build()
    assert_same_state(load(file_of(pickle_state(state))), load(file_of_torch(state)))


@ONE_PROCESS_GROUP
def test_distributed_tensors_load_as_torch_would_have_saved_them() -> None:
    with states.process_group():
        state = states.dtensors()
        actual = load(file_of(pickle_state(state)))
        assert_same_state(actual, load(file_of_torch(state)))


@pytest.mark.parametrize(
    "name", sorted(states.ALL_STATES.keys() - states.UNSAFE_STATES)
)
def test_what_torch_loads_safely_loads_safely(name: str) -> None:
    file = file_of(pickle_state(states.ALL_STATES[name]()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors, typed storage
        torch.load(file, weights_only=True)


@EVERY_STATE
def test_neither_the_state_nor_its_tensors_are_touched(build: states.Builder) -> None:
    state = build()
    before = capture(state)
    pickle_state(state)
    assert before.changed() is None


# ------------------------------------------------------------- which bytes are kept


def test_a_small_view_of_a_large_buffer_costs_its_own_size() -> None:
    buffer = torch.arange(1_000_000.0)
    view = buffer[500:510]

    (span,) = pickle_state({"view": view}).spans

    assert span == Span(buffer.untyped_storage(), 2000, 40)


def test_a_tensor_without_elements_costs_nothing() -> None:
    buffer = torch.arange(1000.0)
    columns = buffer.view(10, 100)[:, 5:5]
    empty = [buffer[:0], buffer[7:7], torch.empty(0), columns]
    pickled = pickle_state([*empty, columns.as_subclass(states.Own)])
    assert sum(span.nbytes for span in pickled.spans) == 0


def test_tensors_without_elements_share_a_record_with_others_of_their_storage() -> None:
    buffer = torch.arange(1000.0)
    (only,) = pickle_state({"a": buffer[:0], "b": buffer[7:7]}).spans
    (beside,) = pickle_state([buffer[7:7], buffer[20:25], buffer[90:90]]).spans
    assert only.nbytes == 0
    assert (beside.start, beside.nbytes) == (80, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16])
@pytest.mark.parametrize("is_parameter", [False, True], ids=["tensor", "parameter"])
@pytest.mark.parametrize("kind", [torch.Tensor, states.Own])
def test_a_view_with_attributes_or_of_a_subclass_costs_its_own_size(
    kind: type, dtype: torch.dtype, *, is_parameter: bool
) -> None:
    view = states.data_of(dtype, 12)[4:6].as_subclass(kind)
    if is_parameter:
        view = nn.Parameter(view, requires_grad=False)
    view.note = "kept"

    pickled = pickle_state([view])

    assert [span.nbytes for span in pickled.spans] == [2 * dtype.itemsize]
    assert_same_state(load(file_of(pickled)), [view])


def test_a_reduction_that_gives_other_tensors_each_time_still_loads() -> None:
    buffer = torch.arange(100.0)
    pickled = pickle_state([Fickle(iter([buffer[:3], buffer[50:54]])), buffer[1:2]])
    assert load(file_of(pickled))[0].tolist() == [50, 51, 52, 53]


class Fickle:
    """Is another tensor each time it is reduced."""

    def __init__(self, tensors) -> None:
        self.tensors = tensors

    def __reduce__(self):
        return torch.detach, (next(self.tensors),)


def test_a_reduction_registered_with_copyreg_is_used() -> None:
    class Registered(torch.Tensor):
        pass

    copyreg.pickle(Registered, lambda tensor: (torch.Size, (tuple(tensor.shape),)))
    try:
        data = pickle_state(torch.ones(2, 3).as_subclass(Registered)).data
    finally:
        del copyreg.dispatch_table[Registered]
    assert pickle.loads(data) == torch.Size([2, 3])


def test_torch_warns_of_hooks_that_are_not_saved() -> None:
    tensor = torch.ones(1, requires_grad=True)
    tensor.register_hook(print)
    with pytest.warns(UserWarning, match="backward hook"):
        data = pickle_state([tensor]).data
    tensor._backward_hooks = None
    assert data == pickle_of_torch([tensor])


def test_ranges_that_overlap_are_one_record_and_those_that_touch_are_two() -> None:
    buffer = torch.arange(100, dtype=torch.uint8)
    parts = {"a": buffer[10:20], "b": buffer[15:25], "c": buffer[25:30]}

    spans = pickle_state(parts).spans

    assert [(span.start, span.nbytes) for span in spans] == [(10, 15), (25, 5)]


def test_parts_that_together_overlap_all_of_a_storage_are_saved_as_torch_would() -> (
    None
):
    buffer = torch.arange(10.0)
    parts = {"a": buffer[:6], "b": buffer[4:]}
    assert pickle_state(parts).data == pickle_of_torch(parts)


def test_storages_that_are_whole_stay_whole_beside_one_that_is_cut() -> None:
    whole, buffer = torch.arange(4.0), torch.arange(100.0)

    spans = pickle_state({"part": buffer[3:5], "whole": whole, "row": whole[2:]}).spans

    assert spans == [
        Span(buffer.untyped_storage(), 12, 8),
        Span(whole.untyped_storage(), 0, 16),
    ]


def test_a_storage_that_is_itself_in_the_state_is_saved_whole() -> None:
    buffer = torch.arange(100.0)
    for raw in (buffer._typed_storage(), torch.uint8):
        source = buffer if raw is not torch.uint8 else buffer.view(torch.uint8)
        storage = source.untyped_storage() if raw is torch.uint8 else raw
        (span,) = pickle_state([source[3:5], storage]).spans
        assert is_whole(span)


def test_a_storage_behind_an_unknown_reduction_is_saved_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        values = torch.linspace(0, 1, 10)
        part = torch.quantize_per_tensor(values, 0.1, 0, torch.quint8)[2:4]
        (span,) = pickle_state([part]).spans
    assert is_whole(span)


def test_elements_of_all_sizes_are_aligned_in_a_record_they_share() -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    state = {"byte": raw[13:18], "long": raw.view(torch.uint64)[2:4]}

    (span,) = pickle_state(state).spans

    assert (span.start, span.nbytes) == (8, 24)
    loaded = load(file_of(pickle_state(state)))
    assert loaded["byte"].tolist() == [13, 14, 15, 16, 17]
    assert loaded["long"].view(torch.uint8).tolist() == list(range(16, 32))


def test_the_spans_keep_the_storages_alive() -> None:
    def pickled() -> Pickled:
        return pickle_state({"a": torch.full((4,), 7.0)})

    (span,) = pickled().spans
    assert bytes(span.storage) == bytes(torch.full((4,), 7.0).untyped_storage())


@st.composite
def states_over_buffers(draw: st.DrawFn) -> object:
    """Nested containers of tensors that view a few buffers in any way."""
    dtypes = st.sampled_from(
        [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint16]
    )
    buffers = [
        states.data_of(draw(dtypes), draw(st.integers(0, 40)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    tensors = [
        draw(views(buffer)) for buffer in draw(st.lists(st.sampled_from(buffers)))
    ]
    leaves = st.sampled_from(tensors) if tensors else st.just(torch.ones(1))
    return draw(
        st.recursive(
            leaves | st.integers() | st.text(max_size=3) | st.none(),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.lists(inner, max_size=3).map(tuple)
                | st.dictionaries(st.text(max_size=3), inner, max_size=4)
            ),
            max_leaves=12,
        )
    )


@st.composite
def views(draw: st.DrawFn, buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, a slice of it, any strided view inside of it, or a parameter."""
    room = buffer.numel()
    offset = draw(st.integers(0, room))
    size, stride, last = [], [], offset
    for _ in range(draw(st.integers(0, 3)) if offset < room else 0):
        step = draw(st.integers(0, 4))
        longest = (room - 1 - last) // step + 1 if step else 3
        length = draw(st.integers(0, min(longest, 4)))
        size.append(length)
        stride.append(step)
        last += max(length - 1, 0) * step
    if offset == room:
        size, stride = [0], [1]
    view = draw(
        st.sampled_from(
            [buffer, buffer[offset:], buffer.as_strided(size, stride, offset)]
        )
    )
    if draw(st.booleans()):
        return nn.Parameter(view, requires_grad=False)
    return view


@given(states_over_buffers())
def test_any_views_and_ties_load_as_torch_would_have_saved_them(state: object) -> None:
    pickled = pickle_state(state)

    assert_same_state(load(file_of(pickled)), load(file_of_torch(state)))
    if all(is_whole(span) for span in pickled.spans):
        assert pickled.data == pickle_of_torch(state)


@given(states_over_buffers())
def test_no_byte_of_a_storage_is_kept_twice(state: object) -> None:
    spans = sorted(
        (span.storage._cdata, span.start, span.nbytes)
        for span in pickle_state(state).spans
    )
    for (storage, start, nbytes), (other, next_start, _) in itertools.pairwise(spans):
        assert storage != other or start + nbytes <= next_start


# -------------------------------------------------------------------- what is refused


def test_data_viewed_as_two_dtypes_is_refused_by_both_keys() -> None:
    tensor = torch.arange(4.0)
    state = {"model": {"w": tensor}, "other": [tensor.view(torch.int32)]}

    with pytest.raises(InvalidArgumentError) as raised:
        pickle_state(state)

    assert 'state["model"]["w"] and state["other"][0] view' in str(raised.value)
    assert "torch.float32 and torch.int32" in str(raised.value)
    with pytest.raises(RuntimeError, match="different types"):
        torch.save(state, io.BytesIO())


def test_a_raw_storage_beside_a_tensor_over_it_is_refused_by_both_keys() -> None:
    tensor = torch.arange(4.0)
    with pytest.raises(InvalidArgumentError, match=r'state\["a"\] and state\["b"\]'):
        pickle_state({"a": tensor, "b": tensor.untyped_storage()})


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (lambda: torch.empty(2, dtype=torch.int4), '["key"][1]'),
        (lambda: torch.ones(2, 2).to_mkldnn(), '["key"][1]'),
        (lambda: with_attribute(torch.ones(1)), '["key"][1].hook'),
        (lambda: with_attribute(nn.Parameter(torch.ones(1))), '["key"][1].hook'),
        (lambda: lambda: None, '["key"][1]'),
    ],
    ids=["dtype", "layout", "attribute", "parameter", "function"],
)
def test_what_cannot_be_pickled_is_refused_by_its_key(value, steps: str) -> None:
    state = {"fine": torch.ones(1), "key": [0, value()]}

    with pytest.raises(InvalidArgumentError) as raised:
        pickle_state(state)

    assert str(raised.value).startswith(f"state{steps} cannot be saved: ")
    assert raised.value.__cause__ is not None


def test_a_lack_of_memory_is_not_taken_for_a_refusal() -> None:
    class Greedy:
        def __reduce__(self):
            raise MemoryError

    with pytest.raises(MemoryError):
        pickle_state([Greedy()])


@pytest.mark.parametrize("nbytes_left", [0, 8, 19])
@pytest.mark.parametrize(
    "kind", [torch.Tensor, nn.Parameter, lambda tensor: tensor.as_subclass(states.Own)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint32])
@pytest.mark.parametrize("is_part", [False, True], ids=["whole", "part"])
def test_a_tensor_that_reaches_beyond_its_storage_is_refused_by_its_key(
    kind, dtype: torch.dtype, nbytes_left: int, *, is_part: bool
) -> None:
    buffer = states.data_of(dtype, 5).detach()
    tensor = buffer[2:] if is_part else buffer
    if kind is nn.Parameter:
        tensor = nn.Parameter(tensor, requires_grad=False)
    elif kind is not torch.Tensor:
        tensor = kind(tensor)
    state = {"first": buffer[:2], "model": [torch.ones(1), tensor]}
    pickle_state(state)
    buffer.untyped_storage().resize_(nbytes_left)
    if nbytes_left == 0:
        state["first"] = buffer[:0]

    with pytest.raises(InvalidArgumentError) as raised:
        pickle_state(state)

    assert str(raised.value).startswith(
        'state["model"][1] cannot be saved: its elements end at byte 20 '
        f"of a storage of {nbytes_left} bytes"
    )


def test_tensors_that_lie_within_what_is_left_of_a_storage_are_saved() -> None:
    buffer = torch.arange(10.0)
    state = [buffer[:2], buffer[3:4], buffer[8:8], buffer.view(2, 5)[:, 5:]]
    buffer.untyped_storage().resize_(16)
    assert [span.nbytes for span in pickle_state(state).spans] == [8, 4]
    assert load(file_of(pickle_state(state)))[1].tolist() == [3]
    buffer.untyped_storage().resize_(0)
    assert load(file_of(pickle_state(state[2:])))[1].shape == (2, 0)


def test_a_tensor_on_the_meta_device_needs_no_bytes() -> None:
    buffer = torch.empty(3, device="meta")
    buffer.untyped_storage().resize_(0)
    assert load(file_of(pickle_state([buffer])))[0].shape == (3,)


def test_a_storage_without_bytes_is_refused() -> None:
    storage = torch.empty(3, device="meta").untyped_storage()
    with pytest.raises(InvalidArgumentError, match=r'state\["meta"\]'):
        pickle_state({"meta": storage})


def test_a_fake_tensor_is_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3)
    with pytest.raises(InvalidArgumentError, match=r'state\["fake"\]'):
        pickle_state({"fake": fake})


def test_too_deep_a_nesting_is_refused() -> None:
    state: list[object] = []
    for _ in range(100_000):
        state = [state]
    with pytest.raises(InvalidArgumentError, match="nested too deeply"):
        pickle_state(state)


# ------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
def test_cuda_tensors_are_pickled_as_torch_does_and_stay_where_they_are() -> None:
    weight = torch.arange(12.0, device="cuda").view(3, 4)
    state = {
        "weight": weight,
        "row": weight[1],
        "parameter": nn.Parameter(weight + 1),
        "cpu": torch.ones(2),
    }

    pickled = pickle_state(state)

    assert pickled.data == pickle_of_torch(state)
    assert [span.storage.device.type for span in pickled.spans] == [
        "cuda",
        "cuda",
        "cpu",
    ]


# ---------------------------------------------------------------------------- helpers


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.hook = lambda: None
    return tensor


def all_of_it_referred_to(state: states.State) -> states.State:
    """The state with the storages of its tensors beside it: nothing is cut then."""
    storages = []
    tensors = capture(state).tensors
    for tensor in [*tensors, *(part for whole in tensors for part in _parts(whole))]:
        try:
            storage = tensor.untyped_storage()
            storage.data_ptr()
        except (RuntimeError, ValueError):  # sparse, wrapper, uninitialised
            continue
        if tensor.is_meta:
            continue
        is_untyped = tensor.dtype in torch.storage._new_dtypes()
        storages.append(storage if is_untyped else tensor._typed_storage())
    return {"storages": storages, **state}


def is_whole(span: Span) -> bool:
    return span.start == 0 and span.nbytes == span.storage.nbytes()


def file_of(pickled: Pickled) -> io.BytesIO:
    """The file that torch's own writer makes of the records."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    writer.write_record("data.pkl", pickled.data, len(pickled.data))
    writer.write_record(".format_version", "1", 1)
    writer.write_record("byteorder", "little", 6)
    for number, span in enumerate(pickled.spans):
        data = bytes(span.storage)[span.start : span.start + span.nbytes]
        writer.write_record(f"data/{number}", data, span.nbytes)
    writer.write_end_of_file()
    file.seek(0)
    return file


def file_of_torch(state: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def pickle_of_torch(state: object) -> bytes:
    with zipfile.ZipFile(file_of_torch(state)) as archive:
        return archive.read("archive/data.pkl")


def load(file: io.BytesIO) -> states.State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors, typed storage
        return torch.load(file, weights_only=False)
