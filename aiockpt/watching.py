"""Waiting for tags that others publish, in this process or another.

A tag is told once its publication has ended: it is durable then. It may be seen a
moment before that, which is why those who publish are waited for.
"""

__all__ = ["After", "BlockingTagWatch", "TagWatch", "Watcher"]

import contextlib
import functools
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import Executor
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from aiockpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.leases import ROOT_LOCK
from aiockpt.loop_thread import Call
from aiockpt.manifest import MANIFEST_PATH, TagInfo, check_tag
from aiockpt.storage.base import Stamp, Storage
from aiockpt.tag_reader import TagReader, is_about_content
from aiockpt.threads import run_blocking

T = TypeVar("T")

_logger = logging.getLogger(__name__)

# The clocks of file systems are slower than this. A file that is older has a stamp that
# no file after it can have.
_STAMPED_NS = 2_000_000_000

After = str | TagInfo
"""A published tag, or one as it was listed, which may have been deleted since."""


class _Known(NamedTuple):
    """A tag as it was read.

    Attributes:
        stamp: Of its manifest; None where that does not tell it from a later one.
        published_ns: When it was published.
    """

    stamp: Stamp | None
    published_ns: int


class Watcher(TagReader):
    """Waits for the tags of one root. Its coroutines run on the engine's loop."""

    def __init__(self, storage: Storage, lookers: Executor) -> None:
        """Touches nothing yet; files are looked at by the threads of `lookers`."""
        super().__init__(storage)
        self._lookers = lookers
        self._notices = storage.notices("", lookers)
        self._is_closed = False
        self._left_out: set[str] = set()
        self._known: dict[str, _Known] = {}

    async def wait_for(self, tag: str | None, newer_than: After | None) -> TagInfo:
        """The latest tag, or that of the name `tag`, once it is newer than that.

        Raises:
            CheckpointNotFoundError: There is no tag `newer_than`.
            EngineStateError: The engine is being closed.
        """
        position_ns = 0
        if newer_than is not None:
            position_ns = await self.position_ns(newer_than)
        find = self._find_latest if tag is None else functools.partial(self._find, tag)

        def find_newer() -> TagInfo | None:
            info = find()
            return info if info and info.published_ns > position_ns else None

        def look() -> TagInfo | None:
            if find_newer() is None:
                return None
            self._settle()
            return find_newer()

        return await self._notices.until(look)

    def _find_latest(self) -> TagInfo | None:
        manifest = self._latest()
        return TagInfo.of(manifest) if manifest else None

    def _find(self, tag: str) -> TagInfo | None:
        try:
            return TagInfo.of(self.manifest(tag)) if self._is_published(tag) else None
        except CheckpointNotFoundError:
            return None

    async def position_ns(self, after: After | None) -> int:
        """When `after` was published; what is told comes later. None: the latest."""
        if isinstance(after, TagInfo):
            return after.published_ns
        return await run_blocking(self._lookers, self._position_ns, after)

    async def now_ns(self, called_ns: int) -> int:
        """The position of who asked at that time, whatever was published since."""
        position_ns = await self.position_ns(None)
        return min(position_ns, called_ns)

    def _position_ns(self, after: str | None) -> int:
        if after is not None:
            return self.manifest(after).published_ns
        return max(self._times_ns().values(), default=0)

    async def next_after(
        self, position_ns: int, ready: list[TagInfo]
    ) -> TagInfo | None:
        """The oldest publication after that time, once there is one; None: closed.

        Args:
            position_ns: As told by `position_ns`, or that of the publication before.
            ready: Publications that were seen by the call before; changed.
        """
        look = functools.partial(self._next_after, position_ns, ready)
        try:
            return await self._notices.until(look)
        except EngineStateError:
            if not self._is_closed:
                raise
            return None

    def _next_after(self, position_ns: int, ready: list[TagInfo]) -> TagInfo | None:
        while True:
            told = [info for info in ready if info.published_ns > position_ns]
            ready[:] = told or self._published_after(position_ns)
            if not ready:
                return None
            for info in ready:
                # Listed some time ago: it may have been deleted, or replaced.
                if self._seen(info.tag) == info:
                    return info
            position_ns = ready[-1].published_ns

    def _published_after(self, position_ns: int) -> list[TagInfo]:
        newest_ns = max(self._times_ns().values(), default=0)
        if newest_ns <= position_ns:
            return []
        self._settle()
        # Again: one that was published while we looked may have been seen, and one
        # before it not. By now all up to the newest that was seen can be.
        wanted = range(position_ns + 1, newest_ns + 1)
        names = [
            name for name, time_ns in self._times_ns().items() if time_ns in wanted
        ]
        seen = [info for info in map(self._seen, names) if info is not None]
        told = [info for info in seen if info.published_ns in wanted]
        return sorted(told, key=lambda info: info.published_ns)

    def _settle(self) -> None:
        """Waits for the end of publications that have begun.

        What was seen is durable afterwards, or is seen no more.
        """
        # Where there is no lock, and none can be made, nobody publishes.
        with contextlib.suppress(StorageError):
            lock = self._storage.lock(ROOT_LOCK, wait=True, shared=True)
            assert lock is not None
            lock.release()

    def _times_ns(self) -> dict[str, int]:
        """When each tag was published.

        As `tags`, but for its costs where there are many, and for the log, where a
        broken tag is told of once.

        Raises:
            StorageError: The file system refused to show one, which must not be passed
                over for that.
        """
        known = self._known
        found: dict[str, _Known] = {}
        for name in self._storage.list_dir(""):
            with contextlib.suppress(InvalidArgumentError):
                path = f"{check_tag(name)}/{MANIFEST_PATH}"
                stamp = self._storage.stamp(path)
                if stamp is None:
                    continue
                if name not in known or known[name].stamp != stamp:
                    now_ns = time.time_ns()
                    info = self._seen(name)
                    if info is None:
                        continue
                    # A younger file may be replaced by one with the same stamp.
                    is_fresh = stamp != self._storage.stamp(path)
                    is_fresh |= now_ns < stamp.changed_ns + _STAMPED_NS
                    stamp = None if is_fresh else stamp
                    found[name] = _Known(stamp, info.published_ns)
                else:
                    found[name] = known[name]
        self._known = found
        return {name: each.published_ns for name, each in found.items()}

    def _seen(self, name: str) -> TagInfo | None:
        """The tag in a directory; None where there is none, or a broken one."""
        try:
            return self._find(name)
        except (CorruptCheckpointError, StorageError) as error:
            if not is_about_content(error):
                raise
            if name not in self._left_out:
                self._left_out.add(name)
                _logger.warning("tag %s is left out: %s", name, error)
            return None

    async def close(self) -> None:
        """Ends all waiting: that for a certain tag by an error, the others quietly."""
        self._is_closed = True
        await self._notices.close()


