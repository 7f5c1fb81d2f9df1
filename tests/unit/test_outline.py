import io
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict, defaultdict
from typing import Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._weights_only_unpickler import Unpickler

from aiockpt.errors import CorruptCheckpointError
from aiockpt.outline import (
    Call,
    Global,
    StorageOutline,
    TensorOutline,
    emit,
    is_tensor,
    leaves,
    outline,
    storage_keys,
    tensors_in,
)


def torch_pickle(obj: object, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, pickle_protocol=protocol)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def made_by_torch(data: bytes) -> object:
    """Unpickles with storages of the right length and undefined contents."""

    def load(pid: tuple[object, ...]) -> torch.TypedStorage:
        _, kind, _, _, numel = pid
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        storage = torch.zeros(numel * dtype.itemsize, dtype=torch.uint8)
        return torch.TypedStorage(
            wrap_storage=storage.untyped_storage(), dtype=dtype, _internal=True
        )

    unpickler = Unpickler(io.BytesIO(data), encoding="utf-8")
    unpickler.persistent_load = load
    return unpickler.load()


atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(1 << 3000), max_value=1 << 3000)
    | st.floats(allow_nan=False)
    | st.text()
)
keys = st.text() | st.integers() | st.tuples(st.text(), st.integers())


def containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner)


@given(st.recursive(atoms, containers), st.integers(2, 5))
def test_plain_values_are_what_they_are(obj, protocol):
    data = pickle.dumps(obj, protocol)
    assert outline(data) == obj
    assert pickle.loads(emit(outline(data), like=data)) == obj


@given(
    st.recursive(
        atoms | st.binary() | st.binary().map(bytearray) | st.frozensets(keys),
        lambda inner: containers(inner) | st.sets(keys),
    ),
    st.integers(4, 5),
)
def test_plain_values_of_later_protocols_are_what_they_are(obj, protocol):
    data = pickle.dumps(obj, protocol)
    made = pickle.loads(emit(outline(data), like=data))
    assert made == obj
    if protocol == 5:
        assert outline(data) == obj


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_long_values_are_what_they_are(protocol):
    obj = {"a" * 70_000: ["b" * 300] * 1200, "tuple": tuple(range(1500))}
    data = pickle.dumps(obj, protocol)
    assert outline(data) == obj
    assert pickle.loads(emit(outline(data), like=data)) == obj


def test_what_is_shared_stays_shared():
    inner = ["x"]
    data = pickle.dumps({"a": inner, "b": (inner, inner)}, 2)
    for made in (outline(data), pickle.loads(emit(outline(data), like=data))):
        assert made["a"] is made["b"][0] is made["b"][1]


def test_what_contains_itself_is_made_and_emitted_as_such():
    loop: list[object] = []
    loop.append(loop)
    data = pickle.dumps(loop, 2)
    made = outline(data)
    assert made[0] is made
    again = pickle.loads(emit(made, like=data))
    assert again[0] is again


class Left:
    """A class that pickle finds, with a class in it that protocol 2 cannot name."""

    class Inner:
        pass

    def __init__(self) -> None:
        self.value = 1


class Items(dict):
    pass


class Listed(list):
    pass


class New:
    def __new__(cls, *, size: int) -> Self:
        made = super().__new__(cls)
        made.size = size
        return made

    def __getnewargs_ex__(self):
        return (), {"size": self.size}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_are_emitted_as_they_were(protocol):
    items, listed, left = Items(a=1), Listed([1, 2]), Left()
    items.note = left
    obj = [items, listed, left, New(size=3), left, defaultdict(list, a=[1]), 1j]
    data = pickle.dumps(obj, protocol)
    made = pickle.loads(emit(outline(data), like=data))
    assert made[0] == items
    assert made[0].note is made[2] is made[4]
    assert (made[1], made[3].size, made[5:]) == (listed, 3, obj[5:])


@pytest.mark.parametrize("protocol", [4, 5])
def test_classes_in_classes_are_named_as_later_protocols_name_them(protocol):
    data = pickle.dumps(Left.Inner, protocol)
    assert outline(data).name == f"{__name__}.Left.Inner"
    assert pickle.loads(emit(outline(data), like=data)) is Left.Inner


def test_an_object_keeps_every_state_it_was_given():
    node = outline(b"\x80\x02cm\nC\n)R}b]b.")
    assert node.states == [{}, []]


