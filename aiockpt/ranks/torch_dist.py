"""The ranks of a `torch.distributed` job. Its process groups see nothing of it."""

__all__ = ["TorchDistRanks", "detect"]

import asyncio
import itertools
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import torch.distributed as dist
from typing_extensions import override

from aiockpt.ranks.addresses import Address, address_of, hosts_to_try
from aiockpt.ranks.base import Ranks
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.link import HubConnection, LocalLink, dial
from aiockpt.ranks.member import Door, Link, Member
from aiockpt.ranks.messages import Hello
from aiockpt.ranks.server import HubServer
from aiockpt.ranks.single import SingleRank
from aiockpt.threads import WorkerPool, run_interruptibly

if TYPE_CHECKING:
    from aiockpt.ranks.store import StoreTalk

# For one address: a wrong one may swallow what is sent to it.
_DIAL_S = 5.0

# How often ranks of one name have connected in this process, so that each job of them
# has an address of its own.
_uses: defaultdict[str, Iterator[int]] = defaultdict(partial(itertools.count, 1))


def detect(name: str, timeout_s: float) -> Ranks:
    """The ranks of the job that this process is a part of, as it is now.

    Args:
        name: The same on all ranks, and not used twice at the same time.
        timeout_s: As for `TorchDistRanks`.
    """
    is_job = dist.is_available() and dist.is_initialized()
    if not is_job or dist.get_world_size() == 1:
        return SingleRank()
    return TorchDistRanks(name, timeout_s=timeout_s)


class TorchDistRanks(Member):
    """A rank of the default process group, connected to a hub in rank 0.

    The group itself is asked for rank and size, and its store once, for the hub's
    address. The hub begins with rank 0's first call: until then the others wait.
    """

    def __init__(self, name: str, *, timeout_s: float) -> None:
        """Connects nothing yet.

        Args:
            name: The same on all ranks; which then have to use ranks of this name in
                the same order.
            timeout_s: How long ranks wait for each other.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        door = _StoreDoor(name, rank, world_size, timeout_s)
        super().__init__(rank, world_size, door, timeout_s=timeout_s)


class _StoreDoor(Door):
    """Finds the hub through the default store; in rank 0, it makes the hub."""

    def __init__(self, name: str, rank: int, world_size: int, timeout_s: float) -> None:
        self._name = name
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._key: str | None = None
        self._server: HubServer | None = None

    @override
    async def connect(self, member: Member) -> Link:
        # Another try is the same use: it must find what the first was looking for.
        if self._key is None:
            self._key = f"aiockpt/{self._name}/{next(_uses[self._name])}"
        from aiockpt.ranks.store import StoreTalk

        talk = StoreTalk()
        pool = WorkerPool(1, "aiockpt-ranks")
        try:
            if self._rank == 0:
                server = await self._started()
                work = partial(_tell, talk, self._key, server.port, server.token)
                await run_interruptibly(pool, talk.stop, work)
                return LocalLink(server.hub, member)
            search = partial(_find, talk, self._key, self._timeout_s)
            address, hosts = await run_interruptibly(pool, talk.stop, search)
        finally:
            pool.shutdown(wait=False)
        return await self._dial(address, hosts, member)

    async def _started(self) -> HubServer:
        if self._server is None:
            hub = Hub(self._world_size, self._timeout_s)
            server = HubServer(hub, self._world_size, secrets.token_hex(16))
            await server.start()
            self._server = server
        return self._server

    async def _dial(
        self, address: Address, hosts: Sequence[str], member: Member
    ) -> Link:
        hello = Hello(address.token, self._rank, self._world_size)
        make = partial(HubConnection, hello, member)
        failures: list[str] = []
        for host in hosts:
            try:
                async with asyncio.timeout(_DIAL_S):
                    return await dial(host, address.port, make)
            except OSError as error:
                failures.append(f"{host}: {str(error) or 'no answer'}")
        raise ConnectionError(f"port {address.port} ({'; '.join(failures)})")

    @override
    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()


def _tell(talk: "StoreTalk", key: str, port: int, token: str) -> None:
    """Lets the other ranks know where the hub is."""
    talk.set(key, msgspec.json.encode(address_of(port, token, talk.host)))


def _find(talk: "StoreTalk", key: str, timeout_s: float) -> tuple[Address, list[str]]:
    """The hub's address, and where it can be tried from here."""
    value = talk.get(key, timeout_s)
    try:
        address = msgspec.json.decode(value, type=Address)
    except msgspec.MsgspecError as error:
        raise ConnectionError(f"the store holds no address: {error}") from error
    return address, hosts_to_try(address, talk.host)
