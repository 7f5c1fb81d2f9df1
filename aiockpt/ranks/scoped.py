"""A view of the ranks with topics of its own."""

__all__ = ["scoped"]

from collections.abc import Sequence

from typing_extensions import override

from aiockpt.ranks.base import Decide, Ranks


def scoped(ranks: Ranks, prefix: str) -> Ranks:
    """The same job, with `prefix` before every topic, so that views do not mix.

    Closing the view closes nothing.
    """
    return _ScopedRanks(ranks, prefix)


class _ScopedRanks(Ranks):
    def __init__(self, ranks: Ranks, prefix: str) -> None:
        self._ranks = ranks
        self._prefix = prefix
        self.rank = ranks.rank
        self.world_size = ranks.world_size

    @override
    async def consult(
        self,
        topic: str,
        word: bytes,
        decide: Decide,
        *,
        group: Sequence[int] | None = None,
    ) -> bytes:
        topic = self._prefix + topic
        return await self._ranks.consult(topic, word, decide, group=group)

    @override
    async def object(
        self,
        topic: str,
        error: Exception,
        phase: str,
        *,
        group: Sequence[int] | None = None,
        scope: str = "",
    ) -> Exception | None:
        topic = self._prefix + topic
        scope = self._prefix + scope if scope else ""
        return await self._ranks.object(topic, error, phase, group=group, scope=scope)

    @override
    async def insist(self, topic: str) -> None:
        await self._ranks.insist(self._prefix + topic)

    @override
    async def close(self) -> None:
        """Whoever made the ranks closes them."""
