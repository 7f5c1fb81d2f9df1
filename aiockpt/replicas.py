"""Replicas share the write of identical state: one file, and each writes a part of it.

Read `ReplicaSaver.run` first. The members of a group meet twice: to see that they
have planned one and the same file, which the first of them then makes, and to put
their parts' checksums together once all of them are written. No member has a lease on
the ring while it waits for the others, so rings of several ranks cannot block each
other. Whoever fails or is cancelled between the meetings says so at the next one.
"""

__all__ = ["ReplicaSaver", "group_of"]

import asyncio
import operator
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec

from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
)
from aiockpt.file_save import FileSave
from aiockpt.manifest import FileEntry
from aiockpt.parts import Part, Totals, combine, digest, part_of
from aiockpt.plan import FilePlan
from aiockpt.ranks.base import Decide, Ranks
from aiockpt.saver import Saver
from aiockpt.storage.base import WriteFile
from aiockpt.threads import run_blocking

_PLAN = "plan"
_CHECKSUMS = "checksums"

_encode = msgspec.msgpack.encode


def group_of(ranks: Ranks, *, replicated: bool | Iterable[int]) -> tuple[int, ...]:
    """The ranks that save a file together, in order; empty where one saves it alone.

    Args:
        ranks: The job.
        replicated: The ranks of a group, this one among them; True for all ranks.

    Raises:
        InvalidArgumentError: That is no group of this rank's.
    """
    everyone = range(ranks.world_size)
    try:
        if isinstance(replicated, bool):
            group = set(everyone) if replicated else {ranks.rank}
        else:
            group = {operator.index(rank) for rank in replicated}
    except TypeError as error:
        message = f"replicated: {replicated!r} is neither a bool nor numbers of ranks"
        raise InvalidArgumentError(message) from error
    if ranks.rank not in group or not group <= set(everyone):
        message = (
            f"replicated: {sorted(group)} is no group of rank {ranks.rank} of "
            f"{ranks.world_size}"
        )
        raise InvalidArgumentError(message)
    return tuple(sorted(group)) if len(group) > 1 else ()


