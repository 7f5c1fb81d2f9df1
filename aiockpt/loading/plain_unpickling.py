"""Pickles of plain state dicts, run by our own inert machine.

torch's restricted unpickler takes as long for ten thousand tensors as a disk does
for a gigabyte, and has to be guarded against bombs besides. What nearly all
checkpoints hold (tensors and parameters in dictionaries, lists and tuples, numbers
and text) is made here in one pass. Everything else is left to torch's.
"""

__all__ = ["NotPlainError", "unpickle_plain"]

import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, cast

import torch

from aiockpt.loading.storages import StorageLoader
from aiockpt.outline import STORAGE_DTYPES
from aiockpt.outline.inert import Call, Global, Machine

# What torch writes for plain states, and its restricted unpickler reads.
_OPCODES: Final = (
    *(pickle.PROTO, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.LONG1),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.BINPERSID),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
)
_PROTOCOL_2: Final = b"\x80\x02"
_MAX_NDIM: Final = 64
# ("storage", class, key, location, number of elements)
_PID_PARTS: Final = 5
# storage, offset, shape, stride, requires_grad, backward hooks
_TENSOR_PARTS: Final = 6


class NotPlainError(Exception):
    """The pickle holds something else, or is malformed: torch's unpickler decides."""


def unpickle_plain(data: bytes, storages: StorageLoader) -> object:
    """Returns what the pickle makes, every tensor filled.

    Raises:
        NotPlainError: It holds more than plain tensors and values.
        CorruptCheckpointError: It is malformed; or as `StorageLoader.untyped`.
        RuntimeError: torch cannot make one of the tensors.
    """
    if not data.startswith(_PROTOCOL_2):
        raise NotPlainError
    making = _Making(storages, len(data))
    machine = Machine(
        data,
        refer=making.refer,
        call=making.call,
        build=making.build,
        opcodes=_OPCODES,
    )
    made = machine.run()
    machine.memo.clear()
    # What stands for a storage or a class must not be in the state by itself. It is
    # not if nobody refers to it any more.
    for inner in (machine.globals.values(), making.shown):
        if any(count > _NUM_REFERENCES for count in _counts(inner)):
            raise NotPlainError
    return made


def _counts(inner: Iterable[object]) -> list[int]:
    """References to each, those of a table and of counting them included."""
    return [sys.getrefcount(one) for one in inner]


# What is counted of an object that only a table refers to: it depends on the Python.
(_NUM_REFERENCES,) = _counts([object()])


class _Shown(NamedTuple):
    """A storage with the element type under which the pickle refers to it."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    nbytes: int


class _Making:
    """Makes the tensors of one pickle.

    Attributes:
        shown: Every reference to a storage.
    """

    def __init__(self, storages: StorageLoader, nbytes: int) -> None:
        self.shown: list[_Shown] = []
        self._storages = storages
        # States may be shared, and are copied each time.
        self._num_attributes_left = nbytes

    def refer(self, pid: object) -> object:
        if type(pid) is int:
            return self._storages.load(pid)
        # Not matched by patterns, here and below: these run for every tensor.
        if type(pid) is not tuple or len(pid) != _PID_PARTS or pid[0] != "storage":
            raise NotPlainError
        _, kind, key, location, numel = cast("tuple[Any, ...]", pid)
        dtype = STORAGE_DTYPES.get(kind.name) if type(kind) is Global else None
        if dtype is None or type(numel) is not int or numel < 0:
            raise NotPlainError
        if type(key) is not str or type(location) is not str:
            raise NotPlainError
        nbytes = numel * dtype.itemsize
        storage = self._storages.untyped(key, location, nbytes)
        shown = _Shown(storage, dtype, nbytes)
        self.shown.append(shown)
        return shown

    def call(self, call: Call) -> Any:
        function = call.function
        if not isinstance(function, Global) or call.opcode != pickle.REDUCE:
            raise NotPlainError
        make = _MAKERS.get((function.module, function.qualname))
        if make is None:
            raise NotPlainError
        return make(*call.args)

    def build(self, target: object, state: object) -> None:
        # What `Module.state_dict` keeps beside its items, such as `_metadata`.
        if type(target) is not OrderedDict or type(state) is not dict:
            raise NotPlainError
        attributes = cast("dict[str, object]", state)
        self._num_attributes_left -= len(attributes)
        if self._num_attributes_left < 0:
            raise NotPlainError
        vars(target).update(attributes)


def _tensor(*args: Any) -> torch.Tensor:
    """As `torch._utils._rebuild_tensor_v2`, for tensors with no more than elements."""
    if len(args) != _TENSOR_PARTS:
        raise NotPlainError
    shown, offset, shape, stride, requires_grad, hooks = args
    if type(shown) is not _Shown or type(requires_grad) is not bool or hooks != {}:
        raise NotPlainError
    if not _is_inside(shown, offset, shape, stride):
        raise NotPlainError
    storage = shown.storage
    tensor = torch.empty(0, dtype=shown.dtype, device=storage.device)
    tensor.set_(storage, offset, shape, stride)
    return tensor.requires_grad_() if requires_grad else tensor


def _is_inside(shown: _Shown, offset: Any, shape: Any, stride: Any) -> bool:
    """Whether these describe a tensor that shows no more than is in its storage."""
    if type(offset) is not int or type(shape) is not tuple or type(stride) is not tuple:
        return False
    if not len(shape) == len(stride) <= _MAX_NDIM:
        return False
    last = offset
    for size, step in zip(shape, stride, strict=True):
        if type(size) is not int or type(step) is not int or size < 0 or step < 0:
            return False
        last += (size - 1) * step
    is_empty = 0 in shape
    return offset >= 0 and (
        is_empty or (last + 1) * shown.dtype.itemsize <= shown.nbytes
    )


def _parameter(*args: object) -> torch.nn.Parameter:
    """As `torch._utils._rebuild_parameter`, without hooks."""
    match args:
        case (torch.Tensor() as data, bool(requires_grad), hooks) if hooks == {}:
            return torch.nn.Parameter(data, requires_grad)
        case _:
            raise NotPlainError


def _ordered_dict(*args: object) -> OrderedDict[object, object]:
    if args:
        raise NotPlainError
    return OrderedDict()


_MAKERS: Final[dict[tuple[str, str], Callable[..., object]]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
