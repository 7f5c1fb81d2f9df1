"""The ranks port: how the processes of one job agree that a tag is complete."""

__all__ = ["Ranks"]

from collections.abc import Sequence
from typing import Protocol

from aiockpt.manifest import FileEntry


class Ranks(Protocol):
    """The job that this process is a part of.

    Attributes:
        rank: This process, from 0.
        world_size: Processes in the job.
    """

    rank: int
    world_size: int

    async def agree(self, files: Sequence[FileEntry]) -> Sequence[FileEntry]:
        """All ranks' files, once every rank has said that its own are durable.

        Raises:
            PeerError: A rank failed or was not heard of in time.

        If cancelled: no rank publishes.
        """
        ...
