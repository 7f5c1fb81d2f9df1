"""The pickle of a state, and which bytes of which storages belong to it.

The pickle is `data.pkl` of torch's zip container: protocol 2, where each storage
stands as the persistent id `("storage", class, key, location, number of elements)`
(torch/serialization.py, `_save`). It is byte for byte what `torch.save` writes, as
long as every storage is saved whole.

A storage that the state refers to only in part is cut: the byte ranges that its
tensors span are merged where they overlap, each merged range becomes a storage of
its own, and the tensors' offsets are made relative to it. What is referred to is
known only after a first pickling; where something is to be cut, a second one
follows.
"""

# ruff: noqa: SLF001 - what torch pickles has no other names
# pyright: reportPrivateUsage=false

__all__ = ["Pickled", "Span", "is_plain", "pickle_state"]

import copyreg
import io
import operator
import pickle
import re
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, TypedStorage, UntypedStorage
from torch._tensor import _rebuild_from_type_v2
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2, _rebuild_tensor_v3
from torch.nn import Parameter
from torch.serialization import normalize_storage_type
from typing_extensions import override

from aiockpt.capturing.key_paths import ROOT, key_path
from aiockpt.errors import InvalidArgumentError
from aiockpt.storage_spans import (
    Cuts,
    Element,
    PersistentId,
    Span,
    StorageConflictError,
    StorageLedger,
)

_PROTOCOL: Final = 2
_MARK_BITS: Final = 128

# A class: its name and its place in the memo, or a reference to that.
_CLASS: Final = re.compile(rb"(?s)(?:c[^\n]*\n[^\n]*\n)?(?:[qh](.)|[rj](.{4}))")

_Reduced: TypeAlias = tuple[Any, ...]


class Pickled(NamedTuple):
    """A pickled state.

    Attributes:
        data: The record `data.pkl`.
        spans: Span `i` is the record `data/{i}`.
    """

    data: bytes
    spans: list[Span]


def pickle_state(tree: object) -> Pickled:
    """Pickles `tree` without touching the data of its tensors.

    Takes 10 us per tensor, twice that where storages are cut. Nothing may change
    `tree` meanwhile.

    Raises:
        InvalidArgumentError: A value cannot be pickled, a tensor reaches beyond its
            storage, or tensors of two dtypes view the same data; the message names
            the key path.
    """
    pickled, cuts = _pickle(tree, {})
    if cuts:
        pickled, _ = _pickle(tree, cuts)
    return pickled


def _pickle(tree: object, cuts: Cuts) -> tuple[Pickled, Cuts]:
    """Pickles with storages cut by `cuts`; returns also how they should be cut."""
    ledger = StorageLedger(cuts)
    try:
        try:
            data = _StatePickler(ledger).pickled(tree)
        except _RawStorageError:
            ledger = StorageLedger(cuts)
            data = _RawStoragePickler(ledger).pickled(tree)
    except StorageConflictError as conflict:
        raise InvalidArgumentError(conflict.describe(tree)) from conflict
    except RecursionError as cause:
        message = f"{ROOT} is nested too deeply to be saved"
        raise InvalidArgumentError(message) from cause
    except MemoryError:
        raise
    except Exception as cause:
        path = key_path(tree, _is_unpicklable) or ROOT
        raise InvalidArgumentError(f"{path} cannot be saved: {cause}") from cause
    return Pickled(data, ledger.spans), ledger.cuts_needed()


def _is_unpicklable(value: object) -> bool:
    try:
        _RawStoragePickler(StorageLedger({})).pickled(value)
    except Exception:  # noqa: BLE001 - whatever the value's class raises
        return True
    return False


class _RawStorageError(Exception):
    """A storage stands in the state by itself, not behind a tensor."""


class _Payload:
    """Stands for the `data` of the parameter that was reduced last."""

    __slots__ = ()


class _NoHooks:
    """Stands for an empty `OrderedDict` of hooks."""

    __slots__ = ()
    reduced = (OrderedDict, ())


