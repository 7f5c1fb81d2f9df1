"""Loading from a plain file: its bytes, all of them."""

__all__ = ["is_as_written", "load_plain"]

from typing import Final

from isal.isal_zlib import crc32

from aiockpt.errors import CorruptCheckpointError
from aiockpt.loading.reader import Reader
from aiockpt.storage.base import ReadFile

# Between two of these a load can be told to end.
_BLOCK_BYTES: Final = 4 << 20


def load_plain(file: ReadFile, expected_crc32: int | None, reader: Reader) -> bytes:
    """Returns the whole file, of which nothing is said but its checksum.

    Args:
        file: The file, open for reading; stays open and the caller's.
        expected_crc32: What the manifest says, if one does.
        reader: Tells whether the load goes on.

    Raises:
        CorruptCheckpointError: The file was cut off, or has other bytes.
        StorageError: The file system refused.
    """
    data = bytearray(file.nbytes)
    for start in range(0, len(data), _BLOCK_BYTES):
        reader.check()
        # Released: a view that a traceback kept would keep the bytes from being freed.
        with memoryview(data)[start : start + _BLOCK_BYTES] as view:
            file.read_into(start, view)
    found = crc32(data)
    if expected_crc32 not in (None, found):
        text = (
            f"{file.path}: not the file that the manifest describes: its CRC-32 is "
            f"{found:08x} instead of {expected_crc32:08x}"
        )
        raise CorruptCheckpointError(text, path=file.path)
    return bytes(data)


def is_as_written(file: ReadFile, expected_crc32: int) -> bool:
    """Whether the file has the manifest's checksum; it reads all of it, and blocks.

    That is all that can be said of a plain file: no container vouches for it.

    Raises:
        CorruptCheckpointError: The file was cut off.
        StorageError: The file system refused.
    """
    block = bytearray(min(_BLOCK_BYTES, file.nbytes))
    total = 0
    for start in range(0, file.nbytes, _BLOCK_BYTES):
        with memoryview(block)[: file.nbytes - start] as view:
            file.read_into(start, view)
            total = crc32(view, total)
    return total == expected_crc32
