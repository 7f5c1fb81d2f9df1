"""Two ranks of a job in this process: an engine each, and a real hub between them.

A fault meets the calls of either. What they save together is what `workloads.save`
saves, so that the driver's checks of "save" are those of a pair.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from typing_extensions import override

from aiockpt.errors import (
    CheckpointError,
    EngineStateError,
    PeerError,
    StorageError,
)
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.link import HubConnection, LocalLink, dial
from aiockpt.ranks.member import Door, Link, Member
from aiockpt.ranks.messages import Hello
from aiockpt.ranks.server import HubServer
from aiockpt.testing.faults import Fault, Injection, inject
from faults.driver import Outcome
from gates import LIMIT_S, in_thread
from workloads import SMALL, Engine, state

TOKEN = "the job's"  # noqa: S105
TIMEOUT_S = 30.0
Work = Callable[[Engine, int], object]


class Port(Protocol):
    """Where rank 0 listens, once it does."""

    def set_result(self, port: int, /) -> None: ...

    async def found(self) -> int: ...


class _Promise(Future[int]):
    async def found(self) -> int:
        return await asyncio.wrap_future(self)


class PairDoor(Door):
    """Rank 0 holds the hub; rank 1 is told where it is."""

    def __init__(
        self, rank: int, port: Port, timeout_s: float, host: str = "127.0.0.1"
    ) -> None:
        self._rank = rank
        self._port = port
        self._timeout_s = timeout_s
        self._host = host
        self._server: HubServer | None = None

    @override
    async def connect(self, member: Member) -> Link:
        if self._rank == 0:
            self._server = HubServer(Hub(2, self._timeout_s), 2, TOKEN)
            await self._server.start()
            self._port.set_result(self._server.port)
            return LocalLink(self._server.hub, member)
        port = await self._port.found()
        hello = Hello(TOKEN, 1, 2)
        return await dial(self._host, port, lambda: HubConnection(hello, member))

    @override
    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()


class Pair:
    """The engines of both ranks, by rank."""

    def __init__(self, root: Path, timeout_s: float = TIMEOUT_S) -> None:
        port = _Promise()
        doors = (PairDoor(rank, port, timeout_s) for rank in (0, 1))
        members = (
            Member(rank, 2, door, timeout_s=timeout_s)
            for rank, door in enumerate(doors)
        )
        with patch("aiockpt.runtime.detect", lambda *_: next(members)):
            self.engines = [Engine(root, SMALL) for _ in (0, 1)]

    def each(self, work: Work) -> list[Outcome]:
        """Both do it at once; what came of it, by rank."""

        def of_rank(rank: int) -> Outcome:
            try:
                work(self.engines[rank], rank)
            except CheckpointError as error:
                return Outcome(errors=[error])
            return Outcome(is_done=True)

        working = [in_thread(lambda rank=rank: of_rank(rank)) for rank in (0, 1)]
        return [outcome.result(LIMIT_S) for outcome in working]

    def close(self) -> list[Outcome]:
        """Both leave."""
        return self.each(lambda engine, _: engine.close())


@contextlib.contextmanager
def told_files(rank: int) -> Iterator[threading.Event]:
    """Set when the rank, all of its files durable, tells the hub of them."""
    has_told = threading.Event()
    consult = Member.consult

    def noting(member: Member, topic: str, *args: Any, **kwargs: Any) -> Any:
        if member.rank == rank and topic.startswith("commit "):
            has_told.set()
        return consult(member, topic, *args, **kwargs)

    with patch.object(Member, "consult", noting):
        yield has_told


@contextlib.contextmanager
def pair(root: Path, timeout_s: float = TIMEOUT_S) -> Iterator[Pair]:
    """Two ranks, closed in the end whatever came of them."""
    ranks = Pair(root, timeout_s)
    try:
        yield ranks
    finally:
        ranks.close()


def save_together(engine: Engine, rank: int) -> None:
    """Saves and commits "new", seed 3: each rank has one of its files."""
    engine.create("new")
    if rank == 0:
        engine.save(state(3), "model.pt")
    else:
        engine.save({"seed": 3}, "sub/opt.pt")
    engine.commit("new")


def save_replicated(engine: Engine, rank: int) -> None:
    """The same; both files are written by both ranks, a part each."""
    engine.create("new")
    engine.save(state(3), "model.pt", replicated=True)
    engine.save({"seed": 3}, "sub/opt.pt", replicated=True)
    engine.commit("new")


PAIR_WORKLOADS: dict[str, Work] = {
    "2 ranks": save_together,
    "2 ranks, the same files": save_replicated,
}


def spoil_pair(ranks: Pair, work: Work, *faults: Fault) -> tuple[Outcome, Injection]:
    """Runs a workload of two ranks into faults; it ended alike on both."""
    with inject(*faults) as injection:
        outcomes = ranks.each(work)
    dones = {outcome.is_done for outcome in outcomes}
    assert len(dones) == 1, f"the ranks do not agree: {outcomes}"
    errors = [error for outcome in outcomes for error in outcome.errors]
    return Outcome(is_done=dones.pop(), errors=errors), injection


def assert_both_tell(errors: Sequence[CheckpointError], text: str) -> None:
    """Both ranks name one and the same rank, and what went wrong on it."""
    # A save that came after the failure is refused for it.
    errors = [
        error.__cause__ if isinstance(error, EngineStateError) else error
        for error in errors
    ]
    found = {(type(error), getattr(error, "rank", None)) for error in errors}
    assert len(found) == 1, errors
    assert all(text in str(error) for error in errors), errors
    if isinstance(errors[0], PeerError):
        assert errors[0].phase not in {"late", "lost"}, errors


def cause_of(errors: Sequence[CheckpointError]) -> StorageError:
    """What went wrong, as the rank has it on which it did."""
    for error in errors:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, StorageError):
                return cause
            cause = cause.__cause__
    raise AssertionError(f"no rank has the cause of {errors}")
