"""Where one engine works in a root, unseen by readers.

    ROOT/.aiockpt/work/ENGINE/N/...files    an attempt, or trash
    ROOT/.aiockpt/work/ENGINE/N.place       the rank that made N, if that is not rank 0
    ROOT/.aiockpt/work/ENGINE.lock          held while ENGINE lives

In a job of several ranks ENGINE is that of rank 0. In other roots than its own the ranks
that work there share the lock. Everything here blocks: call it in a worker.
"""

__all__ = ["WorkArea"]

import logging
import os
import secrets
import threading

from aiockpt.errors import CheckpointNotFoundError
from aiockpt.manifest import PRIVATE_DIR
from aiockpt.storage.base import Lock, Storage

_logger = logging.getLogger(__name__)

_WORK_DIR = f"{PRIVATE_DIR}/work"
_MAX_PLACE_BYTES = 32


class WorkArea:
    """The work area of one engine in one root.

    Attributes:
        in_doubt: Directories that may hold the only durable copy of a tag.
    """

    def __init__(self, storage: Storage) -> None:
        """Touches nothing yet."""
        self._storage = storage
        self._engine = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"
        self._locks: dict[str, Lock] = {}
        self._num_made = 0
        # Tags are opened at once by several workers.
        self._opening = threading.Lock()
        self.in_doubt: set[str] = set()

    @property
    def exists(self) -> bool:
        """Whether any engine ever worked in the root."""
        return self._storage.exists(_WORK_DIR)

    def open(self) -> bool:
        """Makes the work area; whether that had to be done. Idempotent.

        Raises:
            StorageError: The root cannot be made or written.
        """
        with self._opening:
            if self._engine in self._locks:
                return False
            self._make_root()
            # Locked before the directory exists: one without a held lock is dead.
            lock = self._storage.lock(_lock_path(self._engine), wait=True)
            assert lock is not None
            self._locks[self._engine] = lock
            self._storage.make_dirs(f"{_WORK_DIR}/{self._engine}")
            return True

    def _make_root(self) -> None:
        for path in reversed(self._storage.make_dirs(_WORK_DIR)):
            self._storage.sync_dir(path.rpartition("/")[0])

    def close(self) -> None:
        """Removes the work area and lets go of its lock. Idempotent.

        One that is shared is removed by the last rank, if it is empty. What an attempt
        has left there may be all that there is of a tag: that is left to the sweep of
        a later process.
        """
        locks, self._locks = self._locks, {}
        for engine, lock in locks.items():
            try:
                if engine == self._engine and not self.in_doubt:
                    self._remove(engine)
            finally:
                lock.release()
            if engine != self._engine:
                self._remove_if_last(engine)

    def _remove_if_last(self, engine: str) -> None:
        lock = self._storage.lock(_lock_path(engine), wait=False)
        if lock is None:
            return
        try:
            directory = f"{_WORK_DIR}/{engine}"
            if not (self._storage.exists(directory) and self._has_any(directory)):
                self._remove(engine)
        finally:
            lock.release()

    def _has_any(self, directory: str) -> bool:
        return bool(self._storage.list_dir(directory))

    def sweep(self) -> list[str]:
        """Removes what dead engines left; the names of these engines.

        An engine is alive while it holds its lock, however old its files are.
        """
        dead: list[str] = []
        for engine in sorted(self._engines() - {self._engine}):
            lock = self._storage.lock(_lock_path(engine), wait=False)
            if lock is None:
                continue
            try:
                has_left = self._storage.exists(f"{_WORK_DIR}/{engine}")
                self._remove(engine)
            finally:
                lock.release()
            # Without a directory it may be one that is just about to take its lock.
            if has_left:
                dead.append(engine)
                _logger.info("removed what the dead engine %s left behind", engine)
        return dead

    def _remove(self, engine: str) -> None:
        self._storage.remove_tree(f"{_WORK_DIR}/{engine}")
        self._storage.remove(_lock_path(engine))

    def _engines(self) -> set[str]:
        """The engines that have left a directory or a lock, dead or alive."""
        names = self._storage.list_files(_WORK_DIR)
        locks = {name.removesuffix(".lock") for name in names if name.endswith(".lock")}
        return locks.union(self._storage.list_dir(_WORK_DIR))

    def new_directory(self) -> tuple[str, str]:
        """A fresh directory for an attempt, and the attempt's unique name."""
        with self._opening:
            self._num_made += 1
            number = self._num_made
        directory = f"{_WORK_DIR}/{self._engine}/{number}"
        self._storage.make_dirs(directory)
        return directory, f"{self._engine}.{number}"

    def join(self, directory: str, rank: int) -> bool:
        """Sees to it that a directory of rank 0's engine is there.

        Where this rank's root is the same, it is. Where it is another disk's, the first
        rank of those that have it makes the directory, and will publish there.

        Returns:
            Whether this rank made it.
        """
        is_there = self._storage.exists(directory)
        if not is_there:
            self._make_root()
        engine = directory.split("/")[-2]
        with self._opening:
            if engine not in self._locks:
                # Before the directory exists, as above.
                lock = self._storage.lock(_lock_path(engine), wait=False, shared=True)
                # None in the root of rank 0, which holds it alone.
                if lock is not None:
                    self._locks[engine] = lock
        if is_there or directory not in self._storage.make_dirs(directory):
            return False
        self._storage.write_durable(_place_path(directory), f"{rank}".encode())
        return True

    def place(self, directory: str) -> int:
        """The rank that made a directory in this root, once all ranks have joined."""
        try:
            data = self._storage.read_bytes(_place_path(directory), _MAX_PLACE_BYTES)
        except CheckpointNotFoundError:
            return 0
        return int(data)

    def discard(self, directory: str) -> None:
        """Removes an attempt's directory with all that is in it.

        Not one that may hold the only durable copy of a tag: that is left to the
        sweep of a later process, when it has shown which copy is the tag.
        """
        if directory not in self.in_doubt:
            self._storage.remove_tree(directory)
            self._storage.remove(_place_path(directory))


def _lock_path(engine: str) -> str:
    return f"{_WORK_DIR}/{engine}.lock"


def _place_path(directory: str) -> str:
    return f"{directory}.place"