def test_a_part_is_emitted_without_the_rest():
    data = pickle.dumps({"keep": [1, {"x": 2}], "drop": Left()}, 2)
    part = emit({"only": outline(data)["keep"]}, like=data)
    assert pickle.loads(part) == {"only": [1, {"x": 2}]}
    assert b"Left" not in part


def test_substitutes_stand_in_for_nodes():
    root = outline(torch_pickle({"a": torch.ones(2), "b": [torch.ones(3)]}))
    data = emit(root, like=b"", substitutes={id(root["a"]): 0, id(root["b"][0]): 7})
    unpickler = Unpickler(io.BytesIO(data), encoding="utf-8")
    unpickler.persistent_load = lambda pid: ("stand-in", pid)
    assert unpickler.load() == {"a": ("stand-in", 0), "b": [("stand-in", 7)]}


def test_nothing_is_imported_and_nothing_is_called(tmp_path):
    trace = tmp_path / "ran"
    before = set(sys.modules)
    for data, name in [
        (
            b"\x80\x02cnot_there.at_all\nmake\n" + text(str(trace)) + b"\x85R.",
            "not_there.at_all.make",
        ),
        (
            b"\x80\x04" + text("posix") + text("system") + pickle.STACK_GLOBAL
            + text(f"touch {trace}") + b"\x85R.",
            "posix.system",
        ),
        (b"\x80\x02cpathlib\nPath\n" + text(str(trace)) + b"\x85\x81.", "pathlib.Path"),
    ]:  # fmt: skip
        node = outline(data)
        assert isinstance(node, Call)
        assert node.name == name
        list(leaves(node))
        emit(node, like=data)
    assert not trace.exists()
    assert set(sys.modules) == before


def test_globals_are_named_as_python_3_names_them():
    assert outline(b"\x80\x02c__builtin__\nset\n.").name == "builtins.set"
    assert outline(b"\x80\x02ccopy_reg\n_reconstructor\n.").name == (
        "copyreg._reconstructor"
    )
    assert outline(b"\x80\x02cmine\nThing\n.") == Global("mine", "Thing")


# --- tensors ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8,
        torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16,
        torch.uint32, torch.uint64, torch.bool, torch.complex32, torch.complex64,
        torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (1,)])
def test_a_tensor_is_described_as_torch_describes_it(dtype, shape):
    tensor = torch.empty(shape, dtype=dtype)
    node = outline(torch_pickle(tensor))
    assert isinstance(node, TensorOutline)
    assert (node.dtype, node.shape, node.stride) == (dtype, shape, tensor.stride())
    assert (node.offset, node.nbytes, node.device) == (0, tensor.nbytes, "cpu")
    assert (node.storage_key, node.storage_nbytes) == ("0", tensor.nbytes)
    assert node.stop_bytes == tensor.nbytes
    assert node.is_strided
    assert not node.requires_grad


def test_a_view_is_described_with_its_place_in_the_storage():
    base = torch.arange(24.0).reshape(4, 6)
    node = outline(torch_pickle(base[1:3, ::2].T))
    assert (node.shape, node.stride, node.offset) == ((3, 2), (2, 6), 6)
    assert (node.nbytes, node.storage_nbytes) == (24, 96)
    assert node.stop_bytes == (6 + 2 * 2 + 6 + 1) * 4


@pytest.mark.parametrize(
    ("tensor", "is_strided"),
    [
        (torch.nn.Parameter(torch.ones(2)), True),
        (torch.ones(2, requires_grad=True), True),
        (torch.ones(2, dtype=torch.complex64).conj(), False),
        (torch.ones(2, dtype=torch.complex64).conj().imag, False),
    ],
)
def test_gradients_and_lazy_bits_are_told(tensor, is_strided):
    node = outline(torch_pickle(tensor))
    assert node.requires_grad == tensor.requires_grad
    assert node.is_strided is is_strided


def test_a_meta_tensor_has_no_storage():
    node = outline(torch_pickle(torch.empty(2, 3, device="meta")))
    assert (node.shape, node.storage_key, node.nbytes) == ((2, 3), None, 0)
    assert node.device == "meta"


class Tagged(torch.Tensor):
    pass


def test_a_subclass_is_described_by_its_data():
    tensor = torch.ones(2).as_subclass(Tagged)
    tensor.tag = torch.ones(3)
    node = outline(torch_pickle(tensor))
    assert isinstance(node, TensorOutline)
    assert not node.is_strided
    assert storage_keys(node) == ["0", "1"]


