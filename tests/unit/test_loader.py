import glob
import io
import os
import pickle
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

import states
from aiockpt import sync
from aiockpt.config import EngineConfig
from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidArgumentError,
    UnsafePickleError,
)
from aiockpt.formats.zip_directory import parse_directory
from aiockpt.formats.zip_end import find_directory
from aiockpt.loader import LoadOptions, inspect_file
from aiockpt.loading.placing import Placement
from aiockpt.loading.plain_unpickling import NotPlainError, unpickle_plain
from aiockpt.loading.reading import read_storage
from aiockpt.loading.storages import StorageLoader
from aiockpt.loading.torch_file import TorchFile
from aiockpt.loading.unpickling import Unpickling
from aiockpt.machinery import Machinery
from aiockpt.outline import emit, outline
from equality import assert_same_state


class PlainFile:
    """What the loader asks of an open file, and a note of what it read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._descriptor = os.open(path, os.O_RDONLY)
        self.nbytes = os.fstat(self._descriptor).st_size
        self.reads: list[tuple[int, int]] = []
        self.blocks: list[tuple[int, int]] = []

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reads.append((offset, len(view)))
        while view:
            num_read = os.preadv(self._descriptor, [view], offset)
            if num_read == 0:
                raise CorruptCheckpointError("ends early", path=self.path)
            view, offset = view[num_read:], offset + num_read

    def read_block(self, offset: int, view: memoryview) -> None:
        assert offset % 4096 == 0
        assert len(view) % 4096 == 0
        self.blocks.append((offset, min(len(view), self.nbytes - offset)))
        self.read_into(offset, view[: self.nbytes - offset])

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@contextmanager
def opened(path: Path) -> Iterator[PlainFile]:
    file = PlainFile(path)
    try:
        yield file
    finally:
        file.close()


class Threads:
    """What loads and verifies open files, and closes them."""

    def __init__(self) -> None:
        self._machinery = Machinery(EngineConfig(host_cache_size=0.0625))
        self._loader = self._machinery.loader

    def load(self, file: PlainFile, **options: object) -> object:
        work = self._loader.load(lambda: (file, None), LoadOptions(**options))
        return self._machinery.spawn(work).result()

    def verify(
        self, file: PlainFile, progress: Callable[[int], None] | None = None
    ) -> int:
        work = self._loader.verify(lambda: (file, None), progress)
        return self._machinery.spawn(work).result()

    def close(self) -> None:
        self._machinery.stop()
        self._machinery.join()


def load_opened(file: PlainFile, **options: object) -> object:
    """What a load makes of a file that is watched; closes it."""
    with closing(Threads()) as threads:
        return threads.load(file, **options)


def load(path: Path, **options: object) -> object:
    return sync.load(path, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.pt"


@dataclass
class Thing:
    parts: object


def is_mapped(address: int) -> bool:
    """Whether any memory of this process is at the address."""
    with open("/proc/self/maps") as maps:
        spans = (line.split()[0].split("-") for line in maps)
        return any(int(a, 16) <= address < int(b, 16) for a, b in spans)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def tied() -> dict[str, Tensor]:
    weight = torch.ones(2, 3)
    return {"a": weight, "b": weight, "c": weight.view(-1)}


def optimizer_state() -> dict[str, object]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


EVERY_STATE = pytest.mark.parametrize("name", states.ALL_STATES)
SAFE_STATES = sorted(states.ALL_STATES.keys() - states.UNSAFE_STATES)

pytestmark = [
    # What torch says when such tensors are made, whoever makes them.
    pytest.mark.filterwarnings("ignore:Sparse (CS|BS)[RC] tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:.*quantize.*"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]


# --- the same as torch.load -------------------------------------------------------


@EVERY_STATE
@pytest.mark.parametrize("mmap", [False, True])
def test_every_state_loads_as_torch_loads_it(name, mmap, path):
    torch.save(states.ALL_STATES[name](), path)
    theirs = torch.load(path, weights_only=False)
    assert_same_state(load(path, weights_only=False, mmap=mmap), theirs)
    if name in SAFE_STATES:
        assert_same_state(load(path, mmap=mmap), theirs)
    else:
        with pytest.raises(UnsafePickleError):
            load(path, mmap=mmap)


@EVERY_STATE
def test_every_tensor_can_be_chosen_by_its_key_path(name, path):
    torch.save(states.ALL_STATES[name](), path)
    theirs = dict(tensors_in("", torch.load(path, weights_only=False)))
    ours = load(path, weights_only=False, keys=["*"] if theirs else [])
    assert_same_state(ours, {key: theirs[key] for key in ours})
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        found = load(path, weights_only=False, keys=[glob.escape(key)])
        assert_same_state(found, {key: tensor})


def tensors_in(
    key: str, node: object, parents: tuple[object, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested builtin containers, by key path."""
    items: list[tuple[object, object]] = []
    if isinstance(node, Tensor) and not isinstance(node, UninitializedParameter):
        yield key, node
    elif isinstance(node, dict):
        items = [*node.items()]
    elif type(node) in (list, tuple, states.ListWithName, deque):
        items = [*enumerate(node)]
    for name, child in items:
        is_plain = isinstance(name, str | int | tuple)
        segment = name if is_plain else "<Call>"
        if not any(child is parent for parent in (*parents, node)):
            path = f"{key}.{segment}" if key else f"{segment}"
            yield from tensors_in(path, child, (*parents, node))


@EVERY_STATE
def test_a_pickle_that_is_emitted_anew_makes_the_same(name, path):
    torch.save(states.ALL_STATES[name](), path)
    with opened(path) as file:
        records = TorchFile(file)
        data = records.read("data.pkl")
        storages = StorageLoader(records, partial(read_storage, file), Placement(None))
        unpickling = Unpickling(str(path), weights_only=False, map_location=None)
        made = unpickling.run(emit(outline(data), like=data), storages)
    assert_same_state(made, torch.load(path, weights_only=False))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_pickle_protocols_load(protocol, path):
    state = optimizer_state() | {"bytes": b"x" * 300}
    torch.save(state, path, pickle_protocol=protocol)
    assert_same_state(load(path, weights_only=False), state)
    some = load(path, weights_only=False, keys=["model.*"])
    assert_same_state([*some.values()], [*state["model"].values()])


