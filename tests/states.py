"""A catalogue of states: every kind of value that torch can save, for round trips.

`ALL_STATES` maps a name to a function that builds the state afresh; `dtensors` needs
a process group and stands apart. `assert_same_state` of `equality` compares states.
Classes are defined here, under a name that pickle finds.
"""

import collections
import contextlib
import dataclasses
import enum
import fractions
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

State = dict[str, object]
Builder = Callable[[], State]

REAL_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool,
)  # fmt: skip
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
# These have no storage class of their own: torch writes them as untyped storages.
UNTYPED_DTYPES = (
    torch.complex32,
    torch.uint16, torch.uint32, torch.uint64, torch.bits8,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz,
    *(
        getattr(torch, name)
        for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")
        if hasattr(torch, name)
    ),
)  # fmt: skip

ALL_STATES: dict[str, Builder] = {}

# What torch itself loads only with `weights_only=False`.
UNSAFE_STATES = frozenset(
    {
        "custom_object", "custom_tensor_class", "cycles", "dataclass", "default_dict",
        "deque", "enum_members", "generator", "module", "namedtuple", "numpy",
        "slots_object", "standard_objects", "uninitialised",
    }
)  # fmt: skip


def state(build: Builder) -> Builder:
    """Enters the builder into the catalogue, under its name."""
    ALL_STATES[build.__name__] = build
    return build


def data_of(dtype: torch.dtype, num_elements: int = 6) -> torch.Tensor:
    """A tensor of any dtype with known, mostly different bytes."""
    num_bytes = num_elements * dtype.itemsize
    raw = torch.arange(1, num_bytes + 1, dtype=torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    return raw.view(dtype)


class Colour(enum.Enum):
    """An enumeration."""

    RED = 1
    GREEN = 2


class Point(NamedTuple):
    """A named tuple."""

    x: object
    y: object


@dataclasses.dataclass
class Progress:
    """A dataclass with a tensor inside."""

    step: int
    loss: list[float]
    average: torch.Tensor


@dataclasses.dataclass
class Link:
    """An object that can refer to itself."""

    value: object = None
    others: list[object] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Slotted:
    """An object without a `__dict__`."""

    step: int
    history: list[int]


class Schedule:
    """A scheduler-like object: attributes, a bound function, a tensor."""

    def __init__(self) -> None:
        """Holds mutable things of several kinds."""
        self.last_epoch = 3
        self.rates = [0.1, 0.01]
        self.scale = functools.partial(max, 1)
        self.weights = torch.arange(3.0)

    def __eq__(self, other: object) -> bool:
        """Compares what matters."""
        return isinstance(other, Schedule) and self.rates == other.rates

    __hash__ = None


class ListWithName(list):
    """A list subclass with an attribute."""


class Config(dict):
    """A dict subclass."""


class Own(torch.Tensor):
    """A tensor subclass."""


class SmallNet(nn.Module):
    """A module with a parameter, a buffer, tied weights and a submodule."""

    def __init__(self) -> None:
        """Initialises from a fixed seed."""
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
        self.second.weight = self.first.weight


@state
def plain() -> State:
    """A few tensors and values of all builtin classes."""
    return {
        "weight": torch.arange(12.0).view(3, 4),
        "bias": torch.arange(4, dtype=torch.float64),
        "step": 7,
        "big": 2**70,
        "lr": 1e-3,
        "complex": 1 + 2j,
        "none": None,
        "flag": True,
        "name": "gpt",
        "unicode": "ångström \N{SNOWMAN}",
        "bytes": b"\0\1",
        "bytearray": bytearray(b"abc"),
        "set": {1, 2},
        "tuple": (1, "two", 3.0),
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
    }


@state
def empty() -> State:
    """Nothing at all."""
    return {}


@state
def nested_containers() -> State:
    """Containers in containers."""
    return {
        "model": {"layers": [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]},
        "tuple": (torch.ones(1), [torch.zeros(1), (torch.ones(1),)]),
        "shared": [[1, 2]] * 2,
        1: {("a", 2): torch.ones(3)},
    }


@state
def tied() -> State:
    """One tensor under two keys, and two tensors over one storage."""
    weight = torch.arange(12.0).view(3, 4)
    return {
        "embedding": weight,
        "head": weight,
        "transposed": weight.t(),
        "flat": weight.view(-1),
        "detached": weight.detach(),
        "second_row": weight[1],
    }


@state
def views_of_a_large_buffer() -> State:
    """Small, overlapping, touching and empty parts of a buffer that is not saved."""
    buffer = torch.arange(10_000.0)
    return {
        "small": buffer[100:104],
        "overlapping": buffer[102:110],
        "touching": buffer[110:112],
        "far": buffer[9_990:],
        "column": buffer.view(100, 100)[3:5, 7],
        "empty": buffer[50:50],
        "empty_inside": buffer[103:103],
    }


@state
def empty_views() -> State:
    """Only tensors without elements, of a buffer with some."""
    buffer = torch.arange(1000)
    return {"a": buffer[:0], "b": buffer[10:10], "c": buffer.view(10, 100)[:, 5:5]}


@state
def trimmed_storage() -> State:
    """A tensor that ends before its storage does."""
    return {"trimmed": torch.arange(100.0)[:60].view(6, 10)}


@state
def sizes() -> State:
    """Zero-dimensional, empty and many-dimensional tensors."""
    return {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0),
        "empty_rows": torch.empty(0, 4, dtype=torch.int32),
        "empty_columns": torch.empty(3, 0),
        "six": torch.arange(64).view(2, 2, 2, 2, 2, 2),
    }