class _StatePickler(pickle.Pickler):
    """Pickles as `torch.save` does and keeps account of the storages.

    Plain tensors and parameters are reduced here instead of by their `__reduce_ex__`:
    to the same bytes, in a fraction of the time.

    Two things are written as *marks* first, numbers made up anew of 128 random bits,
    so that nothing else in the pickle is like them. Numbers leave no trace in
    pickle's memo, and `pickled` puts in their places what belongs there:

    - The opcode that makes a reference of the persistent id before it. With pickle's
      own way, `persistent_id` is called for each of the twenty objects of a tensor.
    - References to the classes of a storage and of a tensor's hooks, which are in the
      memo since the first tensor of the same dtype. For the hooks, which are to be an
      object each, a new string stands that all pickles spell alike.

    pickle keeps every object that it has written until the end, and enough new ones
    make the garbage collector traverse all that the process holds, while nothing else
    runs. It does not count tuples of numbers and strings: no tensor adds other ones.
    """

    def __init__(self, ledger: StorageLedger) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file, protocol=_PROTOCOL)
        self.dispatch_table = _Reducers(self)
        self._ledger = ledger
        self._rebuilds: dict[torch.dtype, _Rebuild] = {}
        self._parameter: Any = None
        self._refer_mark = _new_mark()
        self._marked: list[_Marked] = []

    def pickled(self, tree: object) -> bytes:
        """The pickle of `tree`."""
        try:
            self.dump(tree)
        finally:
            # It refers to this object, which would outlive the pickle by that, and
            # with it all tensors.
            del self.dispatch_table
        data = self._file.getvalue()
        data = data.replace(_opcodes(self._refer_mark), pickle.BINPERSID)
        for before_first, later, behind in self._marked:
            head, tail = data.split(before_first, 1)
            data = head + tail.replace(later, _reference_to_first(tail) + behind)
        return data

    def reduce_tensor(self, tensor: Any) -> Any:
        """The reduction of an object that is exactly a `Tensor`."""
        if is_plain(tensor):
            return self._reduce_plain(tensor, requires_grad=tensor.requires_grad)
        return self.reduce_odd(tensor)

    def reduce_parameter(self, parameter: Any) -> Any:
        """The reduction of an object that is exactly a `Parameter`."""
        if not is_plain(parameter):
            return self.reduce_odd(parameter)
        self._parameter = parameter
        return _rebuild_parameter, (_Payload(), parameter.requires_grad, _NoHooks())

    def reduce_payload(self, _: _Payload) -> _Reduced:
        """The reduction of what the parameter reduced last consists of."""
        return self._reduce_plain(self._parameter, requires_grad=False)

    def _reduce_plain(self, tensor: Any, *, requires_grad: bool) -> _Reduced:
        known = self._rebuilds.get(tensor.dtype)
        rebuild = known or _rebuild_of(tensor)
        function, element, extra, no_hooks = rebuild
        size, stride = tuple(tensor.shape), tensor.stride()
        persistent_id, offset = self._ledger.refer(
            tensor.untyped_storage(),
            element,
            tensor.storage_offset(),
            tensor.numel() if tensor.is_contiguous() else _num_spanned(size, stride),
        )
        args = (persistent_id, self._refer_mark, offset, size, stride, requires_grad)
        if known is None:
            args, hooks = self._mark_first(tensor.dtype, rebuild, args)
        else:
            hooks = (no_hooks.decode(),)
        return function, args + hooks + extra

    def _mark_first(
        self, dtype: torch.dtype, rebuild: "_Rebuild", args: _Reduced
    ) -> tuple[_Reduced, _Reduced]:
        """Marks the classes of the first tensor of `dtype`, for those after it."""
        in_id, in_hooks = _new_mark(), _new_mark()
        element = rebuild.element._replace(storage_type=in_id)
        self._rebuilds[dtype] = rebuild._replace(element=element)
        text = pickle.BINUNICODE + struct.pack("<I", len(rebuild.no_hooks))
        self._marked += [
            _Marked(_opcodes(in_id), _opcodes(in_id), b""),
            _Marked(
                _opcodes(in_hooks),
                text + rebuild.no_hooks,
                pickle.EMPTY_TUPLE + pickle.REDUCE,
            ),
        ]
        (storage, *rest), *others = args
        return ((storage, in_id, *rest), *others), (in_hooks, _NoHooks())

    def reduce_odd(self, tensor: Any) -> Any:
        """Reduces as torch does, and takes the storage of a strided tensor apart."""
        reducer = copyreg.dispatch_table.get(type(tensor))
        reduced = (
            tensor.__reduce_ex__(_PROTOCOL) if reducer is None else reducer(tensor)
        )
        if not isinstance(reduced, tuple):
            return reduced
        function, args, *rest = reduced
        if function is _rebuild_from_type_v2:
            strided, kind, strided_args, state = args
            args = (strided, kind, self._refer(strided, strided_args), state)
        else:
            args = self._refer(function, args)
        return (function, args, *rest)

    def _refer(self, function: object, args: _Reduced) -> _Reduced:
        """Refers to what the arguments of a strided tensor name; returns new ones."""
        if function is _rebuild_tensor_v2:
            typed, offset, size, stride, *rest = args
            storage, element = typed._untyped_storage, _element_of(typed)
        elif function is _rebuild_tensor_v3:
            storage, offset, size, stride, *rest = args
            element = _untyped_element(storage, itemsize=rest[2].itemsize)
        else:
            return args
        num_spanned = _num_spanned(size, stride)
        persistent_id, offset = self._ledger.refer(
            storage, element, offset, num_spanned
        )
        return (persistent_id, self._refer_mark, offset, size, stride, *rest)


