"""One running engine: its machinery, its open tags, and what can be asked of it.

Doors (`engine`, `sync`) hand it coroutines to run, and wait for them each in its
own way; nothing here knows which door was used. The methods of the first part may
be called from any thread; coroutines run on the engine's loop only, through
`spawn`.
"""

__all__ = ["Runtime", "raise_untold"]

import asyncio
import atexit
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from aiockpt.access import FileAccess
from aiockpt.attempt import Attempt, Means
from aiockpt.capture import capture
from aiockpt.catalog import Catalog
from aiockpt.config import EngineConfig
from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    InvalidArgumentError,
)
from aiockpt.events import CommitReport, Observer
from aiockpt.loader import Loader, LoadOptions, Opened
from aiockpt.loop_thread import Call
from aiockpt.machinery import Machinery
from aiockpt.manifest import FileEntry, TagInfo, check_path, check_tag
from aiockpt.ranks.base import Ranks
from aiockpt.ranks.single import SingleRank
from aiockpt.retention import expired
from aiockpt.saver import FileSave
from aiockpt.storage.base import ReadFile
from aiockpt.threads import outlast, run_blocking

P = ParamSpec("P")
T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Runtime:
    """One running engine, whichever door leads to it.

    Attributes:
        root: The directory of the tags, absolute.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        config: EngineConfig,
        ranks: Ranks | None,
        observers: Sequence[Observer],
    ) -> None:
        """Starts the engine's thread; touches no file yet."""
        # Not resolved: looking at links is file work, and this is the caller's loop.
        self.root = os.path.abspath(root)  # noqa: PTH100
        self._config = config
        self._machinery = machinery = Machinery(self.root, config, observers)
        self._catalog = Catalog(machinery.storage)
        self._means = Means(
            saver=machinery.saver,
            catalog=self._catalog,
            ranks=ranks if ranks is not None else SingleRank(),
            planners=machinery.planners,
            emit=machinery.emit,
        )
        self._attempts: dict[str, Attempt] = {}
        self._creating = asyncio.Lock()
        self._calls: set[Call[Any]] = set()
        self._is_closing = False
        _running.add(self)

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

    def spawn(self, work: Coroutine[Any, Any, T]) -> Call[T]:
        """Runs one of the coroutines below on the engine's loop.

        Raises:
            EngineStateError: The engine is closed, or this is a forked child.
        """
        try:
            self.check_usable()
            return self._spawn(work)
        except BaseException:
            work.close()
            raise

    def spawn_last(self, work: Coroutine[Any, Any, T]) -> Call[T]:
        """As `spawn`, also while the engine is being closed."""
        return self._machinery.spawn(work)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> Call[T]:
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
    ) -> FileSave:
        """Captures `state` and enqueues it as a file of an open tag.

        Raises:
            InvalidArgumentError: A bad path, or state that cannot be captured.
            EngineStateError: No such open tag.
        """
        start = perf_counter()
        self.check_usable()
        attempt = self._attempt(tag)
        attempt.check_open()
        relative = check_path(path, [f"{self.root}/{attempt.tag}"])
        save = FileSave(attempt.tag, relative, capture(state), metadata)
        save.started_s = start
        self._machinery.gate.enter(save)
        try:
            attempt.add(save, lambda: self.spawn(attempt.run(save)))
        except BaseException:
            self._machinery.gate.leave(save)
            raise
        save.stall_s += perf_counter() - start
        return save

    def _attempt(self, tag: str | None) -> Attempt:
        # A copy: the engine's thread may change it meanwhile.
        attempts = self._attempts.copy()
        if tag is None and attempts:
            return attempts[next(reversed(attempts))]
        attempt = attempts.get(tag) if tag is not None else None
        if attempt is None:
            known = ", ".join(map(repr, attempts)) or "none"
            what = "no tag is open" if tag is None else f"tag {tag!r} is not open"
            raise EngineStateError(f"{what} (open: {known}): call `create` first")
        return attempt

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

    def add_stall(self, tag: str | None, stall_s: float) -> None:
        """Counts time that a caller was held against the tags that it waited for."""
        for attempt in list(self._attempts.values()):
            if tag in (None, attempt.tag):
                attempt.stall_s += stall_s

    @property
    def ring_bytes(self) -> tuple[int, int]:
        """Bytes of the ring that are leased now, and all of them."""
        ring = self._machinery.ring
        return ring.leased_bytes, ring.capacity_bytes

    # --- on the engine's loop -------------------------------------------------

    async def _blocking(
        self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await run_blocking(self._machinery.planners, work, *args, **kwargs)

    async def start(self) -> None:
        """Sweeps what dead engines left in the root."""
        await self._blocking(self._catalog.sweep_if_any)

    async def create(self, tag: str, *, overwrite: bool) -> None:
        """Opens a tag for saving."""
        check_tag(tag)
        # One at a time: between the look and the entry another task could open it.
        async with self._creating:
            if tag in self._attempts:
                raise EngineStateError(f"tag {tag!r} is open already")
            await self._blocking(self._catalog.check_free, tag, is_overwrite=overwrite)
            await self._blocking(self._catalog.open_work)
            directory, name = await self._blocking(self._catalog.new_directory)
            self._attempts[tag] = Attempt(
                self._means, tag, directory, name, is_overwrite=overwrite
            )

    async def staged(self, tag: str | None) -> None:
        """Returns when everything saved so far (in `tag`) has been staged."""
        attempts = list(self._attempts.values())
        if tag is not None:
            attempts = [self._attempt(tag)]
        for attempt in attempts:
            for save in attempt.saves:
                await save.staged.wait()
        for attempt in attempts:
            attempt.raise_if_failed()

    async def save_staged(self, save: FileSave) -> None:
        """Returns when one file has been staged."""
        await save.staged.wait()
        self._raise_error_of(save)

    async def save_written(self, save: FileSave) -> None:
        """Returns when one file is complete and durable (not yet published)."""
        await save.written.wait()
        self._raise_error_of(save)

    def _raise_error_of(self, save: FileSave) -> None:
        if save.error is None:
            return
        attempt = self._attempts.get(save.tag)
        if attempt is not None and save in attempt.saves:
            attempt.raise_if_failed()
        raise save.error

    async def commit(self, tag: str) -> CommitReport:
        """Publishes a tag: afterwards it is durable and any load can see it."""
        attempt = self._attempt(tag)
        await attempt.commit()
        self._forget(attempt)
        attempt.raise_if_failed()
        assert attempt.report is not None
        self._spawn(self._tidy(attempt))
        return attempt.report

    async def abort(self, tag: str) -> None:
        """Drops a tag that has not been published, and its files."""
        attempt = self._attempt(tag)
        try:
            await outlast(attempt.abort())
        finally:
            self._forget(attempt)

    def _forget(self, attempt: Attempt) -> None:
        if self._attempts.get(attempt.tag) is attempt:
            del self._attempts[attempt.tag]

    async def _tidy(self, attempt: Attempt) -> None:
        """Removes what a commit made superfluous; failing is worth a warning only."""
        await attempt.discard_files()
        if not self._config.retention:
            return
        try:
            tags = [info.tag for info in await self.tags()]
            for tag in expired(tags, self._config.retention):
                # The tidying of another commit may have been first.
                with suppress(CheckpointNotFoundError):
                    await self.delete(tag)
        except Exception as error:  # noqa: BLE001 - a policy is the user's code
            _logger.warning("old tags of %s remain: %s", self.root, error)

    async def load(
        self, path: str | os.PathLike[str], tag: str | None, options: LoadOptions
    ) -> Any:
        """What was saved as one file of a published tag."""
        return await self.loader.load(functools.partial(self._open, path, tag), options)

    def access(
        self, path: str | os.PathLike[str], tag: str | None, options: LoadOptions
    ) -> FileAccess:
        """A file of a published tag, to be opened for reading tensors one by one."""
        options.check()
        open_file = functools.partial(self._open, path, tag)
        return FileAccess(self, open_file, options)

    @property
    def loader(self) -> Loader:
        """What loads files."""
        return self._machinery.loader

    async def release(self) -> None:
        """Nothing was started for one file alone."""

    def release_blocking(self) -> None:
        """As `release`."""

    async def load_latest_valid(
        self, paths: Sequence[str | os.PathLike[str]], options: LoadOptions
    ) -> tuple[str, list[Any]]:
        """The newest tag from which all of `paths` load, and what they hold.

        Raises:
            CheckpointNotFoundError: There is no such tag, and why for each; or a key
                of `options` names nothing.
            InvalidArgumentError: No paths, or targets for more than one.
        """
        if not paths or (options.into is not None and len(paths) > 1):
            what = "one path, to fill targets from" if paths else "at least one path"
            raise InvalidArgumentError(f"give {what}")
        skipped: list[str] = []
        for tag in await self._blocking(self._catalog.latest_first):
            with ExitStack() as stack:
                try:
                    opened = await self._blocking(self._catalog.open_files, paths, tag)
                except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                    _skip(skipped, tag, error)
                    continue
                for file, _ in opened:
                    stack.callback(file.close)
                try:
                    return tag, [
                        await self.loader.load(_opened(*each), options)
                        for each in opened
                    ]
                except CorruptCheckpointError as error:
                    _skip(skipped, tag, error)
        text = "\n  ".join([f"no tag of {self.root!r} can be loaded:", *skipped])
        raise CheckpointNotFoundError(text)

    def _open(self, path: str | os.PathLike[str], tag: str | None) -> Opened:
        file, entry = self._catalog.open_file(path, tag)
        return file, entry.crc32

    async def latest(self) -> str | None:
        """The tag to resume from."""
        return await self._blocking(self._catalog.latest)

    async def tags(self) -> list[TagInfo]:
        """The published tags, oldest first."""
        return await self._blocking(self._catalog.tags)

    async def delete(self, tag: str) -> None:
        """Unpublishes a tag, then removes its files."""
        check_tag(tag)
        await self._blocking(self._catalog.open_work)
        await self._blocking(self._catalog.delete, tag)

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
        return call

    async def _close(self) -> list[CheckpointError]:
        untold: list[CheckpointError] = []
        # A call that came before may yet open a tag, or be using the work area.
        while self._attempts or self._calls:
            for attempt in list(self._attempts.values()):
                error = await attempt.close()
                self._forget(attempt)
                if error is not None:
                    untold.append(error)
            for call in list(self._calls):
                await call.ended()
        try:
            await self._blocking(self._catalog.close_work)
        except CheckpointError as error:
            untold.append(error)
        return untold

    def stop(self) -> None:
        """Ends the threads and frees the ring, once closed; returns at once."""
        _running.discard(self)
        self._machinery.stop()

    async def ended(self) -> None:
        """Returns when the threads have ended, on any event loop."""
        await self._machinery.ended()

    def join(self) -> None:
        """Blocks until the threads have ended."""
        self._machinery.join()


def _opened(file: ReadFile, entry: FileEntry) -> Callable[[], Opened]:
    return lambda: (file, entry.crc32)


def _skip(skipped: list[str], tag: str, error: CheckpointError) -> None:
    _logger.warning("tag %s is skipped: %s", tag, error)
    skipped.append(f"{tag}: {error}")


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
        call = None if runtime.is_forked else runtime.begin_close()
        if call is None:
            continue
        _logger.warning("the engine for %s was never closed", runtime.root)
        try:
            for error in call.result():
                _logger.error("lost at exit: %s", error)
        except Exception:
            # The other engines are still to be drained.
            _logger.exception("the engine for %s did not end well", runtime.root)
        runtime.stop()
        runtime.join()