def test_a_whole_module_loads_when_trusted(path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), path)
    ours, theirs = load(path, weights_only=False), torch.load(path, weights_only=False)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_what_is_shared_is_read_once(path):
    weight = torch.arange(5000.0)
    torch.save(
        [weight, weight.view(50, 100), weight[7:], weight._typed_storage()], path
    )
    with opened(path) as file:
        made = load_opened(file)
        assert sum(size for _, size in file.blocks) == file.nbytes
    made[0][7] = -1
    assert made[1][0, 7] == made[2][0] == made[3][7] == -1


PLAIN_STATES = [
    "tied", "optimizer_state", "module_state_dict", "inference",
    "ordered_dict", "strides", "nested_containers", "sizes", "empty", "gradients",
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN_STATES)
def test_what_most_checkpoints_hold_does_not_need_torchs_slow_unpickler(
    name, path, monkeypatch
):
    state = states.ALL_STATES[name]()
    torch.save(state, path)
    monkeypatch.setattr(
        "aiockpt.loading.unpickling._RestrictedUnpickler", lambda *_, **__: 1 / 0
    )
    assert_same_state(load(path), torch.load(path))


@pytest.mark.parametrize(
    "leaked",
    [
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
    ],
)
def test_a_class_by_itself_is_what_torch_makes_of_it(leaked, path):
    zip_file(path, b"\x80\x02" + leaked + b".")
    try:
        expected = torch.load(path)
    except pickle.UnpicklingError:
        with pytest.raises(UnsafePickleError):
            load(path)
    else:
        assert load(path) is expected


def test_a_storage_that_was_saved_twice_is_one_object(path):
    storage = torch.arange(3.0).untyped_storage()
    torch.save({"a": storage, "b": storage}, path)
    made = load(path)
    assert made["a"] is made["b"]


@pytest.mark.leaks("gloo keeps its event loop's descriptors")
def test_a_distributed_tensor_loads(path):
    from torch import distributed
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        one, two = (
            DTensor.from_local(torch.arange(4.0) + n, mesh, [Shard(0)]) for n in (0, 9)
        )
        torch.save({"one": one, "two": two}, path)
        made = load(path)
        assert torch.equal(made["two"].to_local(), two.to_local())
        only = load(path, keys=["two"])
        assert torch.equal(only["two"].to_local(), two.to_local())
        assert only["two"].placements == (Shard(0),)
        targets = {"one": torch.zeros_like(one), "two": torch.zeros_like(two)}
        load(path, into=targets)
        assert torch.equal(targets["one"].to_local(), one.to_local())
    finally:
        distributed.destroy_process_group()


def test_loaded_memory_is_ordinary_memory(path):
    torch.save({"small": torch.ones(4), "large": torch.ones(3 << 20)}, path)
    for tensor in load(path).values():
        assert tensor.data_ptr() % 64 == 0
        tensor.add_(1).share_memory_()
        assert torch.save(tensor, io.BytesIO()) is None
        tensor.set_(torch.zeros(9))


def test_the_memory_of_a_large_tensor_goes_with_it(path):
    torch.save({"a": torch.ones(3 << 20), "b": torch.ones(3 << 20)}, path)
    made = load(path)
    address = made["b"].data_ptr()
    assert is_mapped(address)
    del made["b"]
    assert not is_mapped(address)


def test_a_file_larger_than_a_block_loads(path):
    state = {"a": torch.randn(3 << 20), "b": torch.arange(5)}
    torch.save(state, path)
    made = load(path)
    assert all(torch.equal(made[key], state[key]) for key in state)


@pytest.mark.parametrize("verify", [True, False])
def test_every_byte_is_read_once(path, verify):
    torch.save({"a": torch.ones(3 << 20), "b": torch.ones(2000)}, path)
    with opened(path) as file:
        load_opened(file, verify=verify)
        blocks = sorted(file.blocks)
        nbytes = file.nbytes
    # Neighbours may share the block of 4096 bytes in which one ends.
    assert sum(size for _, size in blocks) <= nbytes + 4096 * len(blocks)
    assert all(
        offset + size >= after for (offset, size), (after, _) in pairwise(blocks)
    )


# --- map_location -----------------------------------------------------------------


def to_meta(storage, location):
    assert location == "cpu"
    return torch.UntypedStorage(storage.nbytes(), device="meta")


@pytest.mark.parametrize(
    "map_location",
    [
        None, "cpu", torch.device("cpu"), {"cpu": "cpu"}, {"cuda:0": "cpu"}, {},
        lambda storage, location: storage, lambda storage, location: None,
        "meta", torch.device("meta"), {"cpu": "meta"}, to_meta,
    ],
)  # fmt: skip
def test_map_location_means_what_it_means_to_torch(map_location, path):
    torch.save(optimizer_state(), path)
    theirs = torch.load(path, map_location=map_location)
    assert_same_state(load(path, map_location=map_location), theirs)


def test_a_location_function_sees_the_data_and_may_raise(path):
    torch.save(torch.ones(2), path)

    def refuse(storage, location):
        assert bytes(storage) == raw(torch.ones(2))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        load(path, map_location=refuse)


def test_meta_reads_no_tensor_and_tells_where_it_stands(path):
    torch.save({"a": torch.ones(50_000), "b": torch.ones(7)}, path)
    with opened(path) as file:
        state = load_opened(file, map_location="meta")
        assert max(size for _, size in file.reads) <= 70_000
        assert sum(size for _, size in file.reads) < 100_000
    theirs = torch.load(path, map_location="meta")
    for key, tensor in state.items():
        offset = theirs[key].untyped_storage()._checkpoint_offset
        assert tensor.untyped_storage()._checkpoint_offset == offset


