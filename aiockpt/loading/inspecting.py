"""What is in a file, told without running anything of it or reading a tensor."""

__all__ = [
    "FileInfo",
    "RecordInfo",
    "TensorInfo",
    "inspect_file",
    "inspect_safetensors",
    "inspect_torch",
]

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from aiockpt.formats.safetensors import Header
from aiockpt.loading.container import Container, container_of
from aiockpt.loading.reading import named
from aiockpt.loading.safetensors_loading import read_header
from aiockpt.loading.torch_file import TorchFile
from aiockpt.outline import Leaf, TensorOutline, leaves, tensors_in
from aiockpt.storage.base import ReadFile


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        key: Key path. Of a tensor that is made of several (sparse, nested,
            distributed), or of tensors inside some other object, each is listed,
            with `#0`, `#1`, ... behind the key.
        dtype: Element type.
        shape: Size of each dimension `(ndim,)`.
        nbytes: Bytes of its elements; for a view, fewer than its record's.
        record: The record with its bytes; None for a meta tensor, which has none.
        shared_with: Key of the first tensor with the same record, if not this one.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    record: str | None
    shared_with: str | None = None


@dataclass(frozen=True, slots=True)
class RecordInfo:
    """One run of bytes of a file.

    Attributes:
        name: The record, or the tensor in a safetensors file.
        offset: File offset of the first byte.
        nbytes: Length.
        crc32: Checksum by the file's own account; None where it has none.
    """

    name: str
    offset: int
    nbytes: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What is in a file.

    Attributes:
        container: Its format.
        nbytes: Its length.
        tensors: In the order of the pickle, or of their bytes in safetensors.
        records: In the order of the file's directory.
        num_objects: Number of leaves that have no tensor in them.
        metadata: The small records of a torch file, the metadata of safetensors.
    """

    container: Container
    nbytes: int
    tensors: tuple[TensorInfo, ...]
    records: tuple[RecordInfo, ...]
    num_objects: int
    metadata: Mapping[str, str]


def inspect_file(file: ReadFile) -> FileInfo:
    """Returns what is in the file. Runs nothing, reads no tensor's bytes.

    Raises:
        CorruptCheckpointError: The file is cut off or malformed, or describes
            tensors that are not in it.
        InvalidArgumentError: Only another reader loads it.
        StorageError: The file system refused.
    """
    with named(file):
        if container_of(file) is Container.SAFETENSORS:
            return inspect_safetensors(file, read_header(file))
        return inspect_torch(TorchFile(file))


def inspect_torch(records: TorchFile) -> FileInfo:
    """What is in a torch file; errors as those of `inspect_file`."""
    tensors: list[TensorInfo] = []
    first: dict[str, str] = {}
    num_objects = 0
    for leaf in leaves(records.root):
        found = list(_tensors_of(leaf))
        num_objects += not found
        for key, tensor in found:
            record = _checked_record(records, key, tensor)
            owner = key if record is None else first.setdefault(record, key)
            shared_with = None if owner == key else owner
            sizes = tensor.dtype, tensor.shape, tensor.nbytes
            tensors.append(TensorInfo(key, *sizes, record, shared_with))
    return FileInfo(
        container=Container.TORCH,
        nbytes=records.file.nbytes,
        tensors=tuple(tensors),
        records=tuple(_record_infos(records)),
        num_objects=num_objects,
        metadata=records.notes(),
    )


def _tensors_of(leaf: Leaf) -> Iterator[tuple[str, TensorOutline]]:
    if isinstance(leaf.node, TensorOutline):
        yield leaf.key, leaf.node
    else:
        for number, tensor in enumerate(tensors_in(leaf.node)):
            yield f"{leaf.key}#{number}", tensor


def _checked_record(records: TorchFile, key: str, tensor: TensorOutline) -> str | None:
    if tensor.storage_key is None:
        return None
    return records.tensor_region(key, tensor).name


def _record_infos(records: TorchFile) -> Iterator[RecordInfo]:
    for name, entry in records.entries.items():
        crc32 = entry.crc32 if records.is_summed else None
        yield RecordInfo(name, records.region(name).offset, entry.nbytes, crc32)


def inspect_safetensors(file: ReadFile, header: Header) -> FileInfo:
    """What is in a safetensors file with this header."""
    entries = header.entries.values()
    return FileInfo(
        container=Container.SAFETENSORS,
        nbytes=file.nbytes,
        tensors=tuple(
            TensorInfo(entry.name, entry.dtype, entry.shape, entry.nbytes, entry.name)
            for entry in entries
        ),
        records=tuple(
            RecordInfo(entry.name, entry.start, entry.nbytes, None) for entry in entries
        ),
        num_objects=0,
        metadata=header.metadata or {},
    )
