"""The staging port: how a chunk of the ring is filled from tensors."""

__all__ = ["Copying", "Source", "Stager"]

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from aiockpt.image import Chunk
from aiockpt.ring import Lease
from aiockpt.storage_spans import Span

# Where the bytes of one record come from: known bytes, or a part of a storage.
Source: TypeAlias = bytes | Span


class Copying(Protocol):
    """Copies into a chunk that devices are at."""

    async def ended(self) -> None:
        """Returns when no device reads or writes the chunk any more.

        Raises:
            StagingError: A copy failed.

        If cancelled: the copies are waited for first.
        """
        ...


class Stager(Protocol):
    """Copies literals and records' pieces into chunks."""

    def check(self, sources: Sequence[Source]) -> None:
        """Returns if every source is on a device that this stager copies from.

        Blocks no more than an attribute's look-up per source.

        Raises:
            StagingError: One is not; the message names the device.
        """
        ...

    async def fill(
        self, lease: Lease, chunk: Chunk, sources: Sequence[Source]
    ) -> Copying | None:
        """Makes `lease` hold the chunk, except what its seals will write.

        Chunks of one file are filled in the order in which `fill` was called.

        Returns:
            None where the chunk is filled; else what must end, even if the caller is
            cancelled, before the lease does. Sources are then read until it has.

        Raises:
            StagingError: A copy failed.

        If cancelled: a copy under way is waited for; the lease is then unread.
        """
        ...
