"""Storages and tensors as a pickle describes them, without their data.

The arguments are those of the rebuild functions in `torch._utils` and
`torch._tensor`, which torch 2.13 writes and every torch since 2.0 reads.
"""

__all__ = [
    "STORAGE_DTYPES",
    "StorageOutline",
    "TensorOutline",
    "is_tensor",
    "outline",
]

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, cast

import torch

from aiockpt.errors import CorruptCheckpointError
from aiockpt.outline.inert import Call, Global, Machine

_MAX_NDIM: Final = 64

_DTYPES: Final = {
    f"torch.{name}": value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype)
}
# Frozen since torch 1.6. The data of dtypes that came later stands in untyped storages.
STORAGE_DTYPES: Final = {
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.QInt8Storage": torch.qint8,
    "torch.QInt32Storage": torch.qint32,
    "torch.QUInt8Storage": torch.quint8,
    "torch.QUInt4x2Storage": torch.quint4x2,
    "torch.QUInt2x4Storage": torch.quint2x4,
}
"""Element type of each storage class that pickles name."""


@dataclass(frozen=True, slots=True, eq=False)
class StorageOutline:
    """A reference from the pickle to a storage's record.

    Attributes:
        key: The record is `data/<key>`.
        dtype: Element type; `torch.uint8` for an untyped storage.
        nbytes: Length of the record, as the pickle has it.
        device: Where the storage was, as torch tags it (`"cpu"`, `"cuda:0"`).
        pid: The reference as it stands in the pickle.
    """

    key: str
    dtype: torch.dtype
    nbytes: int
    device: str
    pid: tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TensorOutline:
    """A tensor as the pickle describes it, without its data.

    Attributes:
        dtype: Element type.
        shape: Size of each dimension `(ndim,)`.
        stride: Distance between neighbours in each dimension, in elements `(ndim,)`.
        storage_key: Its bytes are in the record `data/<storage_key>`; None for a
            meta tensor, which has no bytes.
        offset: First element, counted from the storage's start in elements.
        nbytes: Bytes of its elements (`numel * itemsize`).
        storage_nbytes: Length of that record, as the pickle has it.
        requires_grad: Whether gradients are recorded for it.
        device: Where its storage was.
        call: The call that rebuilds it.
        is_strided: Whether dtype, shape, stride and bytes say all there is about
            its values: not quantized, no subclass, no conjugate or negative bit.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_key: str | None
    offset: int
    nbytes: int
    storage_nbytes: int
    requires_grad: bool
    device: str
    call: Call = field(repr=False)
    is_strided: bool = True

    @property
    def stop_bytes(self) -> int:
        """End of the last byte it shows, counted from the storage's start."""
        if not self.nbytes:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize


def outline(pickle_bytes: bytes) -> object:
    """Returns what the pickle describes; imports nothing and calls nothing.

    Raises:
        CorruptCheckpointError: This is no pickle, or one with opcodes that no
            checkpoint needs, or one that takes more than 2**26 steps.
    """
    return Machine(pickle_bytes, refer=_referred, call=_rebuilt).run()


def is_tensor(node: object) -> bool:
    """Whether the node stands for a tensor, of any kind."""
    if isinstance(node, Call):
        return node.name.startswith(
            ("torch._utils._rebuild_", "torch._tensor._rebuild_")
        )
    return isinstance(node, TensorOutline)


def _referred(pid: object) -> StorageOutline:
    match pid:
        case tuple(("storage", Global() as kind, str(key), str(device), int(numel))):
            dtype = STORAGE_DTYPES.get(kind.name)
            if dtype is not None and numel >= 0:
                return StorageOutline(key, dtype, numel * dtype.itemsize, device, pid)
        case _:
            pass
    raise CorruptCheckpointError("the pickle refers to something else than a storage")


