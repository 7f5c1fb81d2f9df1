"""Staging of tensors in host memory: plain memory copies in a thread."""

__all__ = ["HostStager"]

from collections.abc import Sequence
from concurrent.futures import Executor

from aiockpt.errors import StagingError
from aiockpt.image import Chunk
from aiockpt.memory import copy_bytes
from aiockpt.ring import Lease
from aiockpt.staging.base import Source
from aiockpt.threads import run_blocking


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
        address = source.storage.data_ptr() + source.start + start
        copy_bytes(lease.address + at, address, nbytes)