def test_wrappers_learn_the_map_location(path):
    torch.save(torch.ones(2), path)
    seen = []

    def look(storage, location):
        seen.append(torch.serialization._serialization_tls.map_location)
        return storage

    load(path, map_location=look)
    assert seen == [look]
    assert torch.serialization._serialization_tls.map_location is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused_by_name(path):
    torch.save(torch.ones(2), path)
    with pytest.raises(InvalidArgumentError, match="cuda:3"):
        load(path, map_location="cuda:3")


def test_a_map_location_of_another_type_is_refused(path):
    torch.save(torch.ones(2), path)
    with pytest.raises(InvalidArgumentError, match="int"):
        load(path, map_location=3)


# --- mmap -------------------------------------------------------------------------


def test_a_mapped_file_is_not_read_and_not_written(path):
    state = {"a": torch.randn(200_000), "b": torch.zeros(5)}
    torch.save(state, path)
    before = path.read_bytes()
    with opened(path) as file:
        mapped = load_opened(file, mmap=True)
        assert sum(size for _, size in file.reads) < 100_000
    assert_same_state(mapped, state)
    mapped["b"].fill_(7)
    assert torch.equal(mapped["b"], torch.full((5,), 7.0))
    assert path.read_bytes() == before


# --- classes that weights_only refuses --------------------------------------------


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("keys", [None, ["*"], ["w"]])
def test_code_in_a_pickle_does_not_run(keys, path, tmp_path):
    trace = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Runs(trace)}, path)
    if keys is None:
        with pytest.raises(UnsafePickleError, match=r"(posix|nt)\.system"):
            load(path)
        with pytest.raises(UnsafePickleError):
            load(path, into={"w": torch.zeros(2)})
    else:
        assert_same_state(load(path, keys=keys), {"w": torch.ones(2)})
    inspect_path(path)
    assert not trace.exists()
    load(path, weights_only=False)
    assert trace.exists()


def test_a_refused_class_is_named_with_both_ways_out(path):
    state = {"w": torch.ones(2), "t": Thing([1])}
    torch.save(state, path)
    with pytest.raises(UnsafePickleError) as caught:
        load(path)
    name = f"{Thing.__module__}.Thing"
    assert caught.value.name == name
    for part in (name, "add_safe_globals", "weights_only=False", str(path)):
        assert part in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).name == name
    with torch.serialization.safe_globals([Thing]):
        assert_same_state(load(path), state)
    assert_same_state(load(path, weights_only=False), state)


def test_a_protocol_that_weights_only_cannot_read_is_refused(path):
    torch.save({"w": torch.ones(2)}, path, pickle_protocol=4)
    with (
        pytest.warns(UserWarning, match="protocol 4"),
        pytest.raises(UnsafePickleError, match="weights_only=False"),
    ):
        load(path)


def test_an_error_of_a_trusted_class_is_its_own(path):
    torch.save(Thing(1), path)
    data = path.read_bytes().replace(b"Thing\n", b"Thong\n")
    path.write_bytes(data)
    with pytest.raises(AttributeError, match="Thong"):
        load(path, weights_only=False, verify=False)


# --- some tensors -----------------------------------------------------------------


def nested_state() -> dict[str, object]:
    return {
        "model": OrderedDict(
            [(f"layers.{n}.{kind}", torch.full((1000 + n,), n + 0.5))
             for n in range(12) for kind in ("weight", "bias")]
        ),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": 4}}},
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 2, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "list": [torch.zeros(1), torch.ones(1)],
        "epoch": 3,
    }  # fmt: skip


@pytest.mark.parametrize("mmap", [False, True])
def test_keys_and_globs_choose_tensors_by_key_path(mmap, path):
    state = nested_state()
    torch.save(state, path)
    model = state["model"]
    found = load(
        path, mmap=mmap, keys=["optimizer.state.0.exp_avg", "model.layers.1.*"]
    )
    assert_same_state(
        found,
        {
            "model.layers.1.weight": model["layers.1.weight"],
            "model.layers.1.bias": model["layers.1.bias"],
            "optimizer.state.0.exp_avg": torch.ones(3),
        },
    )
    every = load(path, mmap=mmap, keys=["*"])
    assert len(every) == len(model) + 7
    for key in ("sparse", "quantized", "nested", "parameter"):
        assert_same_state(every[key], state[key])
    assert_same_state(load(path, keys=["list.1"]), {"list.1": torch.ones(1)})
    assert load(path, keys=[]) == {}


def test_only_what_is_asked_for_is_read(path):
    big = {f"w{n}": torch.full((100_000,), float(n)) for n in range(8)}
    torch.save(big, path)
    with opened(path) as file:
        found = load_opened(file, keys=["w5"])
        assert sum(size for _, size in file.reads) < 400_000 + 100_000
    assert_same_state(found, {"w5": big["w5"]})


def test_a_key_that_is_also_a_glob_is_taken_by_its_name(path):
    torch.save({"a*": torch.ones(1), "ab": torch.ones(2)}, path)
    assert list(load(path, keys=["a*"])) == ["a*"]
    assert list(load(path, keys=["?b"])) == ["ab"]


def test_tensors_chosen_together_still_share_memory(path):
    torch.save({"x": tied(), "y": torch.ones(9)}, path)
    found = load(path, keys=["x.*"])
    assert found["x.a"] is found["x.b"]
    assert found["x.a"].data_ptr() == found["x.c"].data_ptr()


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.layers.1.wieght", "model.layers.1.weight"),
        ("model", "model.*"),
        ("epoch", ""),
        ("model.layers.99.*", ""),
    ],
)
def test_an_unknown_key_is_refused_with_near_ones(key, near, path):
    torch.save(nested_state(), path)
    with pytest.raises(CheckpointNotFoundError) as caught:
        load(path, keys=["list.0", key])
    assert key in str(caught.value)
    assert near in str(caught.value)


