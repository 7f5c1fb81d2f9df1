"""Jobs in one process: several members and a hub, over loopback sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from typing_extensions import override

from aiockpt.ranks.hub import Hub
from aiockpt.ranks.link import HubConnection, LocalLink, dial
from aiockpt.ranks.member import Door, Link, Member
from aiockpt.ranks.messages import Hello
from aiockpt.ranks.server import HubServer
from gates import LIMIT_S

TOKEN = "the job's"  # noqa: S105


class StarDoor(Door):
    """Rank 0 holds the hub; the others know where it is."""

    def __init__(self, star: "Star", rank: int) -> None:
        self._star = star
        self._rank = rank
        self.connection: HubConnection | None = None
        self.num_connects = 0

    @override
    async def connect(self, member: Member) -> Link:
        self.num_connects += 1
        if self._rank == 0:
            return LocalLink(self._star.server.hub, member)
        hello = Hello(TOKEN, self._rank, self._star.world_size)
        port = self._star.server.port
        self.connection = await dial(
            "127.0.0.1", port, lambda: HubConnection(hello, member)
        )
        return self.connection

    @override
    async def close(self) -> None:
        if self._rank == 0:
            await self._star.server.close()


@dataclass
class Star:
    """A job; `members` and `doors` by rank."""

    server: HubServer
    world_size: int
    timeout_s: float
    members: list[Member]
    doors: list[StarDoor]

    def kill(self, rank: int) -> None:
        """What a SIGKILL of the rank looks like to the others."""
        if rank:
            self.doors[rank].connection.abort()
        else:
            self.server._server.close()
            for guest in list(self.server._guests):
                guest.abort()

    async def all_connected(self) -> None:
        """Returns when every member has consulted once."""
        await consult_all(self.members, "hello")


@contextlib.asynccontextmanager
async def star(world_size: int, timeout_s: float = LIMIT_S) -> AsyncIterator[Star]:
    """A job whose members have not connected; all are closed in the end."""
    server = HubServer(Hub(world_size, timeout_s), world_size, TOKEN)
    await server.start()
    job = Star(server, world_size, timeout_s, [], [])
    for rank in range(world_size):
        job.doors.append(StarDoor(job, rank))
        job.members.append(
            Member(rank, world_size, job.doors[rank], timeout_s=timeout_s)
        )
    try:
        yield job
    finally:
        for member in reversed(job.members):
            await member.close()


async def joined(words: Sequence[bytes]) -> bytes:
    """A decision that tells what was decided on."""
    return b"|".join(words)


async def never(words: Sequence[bytes]) -> bytes:
    """For those who must not decide."""
    raise AssertionError("this one was not to decide")


async def consult_all(
    members: Sequence[Member], topic: str, group: Sequence[int] | None = None
) -> list[bytes | BaseException]:
    """All consult at once; their outcomes."""
    calls = [m.consult(topic, b"%d" % m.rank, joined, group=group) for m in members]
    return await asyncio.gather(*calls, return_exceptions=True)


async def settled(is_so: Callable[[], bool]) -> None:
    """Returns once it is so: what the loop has to do for it is a few turns."""
    async with asyncio.timeout(LIMIT_S):
        while not is_so():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)


async def outcomes(calls: Iterable[Awaitable[object]]) -> list[object]:
    """What each of the calls returned or raised."""
    return await asyncio.gather(*calls, return_exceptions=True)
