"""One attempt at a tag, from `create` to its end: published, failed or aborted."""

__all__ = ["Attempt", "Means"]

import asyncio
import copy
import errno
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

from aiockpt.agreement import Agreement, Share
from aiockpt.catalog import Catalog
from aiockpt.errors import (
    CheckpointError,
    EngineStateError,
    InvalidArgumentError,
    PeerError,
    StagingError,
    StorageError,
    TornSnapshotError,
)
from aiockpt.events import CommitReport, Event, Failed, Published, Synced
from aiockpt.file_save import FileSave
from aiockpt.manifest import FileEntry
from aiockpt.ranks.base import Ranks
from aiockpt.replicas import ReplicaSaver
from aiockpt.saver import Saver
from aiockpt.threads import finish, outlast, run_blocking, watch

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Means:
    """What every attempt of an engine works with.

    Attributes:
        saver: Saves its files.
        catalog: Publishes and discards it.
        ranks: Those who must agree.
        clerks: Threads for catalog work.
        emit: Told what happens.
    """

    saver: Saver
    catalog: Catalog
    ranks: Ranks
    clerks: Executor
    emit: Callable[[Event], None]


class Attempt:
    """What is being saved under a tag that nobody can see yet.

    `add` may be called from any thread; everything else belongs to the engine's loop.

    Attributes:
        tag: The name under which it is to be published.
        failure: The first thing that went wrong; it ends the attempt.
        is_reported: Whether the failure has reached a caller.
        report: What was published, once it has been.
        stall_s: Time that callers of `staged` were held.
    """

    def __init__(self, means: Means, tag: str, agreement: Agreement) -> None:
        """Open for saves.

        Args:
            means: What to work with.
            tag: The name to publish under.
            agreement: Publishes it, with the other ranks.
        """
        self.tag = tag
        self.failure: CheckpointError | None = None
        self.is_reported = False
        self.report: CommitReport | None = None
        self.stall_s = 0.0
        self._means = means
        self._agreement = agreement
        self._directory = agreement.place.directory
        self._saves: dict[str, FileSave] = {}
        self._own_error: Exception | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_sealed = False
        self._adding = threading.Lock()
        self._ending = asyncio.Lock()

    # --- taking files in ------------------------------------------------------

    @property
    def saves(self) -> list[FileSave]:
        """Every file so far, in the order of the calls."""
        return list(self._saves.values())

    def add(self, save: FileSave, begin: Callable[[], object]) -> None:
        """Takes a file in and calls `begin`, which sees to it that `run` follows.

        Where `begin` raises, the file was never there.

        Raises:
            EngineStateError: The tag is being committed, or has failed.
            InvalidArgumentError: The tag has that file, or a file where the path
                needs a directory (or the reverse).
        """
        with self._adding:
            self.check_open()
            for path in self._saves:
                if path == save.path:
                    message = f"{path!r} has been saved in tag {self.tag!r} already"
                    raise InvalidArgumentError(message)
                if path.startswith(f"{save.path}/") or save.path.startswith(f"{path}/"):
                    message = f"{save.path!r} and {path!r} cannot stand side by side"
                    raise InvalidArgumentError(message)
            begin()
            self._saves[save.path] = save

    def check_open(self) -> None:
        """Returns if the tag can take files.

        Raises:
            EngineStateError: It cannot; the cause is chained.
        """
        if self.failure is not None:
            self.is_reported = True
            message = f"tag {self.tag!r} has failed: {self.failure}"
            raise EngineStateError(message) from self.failure
        if self._is_sealed:
            raise EngineStateError(f"tag {self.tag!r} is being committed")

    def raise_if_failed(self) -> None:
        """Raises the failure, if there is one, and notes that it was reported."""
        if self.failure is not None:
            self.is_reported = True
            # A copy: one instance raised to several callers would collect all of
            # their tracebacks.
            raise copy.copy(self.failure) from self.failure

    # --- saving ---------------------------------------------------------------

    async def run(self, save: FileSave) -> None:
        """Saves a file that was added. Failing, it fails the attempt, and returns."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._run(save)
        finally:
            # In one piece: a cancellation that comes only now (another save fails) must
            # not leave out the end of it, for which `commit` waits.
            await outlast(self._conclude(save, task))

    async def _conclude(self, save: FileSave, task: "asyncio.Task[object]") -> None:
        if save.entry is None and save.error is None:
            save.error = CheckpointError(f"{self.tag}/{save.path} was not finished")
        try:
            await self._means.saver.release(save)
        finally:
            self._tasks.discard(task)
            try:
                if save.error is not None and self.failure is None:
                    await self._refuse(save.error, save.path)
            finally:
                save.written.set()

    async def _run(self, save: FileSave) -> None:
        try:
            if self.failure is None:
                await self._save(save)
            else:
                save.error = self.failure
                await self.refuse_together(save.path, save.replicas, self.failure)
        except asyncio.CancelledError:
            save.error = self.failure
            raise
        except Exception as error:  # noqa: BLE001 - raised by `commit`
            save.error = _as_checkpoint_error(error, f"{self.tag}/{save.path}")

    async def _save(self, save: FileSave) -> None:
        target = f"{self._directory}/{save.path}"
        try:
            if save.replicas:
                await self._together(save.replicas).run(save, target)
            else:
                await self._means.saver.run(save, target, self._means.ranks.rank)
        except StorageError as error:
            if error.errno != errno.EEXIST:
                raise
            # No two saves of this rank have one path.
            message = (
                f"{save.path!r} has been saved in tag {self.tag!r} by another rank"
            )
            raise InvalidArgumentError(message) from error

    async def refuse_together(
        self, path: str, replicas: Sequence[int], error: CheckpointError
    ) -> None:
        """Sees to it that no rank waits for this one to save a file with it.

        If cancelled: it is finished first.
        """
        if replicas:
            await self._together(replicas).refuse(path, self.failure or error)

    def _together(self, replicas: Sequence[int]) -> ReplicaSaver:
        return ReplicaSaver(
            saver=self._means.saver,
            ranks=self._means.ranks,
            group=replicas,
            topic=self._agreement.meetings,
            has_failed=lambda: self.failure is not None,
            note=self._note,
        )

    def _note(self, error: Exception) -> None:
        self._own_error = self._own_error or error

    async def _refuse(self, error: CheckpointError, path: str | None) -> None:
        """Fails the attempt on all ranks, for what went wrong on this one."""
        own, rank = self._own_error, self._means.ranks.rank
        if own is not None and isinstance(error, PeerError) and error.rank == rank:
            # Another rank was quicker to pass it on than the save that it came from.
            error = _as_checkpoint_error(own, f"tag {self.tag}")
        self.failure = error
        told = await self._agreement.refuse(error, _phase(error))
        await self._fail(told if isinstance(told, CheckpointError) else error, path)

    async def _fail(self, error: CheckpointError, path: str | None) -> None:
        """Ends the attempt: its other saves stop, and the disk is given back.

        By this rank, or by the one that can tell that nobody is publishing it.
        """
        self.failure = error
        self._means.emit(Failed(self.tag, path, error))
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        while tasks:
            _, tasks = await asyncio.wait(tasks)
        if self._agreement.may_discard:
            await self.discard_files()

    @property
    def is_publisher(self) -> bool:
        """Whether this rank is the one that publishes, and tidies, in its root."""
        return self._agreement.is_publisher

    async def discard_files(self) -> None:
        """Removes what is in the attempt's directory; a failure is only logged."""
        try:
            await run_blocking(
                self._means.clerks, self._means.catalog.discard, self._directory
            )
        except CheckpointError as error:
            _logger.warning("files of tag %s remain to be swept: %s", self.tag, error)

    # --- ending ---------------------------------------------------------------

    async def commit(self, number: int = 0) -> None:
        """Publishes what was saved: afterwards `report` or `failure` is set.

        Args:
            number: Among the commits of the engine, in the order of the calls.

        Raises:
            EngineStateError: Nothing has been saved; the attempt stays open.

        If cancelled: before publishing has begun, the attempt stays open. From there
        on it is finished first; the cancellation is then dropped, unless that failed.
        """
        async with self._ending:
            if self.report is not None:
                return
            is_alone = self._means.ranks.world_size == 1
            if self.failure is None and is_alone and not self._saves:
                raise EngineStateError(f"nothing has been saved in tag {self.tag!r}")
            self._seal(is_sealed=True)
            try:
                for save in self.saves:
                    await save.written.wait()
            except asyncio.CancelledError:
                self._seal(is_sealed=False)
                raise
            if self.failure is None:
                await self._publish(number)

    def _seal(self, *, is_sealed: bool) -> None:
        with self._adding:
            self._is_sealed = is_sealed

    async def _publish(self, number: int) -> None:
        emit, files = self._means.emit, self._own_files()
        costs = self._costs()
        if files:
            emit(Synced(self.tag, len(files), costs.nbytes, costs.sync_s))
        share = Share(files=tuple(files), costs=costs)
        publishing, is_cancelled = await watch(self._agreement.publish(share, number))
        if publishing.cancelled():
            self._seal(is_sealed=False)
            raise asyncio.CancelledError
        if (error := publishing.exception()) is not None:
            if self.failure is None:
                # Before anything else runs: an abort may have been told the same.
                self.failure = _as_checkpoint_error(error, f"tag {self.tag}")
                await finish(self._fail(self.failure, None))
            if is_cancelled:
                # The failure waits for the next caller; this one would not see it.
                raise asyncio.CancelledError
            return
        self.report = publishing.result()
        if self.report is None:
            self._seal(is_sealed=False)
            raise EngineStateError(f"no rank has saved anything in tag {self.tag!r}")
        emit(Published(self.report))

    def _own_files(self) -> list[FileEntry]:
        """What this rank tells the others of; of a shared file, its first rank does."""
        rank = self._means.ranks.rank
        entries = [save.entry for save in self.saves]
        return [entry for entry in entries if entry and entry.rank == rank]

    def _costs(self) -> CommitReport:
        """This rank's part of the report."""
        saves, files = self.saves, self._own_files()
        now_s = perf_counter()
        first_s = min((save.started_s for save in saves), default=now_s)
        return CommitReport(
            tag=self.tag,
            nbytes=sum(entry.nbytes for entry in files),
            num_files=len(files),
            plan_s=sum(save.plan_s for save in saves),
            stage_s=max((save.staged_s for save in saves), default=first_s) - first_s,
            write_s=max((save.written_s for save in saves), default=first_s) - first_s,
            sync_s=sum(save.sync_s for save in saves),
            publish_s=0.0,
            total_s=now_s - first_s,
            stall_s=self.stall_s + sum(save.stall_s for save in saves),
            peak_ring_bytes=self._means.saver.ring.peak_bytes,
        )

    async def abort(self) -> None:
        """Ends the attempt with nothing published and nothing left on the disk.

        Raises:
            EngineStateError: It was published before this could be done.

        If cancelled: it is finished first.
        """
        if self.failure is None:
            aborted = EngineStateError(f"tag {self.tag!r} was aborted")
            # A commit that waits for files or ranks then finds the attempt failed. One
            # that is publishing is not disturbed.
            told = await self._agreement.refuse(aborted, "abort")
            # A commit that was told the same may have been first to end it. One that
            # is at it still ends it: rank 0's may yet be busy in the directory.
            is_told = told is not None and not self._agreement.is_publishing
            if is_told and self.failure is None:
                await self._fail(aborted, None)
        self.is_reported = True
        async with self._ending:
            if self.report is not None:
                raise EngineStateError(f"tag {self.tag!r} has been published already")
            if self.failure is None:
                # The commit was withdrawn meanwhile.
                await self._fail(
                    EngineStateError(f"tag {self.tag!r} was aborted"), None
                )

    async def close(self) -> CheckpointError | None:
        """Lets a commit under way finish, else aborts; what no caller was told of."""
        async with self._ending:
            if self.report is not None:
                return None
        if self.failure is None:
            await self.abort()
            return EngineStateError(
                f"tag {self.tag!r} was saved into but never committed: it is dropped"
            )
        return None if self.is_reported else self.failure


def _phase(error: CheckpointError) -> str:
    """What was being done when `error` came, as the other ranks are told."""
    if isinstance(error, StorageError):
        return "write"
    if isinstance(error, TornSnapshotError | StagingError):
        return "stage"
    return "plan" if isinstance(error, InvalidArgumentError) else "save"


def _as_checkpoint_error(error: BaseException, what: str) -> CheckpointError:
    """`error`, as a type that callers can act on."""
    if isinstance(error, CheckpointError):
        return error
    wrapped = CheckpointError(f"{what}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