class _PlanWord(msgspec.Struct, frozen=True):
    """What one member has planned: its chunks' length, and the plan's digests."""

    chunk_bytes: int
    sizes: bytes
    rest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSaver:
    """Saves files together with the other members of a group.

    Attributes:
        saver: Does this member's part.
        ranks: The job.
        group: The members, this rank among them; the first speaks for the file.
        topic: What the meetings are about, apart from the file; the same text on
            every member, and unique to the attempt.
        has_failed: Whether the attempt has been given up meanwhile. A cancellation
            that comes too late for a meeting is dropped by it, and not seen here.
        note: Told what went wrong on this rank, before any other rank is: what they
            make of it may be back here sooner than `run` has raised it.
    """

    saver: Saver
    ranks: Ranks
    group: Sequence[int]
    topic: str
    has_failed: Callable[[], bool]
    note: Callable[[Exception], None]

    async def run(self, save: FileSave, target: str) -> None:
        """Makes this member's part of the file `target` complete and durable.

        The file is whole once every member has done so. Its entry is set on all of
        them, under the rank of the first.

        Raises:
            InvalidArgumentError: The members' states differ, or they do not see one
                and the same file; on every member where it was found out at first.
            PeerError: Another member failed.
            CheckpointError: What failed here, by kind.

        `Saver.release` must follow, whatever the outcome.

        If cancelled: the other members are told; copies and writes under way are
        waited for first.
        """
        async with AsyncExitStack() as stack:
            plan, file = await self._open(save, target, stack)
            crc32 = await self._write(save, plan, file)
        save.entry = FileEntry(
            path=save.path, nbytes=plan.nbytes, crc32=crc32, rank=self.group[0]
        )

    async def refuse(self, path: str, error: Exception) -> None:
        """Tells the other members that this one will not save a file with them.

        If cancelled: it is finished first.
        """
        topic = self._topic(path, _PLAN)
        await self.ranks.object(topic, error, _PLAN, group=self.group)

    # --- the first meeting: one plan, one file --------------------------------

    async def _open(
        self, save: FileSave, target: str, stack: AsyncExitStack
    ) -> tuple[FilePlan, WriteFile]:
        async with self._telling(save, _PLAN):
            plan = await self._plan(save, self.saver.ring.chunk_bytes, stack)
            word = await run_blocking(self.saver.planners, self._plan_word, plan)
        made: list[WriteFile] = []

        async def decide(words: Sequence[bytes]) -> bytes:
            chunk_bytes = self._agreed_chunk_bytes(words, f"{save.tag}/{save.path}")
            file = await self.saver.create(save, target, plan.nbytes)
            stack.push_async_callback(file.close)
            made.append(file)
            return _encode(chunk_bytes)

        verdict = await self._consult(save, _PLAN, word, decide)
        async with self._telling(save, _CHECKSUMS):
            if self.has_failed():
                raise CheckpointError(f"{save.tag}/{save.path} was given up")
            chunk_bytes = msgspec.msgpack.decode(verdict, type=int)
            if chunk_bytes != self.saver.ring.chunk_bytes:
                plan = await self._plan(save, chunk_bytes, stack)
            if not made:
                made.append(await self._join(target, plan.nbytes))
                stack.push_async_callback(made[0].close)
        return plan, made[0]

    async def _plan(
        self, save: FileSave, chunk_bytes: int, stack: AsyncExitStack
    ) -> FilePlan:
        plan = await self.saver.plan(save, chunk_bytes)
        # The traceback of a failure refers to the plan, and would hold the tensors.
        stack.callback(plan.sources.clear)
        return plan

    def _plan_word(self, plan: FilePlan) -> bytes:
        return _encode(_PlanWord(self.saver.ring.chunk_bytes, *digest(plan)))

    def _agreed_chunk_bytes(self, words: Sequence[bytes], what: str) -> int:
        """The length of chunks that fits every ring, if the plans are the same."""
        plans = [msgspec.msgpack.decode(word, type=_PlanWord) for word in words]
        first = plans[0]
        for rank, plan in zip(self.group, plans, strict=True):
            if (plan.sizes, plan.rest) == (first.sizes, first.rest):
                continue
            where = "sizes of tensors" if plan.sizes != first.sizes else "other values"
            raise InvalidArgumentError(
                f"{what}: state differs between ranks {self.group[0]} and {rank} in its "
                f"{where}: `replicated` needs identical state"
            )
        return min(plan.chunk_bytes for plan in plans)

    async def _join(self, target: str, nbytes: int) -> WriteFile:
        try:
            return await self.saver.storage.open_write(target, nbytes)
        except CheckpointNotFoundError as error:
            raise InvalidArgumentError(
                f"rank {self.ranks.rank} does not see the file that rank "
                f"{self.group[0]} has made in {self.saver.storage.root!r}: "
                "`replicated` needs one file system that all of its ranks share"
            ) from error

    # --- the second meeting: one checksum -------------------------------------

    async def _write(self, save: FileSave, plan: FilePlan, file: WriteFile) -> int:
        """Stages, writes and syncs this member's part; the CRC-32 of the file."""
        planners = self.saver.planners
        member = self.group.index(self.ranks.rank)
        async with self._telling(save, _CHECKSUMS):
            part = await run_blocking(planners, part_of, plan, member, len(self.group))
            sums = await self.saver.transfer(save, part.plan, file)
            part_crc = await run_blocking(planners, sums.file_crc32)
            word = part.word(part_crc, sums.record_crcs)

        async def decide(words: Sequence[bytes]) -> bytes:
            return (await run_blocking(planners, combine, plan, words)).pack()

        verdict = await self._consult(save, _CHECKSUMS, word, decide)
        totals = Totals.unpack(verdict)
        for offset, data in await run_blocking(planners, _amendments, part, totals):
            await file.amend(offset, data)
        await self.saver.sync(save, part.plan, file, totals.file_crc)
        return totals.file_crc

    # --- meeting --------------------------------------------------------------

    async def _consult(
        self, save: FileSave, meeting: str, word: bytes, decide: Decide
    ) -> bytes:
        async def decided(words: Sequence[bytes]) -> bytes:
            with self._noting():
                return await decide(words)

        try:
            topic = self._topic(save.path, meeting)
            return await self.ranks.consult(topic, word, decided, group=self.group)
        except asyncio.CancelledError as error:
            await self._object(save, meeting, error)
            raise

    @asynccontextmanager
    async def _telling(self, save: FileSave, meeting: str) -> AsyncGenerator[None]:
        """Who waits at the meeting is told of what fails before it."""
        try:
            with self._noting():
                yield
        except BaseException as error:
            await self._object(save, meeting, error)
            raise

    @contextmanager
    def _noting(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self.note(error)
            raise

    async def _object(self, save: FileSave, meeting: str, error: BaseException) -> None:
        if not isinstance(error, Exception):
            error = CheckpointError(f"{save.tag}/{save.path} was given up")
        phase = (
            _PLAN if meeting == _PLAN else "write" if save.staged.is_set() else "stage"
        )
        topic = self._topic(save.path, meeting)
        await self.ranks.object(topic, error, phase, group=self.group)

    def _topic(self, path: str, meeting: str) -> str:
        return f"{self.topic}/{path}/{meeting}"


def _amendments(part: Part, totals: Totals) -> list[tuple[int, bytes]]:
    return [(late.offset, late.render(totals.record_crcs)) for late in part.late_seals]