@pytest.mark.parametrize("keys", ["model.*", [1]])
def test_keys_that_are_no_list_of_strings_are_refused(keys, path):
    torch.save(nested_state(), path)
    with pytest.raises(InvalidArgumentError):
        load(path, keys=keys)


def test_a_key_path_that_two_tensors_have_is_refused_only_if_asked_for(path):
    torch.save(
        {"a": {"b": torch.ones(1)}, "a.b": torch.ones(2), "c": torch.ones(3)}, path
    )
    assert list(load(path, keys=["c"])) == ["c"]
    with pytest.raises(InvalidArgumentError, match=r"a\.b"):
        load(path, keys=["a.b"])
    assert_same_state(load(path), torch.load(path))


# --- into tensors -----------------------------------------------------------------


def zeroed(state: object) -> object:
    """The same structure with tensors of zeros, and other plain values."""
    if isinstance(state, Tensor) and state.is_quantized:
        return torch.quantize_per_tensor(torch.zeros(4), 0.3, 1, state.dtype)
    if isinstance(state, Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: zeroed(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(zeroed, state))
    return "other"


# Of the rest, some cannot be targets; they have tests of their own.
FILLED_STATES = sorted(
    {*SAFE_STATES}
    - {"strides", "meta", "nested_tensors", "sparse", "quantized", "raw_storages"}
)


@pytest.mark.parametrize("name", FILLED_STATES)
def test_every_state_fills_tensors_in_place(name, path):
    torch.save(states.ALL_STATES[name](), path)
    state, into = torch.load(path), torch.load(path)
    targets = dict(tensors_in("", into))
    for target in targets.values():
        target.data.untyped_storage().fill_(0)
    places = [target.data_ptr() for target in targets.values()]
    made = load(path, into=into)
    assert_same_state(into, state)
    assert places == [target.data_ptr() for target in targets.values()]
    for key, tensor in tensors_in("", made):
        assert tensor is targets[key]


def test_tensors_of_several_parts_fill_their_like(path):
    sparse, plain = torch.eye(3).to_sparse(), torch.arange(4.0)
    quantized = torch.quantize_per_tensor(plain, 0.1, 2, torch.quint8)
    torch.save({"s": sparse, "q": quantized, "csr": torch.eye(3).to_sparse_csr()}, path)
    zeros = torch.zeros(4)
    into = {
        "s": torch.zeros(3, 3).to_sparse(),
        "q": torch.quantize_per_tensor(zeros, 0.3, 1, torch.quint8),
        "csr": (torch.eye(3) * 7).to_sparse_csr(),
    }
    made = load(path, into=into)
    assert all(made[key] is into[key] for key in into)
    assert torch.equal(into["s"].to_dense(), torch.eye(3))
    assert torch.equal(into["csr"].to_dense(), torch.eye(3))
    assert torch.equal(into["q"].dequantize(), quantized.dequantize())


def test_a_copy_that_torch_cannot_make_is_refused_by_name(path):
    torch.save({"csr": torch.eye(3).to_sparse_csr()}, path)
    with pytest.raises(InvalidArgumentError, match="csr"):
        load(path, into={"csr": torch.zeros(3, 3).to_sparse_csr()})


def nested() -> Tensor:
    return states.nested_tensors()["strided"]


@pytest.mark.parametrize(
    ("saved", "target", "reason"),
    [
        (lambda: torch.empty(2, device="meta"), lambda: torch.zeros(2), "without data"),
        (lambda: torch.eye(2), lambda: torch.eye(2).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(2).to_sparse(), lambda: torch.zeros(2, 2), "sparse_coo"),
        (nested, lambda: torch.zeros(2, 2), "nested"),
        (lambda: torch.ones(1, 2), nested, "nested"),
        (lambda: torch.ones(3, 2), lambda: torch.ones(2).expand(3, 2), "share memory"),
    ],
)
def test_what_cannot_fill_or_be_filled_is_refused(saved, target, reason, path):
    torch.save({"key": saved()}, path)
    with pytest.raises(InvalidArgumentError, match=f"key: .*{reason}"):
        load(path, into={"key": target()})


def test_values_that_are_no_tensors_come_back_as_loaded(path):
    state = optimizer_state()
    torch.save(state, path)
    into = zeroed(state)
    made = load(path, into=into)
    assert made["model"]._metadata == state["model"]._metadata
    assert made["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert into["optimizer"]["param_groups"][0]["lr"] == "other"


def test_contiguous_targets_are_filled_by_way_of_the_ring_alone(path):
    large = torch.arange(3 << 20).float()
    torch.save({"a": torch.ones(1000), "b": large}, path)
    base = torch.zeros((3 << 20) + 2000)
    into = {"a": base[500:1500], "b": base[2000:]}
    with (
        opened(path) as file,
        mock.patch("aiockpt.loading.runs.Arena", side_effect=AssertionError),
    ):
        load_opened(file, into=into)
    assert into["a"].eq(1).all()
    assert torch.equal(into["b"], large)
    assert int(base[:500].count_nonzero() + base[1500:2000].count_nonzero()) == 0


def test_tensors_and_targets_of_any_stride_fit(path):
    state = {
        "rows": torch.arange(12.0).view(3, 4),
        "columns": torch.arange(12.0).view(3, 4).T,
        "steps": torch.arange(6.0)[::2],
        "part": torch.arange(6.0)[:3],
        "last": torch.arange(6.0)[3:],
        "lazy": torch.tensor([1 + 2j, 3 - 4j]),
    }
    torch.save(state, path)
    into = {key: torch.zeros_like(state[key]).contiguous() for key in state}
    into["rows"] = torch.zeros(4, 3).T
    into["lazy"] = torch.zeros(2, dtype=torch.complex64).conj()
    load(path, into=into)
    for key, tensor in state.items():
        assert torch.equal(into[key], tensor)


def test_tensors_that_share_a_record_fill_targets_that_do_not(path):
    torch.save(tied(), path)
    into = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3), "c": torch.zeros(6)}
    made = load(path, into=into)
    assert all(tensor.eq(1).all() for tensor in into.values())
    assert made["a"] is made["b"] is into["a"]
    assert made["c"] is into["c"]


