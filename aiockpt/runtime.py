"""One running engine: its machinery, its open tags, and what can be asked of it.

Doors (`engine`, `sync`) hand it coroutines to run, and wait for them each in its
own way; nothing here knows which door was used. The methods of the first part may
be called from any thread; coroutines run on the engine's loop only, through
`spawn`.
"""

__all__ = ["Runtime", "raise_untold"]

import atexit
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any, ParamSpec, Self, TypeVar

from aiockpt.access import FileAccess
from aiockpt.attempt import Attempt, Means
from aiockpt.capture import capture
from aiockpt.catalog import Catalog
from aiockpt.config import EngineConfig
from aiockpt.deadline import TimedSave
from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    EngineStateError,
)
from aiockpt.events import CommitReport, Observer
from aiockpt.file_save import FileSave
from aiockpt.leases import Reading
from aiockpt.loader import Loader, LoadOptions
from aiockpt.loop_thread import Call, Work
from aiockpt.machinery import Machinery
from aiockpt.manifest import TagInfo, check_path, check_tag
from aiockpt.open_tags import OpenTags
from aiockpt.opening import TagOptions
from aiockpt.preemption import Preemption
from aiockpt.preflight import Preflight, PreflightReport
from aiockpt.ranks.base import Ranks
from aiockpt.ranks.torch_dist import detect
from aiockpt.replicas import group_of
from aiockpt.retention import RetentionPolicy, expired
from aiockpt.tag_loader import TagLoader
from aiockpt.threads import outlast, run_blocking
from aiockpt.watching import After, Watcher
from aiockpt.weights import or_weights

