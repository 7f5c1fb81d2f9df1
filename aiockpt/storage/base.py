"""The storage port: what the engine asks of a place that keeps files.

Paths are relative to the storage's root, with forward slashes. Methods that are
not coroutines block: call them in a worker. Every failure of the place itself is
a `StorageError` with the errno and the path.
"""

__all__ = ["Lock", "Notices", "ReadFile", "Stamp", "Storage", "WriteFile"]

from collections.abc import Callable
from concurrent.futures import Executor
from typing import NamedTuple, Protocol, TypeVar

T = TypeVar("T")


class Stamp(NamedTuple):
    """Tells a file from others that stand, or stood, at the same path.

    Only a file that was changed within the same tick of the file system's clock can
    have the same one: wait for a tick before you rely on it.

    Attributes:
        identity: The file's number in its file system, and its length.
        changed_ns: When it was changed, by the file system's clock, since 1970.
    """

    identity: tuple[int, ...]
    changed_ns: int


class ReadFile(Protocol):
    """One file open for reading. Its methods block: call them in a worker.

    Attributes:
        path: Where the file is, for messages.
        nbytes: Its length when it was opened.
    """

    path: str
    nbytes: int

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` (flat, writable, bytes) from `offset`.

        Raises:
            CorruptCheckpointError: The file ends before the view is full.
            StorageError: The file system refused.
        """
        ...

    def read_block(self, offset: int, view: memoryview) -> None:
        """Fills `view` from `offset`, as far as the file goes, at the disk's speed.

        What `view` has behind the end of the file is undefined. May be called by
        several threads at once. What is in the page cache is taken from
        there; the rest goes around it where the file system can.

        Args:
            offset: A multiple of 4096.
            view: Page-aligned, flat, writable; its length a multiple of 4096.

        Raises:
            CorruptCheckpointError: The file ends before `nbytes`.
            StorageError: The file system refused.
        """
        ...

    def fileno(self) -> int:
        """The open file descriptor, owned by this object."""
        ...

    def close(self) -> None:
        """Releases the descriptor. Idempotent."""
        ...


class WriteFile(Protocol):
    """One file of known length, written in chunks in any order.

    Its coroutines end only when the work has ended, cancelled or not: afterwards
    nothing reads the buffer that they were given.
    """

    @property
    def is_direct(self) -> bool:
        """Whether writes go around the page cache."""
        ...

    async def write(
        self, offset: int, view: memoryview, prepare: Callable[[], None]
    ) -> None:
        """Calls `prepare()` and writes `view` at `offset`, in one worker's turn.

        Turns are taken in the order of the calls, so this queues its turn before it
        first suspends: `prepare` may wait for those of earlier calls.

        Args:
            offset: A multiple of 4096.
            view: Page-aligned; its length may go past the end of the file (it does
                for the last chunk, whose length is rounded up to the alignment).
            prepare: Makes the bytes final; runs in the worker just before the write.

        Raises:
            StorageError: The write failed. The file is then of no use.
        """
        ...

    async def amend(self, offset: int, data: bytes) -> None:
        """Writes `data` over a part of what `write` has written; all calls have ended.

        Unlike `write` it takes any offset and any length. No other writer may be at
        work on the chunk.

        Raises:
            StorageError: The write failed. The file is then of no use.
        """
        ...

    async def sync(self) -> None:
        """Cuts the file to its length and makes durable what was written to it here.

        Raises:
            StorageError: It may not be durable, and never will be: a failed sync is
                final (the kernel may have dropped the dirty pages).
        """
        ...

    async def close(self) -> None:
        """Releases the descriptor. Idempotent.

        Raises:
            StorageError: The file system reported a late failure.
        """
        ...


class Lock(Protocol):
    """An advisory lock that ends with `release` or with the process."""

    def release(self) -> None:
        """Gives the lock up. Idempotent."""
        ...


class Notices(Protocol):
    """Wakes those who wait for something to appear in one directory.

    It belongs to the event loop on which it is first used.
    """

    async def until(self, look: Callable[[], T | None]) -> T:
        """What `look()` returns, as soon as that is not None.

        `look` runs in a worker: at once, soon after any name has appeared in the
        directory, and now and then, because a file system need not tell of what other
        machines do in it, nor has a directory that is missing anything to tell.

        Raises:
            EngineStateError: `close` was called.

        If cancelled: a look that has begun is waited for.
        """
        ...

    async def close(self) -> None:
        """Ends the waiting of all, and releases what was opened. Idempotent."""
        ...


class Storage(Protocol):
    """A directory tree in which renames are atomic and syncs can be asked for.

    Attributes:
        root: What the paths are relative to, for messages.
    """

    root: str

    async def create(self, path: str, nbytes: int) -> WriteFile:
        """A new file, with room for `nbytes` reserved, in an existing directory.

        Raises:
            StorageError: No room (`ENOSPC`), or the file system refused. Nothing is
                left behind.
        """
        ...

    async def open_write(self, path: str, nbytes: int) -> WriteFile:
        """A file that `create` has made, perhaps in another process, open for writing.

        What is in it stays; each byte may be written by one of those who have it open.

        Args:
            path: The file.
            nbytes: Its length, as `create` was told.

        Raises:
            CheckpointNotFoundError: There is no such file.
            StorageError: It is not a regular file, or the file system refused.
        """
        ...

    def open_read(self, path: str) -> ReadFile:
        """Opens a regular file, following no symbolic link below the root.

        Raises:
            CheckpointNotFoundError: There is no such file.
            StorageError: It is not a regular file, or the file system refused.
        """
        ...

    def read_bytes(self, path: str, max_bytes: int) -> bytes:
        """A small file's content; `open_read`'s errors, or `StorageError` if larger."""
        ...

    def write_durable(self, path: str, data: bytes) -> None:
        """Makes a new small file and syncs it (not its directory), or makes none."""
        ...

    def make_dirs(self, path: str) -> list[str]:
        """Makes a directory and its missing parents; the list of those made.

        A root that was missing is durable afterwards; `sync_dir` is for the others.
        """
        ...

    def list_dir(self, path: str) -> list[str]:
        """The names of the directories in `path`, sorted; links are not followed."""
        ...

    def list_files(self, path: str) -> list[str]:
        """The names of everything else in `path`, sorted."""
        ...

    def is_empty_dir(self, path: str) -> bool:
        """Whether `path` is a directory with nothing in it."""
        ...

    def exists(self, path: str) -> bool:
        """Whether anything stands at `path`."""
        ...

    def length(self, path: str) -> int | None:
        """Bytes of a file; None where there is none. Follows no link."""
        ...

    def stamp(self, path: str) -> Stamp | None:
        """What tells the file at `path` from others; None where nothing stands there."""
        ...

    def sync_dir(self, path: str) -> None:
        """Makes the entries of a directory durable."""
        ...

    def rename_dir(self, source: str, target: str) -> None:
        """Moves a directory to where nothing, or an empty directory, is. Atomic.

        Raises:
            FileExistsError: `target` is taken (as a `StorageError`).
        """
        ...

    def exchange(self, one: str, other: str) -> None:
        """Swaps two directories. Atomic.

        Raises:
            StorageError: The file system cannot (`EINVAL`), or refused.
        """
        ...

    def replace(self, source: str, target: str) -> None:
        """Moves a file over another. Atomic."""
        ...

    def link(self, source: str, target: str) -> None:
        """Gives a file a second name; where that cannot be, `target` is a copy.

        Raises:
            StorageError: EEXIST where `target` is there already, and others.
        """
        ...

    def remove(self, path: str) -> None:
        """Removes a file; nothing happens where there is none."""
        ...

    def remove_tree(self, path: str) -> None:
        """Removes a directory with all that is in it; nothing happens where none is."""
        ...

    def lock(self, path: str, *, wait: bool, shared: bool = False) -> Lock | None:
        """Locks the file at `path`, made if missing; None where it is held elsewhere.

        With `wait`, blocks until it is free. With `shared`, others may hold it at the
        same time who share it, too. The file itself stays.
        """
        ...

    def notices(self, path: str, lookers: Executor) -> Notices:
        """Tells of what appears in the directory `path`; looks are run by `lookers`.

        Opens nothing yet.
        """
        ...