@state
def strides() -> State:
    """Everything but contiguous."""
    base = torch.arange(24.0).view(2, 3, 4)
    return {
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "permuted": base.permute(2, 0, 1),
        "stepped": torch.arange(10.0)[1::3],
        "expanded": torch.tensor([1.0, 2.0]).view(2, 1).expand(2, 5),
        "overlapping": torch.arange(8.0).as_strided((3, 4), (2, 1)),
        "backwards_order": torch.arange(20.0).as_strided((3, 2), (2, 9), 1),
        "channels_last": torch.arange(48.0)
        .view(1, 3, 4, 4)
        .contiguous(memory_format=torch.channels_last),
    }


@state
def all_dtypes() -> State:
    """One tensor of each dtype."""
    dtypes = (*REAL_DTYPES, *COMPLEX_DTYPES, *UNTYPED_DTYPES)
    return {str(dtype): data_of(dtype) for dtype in dtypes}


@state
def views_of_all_dtypes() -> State:
    """A part of a longer tensor of each dtype."""
    dtypes = (*REAL_DTYPES, *COMPLEX_DTYPES, *UNTYPED_DTYPES)
    return {str(dtype): data_of(dtype, 15)[3:9] for dtype in dtypes}


@state
def untyped_dtypes_over_one_storage() -> State:
    """Elements of different sizes in one storage: torch allows these."""
    raw = torch.arange(64, dtype=torch.uint8)
    return {
        "bytes": raw[3:5],
        "shorts": raw.view(torch.uint16)[2:5],
        "longs": raw.view(torch.uint64)[4:6],
        "byte_of_longs": raw[40:41],
    }


@state
def conjugates() -> State:
    """Conjugate and negative views, which hold the original's bytes."""
    values = torch.tensor([1 + 2j, 3 - 4j, 5 + 6j])
    return {
        "plain": torch.arange(3.0),
        "plain_complex": values * 2,
        "conjugate": values.conj(),
        "negative": values.clone().conj().imag,
        "part": torch.tensor([1 + 2j, 3 - 4j, 5 + 6j])[1:].conj(),
    }


@state
def gradients() -> State:
    """Leaves that require gradients, and one tensor that is computed."""
    leaf = torch.arange(3.0, requires_grad=True)
    return {"leaf": leaf, "computed": leaf * 2, "frozen": torch.ones(2)}