class Host(Protocol):
    """The running engine."""

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in a forked child, where nothing of it runs."""
        ...

    @property
    def watcher(self) -> Watcher:
        """What waits for tags."""
        ...

    def spawn(self, work: Coroutine[Any, Any, T]) -> Call[T]:
        """Runs a coroutine on the engine's loop; `EngineStateError` if closed."""
        ...


class _Watch:
    """How far one iteration has come; it holds nothing open."""

    def __init__(self, host: Host, after: After | None) -> None:
        if not (after is None or isinstance(after, TagInfo)):
            check_tag(after)
        self._host = host
        # Now, and not with the first step: "from now on" begins with this call.
        watcher = host.watcher
        position = (
            watcher.now_ns(time.time_ns())
            if after is None
            else watcher.position_ns(after)
        )
        self._start = host.spawn(position)
        self._position_ns: int | None = None
        self._ready: list[TagInfo] = []

    def _begin(self) -> Call[TagInfo | None] | None:
        """Waits for the next one; None where the engine is closed."""
        try:
            return self._host.spawn(self._next(self._position_ns))
        except EngineStateError:
            if self._host.is_forked:
                raise
            return None

    async def _next(self, position_ns: int | None) -> TagInfo | None:
        if position_ns is None:
            await self._start.ended()
            position_ns = self._start.result()
        return await self._host.watcher.next_after(position_ns, self._ready)

    def _took(self, info: TagInfo) -> TagInfo:
        # Only now: a caller who was cancelled did not get it, and gets it again.
        self._position_ns = info.published_ns
        return info


class TagWatch(_Watch):
    """The iterator of `CheckpointEngine.watch`; made for one task."""

    def __aiter__(self) -> Self:
        """Itself: it goes on where it was left."""
        return self

    async def __anext__(self) -> TagInfo:
        """The next publication, once there is one.

        If cancelled: only the waiting ends; the next call yields what this did not.
        """
        call = self._begin()
        info = await call.wait() if call else None
        if info is None:
            raise StopAsyncIteration
        return self._took(info)


class BlockingTagWatch(_Watch):
    """The iterator of `aiockpt.sync.CheckpointEngine.watch`; made for one thread."""

    def __init__(self, host: Host, after: After | None) -> None:
        """Begins after what is published by now, or after `after`."""
        super().__init__(host, after)
        self._start.result()

    def __iter__(self) -> Self:
        """Itself: it goes on where it was left."""
        return self

    def __next__(self) -> TagInfo:
        """The next publication, once there is one; Ctrl-C ends the waiting only."""
        call = self._begin()
        info = call.result() if call else None
        if info is None:
            raise StopIteration
        return self._took(info)