def test_filling_counts_as_a_change_in_place(path):
    torch.save({"a": torch.ones(4), "b": torch.ones(2)[1:]}, path)
    into = {"a": torch.zeros(4), "b": torch.nn.Parameter(torch.zeros(1))}
    before = {key: tensor._version for key, tensor in into.items()}
    load(path, into=into)
    assert all(tensor._version > before[key] for key, tensor in into.items())


def test_every_misfit_is_told_at_once_and_nothing_is_changed(path):
    state = {n: torch.ones(3) for n in ("fits", "shape", "dtype", "missing", "wide")}
    torch.save({**state, "meta": torch.ones(3)}, path)
    into = {
        "fits": torch.zeros(3),
        "shape": torch.zeros(4),
        "dtype": torch.zeros(3, dtype=torch.int32),
        "extra": torch.zeros(1),
        "wide": torch.zeros(1).expand(3),
        "meta": torch.zeros(3, device="meta"),
    }
    with pytest.raises(InvalidArgumentError) as caught:
        load(path, into=into)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.strip().split(":")[0] for line in lines) == [
        "dtype", "extra", "meta", "missing", "shape", "wide",
    ]  # fmt: skip
    assert not any(
        tensor.count_nonzero() for tensor in into.values() if not tensor.is_meta
    )


def test_a_class_that_is_refused_leaves_the_targets_alone(path):
    torch.save({"w": torch.ones(2), "t": Thing(1)}, path)
    into = {"w": torch.zeros(2)}
    with pytest.raises(UnsafePickleError):
        load(path, into=into)
    assert torch.equal(into["w"], torch.zeros(2))


def test_keys_fill_only_their_own_targets(path):
    torch.save(nested_state(), path)
    into = {"model": {"layers.1.weight": torch.zeros(1001), "other": torch.zeros(1)}}
    made = load(path, into=into, keys=["model.layers.1.weight"])
    assert list(made) == ["model.layers.1.weight"]
    assert made["model.layers.1.weight"] is into["model"]["layers.1.weight"]
    assert made["model.layers.1.weight"].eq(1.5).all()
    assert load(path, into=into, keys=[]) == {}


def test_mapping_and_filling_exclude_each_other(path):
    torch.save(torch.ones(1), path)
    with pytest.raises(InvalidArgumentError, match="mmap"):
        load(path, into=torch.zeros(1), mmap=True)


def test_targets_may_lead_back_to_themselves(path):
    torch.save({"a": torch.ones(1)}, path)
    into: dict[str, object] = {"a": torch.zeros(1)}
    into["self"] = into
    load(path, into=into)
    assert into["a"] == 1


def test_targets_that_nest_without_end_are_refused(path):
    torch.save({"a": torch.ones(1)}, path)
    into: list[object] = [torch.zeros(1)]
    for _ in range(1000):
        into = [into]
    with pytest.raises(InvalidArgumentError, match="nests"):
        load(path, into=into)


# --- corruption -------------------------------------------------------------------


def small_file(path: Path) -> dict[str, object]:
    state = {"a": torch.arange(7.0), "b": [torch.ones(3, dtype=torch.int8), 5]}
    torch.save(state, path)
    return state


def outcome(use: Callable[[Path], object], path: Path) -> object:
    """What comes of using a file: the result, or the error that it was refused with."""
    try:
        return use(path)
    except CheckpointError as error:
        return error


def test_no_changed_byte_ever_gives_other_data(path):
    state = small_file(path)
    good = path.read_bytes()
    num_refused = 0
    with closing(Threads()) as threads:
        uses = {
            "load": lambda path: threads.load(PlainFile(path)),
            "fill": lambda path: threads.load(PlainFile(path), into=zeroed(state)),
            "inspect": inspect_path,
        }
        for at in range(len(good)):
            data = bytearray(good)
            data[at] ^= 1 << at % 8
            path.write_bytes(data)
            for name, use in uses.items():
                result = outcome(use, path)
                if isinstance(result, CheckpointError):
                    num_refused += 1
                    assert str(path) in str(result)
                elif name != "inspect":
                    assert_same_state(result, state)
            checksum = outcome(threads.verify, PlainFile(path))
            assert isinstance(checksum, CheckpointError) or (
                checksum == zlib.crc32(data) != zlib.crc32(good)
            )
    assert num_refused > 1000


HEADER_USES = {
    "all of it": {},
    "unverified": {"verify": False},
    "by key": {"keys": ["w"]},
    "in place": {"into": {"w": torch.zeros(50)}},
    "mapped": {"mmap": True},
    "without data": {"map_location": "meta"},
}


@pytest.mark.parametrize("use", HEADER_USES)
@pytest.mark.parametrize(
    "field", [8, 26, 28, 40], ids=["method", "name", "extra", "text"]
)
def test_a_local_header_that_disagrees_with_the_directory_is_refused(path, field, use):
    # Readers that believe the one and readers that believe the other see two files.
    torch.save({"w": torch.ones(50)}, path)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("file/data/0").header_offset
    data = bytearray(path.read_bytes())
    data[at + field] ^= 8
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        load(path, **HEADER_USES[use])


def test_a_file_repacked_by_another_writer_loads(path, tmp_path):
    state = {"w": torch.arange(50.0), "n": torch.arange(3)}
    torch.save(state, tmp_path / "theirs.pt")
    with (
        zipfile.ZipFile(tmp_path / "theirs.pt") as theirs,
        zipfile.ZipFile(path, "w") as ours,
    ):
        for info in theirs.infolist():
            ours.writestr(info.filename, theirs.read(info))
    for options in HEADER_USES.values():
        if "into" not in options and "map_location" not in options:
            found = load(path, **options)["w"]
            assert torch.equal(found, state["w"])
            assert found.data_ptr() % 16 == 0 or "mmap" in options
    into = {"w": torch.zeros(50), "n": torch.zeros(3, dtype=torch.int64)}
    load(path, into=into)
    assert_same_state(into, state)


