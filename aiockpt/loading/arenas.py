"""Fresh host memory that a range of a file is read into, as it stands there.

Direct reads need whole blocks at aligned addresses, and tensors stand where they
stand. So the memory takes the blocks around the range, and a storage is a slice of
it: nothing is copied after the read.
"""

__all__ = ["Arena"]

import contextlib
import mmap

import torch


class Arena:
    """One anonymous mapping, freed with the last storage that shows a part of it.

    Attributes:
        view: Its bytes, writable, page-aligned.
        address: Where they are in memory.
    """

    def __init__(self, nbytes: int) -> None:
        """Reserves `nbytes` bytes; the kernel gives them as they are first written.

        Raises:
            MemoryError: There is no such memory.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            region = mmap.mmap(-1, nbytes, flags=flags)
        except OSError as error:
            raise MemoryError(f"{nbytes} bytes cannot be had: {error}") from error
        # Advice, which a kernel may refuse. Zeroing small pages one fault at a time
        # takes as long as reading them from a disk does.
        with contextlib.suppress(OSError, AttributeError):
            region.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(region)
        self._storage = torch.frombuffer(region, dtype=torch.uint8).untyped_storage()
        self.address = self._storage.data_ptr()

    def storage(self, at: int, nbytes: int) -> torch.UntypedStorage:
        """The bytes from `at` as a storage, which keeps the whole arena alive."""
        piece: torch.UntypedStorage = self._storage[at : at + nbytes]
        return piece