def _rebuilt(call: Call) -> Call | TensorOutline:
    """The tensor that the call rebuilds, or the call where it is not understood."""
    rebuild = _REBUILDERS.get(call.name)
    if rebuild is None or call.opcode != pickle.REDUCE:
        return call
    try:
        return rebuild(call, *call.args)
    except (IndexError, TypeError, ValueError):
        return call


def _strided(
    call: Call, storage: object, offset: object, shape: object, stride: object
) -> TensorOutline:
    if not isinstance(storage, StorageOutline):
        raise TypeError("a tensor of something else than a storage")
    sizes = _numbers(shape)
    return TensorOutline(
        dtype=storage.dtype,
        shape=sizes,
        stride=_numbers(stride, len(sizes)),
        storage_key=storage.key,
        offset=_numbers((offset,))[0],
        nbytes=math.prod(sizes) * storage.dtype.itemsize,
        storage_nbytes=storage.nbytes,
        requires_grad=False,
        device=storage.device,
        call=call,
    )


def _strided_v2(call: Call, *args: object) -> TensorOutline:
    *strided, requires_grad, _ = args[:6]
    return replace(
        _strided(call, *strided),
        requires_grad=bool(requires_grad),
        is_strided=not any(args[6:]),
    )


def _strided_v3(call: Call, *args: object) -> TensorOutline:
    tensor = _strided_v2(call, *args[:6], *args[7:])
    dtype = _dtype(args[6])
    nbytes = math.prod(tensor.shape) * dtype.itemsize
    return replace(tensor, dtype=dtype, nbytes=nbytes)


def _quantized(call: Call, *args: object) -> TensorOutline:
    *strided, _, requires_grad, _ = args
    return replace(
        _strided(call, *strided), requires_grad=bool(requires_grad), is_strided=False
    )


def _parameter(
    call: Call, data: object, requires_grad: object, *_: object
) -> TensorOutline:
    if not isinstance(data, TensorOutline):
        raise TypeError("a parameter of something else than a tensor")
    return replace(data, call=call, requires_grad=bool(requires_grad))


def _subclass(
    call: Call, function: object, _: object, args: object, _state: object
) -> TensorOutline:
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise TypeError("a subclass of something else than a tensor")
    data = _rebuilt(Call(function, args, pickle.REDUCE))
    if not isinstance(data, TensorOutline):
        raise TypeError("a subclass that has its bytes elsewhere")
    return replace(data, call=call, is_strided=False)


def _meta(
    call: Call, dtype: object, shape: object, stride: object, requires_grad: object
) -> TensorOutline:
    sizes = _numbers(shape)
    return TensorOutline(
        dtype=_dtype(dtype),
        shape=sizes,
        stride=_numbers(stride, len(sizes)),
        storage_key=None,
        offset=0,
        nbytes=0,
        storage_nbytes=0,
        requires_grad=bool(requires_grad),
        device="meta",
        call=call,
        is_strided=False,
    )


def _numbers(value: object, length: int | None = None) -> tuple[int, ...]:
    if isinstance(value, Call) and value.name == "torch.Size":
        (value,) = value.args
    if not isinstance(value, tuple) or len(value) > _MAX_NDIM:
        raise TypeError("not the sizes of a tensor")
    if length not in (None, len(value)):
        raise ValueError("as many strides as dimensions are due")
    numbers = cast("tuple[int, ...]", value)
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise TypeError("not the sizes of a tensor")
    if length is None and math.prod(numbers) >= 1 << 63:
        raise ValueError("more elements than a tensor can have")
    return numbers


def _dtype(value: object) -> torch.dtype:
    if not isinstance(value, Global) or value.name not in _DTYPES:
        raise TypeError("not a dtype of this torch")
    return _DTYPES[value.name]


_REBUILDERS: Final[dict[str, Callable[..., TensorOutline]]] = {
    "torch._utils._rebuild_tensor": _strided,
    "torch._utils._rebuild_tensor_v2": _strided_v2,
    "torch._utils._rebuild_tensor_v3": _strided_v3,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}