P = ParamSpec("P")
T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Runtime:
    """One running engine, whichever door leads to it.

    Attributes:
        root: The directory of the tags, absolute.
        open_tags: Those that can be saved into.
        tag_loader: Loads from published ones.
        preemption: Whether a signal asked for a last save.
        watcher: What waits for tags that others publish.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        machinery: Machinery,
        ranks: Ranks,
        *,
        retention: Sequence[RetentionPolicy] = (),
        is_sharing: bool = False,
    ) -> None:
        """Touches no file yet.

        Args:
            root: The directory of the tags.
            machinery: What does the work.
            ranks: The job that this process is a part of; left when this is closed.
            retention: Policies asked after each commit.
            is_sharing: Whether the machinery serves others as well; it is then not
                stopped with this.
        """
        # Not resolved: looking at links is file work, and this is the caller's loop.
        self.root = os.path.abspath(root)  # noqa: PTH100
        self._machinery = machinery
        self._ranks = ranks
        self._retention = retention
        self._is_sharing = is_sharing
        storage = machinery.storage(self.root)
        self._catalog = Catalog(storage)
        self._means = Means(
            saver=machinery.saver(storage),
            catalog=self._catalog,
            ranks=ranks,
            clerks=machinery.clerks,
            emit=machinery.emit,
        )
        self.watcher = Watcher(storage, machinery.lookers)
        self.preemption = Preemption()
        self.tag_loader = TagLoader(
            self._catalog, machinery.loader, ranks, machinery.clerks
        )
        self.open_tags = OpenTags(self._means)
        self._calls: set[Call[Any]] = set()
        self._is_closing = False
        _running.add(self)

    @classmethod
    def start(
        cls,
        root: str | os.PathLike[str],
        config: EngineConfig,
        ranks: Ranks | None,
        observers: Sequence[Observer],
    ) -> Self:
        """A runtime with machinery of its own, whose thread has been started.

        Args:
            root: The directory of the tags.
            config: Its settings.
            ranks: The job; by default that of `torch.distributed`, where it runs.
            observers: Called with each event.
        """
        machinery = Machinery(config, observers)
        if ranks is None:
            ranks = detect(os.fspath(root), config.peer_timeout_s)
        return cls(root, machinery, ranks, retention=config.retention)

    # --- from any thread ------------------------------------------------------

    def check_usable(self) -> None:
        """Returns if calls can be made.

        Raises:
            EngineStateError: The engine is closed, or this is a forked child.
        """
        self._check_owned()
        if self._is_closing:
            raise EngineStateError(f"the engine for {self.root!r} has been closed")

    def _check_owned(self) -> None:
        if self.is_forked:
            raise EngineStateError(
                "this engine belongs to the parent process: make one after the fork"
            )

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in a forked child, where nothing of it runs."""
        return self._machinery.is_forked

    def spawn(self, work: Work[T]) -> Call[T]:
        """Runs one of the coroutines below on the engine's loop.

        Raises:
            EngineStateError: The engine is closed, or this is a forked child.
        """
        try:
            self.check_usable()
            return self._spawn(work)
        except EngineStateError:
            work.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to on the engine's loop; blocks the calling thread.

        If interrupted (Ctrl-C): the work is cancelled and waited for.
        """
        return Call(work).run(self.spawn)

    def spawn_last(self, work: Work[T]) -> Call[T]:
        """As `spawn`, also while the engine is being closed."""
        return self._machinery.spawn(work)

    def _spawn(self, work: Work[T]) -> Call[T]:
        call = self._machinery.spawn(work)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def save(
        self,
        state: object,
        path: object,
        *,
        tag: str | None,
        metadata: Mapping[str, str] | None,
        replicated: bool | Iterable[int] = False,
    ) -> FileSave:
        """Captures `state` and enqueues it as a file of an open tag.

        Raises:
            InvalidArgumentError: A bad path or group, or state that cannot be captured.
            EngineStateError: No such open tag.
            StagingError: State on a device that cannot be used.
        """
        start = perf_counter()
        self.check_usable()
        attempt = self.open_tags.get(tag)
        path = check_path(path, [f"{self.root}/{attempt.tag}"])
        replicas = group_of(self._ranks, replicated=replicated)
        try:
            attempt.check_open()
            save = self._capture(attempt.tag, state, path, metadata)
            save.replicas = replicas
            save.started_s = start
            self._add(save)
        except CheckpointError as error:
            if replicas:
                self._spawn(attempt.refuse_together(path, replicas, error))
            raise
        save.stall_s += perf_counter() - start
        return save

    def _capture(
        self,
        tag: str,
        state: object,
        path: object,
        metadata: Mapping[str, str] | None = None,
    ) -> FileSave:
        relative = check_path(path, [f"{self.root}/{tag}"])
        state, metadata = or_weights(state, relative, metadata)
        save = FileSave(tag, relative, capture(state), metadata)
        self._means.saver.enter(save)
        return save

    def _add(self, save: FileSave) -> None:
        try:
            attempt = self.open_tags.get(save.tag)
            attempt.add(save, lambda: self.spawn(attempt.run(save)))
        except BaseException:
            self._machinery.gate.leave(save)
            raise

    def save_before(
        self, timed: TimedSave, files: Mapping[str, object], options: TagOptions
    ) -> Call[CommitReport]:
        """Captures `files` and begins to save and publish them; `let_go` must follow.

        Raises:
            InvalidArgumentError: A bad tag or path, or state that cannot be captured.
        """
        check_tag(timed.tag)
        try:
            for path, state in files.items():
                timed.saves.append(self._capture(timed.tag, state, path))
            return self.spawn(self._save_before(timed, options))
        except BaseException:
            self.let_go(timed)
            raise

    def let_go(self, timed: TimedSave) -> None:
        """Ends the holding of optimizers; after `save_before` has, however it did."""
        for save in timed.saves:
            self._machinery.gate.leave(save)

    async def _save_before(self, timed: TimedSave, options: TagOptions) -> CommitReport:
        tag = timed.tag
        return await timed.run(
            create=lambda: self.open_tags.create(tag, options),
            add=self._add,
            commit=lambda: self.commit(tag),
            abort=lambda: self.open_tags.abort_if_open(tag),
        )

    def preempt_on(self, signals: tuple[int, ...]) -> None:
        """From now on, `preemption` notes these signals; in the main thread only."""
        self.check_usable()
        self.preemption.watch(signals)

    def preflight(self, state: object) -> Call[PreflightReport]:
        """Captures `state` and begins to try what saves and commits rely on."""
        self.check_usable()
        means = self._means
        return self.spawn(
            Preflight(means.saver, means.catalog, self.loader, state).run()
        )

    def wait_staged(self) -> None:
        """Blocks the thread until all that is being staged now has been staged.

        Raises:
            EngineStateError: Called on the engine's own thread, which must not block,
                on a closed engine, or in a forked child.
        """
        self.check_usable()
        if self._machinery.is_current_thread:
            raise EngineStateError("wait_staged would block the engine's own thread")
        self._machinery.gate.wait()

    def follow(self, saves: Sequence[FileSave]) -> Call[None] | None:
        """What the calling thread enqueues from now on comes behind what is copied.

        Returns:
            What to wait for where a device refuses that; else None.
        """
        refused = [save for save in saves if not save.follow()]
        return self.spawn(self.open_tags.fully_staged(refused)) if refused else None

    @property
    def ring_bytes(self) -> tuple[int, int]:
        """Bytes of the ring that are leased now, and all of them."""
        ring = self._machinery.ring
        return ring.leased_bytes, ring.capacity_bytes

    # --- on the engine's loop -------------------------------------------------

    async def _blocking(
        self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await run_blocking(self._machinery.clerks, work, *args, **kwargs)

    async def sweep_at_start(self) -> None:
        """Sweeps what dead engines left in the root; once for all ranks."""
        if self._ranks.rank == 0:
            await self._blocking(self._catalog.sweep_if_any)

    async def commit(self, tag: str) -> CommitReport:
        """Publishes a tag: afterwards it is durable and any load can see it."""
        attempt = await self.open_tags.commit(tag)
        assert attempt.report is not None
        self._spawn(self._tidy(attempt))
        return attempt.report

    async def _tidy(self, attempt: Attempt) -> None:
        """Removes what a commit made superfluous; failing is worth a warning only."""
        if not attempt.is_publisher:
            return
        await attempt.discard_files()
        if not self._retention:
            return
        try:
            published = {info.tag: info.published_ns for info in await self.tags()}
            # Where commits run beside each other, these need not be the last.
            spared = {attempt.tag, await self.latest()}
            for tag in expired(list(published), self._retention):
                if tag in spared:
                    continue
                # The tidying of another commit may have been first. What is being read
                # is left to that of a later one, and what has been saved anew stays.
                with suppress(CheckpointNotFoundError, EngineStateError):
                    await self._blocking(self._catalog.open_work)
                    await self._blocking(self._catalog.expire, tag, published[tag])
        except Exception as error:  # noqa: BLE001 - a policy is the user's code
            _logger.warning("old tags of %s remain: %s", self.root, error)

    def access(
        self, path: str | os.PathLike[str], tag: str | None, options: LoadOptions
    ) -> FileAccess:
        """A file of a published tag, to be opened for reading tensors one by one."""
        options.check()
        return FileAccess(self, self.tag_loader.opener(path, tag), options)

    @property
    def loader(self) -> Loader:
        """What loads files."""
        return self._machinery.loader

    async def release(self) -> None:
        """Nothing was started for one file alone."""

    def release_blocking(self) -> None:
        """As `release`."""

    async def latest(self) -> str | None:
        """The tag to resume from."""
        return await self._blocking(self._catalog.latest)

    async def tags(self) -> list[TagInfo]:
        """The published tags, oldest first."""
        return await self._blocking(self._catalog.tags)

    async def wait_for(self, tag: str | None, newer_than: After | None) -> TagInfo:
        """A tag that is, or will be, published; see `Watcher.wait_for`."""
        for name in (tag, newer_than):
            if not (name is None or isinstance(name, TagInfo)):
                check_tag(name)
        return await self.watcher.wait_for(tag, newer_than)

    async def delete(self, tag: str) -> None:
        """Unpublishes a tag, then removes its files."""
        check_tag(tag)
        await self._blocking(self._catalog.open_work)
        await self._blocking(self._catalog.delete, tag)

    def reading(self, tag: str | None) -> Reading:
        """A lease on a published tag, to be begun."""
        if tag is not None:
            check_tag(tag)
        leases = self._catalog.leases
        return Reading(leases, self._catalog, tag, self._machinery.lookers)

    def end_reading(self, reading: Reading) -> Call[None] | None:
        """Ends a lease; None where it has ended with the engine."""
        try:
            return self.spawn_last(reading.end())
        except EngineStateError:
            return None

    async def sweep(self) -> list[str]:
        """Removes what dead engines left; their names."""
        return await self._blocking(self._catalog.sweep)

    # --- the end --------------------------------------------------------------

    def begin_close(self) -> Call[list[CheckpointError]] | None:
        """Refuses further calls and starts `_close`; None if that was done before.

        The result is what went wrong and no caller was told of. `stop` comes next.

        Raises:
            EngineStateError: This is a forked child.
        """
        self._check_owned()
        if self._is_closing:
            return None
        # Shielded: an engine is not left half closed.
        call = self._machinery.spawn(outlast(self._close()))
        self._is_closing = True
        self.preemption.end_waiting()
        return call

    async def _close(self) -> list[CheckpointError]:
        untold: list[CheckpointError] = []
        # Who waits for what others publish would wait for ever.
        await self.watcher.close()
        # A call that came before may yet open a tag, or be using the work area.
        while self.open_tags or self._calls:
            untold += await self.open_tags.close()
            for call in list(self._calls):
                await call.ended()
                # It does so itself, unless Ctrl-C came before it had been told to.
                self._calls.discard(call)
        for close in (
            self._ranks.close,
            partial(self._blocking, self._catalog.close_work),
        ):
            try:
                await close()
            except CheckpointError as error:
                untold.append(error)
        return untold

    def stop(self) -> None:
        """Ends the threads and frees the ring, once closed; returns at once."""
        _running.discard(self)
        if not self._is_sharing:
            self._machinery.stop()
        self.preemption.close()

    async def ended(self) -> None:
        """Returns when the threads have ended, on any event loop."""
        if not self._is_sharing:
            await self._machinery.ended()

    def join(self) -> None:
        """Blocks until the threads have ended."""
        if not self._is_sharing:
            self._machinery.join()


def raise_untold(errors: Sequence[CheckpointError]) -> None:
    """Raises the first of `errors`, if any, with the others as notes."""
    if errors:
        first, *others = errors
        for error in others:
            first.add_note(f"and: {error}")
        raise first


_running: set[Runtime] = set()


@atexit.register
def _close_all() -> None:
    """Drains the engines that nobody closed, and says what was lost."""
    for runtime in list(_running):
        try:
            call = None if runtime.is_forked else runtime.begin_close()
            if call is None:
                continue
            _logger.warning("the engine for %s was never closed", runtime.root)
            for error in call.result():
                _logger.error("lost at exit: %s", error)
        except Exception:
            # The other engines are still to be drained.
            _logger.exception("the engine for %s did not end well", runtime.root)
        runtime.stop()
        runtime.join()
