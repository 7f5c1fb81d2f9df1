"""One attempt at a tag, from `create` to its end: published, failed or aborted."""

__all__ = ["Attempt", "Means"]

import asyncio
import copy
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from time import perf_counter

from aiockpt.catalog import Catalog
from aiockpt.errors import CheckpointError, EngineStateError, InvalidArgumentError
from aiockpt.events import CommitReport, Event, Failed, Published, Synced
from aiockpt.manifest import FileEntry
from aiockpt.ranks.base import Ranks
from aiockpt.saver import FileSave, Saver
from aiockpt.threads import outlast, run_blocking

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Means:
    """What every attempt of an engine works with.

    Attributes:
        saver: Saves its files.
        catalog: Publishes and discards it.
        ranks: Those who must agree.
        planners: Threads for catalog work.
        emit: Told what happens.
    """

    saver: Saver
    catalog: Catalog
    ranks: Ranks
    planners: Executor
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

    def __init__(
        self, means: Means, tag: str, directory: str, name: str, *, is_overwrite: bool
    ) -> None:
        """Open for saves.

        Args:
            means: What to work with.
            tag: The name to publish under.
            directory: An empty directory of its own, relative to the root.
            name: Unique among all attempts at all tags of the root.
            is_overwrite: Whether it may take the place of a published tag.
        """
        self.tag = tag
        self.failure: CheckpointError | None = None
        self.is_reported = False
        self.report: CommitReport | None = None
        self.stall_s = 0.0
        self._means = means
        self._directory = directory
        self._name = name
        self._is_overwrite = is_overwrite
        self._saves: dict[str, FileSave] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_sealed = False
        self._is_publishing = False
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
                    await self._fail(save.error, save.path)
            finally:
                save.written.set()

    async def _run(self, save: FileSave) -> None:
        try:
            if self.failure is None:
                await self._save(save)
            else:
                save.error = self.failure
        except asyncio.CancelledError:
            save.error = self.failure
            raise
        except Exception as error:  # noqa: BLE001 - raised by `commit`
            save.error = _as_checkpoint_error(error, f"{self.tag}/{save.path}")

    async def _save(self, save: FileSave) -> None:
        target = f"{self._directory}/{save.path}"
        if "/" in save.path:
            parent, _ = target.rsplit("/", 1)
            storage = self._means.saver.storage
            await run_blocking(self._means.planners, storage.make_dirs, parent)
        await self._means.saver.run(save, target, self._means.ranks.rank)

    async def _fail(self, error: CheckpointError, path: str | None) -> None:
        """Ends the attempt: its other saves stop, and the disk is given back."""
        self.failure = error
        self._means.emit(Failed(self.tag, path, error))
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        while tasks:
            _, tasks = await asyncio.wait(tasks)
        await self.discard_files()

    async def discard_files(self) -> None:
        """Removes what is in the attempt's directory; a failure is only logged."""
        try:
            await run_blocking(
                self._means.planners, self._means.catalog.discard, self._directory
            )
        except CheckpointError as error:
            _logger.warning("files of tag %s remain to be swept: %s", self.tag, error)

    # --- ending ---------------------------------------------------------------

    async def commit(self) -> None:
        """Publishes what was saved: afterwards `report` or `failure` is set.

        Raises:
            EngineStateError: Nothing has been saved; the attempt stays open.

        If cancelled: before publishing has begun, the attempt stays open. From there
        on it is finished first; the cancellation is then dropped, unless that failed.
        """
        async with self._ending:
            if self.report is not None:
                return
            if self.failure is None and not self._saves:
                raise EngineStateError(f"nothing has been saved in tag {self.tag!r}")
            self._seal(is_sealed=True)
            try:
                for save in self.saves:
                    await save.written.wait()
            except asyncio.CancelledError:
                self._seal(is_sealed=False)
                raise
            if self.failure is None:
                self._is_publishing = True
                # Shielded: there is no half of this.
                try:
                    await outlast(self._publish())
                except asyncio.CancelledError:  # noqa: ASYNC103 - told by a note
                    # A failure waits for the next caller; this one would not see it.
                    if self.report is None:
                        raise

    def _seal(self, *, is_sealed: bool) -> None:
        with self._adding:
            self._is_sealed = is_sealed

    async def _publish(self) -> None:
        try:
            await self._publish_files([save.entry for save in self.saves if save.entry])
        except Exception as error:  # noqa: BLE001 - raised by `commit`
            await self._fail(_as_checkpoint_error(error, f"tag {self.tag}"), None)

    async def _publish_files(self, files: list[FileEntry]) -> None:
        means = self._means
        start = perf_counter()
        all_files = await means.ranks.agree(files)
        sync_s = sum(save.sync_s for save in self.saves)
        nbytes = sum(entry.nbytes for entry in all_files)
        means.emit(Synced(self.tag, len(files), nbytes, sync_s))
        await run_blocking(
            means.planners,
            means.catalog.publish,
            self.tag,
            self._name,
            self._directory,
            subdirectories=sorted(
                {parent for entry in files for parent in _parents(entry)}
            ),
            files=all_files,
            world_size=means.ranks.world_size,
            is_overwrite=self._is_overwrite,
        )
        self.report = self._summarise(nbytes, len(all_files), sync_s, start)
        means.emit(Published(self.report))

    def _summarise(
        self, nbytes: int, num_files: int, sync_s: float, publish_start_s: float
    ) -> CommitReport:
        saves = self.saves
        first_s = min(save.started_s for save in saves)
        now_s = perf_counter()
        return CommitReport(
            tag=self.tag,
            nbytes=nbytes,
            num_files=num_files,
            plan_s=sum(save.plan_s for save in saves),
            stage_s=max(save.staged_s for save in saves) - first_s,
            write_s=max(save.written_s for save in saves) - first_s,
            sync_s=sync_s,
            publish_s=now_s - publish_start_s,
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
        if self.failure is None and not self._is_publishing:
            # A commit that is waiting for files then finds the attempt failed.
            await self._fail(EngineStateError(f"tag {self.tag!r} was aborted"), None)
        self.is_reported = True
        async with self._ending:
            if self.report is not None:
                raise EngineStateError(f"tag {self.tag!r} has been published already")

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


def _parents(entry: FileEntry) -> Iterable[str]:
    parts = entry.path.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def _as_checkpoint_error(error: Exception, what: str) -> CheckpointError:
    """`error`, as a type that callers can act on."""
    if isinstance(error, CheckpointError):
        return error
    wrapped = CheckpointError(f"{what}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
