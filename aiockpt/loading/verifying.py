"""Checking every byte of a file, once."""

__all__ = ["verify_file"]

from collections.abc import Callable, Sequence
from typing import Final

from isal.isal_zlib import crc32

from aiockpt.loading.container import Container, container_of
from aiockpt.loading.reading import Region, checksum_mismatch, named
from aiockpt.loading.safetensors_loading import read_header
from aiockpt.loading.torch_file import TorchFile
from aiockpt.storage.base import ReadFile

_BLOCK_BYTES: Final = 4 << 20


def verify_file(file: ReadFile, progress: Callable[[int], None] | None = None) -> int:
    """Reads the whole file, checks what it says of itself, returns its CRC-32.

    Checked are the structure and, of a torch file that has them, the checksums of
    all records. Whether it is the file that was saved can only be told by comparing
    the result with the manifest's.

    Args:
        file: The file, open for reading; stays open and the caller's.
        progress: Called with the number of further bytes read, every few MiB.

    Raises:
        CorruptCheckpointError: The file is cut off or malformed, or a record does
            not have its checksum; names the tensor and the offset where it can.
        InvalidArgumentError: Only another reader loads it.
        StorageError: The file system refused.
    """
    with named(file):
        if container_of(file) is Container.SAFETENSORS:
            read_header(file)
            return _verify(file, None, progress)
        return _verify(file, TorchFile(file), progress)


def _verify(
    file: ReadFile, records: TorchFile | None, progress: Callable[[int], None] | None
) -> int:
    regions = [] if records is None else [*map(records.region, records.entries)]
    sums = _Sums(sorted(regions, key=lambda region: region.offset))
    whole = 0
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, file.nbytes)))
    for start in range(0, file.nbytes, _BLOCK_BYTES):
        block = buffer[: file.nbytes - start]
        file.read_into(start, block)
        whole = crc32(block, whole)
        bad = sums.add(start, block)
        if records is not None and bad is not None:
            with records.keyed(bad.name):
                raise checksum_mismatch(file, bad)
        if progress is not None:
            progress(len(block))
    return whole


class _Sums:
    """Running checksums of regions that come in the order of their offsets."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = regions
        self._index = 0
        self._sum = 0

    def add(self, start: int, block: memoryview) -> Region | None:
        """Sums the next bytes of the file; returns a region that turned out bad."""
        stop = start + len(block)
        while self._index < len(self._regions):
            region = self._regions[self._index]
            end = region.offset + region.nbytes
            first, last = max(region.offset, start), min(end, stop)
            if first > last:
                break
            self._sum = crc32(block[first - start : last - start], self._sum)
            if end > stop:
                break
            if region.crc32 not in (None, self._sum):
                return region
            self._index += 1
            self._sum = 0
        return None
