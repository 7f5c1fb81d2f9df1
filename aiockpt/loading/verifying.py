"""Checking every byte of a file, once."""

__all__ = ["verify_file"]

from collections.abc import Callable
from functools import partial

from aiockpt.errors import CorruptCheckpointError
from aiockpt.loading.bulk import Reads
from aiockpt.loading.container import Container, container_of
from aiockpt.loading.reader import Reader
from aiockpt.loading.reading import Region, checksum_mismatch, named
from aiockpt.loading.safetensors_loading import read_header, tensor_region
from aiockpt.loading.torch_file import TorchFile
from aiockpt.storage.base import ReadFile

Mismatch = Callable[[Region], CorruptCheckpointError]


def verify_file(
    file: ReadFile, reader: Reader, progress: Callable[[int], None] | None = None
) -> int:
    """Reads the whole file, checks what it says of itself, returns its CRC-32.

    Checked are the structure and, of a torch file that has them, the checksums of
    all records. Whether it is the file that was saved can only be told by comparing
    the result with the manifest's.

    Args:
        file: The file, open for reading; stays open and the caller's.
        reader: What it is read with.
        progress: Called by the workers with the number of further bytes read.

    Raises:
        CorruptCheckpointError: The file is cut off or malformed, or a record does
            not have its checksum; names the tensor and the offset where it can.
        InvalidArgumentError: Only another reader loads it.
        StorageError: The file system refused.
    """
    with named(file):
        if container_of(file) is Container.SAFETENSORS:
            regions = [*map(tensor_region, read_header(file).entries.values())]
            mismatch: Mismatch = partial(checksum_mismatch, file)
        else:
            records = TorchFile(file)
            regions = [*map(records.region, records.entries)]
            mismatch = records.mismatch
        reads = Reads(regions, mismatch, is_whole=True, progress=progress)
        with reader.reading(file, reads) as bulk:
            return bulk.wait()