class _RawStoragePickler(_StatePickler):
    """Takes raw storages as well, and is asked about every object for that."""

    @override
    def persistent_id(self, obj: object) -> PersistentId | None:
        if isinstance(obj, TypedStorage):
            return self._ledger.refer_whole(obj._untyped_storage, _element_of(obj))
        if isinstance(obj, UntypedStorage):
            return self._ledger.refer_whole(obj, _untyped_element(obj, itemsize=1))
        return None


class _Reducers(dict[type, Callable[[Any], Any]]):
    """What reduces the objects of a class, as a pickler's `dispatch_table`."""

    def __init__(self, pickler: _StatePickler) -> None:
        super().__init__(
            {
                Tensor: pickler.reduce_tensor,
                Parameter: pickler.reduce_parameter,
                _Payload: pickler.reduce_payload,
                _NoHooks: operator.attrgetter("reduced"),
            }
        )
        self._reduce_odd = pickler.reduce_odd

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        if issubclass(kind, Tensor):
            return self._reduce_odd
        if issubclass(kind, TypedStorage | UntypedStorage):
            raise _RawStorageError
        return copyreg.dispatch_table[kind]


class _Rebuild(NamedTuple):
    """How torch pickles plain tensors of one dtype.

    Attributes:
        function: Makes the tensor.
        element: What stands in its storage.
        extra: Arguments behind those that all dtypes have.
        no_hooks: A text like no other, that stands for a tensor's hooks.
    """

    function: Any
    element: Element
    extra: tuple[object, ...]
    no_hooks: bytes


class _Marked(NamedTuple):
    """Where the reference to a class belongs.

    Attributes:
        before_first: Opcodes to be left out, before the class itself.
        later: Opcodes in the place of a reference to it.
        behind: Opcodes that follow the reference.
    """

    before_first: bytes
    later: bytes
    behind: bytes


def _rebuild_of(tensor: Any) -> _Rebuild:
    """Learns from a plain tensor how torch pickles its dtype."""
    function, args = tensor.data.__reduce_ex__(_PROTOCOL)
    no_hooks = secrets.token_hex(_MARK_BITS // 8).encode()
    storage, extra = args[0], args[6:]
    if isinstance(storage, TypedStorage):
        return _Rebuild(function, _element_of(storage), extra, no_hooks)
    element = _untyped_element(storage, itemsize=tensor.itemsize)
    return _Rebuild(function, element, extra, no_hooks)


def _new_mark() -> int:
    # Of the same length each time: the highest of its bits is set.
    return secrets.randbits(_MARK_BITS) | 1 << _MARK_BITS - 1


def _opcodes(number: int) -> bytes:
    """What pickle writes for a number: `dumps` puts the protocol and a stop around."""
    return pickle.dumps(number, _PROTOCOL)[2:-1]


def _reference_to_first(data: bytes) -> bytes:
    """The opcode that refers to the class with which `data` begins."""
    found = _CLASS.match(data)
    assert found is not None
    short, long = found.groups()
    return pickle.LONG_BINGET + long if short is None else pickle.BINGET + short


def _element_of(storage: Any) -> Element:
    dtype = storage.dtype
    storage_type = getattr(torch, storage._pickle_storage_type())
    return Element(storage_type, dtype, dtype.itemsize, dtype.itemsize)


def _untyped_element(storage: UntypedStorage, *, itemsize: int) -> Element:
    storage_type: type = cast("Any", normalize_storage_type)(type(storage))
    return Element(storage_type, torch.uint8, 1, itemsize)


def is_plain(tensor: Tensor) -> bool:
    """Whether torch pickles it as a storage, offset, size and stride, and no more."""
    return (
        tensor.layout is torch.strided
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor._backward_hooks
        and tensor.__getstate__() is None
    )


def _num_spanned(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements of storage from a strided tensor's first to its last."""
    num = 1
    for length, step in zip(size, stride, strict=True):
        if length == 0:
            return 0
        num += (length - 1) * step
    return num
