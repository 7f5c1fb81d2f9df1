"""A job of one process, which agrees with itself."""

__all__ = ["SingleRank"]

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from typing_extensions import override

from aiockpt.ranks.base import Decide, Ranks
from aiockpt.threads import finish, outlast


class SingleRank(Ranks):
    """Rank 0 of 1. Its errors are raised as they are: there is no peer to tell."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        """There is nothing to connect."""
        # By topic, oldest first: done with the error or None when it is decided.
        self._undecided: defaultdict[str, list[asyncio.Future[Exception | None]]]
        self._undecided = defaultdict(list)

    @override
    async def consult(
        self,
        topic: str,
        word: bytes,
        decide: Decide,
        *,
        group: Sequence[int] | None = None,
    ) -> bytes:
        """See `Ranks.consult`: all words are there at once, it is too late to cancel."""
        decided: asyncio.Future[Exception | None]
        decided = asyncio.get_running_loop().create_future()
        self._undecided[topic].append(decided)
        failure: Exception | None = None
        try:
            return await finish(decide([word]))
        except Exception as error:
            failure = error
            raise
        finally:
            self._undecided[topic].remove(decided)
            if not self._undecided[topic]:
                del self._undecided[topic]
            decided.set_result(failure)
            del decided, failure  # as in `threads.settle`

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
        """See `Ranks.object`; `error` itself where it is not too late."""
        undecided = self._undecided.get(topic)
        return await outlast(undecided[0]) if undecided else error

    @override
    async def insist(self, topic: str) -> None:
        """See `Ranks.insist`: there is nobody who could have been told."""

    @override
    async def close(self) -> None:
        """See `Ranks.close`."""
