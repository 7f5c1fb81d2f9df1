"""One file on its way from captured tensors to the disk: plan → stage → write.

Read `Saver.run` first: it is the path of every tensor.
"""

__all__ = ["Saver"]

import asyncio
import functools
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

from aiockpt.checksums import AbandonedError, Checksums
from aiockpt.errors import CheckpointError, InvalidArgumentError, TornSnapshotError
from aiockpt.events import Event, Planned, Staged, Written
from aiockpt.file_save import FileSave
from aiockpt.guard import StagingGate, check_at_rest
from aiockpt.image import Chunk
from aiockpt.manifest import FileEntry
from aiockpt.plan import FilePlan, make_plan
from aiockpt.ring import Lease, Ring
from aiockpt.staging.base import Stager
from aiockpt.staging.device import mark
from aiockpt.staging.devices import Devices
from aiockpt.storage.base import Storage, WriteFile
from aiockpt.threads import run_blocking

# What direct writes ask of lengths.
_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Saver:
    """Saves files with the parts that it is given, and owns none of them.

    Attributes:
        ring: Host memory.
        stager: Fills chunks of it.
        storage: Where files go.
        gate: Told when sources are free again.
        planners: Threads for planning.
        clerks: Threads that make directories.
        copiers: Threads for looking at sources once they have been copied.
        emit: Told what happens.
        devices: What copies from devices, where that is done.
    """

    ring: Ring
    stager: Stager
    storage: Storage
    gate: StagingGate
    planners: Executor
    clerks: Executor
    copiers: Executor
    emit: Callable[[Event], None]
    devices: Devices | None = None

    def enter(self, save: FileSave) -> None:
        """Keeps optimizers and loads away from the tensors of `save`, and marks it.

        `release` or `StagingGate.leave` must follow; not if it raises.

        Raises:
            EngineStateError: A load is filling a tensor of it.
            StagingError: As `mark`.
        """
        assert save.capture is not None
        # First: a load that begins now finds it there, or is found.
        self.gate.enter(save)
        try:
            check_at_rest(save.capture)
            self.mark(save)
        except BaseException:
            self.gate.leave(save)
            raise

    def mark(self, save: FileSave) -> None:
        """Has `save` staged behind what the calling thread has enqueued on devices.

        Raises:
            StagingError: It is on a device that cannot be used, or refuses.
        """
        if self.devices is not None and save.capture is not None:
            save.stager = mark(self.devices, self.copiers, save.capture)

    async def run(self, save: FileSave, target: str, rank: int) -> None:
        """Makes the file `target` (a path of the storage), complete and durable.

        Raises:
            CheckpointError: What failed, by kind. The file may then exist in part.

        `release` must follow, whatever the outcome.

        If cancelled: copies and writes under way are waited for first.
        """
        plan = await self.plan(save, self.ring.chunk_bytes)
        create = functools.partial(self.create, save, target, plan.nbytes)
        transfer = _Transfer(self, save, plan, create)
        try:
            try:
                sums = await transfer.run()
                crc32 = await run_blocking(self.planners, sums.file_crc32)
                await self.sync(save, plan, transfer.file, crc32)
            finally:
                if transfer.is_opened:
                    await transfer.file.close()
        finally:
            # The traceback of a failure refers to the plan, and would hold the tensors.
            plan.sources.clear()
        save.entry = FileEntry(
            path=save.path, nbytes=plan.nbytes, crc32=crc32, rank=rank
        )

    async def release(self, save: FileSave) -> None:
        """Lets go of sources that `run` has not staged, and of those who wait."""
        if save.staged.is_set():
            return
        try:
            await run_blocking(self.copiers, self.gate.leave, save)
        finally:
            # Again, on the loop, where no thread could do it: nobody waits for ever.
            self.gate.leave(save)
            save.capture = save.stager = None
            save.begun.set()
            save.staged.set()

    # --- the steps of `run` ---------------------------------------------------

    async def plan(self, save: FileSave, chunk_bytes: int) -> FilePlan:
        """The file's image, cut into chunks that are no longer than those of the ring.

        Raises:
            InvalidArgumentError: The state cannot be saved as it is.
            TornSnapshotError: Nor can it be any more: a tensor was changed too early.
            StagingError: A tensor is where nothing can be copied from.

        If cancelled: a plan in the making is waited for and dropped.
        """
        start = perf_counter()
        plan = await run_blocking(self.planners, self._make_plan, save, chunk_bytes)
        save.planned_s = perf_counter()
        save.plan_s = save.planned_s - start
        self.emit(
            Planned(save.tag, save.path, plan.nbytes, plan.num_records, save.plan_s)
        )
        return plan

    def _make_plan(self, save: FileSave, chunk_bytes: int) -> FilePlan:
        assert save.capture is not None
        try:
            plan = make_plan(save.capture, save.path, save.metadata, chunk_bytes)
        except InvalidArgumentError as refusal:
            # What has been freed since `save` cannot be saved; but that is the fault.
            save.note_changes()
            if save.stepped_key is None:
                raise
            raise _torn(save, save.stepped_key) from refusal
        self.stager_of(save).check(plan.sources)
        return plan

    def stager_of(self, save: FileSave) -> Stager:
        """What fills the chunks of `save`."""
        return save.stager or self.stager

    async def create(self, save: FileSave, target: str, nbytes: int) -> WriteFile:
        """A new file, in directories that are made where the save's path names any.

        Raises:
            StorageError: No room, or the file system refused.

        If cancelled: no file is left open.
        """
        if "/" in save.path:
            parent, _ = target.rsplit("/", 1)
            await run_blocking(self.clerks, self.storage.make_dirs, parent)
        return await self.storage.create(target, nbytes)

    async def transfer(
        self, save: FileSave, plan: FilePlan, file: WriteFile
    ) -> Checksums:
        """Stages and writes every chunk of the plan; the checksums of all of them.

        Raises:
            CheckpointError: What failed, by kind.

        If cancelled: copies and writes under way are waited for first.
        """

        async def opened() -> WriteFile:  # noqa: ASYNC124 - as `_Transfer` wants it
            return file

        return await _Transfer(self, save, plan, opened).run()

    async def sync(
        self, save: FileSave, plan: FilePlan, file: WriteFile, crc32: int
    ) -> None:
        """Makes durable what `transfer` has written.

        Raises:
            StorageError: It may not be durable, and never will be.

        If cancelled: the syncing is waited for first.
        """
        elapsed_s = save.written_s - save.planned_s
        self.emit(
            Written(save.tag, save.path, plan.nbytes, crc32, file.is_direct, elapsed_s)
        )
        start = perf_counter()
        await file.sync()
        save.sync_s = perf_counter() - start


