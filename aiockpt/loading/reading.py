"""Reading: bytes of a file into memory, checked on the way.

What to read is a `Region`. Where to is plain memory: a storage's or a tensor's.
A *fetch* turns a region into a storage that holds its bytes; the loader asks for
regions in the order in which the pickle first refers to them, and does not care
how a fetch goes about it.
"""

__all__ = [
    "Fetch",
    "Region",
    "Window",
    "check_header",
    "checksum_mismatch",
    "compare_header",
    "named",
    "open_mapping",
    "read_bytes",
    "read_region",
    "read_storage",
    "storage_view",
    "tensor_view",
]

import ctypes
import mmap
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from isal.isal_zlib import crc32

from aiockpt.errors import CorruptCheckpointError
from aiockpt.formats.zip_directory import Entry, data_offset
from aiockpt.storage.base import ReadFile

# Large enough to keep a disk busy, small enough to be summed while in the cache.
_BLOCK_BYTES: Final = 4 << 20


class Region(NamedTuple):
    """Bytes of a file that belong together.

    Attributes:
        name: Name of the record or the tensor, for messages.
        offset: File offset of the first byte.
        nbytes: Length.
        crc32: Their CRC-32, or None where it is not known or not to be checked.
        entry: The zip record that they are, if so. Where its local header says
            otherwise than the directory, they are not to be handed out.
    """

    name: str
    offset: int
    nbytes: int
    crc32: int | None
    entry: Entry | None = None

    @property
    def start(self) -> int:
        """File offset of the first byte that has a say: the header's, or the data's."""
        return self.offset if self.entry is None else self.entry.header_offset

    @property
    def stop(self) -> int:
        """File offset behind the last byte."""
        return self.offset + self.nbytes


class Window(NamedTuple):
    """Where the elements of one strided tensor stand.

    Attributes:
        region: The storage that has them.
        dtype: Element type.
        shape: Size of each dimension `(ndim,)`.
        stride: Distance between neighbours, in elements `(ndim,)`.
        offset: First element, from the region's start in elements.
        location: Where the tensor was saved, as torch tags it.
    """

    region: Region
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    location: str


Fetch = Callable[[Region], torch.UntypedStorage]
"""Gives the bytes of a region as a new storage in host memory."""


def check_header(file: ReadFile, region: Region) -> None:
    """Holds a zip record's local header against what the directory says.

    Raises:
        CorruptCheckpointError: They do not agree.
        StorageError: The file system refused.
    """
    if region.entry is not None:
        header = bytearray(region.entry.header_nbytes)
        file.read_into(region.start, memoryview(header))
        compare_header(file, region, bytes(header))


def compare_header(file: ReadFile, region: Region, header: bytes) -> None:
    """As `check_header`, for a header that has been read (at least its fixed part)."""
    assert region.entry is not None
    try:
        if data_offset(region.entry, header) == region.offset:
            return
    except CorruptCheckpointError:
        with named(file):
            raise
    text = f"{file.path}: the local header of {region.name!r} leads elsewhere"
    raise CorruptCheckpointError(text, path=file.path, offset=region.start)


def read_region(file: ReadFile, region: Region, view: memoryview) -> None:
    """Fills `view`, as long as the region, with the region's bytes.

    Raises:
        CorruptCheckpointError: They do not have the region's checksum; the view
            holds what was read.
        StorageError: The file system refused.
    """
    check_header(file, region)
    checksum = 0
    for start in range(0, region.nbytes, _BLOCK_BYTES):
        block = view[start : start + _BLOCK_BYTES]
        file.read_into(region.offset + start, block)
        if region.crc32 is not None:
            checksum = crc32(block, checksum)
    if region.crc32 not in (None, checksum):
        raise checksum_mismatch(file, region)


def checksum_mismatch(file: ReadFile, region: Region) -> CorruptCheckpointError:
    """The error for a region whose bytes do not have its checksum."""
    text = (
        f"{file.path}: the {region.nbytes} bytes of {region.name!r} at offset "
        f"{region.offset} do not have the checksum that was written with them"
    )
    return CorruptCheckpointError(text, path=file.path, offset=region.offset)


def read_bytes(file: ReadFile, region: Region) -> bytes:
    """Returns the region's bytes; errors as those of `read_region`."""
    data = bytearray(region.nbytes)
    read_region(file, region, memoryview(data))
    return bytes(data)


def content_of(file: ReadFile, region: Region) -> tuple[int, int]:
    """Length and CRC-32 of a region's bytes, as they are; errors as `StorageError`."""
    checksum, block = 0, memoryview(bytearray(min(region.nbytes, _BLOCK_BYTES)))
    for start in range(0, region.nbytes, _BLOCK_BYTES):
        part = block[: min(_BLOCK_BYTES, region.nbytes - start)]
        file.read_into(region.offset + start, part)
        checksum = crc32(part, checksum)
    return region.nbytes, checksum


def read_storage(file: ReadFile, region: Region) -> torch.UntypedStorage:
    """Returns the region's bytes in new memory; errors as those of `read_region`."""
    memory = torch.empty(region.nbytes, dtype=torch.uint8, device="cpu")
    storage = memory.untyped_storage()
    read_region(file, region, storage_view(storage))
    return storage


def open_mapping(file: ReadFile) -> Fetch:
    """Maps the file and returns a fetch that slices the mapping.

    Nothing is read until it is looked at, so nothing is checked. Writing to a
    storage changes private memory, never the file. The mapping lives as long as
    any of its storages; `file` may be closed.
    """
    mapping = mmap.mmap(file.fileno(), file.nbytes, access=mmap.ACCESS_COPY)
    whole = torch.frombuffer(mapping, dtype=torch.uint8).untyped_storage()

    def fetch(region: Region) -> torch.UntypedStorage:
        check_header(file, region)
        piece: torch.UntypedStorage = whole[
            region.offset : region.offset + region.nbytes
        ]
        return piece

    return fetch


def storage_view(storage: torch.UntypedStorage) -> memoryview:
    """The memory of a storage in host memory, kept alive by the view."""
    return _view(storage, 0, storage.nbytes())


def tensor_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor in host memory, kept alive by the view."""
    start = tensor.storage_offset() * tensor.itemsize
    return _view(tensor.untyped_storage(), int(start), tensor.nbytes)


def _view(storage: torch.UntypedStorage, start: int, nbytes: int) -> memoryview:
    memory = (ctypes.c_ubyte * nbytes).from_address(storage.data_ptr() + start)
    # `from_address` keeps nothing alive, but the array lives as long as its view.
    vars(memory)["storage"] = storage
    return memoryview(memory).cast("B")


@contextmanager
def named(file: ReadFile) -> Generator[None]:
    """Puts the file's path into errors of code that does not know it."""
    try:
        yield
    except CorruptCheckpointError as error:
        if error.path is not None:
            raise
        text = f"{file.path}: {error}"
        raise CorruptCheckpointError(
            text, path=file.path, key=error.key, offset=error.offset
        ) from error
