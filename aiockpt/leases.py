"""Leases of readers on tags: while one is held, nobody removes the tag.

    ROOT/.aiockpt/lock                      held while tags change, and shared by
                                            whoever takes a lease
    ROOT/.aiockpt/reading.TAG.READER        locked while READER reads the tag (of which
                                            TAG is a digest)

A lease is a lock on a file of the reader's own, so it ends with the reader's process,
however that ends. Everything here blocks: call it in a worker.
"""

__all__ = ["ROOT_LOCK", "Lease", "Leases", "Reading"]

import contextlib
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Executor
from typing import Final

from aiockpt.errors import CheckpointNotFoundError, EngineStateError, StorageError
from aiockpt.manifest import PRIVATE_DIR, TagInfo
from aiockpt.storage.base import Lock, Storage
from aiockpt.tag_reader import TagReader
from aiockpt.threads import outlast, run_blocking

_logger = logging.getLogger(__name__)

# The file that is locked while tags change.
ROOT_LOCK: Final = f"{PRIVATE_DIR}/lock"
_READING = "reading."


class Lease:
    """One reader's hold on one tag; made by `Leases.take`.

    Attributes:
        info: The tag as it was when the lease was taken.
        path: The file that is locked.
        lock: The lock on it.
    """

    def __init__(self, info: TagInfo, path: str, lock: Lock) -> None:
        """Holds what was taken."""
        self.info = info
        self.path = path
        self.lock = lock


class Leases:
    """The leases on the tags of one root: those of this engine, and who has others."""

    def __init__(self, storage: Storage) -> None:
        """Touches nothing yet."""
        self._storage = storage
        self._held: set[Lease] = set()
        self._changing_held = threading.Lock()

    def take(self, tags: TagReader, tag: str | None) -> Lease:
        """A lease on a published tag, by default the latest.

        Waits while others change tags. Many may hold a lease on the same tag.

        Raises:
            CheckpointNotFoundError: No such tag, or nothing is published.
            StorageError: The root cannot be written.
        """
        while True:
            # Before anything is made: a root that is not there stays so. And outside
            # the lock, which a repair of `latest` takes for itself.
            name = tags.latest() if tag is None else tags.manifest(tag).tag
            if name is None:
                message = f"nothing is published in {self._storage.root!r}"
                raise CheckpointNotFoundError(message)
            self._storage.make_dirs(PRIVATE_DIR)
            try:
                lease = self._take(tags, name)
            except CheckpointNotFoundError:
                # Deleted on the way: then another one is the latest.
                if tag is not None:
                    raise
            else:
                with self._changing_held:
                    self._held.add(lease)
                return lease

    def _take(self, tags: TagReader, tag: str) -> Lease:
        with self._nothing_changes():
            path = f"{PRIVATE_DIR}/{_prefix(tag)}{_reader()}"
            lock = self._storage.lock(path, wait=True)
            assert lock is not None
            try:
                # Under both locks: a deleter has not come yet, or finds the lease.
                info = TagInfo.of(tags.manifest(tag))
            except BaseException:
                self._give_up(path, lock)
                raise
            return Lease(info, path, lock)

    @contextlib.contextmanager
    def _nothing_changes(self) -> Generator[None]:
        lock = self._storage.lock(ROOT_LOCK, wait=True, shared=True)
        assert lock is not None
        try:
            yield
        finally:
            lock.release()

    def release(self, lease: Lease) -> None:
        """Ends a lease. Idempotent; what cannot be removed is only logged."""
        with self._changing_held:
            if lease not in self._held:
                return
            self._held.remove(lease)
        self._give_up(lease.path, lease.lock)

    def release_all(self) -> None:
        """Ends the leases that this engine still holds."""
        for lease in list(self._held):
            self.release(lease)

    def _give_up(self, path: str, lock: Lock) -> None:
        try:
            # Still locked: who would take it for a dead reader's finds it gone.
            self._storage.remove(path)
        except StorageError as error:
            _logger.warning("the file of an ended lease is left: %s", error)
        finally:
            lock.release()

    # --- for those who change tags --------------------------------------------

    def check_unread(self, tag: str) -> None:
        """Returns if nobody holds a lease on `tag`; the caller holds the root's lock.

        Raises:
            EngineStateError: Somebody does; the message says who.
        """
        prefix = _prefix(tag)
        readers = self._living(prefix)
        if readers:
            names = ", ".join(name.removeprefix(prefix) for name in readers)
            count = f"{len(readers)} reader{'s' if len(readers) > 1 else ''}"
            raise EngineStateError(f"tag {tag!r} is being read by {count} ({names})")

    def sweep(self) -> None:
        """Removes what dead readers left; the caller holds the root's lock."""
        self._living(_READING)

    def _living(self, prefix: str) -> list[str]:
        """The leases that are held, of those so named; the others are removed."""
        living: list[str] = []
        for name in self._storage.list_files(PRIVATE_DIR):
            if not name.startswith(prefix):
                continue
            path = f"{PRIVATE_DIR}/{name}"
            # Shared: files of another user's readers can be opened for reading only.
            lock = self._storage.lock(path, wait=False, shared=True)
            if lock is None:
                living.append(name)
            else:
                self._give_up(path, lock)
        return living


def _prefix(tag: str) -> str:
    # A digest: a tag may be as long as a name can be.
    return f"{_READING}{hashlib.sha256(tag.encode()).hexdigest()[:16]}."


def _reader() -> str:
    return f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"


class Reading:
    """One lease from its beginning to its end; its coroutines run on the engine's loop.

    `end` must follow `begin`, whatever came of that.
    """

    def __init__(
        self, leases: Leases, tags: TagReader, tag: str | None, pool: Executor
    ) -> None:
        """Takes nothing yet; see `Leases.take`. Locks are waited for in `pool`."""
        self._take: Callable[[], Lease] = lambda: leases.take(tags, tag)
        self._release = leases.release
        self._pool = pool
        self._lease: Lease | None = None

    async def begin(self) -> TagInfo:
        """Takes the lease; the tag as it is now.

        If cancelled: the lease may have been taken.
        """
        return await run_blocking(self._pool, self._begin)

    def _begin(self) -> TagInfo:
        # Kept here, since a caller who is cancelled gets no result.
        self._lease = self._take()
        return self._lease.info

    async def end(self) -> None:
        """Ends the lease, if there is one.

        If cancelled: it is ended first.
        """
        lease, self._lease = self._lease, None
        if lease is not None:
            await outlast(run_blocking(self._pool, self._release, lease))
