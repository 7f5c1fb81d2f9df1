"""Staging of tensors in host memory: plain memory copies in a thread."""

__all__ = ["HostStager", "copy_host_piece", "copy_literals"]

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Final

import torch

from aiockpt.errors import StagingError
from aiockpt.image import Chunk, Copy
from aiockpt.memory import copy_bytes
from aiockpt.ring import Lease
from aiockpt.staging.base import Source
from aiockpt.threads import run_blocking

_CPU: Final = torch.device("cpu")


class HostStager:
    """Copies from CPU storages, one chunk after the other, in `copiers`."""

    def __init__(self, copiers: Executor) -> None:
        """Uses `copiers` (one thread keeps the chunks in order)."""
        self._copiers = copiers

    def check(self, sources: Sequence[Source]) -> None:
        """See `Stager.check`."""
        for source in sources:
            if isinstance(source, bytes):
                continue
            device = source.storage.device
            # Not by its `type`, which takes many times as long.
            if device != _CPU:
                message = f"tensors on {device} cannot be staged by this engine"
                raise StagingError(message)

    async def fill(self, lease: Lease, chunk: Chunk, sources: Sequence[Source]) -> None:
        """See `Stager.fill`; the chunk is filled when this returns."""
        await run_blocking(self._copiers, _fill, lease, chunk, sources)


def _fill(lease: Lease, chunk: Chunk, sources: Sequence[Source]) -> None:
    copy_literals(lease, chunk)
    for copy in chunk.copies:
        copy_host_piece(lease, copy, sources[copy.record])


def copy_literals(lease: Lease, chunk: Chunk) -> None:
    """Puts the chunk's known bytes where they belong."""
    view = lease.view
    for at, data in chunk.literals:
        view[at : at + len(data)] = data


def copy_host_piece(lease: Lease, copy: Copy, source: Source) -> None:
    """Puts a record's piece, which is in host memory, where it belongs."""
    at, _, start, nbytes = copy
    if isinstance(source, bytes):
        lease.view[at : at + nbytes] = source[start : start + nbytes]
    else:
        if source.storage.nbytes() < source.start + start + nbytes:
            text = "a tensor's memory was given back while it was being saved"
            raise StagingError(text)
        address = source.storage.data_ptr() + source.start + start
        copy_bytes(lease.address + at, address, nbytes)