@pytest.mark.parametrize("num_unused", [1, 12, 64, 4096])
def test_unused_bytes_behind_records_are_passed_over(num_unused, path):
    state = {f"w{n}": torch.arange(n * 100.0) for n in range(5)}
    torch.save(state, path)
    path.write_bytes(spread(path.read_bytes(), num_unused))
    assert_same_state(torch.load(path), state)
    for options in ({}, {"keys": ["w3"]}, {"verify": False}, {"mmap": True}):
        found = load(path, **options)
        assert all(torch.equal(found[key], state[key]) for key in found)


def spread(data: bytes, num_unused: int) -> bytes:
    """The zip with bytes that belong to nobody before each local header but the first."""
    span = find_directory(data, len(data))
    entries = parse_directory(data[span.offset :][: span.nbytes], span).entries.values()
    starts = sorted(entry.header_offset for entry in entries)
    moved = {start: start + number * num_unused for number, start in enumerate(starts)}
    body = bytearray()
    for start, stop in pairwise([*starts, span.offset]):
        body += data[start:stop] + b"?" * num_unused
    directory = bytearray(data[span.offset : span.offset + span.nbytes])
    at = 0
    while at < len(directory):
        lengths = struct.unpack_from("<HHH", directory, at + 28)
        (old,) = struct.unpack_from("<I", directory, at + 42)
        struct.pack_into("<I", directory, at + 42, moved[old])
        at += 46 + sum(lengths)
    end = struct.pack(
        "<IHHHHIIH",
        0x06054B50,
        0,
        0,
        len(starts),
        len(starts),
        len(directory),
        len(body),
        0,
    )
    return bytes(body + directory) + end


def test_a_tensor_of_more_dimensions_than_torch_has_is_left_to_torch():
    ones = b"(" + b"K\1" * 65 + b"t"
    data = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage_pid(numel=1)
        + b"K\0" + ones + ones + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip
    storages = mock.Mock()
    storages.untyped.return_value = torch.zeros(1).untyped_storage()
    with pytest.raises(NotPlainError):
        unpickle_plain(data, storages)


def test_no_shorter_file_ever_loads(path):
    small_file(path)
    good = path.read_bytes()
    with closing(Threads()) as threads:
        for length in range(len(good)):
            path.write_bytes(good[:length])
            for use in (threads.load, threads.verify):
                with pytest.raises(CorruptCheckpointError):
                    use(PlainFile(path))
            with pytest.raises(CorruptCheckpointError):
                inspect_path(path)


def inspect_path(path: Path) -> object:
    with opened(path) as file:
        return inspect_file(file)


def verify_path(path: Path, progress: Callable[[int], None] | None = None) -> int:
    with closing(Threads()) as threads:
        return threads.verify(PlainFile(path), progress)


def flip(path: Path, old: bytes, at: int = 0) -> int:
    """Changes a bit in the only place where `old` stands; returns its offset."""
    data = bytearray(path.read_bytes())
    assert data.count(old) == 1
    offset = data.index(old)
    data[offset + at] ^= 0x10
    path.write_bytes(data)
    return offset


def test_a_wrong_byte_is_told_with_file_tensor_and_offset(path):
    state = {"model": {"good": torch.zeros(9), "bad": torch.arange(1, 3_000_000)}}
    torch.save(state, path)
    offset = flip(path, struct.pack("<4q", 2_500_000, 2_500_001, 2_500_002, 2_500_003))
    start = offset - 8 * 2_499_999
    targets = zeroed(state)
    for load_it in (
        load,
        lambda p: load(p, keys=["*.bad"]),
        lambda p: load(p, into=targets),
        verify_path,
    ):
        with pytest.raises(CorruptCheckpointError) as caught:
            load_it(path)
        error = caught.value
        assert (error.path, error.key, error.offset) == (str(path), "model.bad", start)
        for part in (str(path), "model.bad", str(start)):
            assert part in str(error)
    assert load(path, keys=["*.good"])["model.good"].shape == (9,)
    assert load(path, verify=False)["model"]["bad"].shape == (2_999_999,)


def test_a_wrong_pickle_is_not_run(path, tmp_path):
    trace = tmp_path / "ran"
    torch.save({"x": Runs(trace)}, path)
    flip(path, b"touch", at=4)
    with pytest.raises(CorruptCheckpointError, match=r"data\.pkl") as caught:
        load(path, weights_only=False)
    assert caught.value.offset is not None
    assert not trace.exists()
    assert not (tmp_path / "ran").exists()


def test_a_file_without_checksums_loads(path):
    state = optimizer_state()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same_state(load(path), state)
    assert verify_path(path) == zlib.crc32(path.read_bytes())
    assert {record.crc32 for record in inspect_path(path).records} == {None}


# --- hostile and foreign files ----------------------------------------------------

RECORDS = {"version": b"3\n", "byteorder": b"little", "data/0": bytes(8)}