@state
def parameters() -> State:
    """Parameters: trained, frozen, views, tied to tensors, in other layouts."""
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    return {
        "weight": weight,
        "again": weight,
        "data": weight.data,
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "transposed": nn.Parameter(torch.arange(6.0).view(2, 3).t()),
        "part": nn.Parameter(torch.arange(100.0)[10:14]),
        "half": nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "untyped": nn.Parameter(data_of(torch.uint16), requires_grad=False),
    }


@state
def attributes() -> State:
    """Tensors and parameters with attributes, and a buffer, which is one."""
    tensor = torch.arange(100.0)[20:24]
    tensor.note = "hello"
    parameter = nn.Parameter(torch.arange(3.0))
    parameter.is_expert = True
    return {"tensor": tensor, "parameter": parameter, "buffer": nn.Buffer(tensor + 1)}


@state
def custom_tensor_class() -> State:
    """Tensor subclasses, whole and in part."""
    part = torch.arange(100.0)[30:33].as_subclass(Own)
    part.note = ["kept"]
    return {
        "whole": torch.arange(4.0).as_subclass(Own),
        "part": part,
        "untyped": data_of(torch.uint16, 9)[2:4].as_subclass(Own),
        "empty": torch.arange(100.0).view(10, 10)[:, 3:3].as_subclass(Own),
        "parameter": nn.Parameter(torch.arange(4.0).as_subclass(Own)),
    }