class _Transfer:
    """The chunks of one file, between its sources and its blocks on the disk.

    Attributes:
        file: What is written, once it is opened.
    """

    file: WriteFile

    def __init__(
        self,
        saver: Saver,
        save: FileSave,
        plan: FilePlan,
        open_file: Callable[[], Awaitable[WriteFile]],
    ) -> None:
        self._saver = saver
        self._save = save
        self._plan = plan
        self._open_file = open_file
        self._opened = asyncio.Event()
        self._sums = Checksums(plan.num_records, len(plan.chunks))
        self._num_unbegun = self._num_unfilled = len(plan.chunks)
        self._stager = saver.stager_of(save)
        save.progress.planned_bytes = plan.nbytes

    @property
    def is_opened(self) -> bool:
        """Whether there is a file, which whoever had it opened has to close."""
        return self._opened.is_set()

    async def run(self) -> Checksums:
        """Stages and writes every chunk; the checksums of all of them."""
        if not self._plan.chunks:
            await self._release_sources()
        try:
            async with asyncio.TaskGroup() as group:
                # Beside the staging: no step waits for a file system that is slow.
                group.create_task(self._open())
                turn = asyncio.Event()
                turn.set()
                for chunk in self._plan.chunks:
                    lease = await self._saver.ring.lease()
                    next_turn = asyncio.Event()
                    task = group.create_task(self._move(chunk, lease, turn, next_turn))
                    # Not in the task: one that is cancelled before its first step (the
                    # lease came from a chunk whose failure ends the group) runs nothing.
                    task.add_done_callback(functools.partial(_release, lease))
                    turn = next_turn
        except BaseExceptionGroup as failures:
            first = _first(failures)
            # What was behind it stays so: a device's or the system's own words.
            raise first from first.__cause__ or failures
        self._save.written_s = perf_counter()
        return self._sums

    async def _open(self) -> None:
        self.file = await self._open_file()
        self._opened.set()

    async def _move(
        self, chunk: Chunk, lease: Lease, turn: asyncio.Event, next_turn: asyncio.Event
    ) -> None:
        """Fills one chunk and writes it; the lease ends with the task.

        Writes are queued in the order of the chunks, as `Checksums.seal` needs it:
        the next turn begins before this write does, but its task runs only after
        this one has queued its job.
        """
        try:
            await self._fill(chunk, lease)
            await self._opened.wait()
            await turn.wait()
            next_turn.set()
            padded = -(-chunk.nbytes // _ALIGNMENT) * _ALIGNMENT
            prepare = functools.partial(self._sums.seal, chunk, lease.view)
            # Released at once: in a failure's traceback it would hold the whole ring.
            with lease.view[:padded] as view:
                await self.file.write(chunk.offset, view, prepare)
            self._save.progress.written_bytes += chunk.nbytes
        except BaseException:
            self._sums.abandon()
            raise

    async def _fill(self, chunk: Chunk, lease: Lease) -> None:
        copying = await self._stager.fill(lease, chunk, self._plan.sources)
        if copying is not None:
            try:
                self._num_unbegun -= 1
                if self._num_unbegun == 0:
                    await self._let_go_on()
            finally:
                # The lease is the device's until then.
                await copying.ended()
        self._save.progress.staged_bytes += chunk.nbytes
        self._num_unfilled -= 1
        if self._num_unfilled == 0:
            await self._release_sources()

    async def _let_go_on(self) -> None:
        """Checks that what is being copied is one state, and lets the caller go on."""
        save, saver = self._save, self._saver
        await run_blocking(saver.copiers, _begin_end, save, saver.gate)
        self._raise_if_torn()
        save.begun.set()

    def _raise_if_torn(self) -> None:
        if self._save.stepped_key is not None:
            raise _torn(self._save, self._save.stepped_key)

    async def _release_sources(self) -> None:
        """Checks that what was copied is one state, and lets go of the sources."""
        save, saver = self._save, self._saver
        await run_blocking(saver.copiers, _check_sources, save, self._plan, saver.gate)
        self._raise_if_torn()
        save.staged_s = perf_counter()
        save.begun.set()
        save.staged.set()
        saver.emit(
            Staged(
                save.tag, save.path, self._plan.nbytes, save.staged_s - save.planned_s
            )
        )


def _begin_end(save: FileSave, gate: StagingGate) -> None:
    """Notes whether a source changed; if none did, lets those go on who wait."""
    save.note_changes()
    if save.stepped_key is None:
        save.is_begun = True
        gate.look_again()


def _check_sources(save: FileSave, plan: FilePlan, gate: StagingGate) -> None:
    """Notes whether a source changed; none is referred to any more."""
    save.note_changes()
    # First of all: until then the gate looks at the capture.
    gate.leave(save)
    # Here and not on the loop: freeing many small objects takes a while.
    save.capture = save.stager = None
    plan.sources.clear()


def _release(lease: Lease, _task: asyncio.Task[None]) -> None:
    lease.release()


def _torn(save: FileSave, key: str) -> TornSnapshotError:
    return TornSnapshotError(
        f"{save.tag}/{save.path}: {key} was changed after `save` and before it was "
        "staged: await `staged` first, or leave the optimizer guard on",
        key=key,
    )


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure to report: one that a caller can act on, else a cause."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [failures]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            flat.append(error)
    acted_on = [error for error in flat if isinstance(error, CheckpointError)]
    causes = [error for error in flat if not isinstance(error, AbandonedError)]
    return (acted_on or causes or flat)[0]