def zip_file(path: Path, data: bytes, records: dict[str, bytes] | None = None) -> None:
    """Writes a torch file with a pickle of our own."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, **RECORDS, **(records or {})}.items():
            archive.writestr(f"archive/{name}", content)


def storage_pid(key: str = "0", numel: int = 2, kind: str = "FloatStorage") -> bytes:
    return (
        b"(X\7\0\0\0storagectorch\n" + kind.encode() + b"\nX"
        + struct.pack("<I", len(key)) + key.encode() + b"X\3\0\0\0cpu"
        + b"\x8a\x08" + struct.pack("<q", numel) + b"tQ"
    )  # fmt: skip


def tensor_pickle(
    pid: bytes, shape: int = 2, stride: int = 1, offset: int = 0
) -> bytes:
    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    return (
        b"\x80\x02}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + pid
        + number(offset) + number(shape) + b"\x85" + number(stride) + b"\x85"
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def test_the_crafted_file_is_a_good_one(path):
    zip_file(path, tensor_pickle(storage_pid()))
    assert_same_state(load(path), {"w": torch.zeros(2)})


@pytest.mark.parametrize(
    "data",
    [
        tensor_pickle(storage_pid(numel=3)),
        tensor_pickle(storage_pid(numel=1 << 60)),
        tensor_pickle(storage_pid(numel=-2)),
        tensor_pickle(storage_pid(key="1")),
        tensor_pickle(storage_pid(key="../version")),
        tensor_pickle(storage_pid(kind="NoStorage")),
        tensor_pickle(storage_pid(), shape=3),
        tensor_pickle(storage_pid(), shape=1 << 40),
        tensor_pickle(storage_pid(), shape=1 << 62),
        tensor_pickle(storage_pid(), shape=-1),
        tensor_pickle(storage_pid(), offset=1),
        tensor_pickle(storage_pid(), stride=1 << 40),
        tensor_pickle(b"K\1Q"),
        b"\x80\x02(X\5\0\0\0otherK\1K\1K\1K\1tQ.",
        b"\x80\x02K\1Q.",
        b"\x80\x02",
        b"",
    ],
)
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_pickle_that_does_not_fit_the_file_is_refused(data, weights_only, path):
    zip_file(path, data)
    targets = {"w": torch.full((2,), 9.0)}
    # A trusted pickle may make its tensors as it likes; what it refers to is checked.
    refused = CheckpointError if weights_only else Exception
    for options in ({}, {"keys": ["w"]}, {"into": targets}):
        try:
            load(path, weights_only=weights_only, **options)
        except refused:
            continue
        assert not weights_only
        assert b"_rebuild_tensor" in data
    assert targets["w"].eq(9).all()


@pytest.mark.parametrize(
    "records",
    [
        {"version": b""},
        {"version": b"x"},
        {"version": b"-1"},
        {"data/0": bytes(7)},
        {"data/0": bytes(9)},
        {"../evil": b"x"},
        {"constants.pkl": b"x"},
    ],
)
def test_records_that_no_checkpoint_has_are_refused(records, path):
    zip_file(path, tensor_pickle(storage_pid()), records)
    with pytest.raises(CorruptCheckpointError):
        load(path)


def test_a_compressed_record_is_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(storage_pid()))
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", bytes(1 << 20))
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        load(path)


def test_a_zip_without_a_pickle_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", b"3\n")
    with pytest.raises(CorruptCheckpointError, match=r"data\.pkl"):
        load(path)


@pytest.mark.parametrize(
    ("records", "hint"),
    [({"version": b"11\n"}, "newer"), ({"byteorder": b"big"}, "big-endian")],
)
def test_a_file_for_another_reader_is_refused_with_a_reason(records, hint, path):
    zip_file(path, tensor_pickle(storage_pid()), records)
    with pytest.raises(InvalidArgumentError, match=hint):
        load(path)


def test_a_torchscript_archive_is_refused_by_name(path):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(1)}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/constants.pkl", b"x")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(CorruptCheckpointError, match="TorchScript"):
        load(path)


def test_the_legacy_format_is_refused_by_name(path):
    torch.save({"w": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    for use in (load, inspect_path, verify_path):
        with pytest.raises(InvalidArgumentError, match=r"before version 1\.6"):
            use(path)


@pytest.mark.parametrize("content", [b"", b"x", bytes(5000), b"PK", b"PK\3\4" * 9])
def test_a_file_that_is_nothing_known_is_refused(content, path):
    path.write_bytes(content)
    for use in (load, inspect_path, verify_path):
        with pytest.raises(CorruptCheckpointError) as caught:
            use(path)
        assert caught.value.path == str(path)


def test_a_failed_load_leaves_nothing_to_the_next(path):
    zip_file(path, tensor_pickle(storage_pid(), shape=3))
    for _ in range(2):
        with pytest.raises(CorruptCheckpointError):
            load(path, map_location=lambda storage, _: storage)
    assert torch.serialization._serialization_tls.map_location is None


def test_a_refused_sparse_tensor_is_not_validated_by_the_next_load(path):
    torch.save([torch.eye(2).to_sparse(), Thing(1)], path)
    with pytest.raises(UnsafePickleError):
        load(path)
    assert torch._utils._sparse_tensors_to_validate == []


def test_sparse_tensors_are_validated_where_torch_is_told_to(path):
    indices, values = torch.tensor([[0, 5]]), torch.ones(2)
    good = torch.sparse_coo_tensor(indices, values, (6,), check_invariants=False)
    torch.save(good, path)
    data = path.read_bytes()
    buffer = struct.pack("<2q", 0, 5)
    assert data.count(buffer) == 1
    path.write_bytes(data.replace(buffer, struct.pack("<2q", 0, 50)))
    load(path, verify=False)
    with torch.sparse.check_sparse_tensor_invariants():
        with pytest.raises((CheckpointError, RuntimeError)):
            load(path, verify=False)


def test_files_load_in_several_threads_at_once(path):
    state = nested_state()
    torch.save(state, path)
    results: list[object] = []

    def run() -> None:
        results.extend(load(path) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        assert_same_state(result, torch.load(path))


# --- safetensors ------------------------------------------------------------------


def safe_state() -> dict[str, Tensor]:
    return {
        "model.w": torch.randn(300, 70),
        "model.b": torch.arange(7, dtype=torch.int16),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
    }


@pytest.fixture
def safe(tmp_path: Path) -> Path:
    # The container is told by its bytes, so the suffix is beside the point.
    path = tmp_path / "file.bin"
    safetensors.torch.save_file(safe_state(), path, {"who": "test"})
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_safetensors_load_as_its_own_library_loads_them(mmap, safe):
    theirs = safetensors.torch.load_file(safe)
    ours = load(safe, mmap=mmap)
    assert ours.keys() == theirs.keys()
    assert_same_state(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    ours["model.w"].fill_(1)
    assert_same_state(load(safe)["model.w"], theirs["model.w"])


@pytest.mark.parametrize("map_location", ["meta", {"cpu": "meta"}, to_meta])
def test_safetensors_go_where_map_location_says(map_location, safe):
    state = load(safe, map_location=map_location)
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert state["model.w"].shape == (300, 70)


def test_safetensors_on_meta_are_not_read(safe):
    with opened(safe) as file:
        load_opened(file, map_location="meta")
        assert sum(size for _, size in file.reads) < 2000


def test_some_safetensors_are_read_alone(safe):
    with opened(safe) as file:
        found = load_opened(file, keys=["model.b", "s*"])
        assert sum(size for _, size in file.blocks) <= 8192
    theirs = safetensors.torch.load_file(safe)
    assert found.keys() == {"model.b", "scalar"}
    assert_same_state(found, {name: theirs[name] for name in found})
    with pytest.raises(CheckpointNotFoundError, match=r"model\.w"):
        load(safe, keys=["model.ww"])


def test_safetensors_fill_tensors_in_place(safe):
    theirs = safetensors.torch.load_file(safe)
    into = zeroed(theirs)
    made = load(safe, into=into)
    assert all(made[name] is into[name] for name in theirs)
    assert_same_state(into, theirs)
    one = {"model": {"b": torch.zeros(7, dtype=torch.int16)}}
    load(safe, into=one, keys=["model.b"])
    assert_same_state(one["model"]["b"], theirs["model.b"])
    with pytest.raises(InvalidArgumentError, match="scalar"):
        load(safe, into={"model.w": torch.zeros(300, 70)})


def test_a_safetensors_file_cut_off_or_extended_is_corrupt(safe):
    good = safe.read_bytes()
    for data in (*(good[:n] for n in range(0, len(good), 1999)), good + b"\0"):
        safe.write_bytes(data)
        for use in (load, inspect_path, verify_path):
            with pytest.raises(CorruptCheckpointError) as caught:
                use(safe)
            assert caught.value.path == str(safe)


# --- inspecting and verifying -----------------------------------------------------


def test_inspecting_tells_tensors_records_and_notes(path):
    shared = torch.arange(10.0)
    torch.save(
        {
            "w": torch.nn.Parameter(torch.ones(2, 3)),
            "tied": [shared, shared[4:]],
            "sparse": torch.eye(3).to_sparse(),
            "meta": torch.empty(5, device="meta"),
            "n": 1,
            "thing": Thing({"inner": torch.ones(1)}),
            "text": "x",
        },
        path,
    )
    with opened(path) as file:
        info = inspect_file(file)
    assert (info.container, info.nbytes) == ("torch", path.stat().st_size)
    rows = [
        (t.key, str(t.dtype), t.shape, t.nbytes, t.record, t.shared_with)
        for t in info.tensors
    ]
    assert rows == [
        ("w", "torch.float32", (2, 3), 24, "data/0", None),
        ("tied.0", "torch.float32", (10,), 40, "data/1", None),
        ("tied.1", "torch.float32", (6,), 24, "data/1", "tied.0"),
        ("sparse#0", "torch.int64", (2, 3), 48, "data/2", None),
        ("sparse#1", "torch.float32", (3,), 12, "data/3", None),
        ("meta", "torch.float32", (5,), 0, None, None),
        ("thing#0", "torch.float32", (1,), 4, "data/4", None),
    ]
    assert info.num_objects == 2
    assert info.metadata["version"] == "3"
    assert info.metadata["byteorder"] == "little"
    data = path.read_bytes()
    assert {record.name for record in info.records} >= {"data.pkl", "data/0"}
    for record in info.records:
        content = data[record.offset : record.offset + record.nbytes]
        assert zlib.crc32(content) == record.crc32


def test_inspecting_reads_no_tensor(path):
    torch.save({f"w{n}": torch.ones(50_000) for n in range(4)}, path)
    with opened(path) as file:
        inspect_file(file)
        assert sum(size for _, size in file.reads) < 100_000


def test_inspecting_safetensors_tells_tensors_and_metadata(safe):
    with opened(safe) as file:
        info = inspect_file(file)
    assert info.container == "safetensors"
    assert info.metadata == {"who": "test"}
    shapes = {t.key: (t.dtype, t.shape) for t in info.tensors}
    state = safe_state()
    assert shapes == {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    assert {t.shared_with for t in info.tensors} == {None}


@pytest.mark.parametrize(
    "data", [tensor_pickle(storage_pid(numel=3)), tensor_pickle(storage_pid(), shape=3)]
)
def test_inspecting_refuses_tensors_that_are_not_in_the_file(data, path):
    zip_file(path, data)
    with pytest.raises(CorruptCheckpointError) as caught:
        inspect_path(path)
    assert caught.value.key == "w"


def test_verifying_reads_everything_once_and_returns_the_checksum(path):
    torch.save(
        {"a": torch.randn(3 << 20), "b": [torch.ones(n) for n in range(50)]}, path
    )
    seen: list[int] = []
    with opened(path) as file, closing(Threads()) as threads:
        checksum = threads.verify(file, seen.append)
        num_read = sum(size for _, size in file.reads)
    assert checksum == zlib.crc32(path.read_bytes())
    assert sum(seen) == path.stat().st_size
    assert len(seen) > 2
    assert num_read < path.stat().st_size + 200_000


def test_verifying_safetensors_returns_the_checksum(safe):
    assert verify_path(safe) == zlib.crc32(safe.read_bytes())


def test_verifying_finds_a_change_in_every_record(path):
    torch.save([torch.full((1 + 700_000 * n,), n + 1.0) for n in range(4)], path)
    good = path.read_bytes()
    for record in inspect_path(path).records:
        for at in {record.offset, record.offset + record.nbytes - 1}:
            data = bytearray(good)
            data[at] ^= 1
            path.write_bytes(data)
            with pytest.raises(CheckpointError):
                verify_path(path)
