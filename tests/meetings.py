"""A job whose ranks are tasks of one loop: the ranks port, kept in memory."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from aiockpt.errors import EngineStateError, InvalidArgumentError, PeerError
from aiockpt.ranks.base import Decide, Ranks
from aiockpt.threads import outlast


class Job:
    """All ranks of a job.

    Attributes:
        log: What was asked of the port, as `(rank, call, topic)`.
        on_call: Awaited first of all, with the same.
    """

    def __init__(self, world_size: int) -> None:
        self.log: list[tuple[int, str, str]] = []
        self.on_call: Callable[[int, str, str], Awaitable[object]] | None = None
        self.ranks = [_Rank(self, rank, world_size) for rank in range(world_size)]
        self._meetings: dict[tuple[str, int], _Meeting] = {}
        self._calls: Counter[tuple[int, str]] = Counter()

    async def meeting(
        self, rank: int, call: str, topic: str, members: Sequence[int]
    ) -> "_Meeting":
        self.log.append((rank, call, topic))
        if self.on_call is not None:
            await self.on_call(rank, call, topic)
        key = topic, self._calls[rank, topic]
        self._calls[rank, topic] += 1
        meeting = self._meetings.setdefault(key, _Meeting(tuple(members)))
        assert meeting.members == tuple(members), "members disagree on who they are"
        assert rank in meeting.members
        return meeting

    def withdraw(self, rank: int, topic: str) -> None:
        self._calls[rank, topic] -= 1

    @property
    def unfinished(self) -> list[tuple[str, int]]:
        """Meetings that some members came to, and others neither came nor objected."""
        return [
            key
            for key, meeting in self._meetings.items()
            if meeting.words and not meeting.outcome.done()
        ]


class _Meeting:
    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.words: dict[int, bytes] = {}
        self.chair_decides: Decide | None = None
        self.deciding: asyncio.Task[None] | None = None
        self.outcome: asyncio.Future[bytes | Callable[[], Exception]] = (
            asyncio.get_running_loop().create_future()
        )

    async def decide(self) -> None:
        assert self.chair_decides is not None
        try:
            words = [self.words[rank] for rank in self.members]
            self.outcome.set_result(await self.chair_decides(words))
        except (InvalidArgumentError, EngineStateError) as error:
            kind, text = type(error), str(error)
            self.outcome.set_result(lambda: kind(text))
        except Exception as error:  # noqa: BLE001 - the members raise it
            self.outcome.set_result(_failure(self.members[0], "decide", error))


class _Rank(Ranks):
    def __init__(self, job: Job, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._job = job

    async def consult(
        self,
        topic: str,
        word: bytes,
        decide: Decide,
        *,
        group: Sequence[int] | None = None,
    ) -> bytes:
        members = group if group is not None else range(self.world_size)
        meeting = await self._job.meeting(self.rank, "consult", topic, members)
        if self.rank == meeting.members[0]:
            meeting.chair_decides = decide
        meeting.words[self.rank] = word
        if len(meeting.words) == len(meeting.members) and not meeting.outcome.done():
            meeting.deciding = asyncio.create_task(meeting.decide())
        while not meeting.outcome.done():
            try:
                await asyncio.wait([meeting.outcome])
            except asyncio.CancelledError:
                if meeting.deciding is None:
                    del meeting.words[self.rank]
                    self._job.withdraw(self.rank, topic)
                    raise
        if meeting.deciding is not None:
            await outlast(meeting.deciding)
        outcome = meeting.outcome.result()
        if isinstance(outcome, bytes):
            return outcome
        raise outcome()

    async def object(
        self,
        topic: str,
        error: Exception,
        phase: str,
        *,
        group: Sequence[int] | None = None,
        scope: str = "",
    ) -> Exception | None:
        members = group if group is not None else range(self.world_size)
        meeting = await outlast(
            self._job.meeting(self.rank, f"object in {phase}", topic, members)
        )
        if not meeting.outcome.done():
            assert meeting.deciding is None
            meeting.outcome.set_result(_failure(self.rank, phase, error))
        outcome = meeting.outcome.result()
        return None if isinstance(outcome, bytes) else outcome()

    async def insist(self, topic: str) -> None:
        pass

    async def close(self) -> None:
        pass


def _failure(rank: int, phase: str, error: Exception) -> Callable[[], Exception]:
    def failure() -> Exception:
        peer_error = PeerError(f"rank {rank}: {error}", rank=rank, phase=phase)
        peer_error.__cause__ = error
        return peer_error

    return failure
