"""Staging of tensors in host memory: plain memory copies in a thread."""

__all__ = ["HostStager"]

import ctypes
from collections.abc import Sequence
from concurrent.futures import Executor

from aiockpt.errors import StagingError
from aiockpt.image import Chunk
from aiockpt.ring import Lease
from aiockpt.staging.base import Source
from aiockpt.threads import run_blocking

_SIGNATURE = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

# Called through `CDLL` the interpreter's lock is given up during the copy. While a
# trainer runs pure Python, getting it back may take a whole switch interval (5 ms),
# so small copies keep it: below this size a copy takes microseconds.
_copy_unlocked = ctypes.CDLL(None).memmove
_copy_unlocked.argtypes = _SIGNATURE
_copy_unlocked.restype = ctypes.c_void_p
_copy_locked = ctypes.PyDLL(None).memmove
_copy_locked.argtypes = _SIGNATURE
_copy_locked.restype = ctypes.c_void_p
_UNLOCK_BYTES = 128 << 10


class HostStager:
    """Copies from CPU storages, one chunk after the other, in `copiers`."""

    def __init__(self, copiers: Executor) -> None:
        """Uses `copiers` (one thread keeps the chunks in order)."""
        self._copiers = copiers

    def check(self, sources: Sequence[Source]) -> None:
        """See `Stager.check`."""
        for source in sources:
            if not isinstance(source, bytes) and source.storage.device.type != "cpu":
                device = source.storage.device
                message = f"tensors on {device} cannot be staged by this engine"
                raise StagingError(message)

    async def fill(self, lease: Lease, chunk: Chunk, sources: Sequence[Source]) -> None:
        """See `Stager.fill`."""
        await run_blocking(self._copiers, _fill, lease, chunk, sources)


def _fill(lease: Lease, chunk: Chunk, sources: Sequence[Source]) -> None:
    view = lease.view
    for at, data in chunk.literals:
        view[at : at + len(data)] = data
    for at, record, start, nbytes in chunk.copies:
        source = sources[record]
        if isinstance(source, bytes):
            view[at : at + nbytes] = source[start : start + nbytes]
            continue
        copy = _copy_unlocked if nbytes >= _UNLOCK_BYTES else _copy_locked
        address = source.storage.data_ptr() + source.start + start
        copy(lease.address + at, address, nbytes)
