"""The safetensors container: a JSON header, then every tensor's bytes back to back.

Files are laid out as the official writer (0.8) does: names sorted by dtype, the
widest first, so that every tensor is aligned to its element, and the header padded
with spaces to a multiple of 8 bytes. The official writer takes metadata in the
order of a hash map; here it is sorted by key.

On reading, what the official reader refuses is refused, and duplicate names too:
readers that take the first and readers that take the last would see two files.

The format is described at https://github.com/huggingface/safetensors#format.
"""

__all__ = [
    "MAX_HEADER_BYTES",
    "Header",
    "TensorEntry",
    "check",
    "header_nbytes",
    "parse_header",
    "plan",
]

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Annotated, Any, NamedTuple, NoReturn, cast

import msgspec
import torch

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.image import Data, Extent, Layout, Literal

MAX_HEADER_BYTES = 100_000_000
"""The longest JSON header that a reader accepts."""

_METADATA = "__metadata__"
_INT64_MAX = (1 << 63) - 1
_Size = Annotated[int, msgspec.Meta(ge=0, le=_INT64_MAX)]
_LENGTH = struct.Struct("<Q")

# In the order in which the official writer places them.
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


class TensorEntry(NamedTuple):
    """One tensor of a file: `nbytes` bytes from file offset `start`, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Header(NamedTuple):
    """What a file contains.

    Attributes:
        entries: By name, in the order of their bytes; they tile the file from
            `data_start` to its end.
        metadata: The file's free text, or None where it has none.
        data_start: File offset of the first tensor's bytes.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] | None
    data_start: int


def plan(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None
) -> tuple[Layout, list[tuple[str, torch.Tensor]]]:
    """Lays out a file; record `i` is the bytes of the `i`-th returned tensor.

    A tensor of no elements has no `Data` extent. No tensor data is read.

    Args:
        tensors: Dense, contiguous tensors that share no memory, by name.
        metadata: Free text for the header, or None for none.

    Returns:
        The layout, and the tensors in the order of their bytes.

    Raises:
        InvalidArgumentError: The format cannot hold this; the message names the key.
    """
    items = _checked(tensors)
    items.sort(key=lambda item: (_RANKS[item[1].dtype], item[0]))
    header = _header_bytes(items, _checked_metadata(metadata))
    extents: list[Extent] = [Literal(0, len(header), header)]
    offset = len(header)
    for record, (_, tensor) in enumerate(items):
        if tensor.nbytes:
            extents.append(Data(offset, tensor.nbytes, record))
            offset += tensor.nbytes
    return Layout(offset, extents), items


def check(tensors: Mapping[str, torch.Tensor]) -> None:
    """Returns if files of the format can hold the tensors, in whatever number.

    Raises:
        InvalidArgumentError: They cannot; the message names the key.
    """
    _checked(tensors)


def header_nbytes(prefix: bytes, file_nbytes: int) -> int:
    """Returns how many first bytes of the file `parse_header` wants to see.

    Args:
        prefix: The first 8 bytes of the file, or more.
        file_nbytes: Length of the file.

    Raises:
        CorruptCheckpointError: The header is too long for the file or the format.
    """
    if len(prefix) < _LENGTH.size:
        _refuse("the file has no room for its header's length", offset=0)
    nbytes: int = _LENGTH.unpack_from(prefix)[0]
    if nbytes > MAX_HEADER_BYTES:
        _refuse(
            f"the header is said to have {nbytes} bytes, "
            f"more than the {MAX_HEADER_BYTES} allowed",
            offset=0,
        )
    if _LENGTH.size + nbytes > file_nbytes:
        _refuse(
            f"the header is said to have {nbytes} bytes, the file has {file_nbytes}",
            offset=0,
        )
    return _LENGTH.size + nbytes


def parse_header(prefix: bytes, file_nbytes: int) -> Header:
    """Reads and checks everything that a file says of itself.

    Args:
        prefix: `header_nbytes(...)` first bytes of the file, or more.
        file_nbytes: Length of the file.

    Raises:
        CorruptCheckpointError: The header is malformed, names a tensor twice, or
            does not describe exactly the bytes that follow it.
    """
    data_start = header_nbytes(prefix, file_nbytes)
    if len(prefix) < data_start:
        _refuse("the header is cut off", offset=len(prefix))
    infos, metadata = _decoded(prefix[_LENGTH.size : data_start])
    entries: dict[str, TensorEntry] = {}
    start = data_start
    for name, info in sorted(infos.items(), key=lambda item: item[1].data_offsets):
        entries[name] = entry = _entry_at(start, name, info, data_start)
        start += entry.nbytes
    if start != file_nbytes:
        _refuse(
            f"the tensors end at {start}, the file at {file_nbytes}",
            offset=min(start, file_nbytes),
        )
    return Header(entries, metadata, data_start)


def _checked(tensors: object) -> list[tuple[str, torch.Tensor]]:
    """Returns the items, if a file can hold them."""
    if not isinstance(tensors, Mapping):
        raise InvalidArgumentError(
            f"safetensors holds a mapping of tensors, not a {_type_name(tensors)}"
        )
    items: list[tuple[str, torch.Tensor]] = []
    for key, value in cast("Mapping[object, object]", tensors).items():
        name = _checked_text("a tensor name", key)
        if name == _METADATA:
            raise InvalidArgumentError(f"safetensors keeps the name {name!r} to itself")
        if not isinstance(value, torch.Tensor):
            raise InvalidArgumentError(
                f"safetensors holds tensors only, and {name!r} is a "
                f"{_type_name(value)}: flatten the mapping, or save a .pt file"
            )
        if reason := _kind_fault(value) or _memory_fault(value):
            raise InvalidArgumentError(f"safetensors cannot hold {name!r}: {reason}")
        items.append((name, value))
    _check_sharing(items)
    return items


