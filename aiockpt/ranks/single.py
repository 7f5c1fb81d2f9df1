"""A job of one process, which agrees with itself."""

__all__ = ["SingleRank"]

from collections.abc import Sequence

from aiockpt.manifest import FileEntry


class SingleRank:
    """Rank 0 of 1."""

    rank = 0
    world_size = 1

    async def agree(self, files: Sequence[FileEntry]) -> Sequence[FileEntry]:
        """See `Ranks.agree`."""
        return files