def test_tensors_of_several_parts_are_calls_with_tensors_in_them():
    node = outline(torch_pickle(torch.eye(3).to_sparse()))
    assert is_tensor(node)
    assert isinstance(node, Call)
    assert [part.dtype for part in tensors_in(node)] == [torch.int64, torch.float32]
    assert storage_keys(node) == ["0", "1"]


def test_a_storage_by_itself_is_described():
    node = outline(torch_pickle(torch.ones(3).untyped_storage()))
    assert isinstance(node, StorageOutline)
    assert (node.key, node.dtype, node.nbytes) == ("0", torch.uint8, 12)
    assert not is_tensor(node)


def test_every_tensor_can_be_made_from_what_is_emitted():
    shared = torch.ones(3)
    state = OrderedDict(
        w=torch.nn.Parameter(torch.ones(2, 3)), a=shared, b=shared[1:], n=1
    )
    state._metadata = {"version": 1}
    data = torch_pickle({"model": state, "size": torch.Size([1]), "u": {1, 2}})
    made = made_by_torch(emit(outline(data), like=data))
    assert list(made["model"]) == ["w", "a", "b", "n"]
    assert made["model"]._metadata == {"version": 1}
    assert isinstance(made["model"]["w"], torch.nn.Parameter)
    assert made["model"]["b"].shape == (2,)
    assert (made["size"], made["u"]) == (torch.Size([1]), {1, 2})


@pytest.mark.parametrize(
    "args",
    [
        (1, 2),
        (torch.float32, 0, (2,), (1,), False, OrderedDict()),
        (0, 0, (2,), (1,), False, OrderedDict()),
    ],
)
def test_a_rebuild_with_arguments_of_another_kind_stays_a_call(args):
    class Odd:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, args

    assert isinstance(outline(pickle.dumps(Odd(), 2)), Call)


def test_a_shape_that_torch_cannot_have_stays_a_call():
    data = torch_pickle(torch.ones(2, 3))
    two_three = b"K\x02K\x03\x86"
    assert data.count(two_three) == 1
    for shape in (
        b"J\xff\xff\xff\xffK\x03\x86",
        b"\x8a\x09" + b"\0" * 8 + b"\1K\x03\x86",
    ):
        node = outline(data.replace(two_three, shape))
        assert isinstance(node, Call)


# --- key paths --------------------------------------------------------------------


def test_leaves_are_named_by_their_way_from_the_root():
    obj = {
        "model": OrderedDict([("layers.0.w", torch.ones(1)), ("empty", OrderedDict())]),
        "opt": {"state": {0: {"step": 1.5}}, "groups": [{"lr": 0.1, "params": [0, 1]}]},
        "pair": (None, True),
        ("odd", 1): "key",
        "default": defaultdict(list, x=[2]),
    }
    found = {leaf.key: leaf.node for leaf in leaves(outline(torch_pickle(obj)))}
    assert list(found) == [
        "model.layers.0.w", "opt.state.0.step", "opt.groups.0.lr",
        "opt.groups.0.params.0", "opt.groups.0.params.1", "pair.0", "pair.1",
        "('odd', 1)", "default.x.0",
    ]  # fmt: skip
    assert found["opt.state.0.step"] == 1.5
    assert isinstance(found["model.layers.0.w"], TensorOutline)


def test_a_root_that_is_a_leaf_has_an_empty_key():
    assert [leaf.key for leaf in leaves(outline(torch_pickle(torch.ones(1))))] == [""]


# --- hostile pickles --------------------------------------------------------------

GOOD = torch_pickle(
    {"w": torch.nn.Parameter(torch.ones(2)), "n": [1, 2.5, "x", None], "o": Left()}
)