@state
def sparse() -> State:
    """All sparse layouts."""
    dense = torch.tensor([[0.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 5.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sparse CSR is in beta
        return {
            "coo": dense.to_sparse(),
            "uncoalesced": torch.sparse_coo_tensor(
                [[0, 0], [1, 1]], [1.0, 2.0], (2, 2)
            ),
            "hybrid": torch.sparse_coo_tensor([[0, 1]], torch.ones(2, 3), (4, 3)),
            "csr": dense.to_sparse_csr(),
            "csc": dense.to_sparse_csc(),
            "bsr": dense.to_sparse_bsr((2, 2)),
            "bsc": dense.to_sparse_bsc((2, 2)),
            "values_of_a_buffer": torch.sparse_coo_tensor(
                torch.tensor([[0, 1]]), torch.arange(100.0)[40:42], (2,)
            ),
        }


@state
def quantized() -> State:
    """Quantized per tensor and per channel, whole and in part."""
    values = torch.linspace(-1, 1, 12).view(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated
        per_tensor = torch.quantize_per_tensor(values, 0.1, 10, torch.quint8)
        return {
            "per_tensor": per_tensor,
            "part": torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)[1:],
            "per_channel": torch.quantize_per_channel(
                values, torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3), 0, torch.qint8
            ),
            "qint32": torch.quantize_per_tensor(values, 0.1, 0, torch.qint32),
        }


@state
def nested_tensors() -> State:
    """Nested tensors of both layouts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype
        return {
            "strided": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
            "jagged": torch.nested.nested_tensor(
                [torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged
            ),
        }


@state
def meta() -> State:
    """Tensors without memory."""
    return {
        "plain": torch.empty(3, 4, device="meta"),
        "parameter": nn.Parameter(torch.empty(2, device="meta")),
    }


@state
def inference() -> State:
    """Tensors without version counters."""
    with torch.inference_mode():
        return {"tensor": torch.arange(4.0), "part": torch.arange(100.0)[3:5]}


@state
def uninitialised() -> State:
    """What lazy modules hold before their first input."""
    return {
        "parameter": nn.parameter.UninitializedParameter(),
        "tensor": torch.ones(1),
    }


@state
def raw_storages() -> State:
    """Storages themselves, beside tensors over a part of them."""
    base = torch.arange(50.0)
    return {
        "untyped": data_of(torch.uint8).untyped_storage(),
        "typed": base._typed_storage(),
        "part_of_typed": base[3:6],
    }


@state
def module_state_dict() -> State:
    """An `OrderedDict` with `_metadata`, and the parameters it was made of."""
    net = SmallNet()
    return {"model": net.state_dict(), "kept": net.state_dict(keep_vars=True)}


@state
def module() -> State:
    """A whole module, and a parameter of it beside it."""
    net = SmallNet()
    return {"net": net, "weight": net.first.weight}


@state
def optimizer_state() -> State:
    """AdamW after a step, and its scheduler."""
    net = SmallNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    net.second(net.first(torch.ones(2, 4))).sum().backward()
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


@state
def custom_object() -> State:
    """An object of an ordinary class that shares a tensor and a list with the rest."""
    schedule = Schedule()
    return {"schedule": schedule, "w": schedule.weights, "rates": schedule.rates}


@state
def slots_object() -> State:
    """An object without a `__dict__`."""
    return {"slots": Slotted(3, [1, 2]), "w": torch.ones(1)}


@state
def dataclass() -> State:
    """A dataclass with a tensor that is also elsewhere."""
    average = torch.arange(4.0)
    return {"progress": Progress(3, [1.0, 0.5], average), "average": average}


@state
def namedtuple() -> State:
    """A named tuple of tensors."""
    return {"point": Point(torch.ones(2), [1, 2])}


@state
def default_dict() -> State:
    """A `defaultdict` with a builtin and one with a class as its factory."""
    lists = collections.defaultdict(list, a=[torch.ones(2)])
    return {"lists": lists, "links": collections.defaultdict(Link)}


@state
def deque() -> State:
    """A bounded deque, a `Counter`, subclasses of list and dict."""
    named = ListWithName([1, torch.ones(1)])
    named.name = "losses"
    return {
        "recent": collections.deque([1.0, torch.ones(2)], maxlen=2),
        "counter": collections.Counter("abracadabra"),
        "named": named,
        "config": Config(layers=[1, 2], weight=torch.ones(2)),
    }


@state
def ordered_dict() -> State:
    """An `OrderedDict` whose order is not sorted."""
    return {"od": collections.OrderedDict([("b", torch.ones(1)), ("a", 2)])}


@state
def enum_members() -> State:
    """Members of an enumeration, also as a key."""
    return {"colour": Colour.RED, "by_colour": {Colour.GREEN: torch.ones(1)}}


@state
def standard_objects() -> State:
    """Classes, functions and other things pickled by name; standard library values."""
    return {
        "class": Schedule,
        "function": torch.relu,
        "python_function": data_of,
        "partial": functools.partial(data_of, torch.int8),
        "builtin": len,
        "method": Schedule().__eq__,
        "fraction": fractions.Fraction(1, 3),
        "frozenset": frozenset({3, 4}),
        "namespace": types.SimpleNamespace(a=1, b=[2]),
        "slice": slice(1, None, 2),
        "range": range(4),
        "ellipsis": ...,
    }


@state
def numpy() -> State:
    """Arrays of several layouts and kinds, and scalars."""
    return {
        "array": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "stepped": np.arange(10)[::3],
        "scalar": np.float64(1.5),
        "integer": np.int32(3),
        "structured": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        "objects": np.array([None, [1, 2], "three"], dtype=object),
        "dtype": np.dtype("float32"),
    }


@state
def generator() -> State:
    """A random number generator and its state."""
    source = torch.Generator()
    source.manual_seed(3)
    return {"generator": source, "state": source.get_state()}


@state
def cycles() -> State:
    """Containers and objects that lead back to themselves."""
    ring: list[object] = [torch.ones(1)]
    ring.append(ring)
    link = Link()
    link.others.append({"link": link, "ring": ring})
    in_tuple: list[object] = []
    in_tuple.append((in_tuple, 1))
    return {"ring": ring, "link": link, "tuple": in_tuple[0]}


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A gloo process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def dtensors() -> State:
    """Sharded and replicated tensors and parameters. Needs `process_group`."""
    from torch.distributed.tensor import (
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (1,))
    values = torch.arange(16.0).view(4, 4)
    sharded = distribute_tensor(values, mesh, [Shard(0)])
    return {
        "sharded": sharded,
        "replicated": distribute_tensor(values + 1, mesh, [Replicate()]),
        "parameter": nn.Parameter(distribute_tensor(values + 2, mesh, [Shard(1)])),
        "local": sharded.to_local(),
    }