def _kind_fault(tensor: torch.Tensor) -> str | None:
    """Why the format has no place for this kind of tensor, or None."""
    if tensor.is_nested:
        return "it is nested"
    if tensor.layout != torch.strided:
        return f"it is not dense, its layout is {tensor.layout}"
    if tensor.is_quantized:
        return "it is quantized"
    if tensor.is_meta:
        return "it is on the meta device and has no data"
    if tensor.dtype not in _NAMES:
        return f"its dtype is {tensor.dtype}"
    return None


def _memory_fault(tensor: torch.Tensor) -> str | None:
    """Why the tensor's memory is not the bytes of its elements, or None."""
    if not tensor.is_contiguous():
        return "it is not contiguous; pass `tensor.contiguous()`"
    if tensor.is_conj() or tensor.is_neg():
        return (
            "it is a lazy conjugate or negative; "
            "pass `tensor.resolve_conj().resolve_neg()`"
        )
    if tensor.nbytes and not _has_memory(tensor):
        return f"this {_type_name(tensor)} has no memory of its own"
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether the elements lie in the storage: not so for wrappers of tensors."""
    try:
        storage = tensor.untyped_storage()
        if storage.device != tensor.device:  # a FakeTensor
            return False
        start = tensor.data_ptr() - storage.data_ptr()
        return storage.data_ptr() != 0 and start + tensor.nbytes <= storage.nbytes()
    except (NotImplementedError, RuntimeError):
        return False


def _check_sharing(items: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuses tensors whose bytes overlap: on loading they would be separate."""
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.nbytes, name)
        for name, tensor in items
        if tensor.nbytes
    )
    for (device, start, nbytes, name), (next_device, next_start, _, other) in pairwise(
        spans
    ):
        if device == next_device and start + nbytes > next_start:
            raise InvalidArgumentError(
                f"safetensors cannot hold {name!r} and {other!r}: they share memory; "
                "leave one out, or pass a clone (of a module that is passed itself, "
                "tied weights are written once)"
            )


def _checked_metadata(metadata: object) -> dict[str, str] | None:
    """Returns the metadata sorted by key, if the format can hold it."""
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise InvalidArgumentError(
            f"safetensors metadata is a mapping of text, not a {_type_name(metadata)}"
        )
    pairs = cast("Mapping[object, object]", metadata).items()
    return dict(
        sorted(
            (
                _checked_text("a metadata key", key),
                _checked_text(f"the metadata value of {key!r}", value),
            )
            for key, value in pairs
        )
    )


def _checked_text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(
            f"{what} must be a str in safetensors, not {value!r} ({_type_name(value)})"
        )
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidArgumentError(
            f"{what} must be valid Unicode in safetensors, not {value!r}"
        ) from exc
    return value


def _type_name(value: object) -> str:
    return type(value).__name__


def _header_bytes(
    items: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str] | None
) -> bytes:
    """Returns the length, the JSON and its padding."""
    header: dict[str, object] = {} if metadata is None else {_METADATA: metadata}
    start = 0
    for name, tensor in items:
        end = start + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidArgumentError(
            f"the safetensors header would have {len(text)} bytes, "
            f"more than the {MAX_HEADER_BYTES} that readers accept"
        )
    return _LENGTH.pack(len(text)) + text


class _Info(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON of one tensor."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


def _decoded(data: bytes) -> tuple[dict[str, _Info], dict[str, str] | None]:
    """Returns the tensors and the metadata of a header's JSON, types checked."""
    if not data.startswith(b"{"):
        _refuse("the header does not start with '{'", offset=_LENGTH.size)
    try:
        header: dict[str, Any] = json.loads(data.decode(), object_pairs_hook=_unique)
        metadata = None
        if _METADATA in header:
            metadata = msgspec.convert(header.pop(_METADATA), dict[str, str])
            "".join((*metadata, *metadata.values())).encode()
        "".join(header).encode()
        return msgspec.convert(header, dict[str, _Info]), metadata
    except (ValueError, RecursionError, msgspec.ValidationError) as exc:
        raise CorruptCheckpointError(
            f"the header is malformed: {exc}", offset=_LENGTH.size
        ) from exc


def _entry_at(start: int, name: str, info: _Info, data_start: int) -> TensorEntry:
    """Returns the tensor, if it starts at `start` and is as long as its shape says."""
    begin, end = info.data_offsets
    dtype = _DTYPES.get(info.dtype)
    if dtype is None:
        _refuse(f"{name!r} has the unknown dtype {info.dtype!r}", key=name)
    if data_start + begin != start:
        _refuse(
            f"{name!r} starts at {data_start + begin}, "
            f"but the bytes before it end at {start}",
            offset=start,
            key=name,
        )
    if _num_elements(info.shape, name) * dtype.itemsize != end - begin:
        _refuse(
            f"{name!r} has {end - begin} bytes, "
            f"which is not what {info.dtype} {list(info.shape)} takes",
            offset=start,
            key=name,
        )
    return TensorEntry(name, dtype, info.shape, start, end - begin)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(name, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"two values under the key {name!r}")
    return found


def _num_elements(shape: Iterable[int], name: str) -> int:
    """Multiplies the shape, refusing what torch cannot count in 64 bits."""
    product, is_empty = 1, False
    for size in shape:
        is_empty = is_empty or size == 0
        product *= max(size, 1)
        if product > _INT64_MAX:
            _refuse(f"{name!r} has a shape beyond 64 bits", key=name)
    return 0 if is_empty else product


def _refuse(
    message: str, *, offset: int | None = None, key: str | None = None
) -> NoReturn:
    raise CorruptCheckpointError(message, key=key, offset=offset)