def test_a_pickle_cut_off_anywhere_is_corrupt():
    for length in range(len(GOOD)):
        with pytest.raises(CorruptCheckpointError):
            outline(GOOD[:length])


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_changed_byte_is_read_or_refused(at, value):
    data = bytearray(GOOD)
    data[at] = value
    read_or_refuse(bytes(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    read_or_refuse(b"\x80\x02" + data)


OPCODES = [
    getattr(pickle, name) for name in dir(pickle)
    if name.isupper() and isinstance(getattr(pickle, name), bytes)
]  # fmt: skip


@given(st.lists(st.sampled_from(OPCODES) | st.binary(max_size=3), max_size=60))
def test_any_opcodes_are_read_or_refused(parts):
    read_or_refuse(b"".join(parts) + b".")


def read_or_refuse(data: bytes) -> None:
    try:
        root = outline(data)
        list(leaves(root))
        emit(root, like=data)
        storage_keys(root)
    except CorruptCheckpointError:
        pass


LONG = struct.pack("<Q", 1 << 50)


@pytest.mark.parametrize(
    "data",
    [
        pickle.BINBYTES8 + LONG,
        pickle.BYTEARRAY8 + LONG,
        pickle.BINUNICODE8 + LONG,
        pickle.BINUNICODE + b"\xff\xff\xff\xff",
        pickle.LONG4 + b"\xff\xff\xff\x7f",
        pickle.FRAME + LONG,
        pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f",
    ],
)
def test_declared_lengths_cost_nothing(data):
    tracemalloc.start()
    try:
        read_or_refuse(b"\x80\x04" + data + b".")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"hello",
        b"I1\n.",
        pickle.EXT1 + b"\1.",
        pickle.EXT4 + b"\1\0\0\0.",
        pickle.INST + b"os\nsystem\n.",
        pickle.NEXT_BUFFER + b".",
        b"K\1Q.",
        b"K\1)R.",
        b"K\1K\2b.",
        b"K\1K\2a.",
        b"]K\1K\2s.",
        b"}]K\1s.",
        b"}(K\1u.",
        b"cos\nsy",
        text("a\nb") + text("c") + pickle.STACK_GLOBAL + b".",
        b"(" + text("storage") + b"K\1K\2K\3K\4tQ.",
    ],
)
def test_what_is_no_checkpoint_pickle_is_refused(data):
    with pytest.raises(CorruptCheckpointError):
        outline(data)


def test_registered_extensions_are_not_looked_up():
    import copyreg

    copyreg.add_extension("posix", "system", 0xE7)
    try:
        with pytest.raises(CorruptCheckpointError):
            outline(pickle.EXT1 + b"\xe7.")
    finally:
        copyreg.remove_extension("posix", "system", 0xE7)


def laughs(levels: int) -> bytes:
    """A list of twice a list of twice a list ...: 2**levels ways to the bottom."""
    data = b"]K\1a" + pickle.BINPUT + b"\0"
    for level in range(1, levels):
        put, get = pickle.BINPUT + bytes([level]), pickle.BINGET + bytes([level - 1])
        data += b"0](" + get * 2 + b"e" + put
    return b"\x80\x02" + data + b"."


def test_a_pickle_of_endlessly_many_paths_is_refused():
    root = outline(laughs(100))
    assert storage_keys(root) == []
    with pytest.raises(CorruptCheckpointError, match="beyond all measure"):
        for _ in leaves(root):
            pass


def test_a_way_back_to_where_it_came_from_is_not_followed():
    loop: list[object] = [1]
    loop.append({"loop": loop, "n": 2})
    both = [loop, loop]
    found = [leaf.key for leaf in leaves(outline(pickle.dumps(both, 2)))]
    assert found == ["0.0", "0.1.n", "1.0", "1.1.n"]


def test_depth_is_survived():
    deep = outline(b"\x80\x02)" + b"\x85" * 200_000 + b".")
    assert storage_keys(deep) == []
    for use in (lambda: emit(deep, like=b""), lambda: list(leaves(deep))):
        with pytest.raises(CorruptCheckpointError):
            use()


def test_a_key_that_takes_forever_to_hash_is_refused():
    shared = b"K\1" + pickle.BINPUT + b"\0"
    for level in range(1, 90):
        put, get = pickle.BINPUT + bytes([level]), pickle.BINGET + bytes([level - 1])
        shared += b"0" + get * 2 + b"\x86" + put
    with pytest.raises(CorruptCheckpointError, match="too many parts"):
        outline(b"\x80\x02" + shared + b"0}" + pickle.BINGET + b"\x59K\1s.")
    with pytest.raises(CorruptCheckpointError, match="too many parts"):
        outline(b"\x80\x02})" + b"\x85" * 200_000 + b"K\1s.")


def test_sizes_of_endless_products_are_not_multiplied():
    data = torch_pickle(torch.ones(2, 3))
    many = b"(" + b"M\xff\xff" * 100_000 + b"t"
    for sizes in (b"K\x02K\x03\x86", b"K\x03K\x01\x86"):
        assert data.count(sizes) == 1
        data = data.replace(sizes, many)
    assert isinstance(outline(data), Call)
