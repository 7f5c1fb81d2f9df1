"""A local (or mounted) file system as storage: names, directories, locks."""

__all__ = ["LocalStorage"]

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from concurrent.futures import Executor

from aiockpt.errors import CheckpointNotFoundError, StorageError
from aiockpt.storage.base import Stamp
from aiockpt.storage.local_calls import close_unwritten, errors_name
from aiockpt.storage.local_read import LocalReadFile
from aiockpt.storage.local_write import LocalWriteFile, create_file, open_file
from aiockpt.storage.notices import LocalNotices

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What file systems without hard links, or with enough of them, say.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LocalStorage:
    """Files below one directory of this machine's file systems.

    Attributes:
        root: The directory, absolute, symbolic links resolved.
    """

    def __init__(
        self, root: str, workers: Executor, openers: Executor | None = None
    ) -> None:
        """Uses `workers` for file work; touches nothing yet.

        Where there are `openers`, they open files: what is to be staged then does not
        wait for the writes that are queued for `workers`.
        """
        self.root = root
        self._workers = workers
        self._openers = openers or workers

    def _full(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root

    async def create(self, path: str, nbytes: int) -> LocalWriteFile:
        """See `Storage.create`."""
        full = self._full(path)
        return await create_file(full, nbytes, self._openers, self._workers)

    async def open_write(self, path: str, nbytes: int) -> LocalWriteFile:
        """See `Storage.open_write`."""
        full = self._full(path)
        return await open_file(full, nbytes, self._openers, self._workers)

    def open_read(self, path: str) -> LocalReadFile:
        """See `Storage.open_read`."""
        full = self._full(path)
        with errors_name(full):
            try:
                descriptor = self._open_beneath(path)
            except FileNotFoundError as error:
                raise CheckpointNotFoundError(f"there is no file {full!r}") from error
            try:
                return LocalReadFile(full, descriptor)
            except BaseException:
                close_unwritten(descriptor)
                raise

    def _open_beneath(self, path: str) -> int:
        # Component by component, so that no link below the root leads out of it.
        *parents, name = path.split("/")
        with contextlib.ExitStack() as stack:
            directory = os.open(self.root, _DIR_FLAGS & ~os.O_NOFOLLOW)
            stack.callback(close_unwritten, directory)
            for parent in parents:
                directory = os.open(parent, _DIR_FLAGS, dir_fd=directory)
                stack.callback(close_unwritten, directory)
            # Without O_NONBLOCK, opening a FIFO would wait for its writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            return os.open(name, flags, dir_fd=directory)

    def read_bytes(self, path: str, max_bytes: int) -> bytes:
        """See `Storage.read_bytes`."""
        with contextlib.closing(self.open_read(path)) as file:
            if file.nbytes > max_bytes:
                text = f"{file.nbytes} bytes, more than the {max_bytes} expected"
                raise StorageError(errno.EFBIG, text, file.path)
            data = bytearray(file.nbytes)
            file.read_into(0, memoryview(data))
            return bytes(data)

    def write_durable(self, path: str, data: bytes) -> None:
        """See `Storage.write_durable`."""
        full = self._full(path)
        with errors_name(full):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(full, flags, 0o666)
            try:
                try:
                    _write_all(descriptor, data)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(full)
                raise

    def make_dirs(self, path: str) -> list[str]:
        """See `Storage.make_dirs`."""
        made: list[str] = []
        parts = path.split("/")
        with errors_name(self._full(path)):
            _make_durable_dir(self.root)
            for depth in range(1, len(parts) + 1):
                parent = "/".join(parts[:depth])
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self._full(parent))
                    made.append(parent)
        return made

    def list_dir(self, path: str) -> list[str]:
        """See `Storage.list_dir`."""
        return [entry.name for entry in self._scan(path) if _is_dir(entry)]

    def list_files(self, path: str) -> list[str]:
        """See `Storage.list_files`."""
        return [entry.name for entry in self._scan(path) if not _is_dir(entry)]

    def is_empty_dir(self, path: str) -> bool:
        """See `Storage.is_empty_dir`."""
        return os.path.isdir(self._full(path)) and not self._scan(path)

    def _scan(self, path: str) -> "list[os.DirEntry[str]]":
        full = self._full(path)
        with errors_name(full):
            try:
                with os.scandir(full) as entries:
                    return sorted(entries, key=lambda entry: entry.name)
            except FileNotFoundError:
                return []

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        return os.path.lexists(self._full(path))

    def length(self, path: str) -> int | None:
        """See `Storage.length`."""
        full = self._full(path)
        with errors_name(full):
            try:
                status = os.lstat(full)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def stamp(self, path: str) -> Stamp | None:
        """See `Storage.stamp`."""
        full = self._full(path)
        with errors_name(full):
            try:
                status = os.lstat(full)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                return None  # As `exists`, which cannot see it either.
        identity = status.st_dev, status.st_ino, status.st_size
        return Stamp(identity, status.st_ctime_ns)

    def sync_dir(self, path: str) -> None:
        """See `Storage.sync_dir`."""
        full = self._full(path)
        with errors_name(full):
            _sync_dir(full)

    def rename_dir(self, source: str, target: str) -> None:
        """See `Storage.rename_dir`."""
        # rename(2) replaces an empty directory and nothing else, which is what is
        # wanted: trainers make the tag's directory before they save into it.
        with errors_name(self._full(target)):
            os.rename(self._full(source), self._full(target))

    def exchange(self, one: str, other: str) -> None:
        """See `Storage.exchange`."""
        names = os.fsencode(self._full(one)), os.fsencode(self._full(other))
        with errors_name(self._full(other)):
            result = _libc.renameat2(
                _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
            )
            if result != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))

    def replace(self, source: str, target: str) -> None:
        """See `Storage.replace`."""
        with errors_name(self._full(target)):
            os.replace(self._full(source), self._full(target))

    def link(self, source: str, target: str) -> None:
        """See `Storage.link`."""
        full = self._full(target)
        with errors_name(full):
            try:
                os.link(self._full(source), full, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                is_link = os.path.islink(self._full(source))
                copy = shutil.copyfile if is_link else shutil.copy2
                copy(self._full(source), full, follow_symlinks=False)
                if not is_link:
                    _sync_file(full)

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        with errors_name(self._full(path)), contextlib.suppress(FileNotFoundError):
            os.unlink(self._full(path))

    def remove_tree(self, path: str) -> None:
        """See `Storage.remove_tree`."""
        with errors_name(self._full(path)), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._full(path))

    def notices(self, path: str, lookers: Executor) -> LocalNotices:
        """See `Storage.notices`."""
        return LocalNotices(self._full(path), lookers)

    def lock(
        self, path: str, *, wait: bool, shared: bool = False
    ) -> "_LocalLock | None":
        """See `Storage.lock`."""
        full = self._full(path)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        # Whoever may only read can share: some file systems ask for no more than that.
        flags = (os.O_RDONLY if shared else os.O_RDWR) | os.O_CREAT | os.O_CLOEXEC
        with errors_name(full):
            while True:
                descriptor = os.open(full, flags, 0o666)
                lock = _LocalLock(descriptor)
                try:
                    fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
                    # A sweeper may have removed the file between the open and the lock:
                    # then this lock guards nothing that others can see.
                    if _is_same_file(descriptor, full):
                        return lock
                except BlockingIOError:
                    lock.release()
                    return None
                except BaseException:
                    lock.release()
                    raise
                lock.release()


def _sync_file(full: str) -> None:
    descriptor = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_dir(entry: "os.DirEntry[str]") -> bool:
    return entry.is_dir(follow_symlinks=False)


def _is_same_file(descriptor: int, full: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(full))
    except FileNotFoundError:
        return False


class _LocalLock:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pid = os.getpid()

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        # A forked child shares the lock; only its owner may end it.
        if descriptor < 0 or os.getpid() != self._pid:
            return
        # What was done under the lock is done, whatever giving it up says.
        with contextlib.suppress(OSError):
            # Unlocked by word: closing is not enough while a forked child, which
            # may live for hours, has its copy of the descriptor.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        close_unwritten(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        num_written = os.write(descriptor, view)
        if num_written == 0:
            raise OSError(errno.EIO, "the file system wrote nothing")
        view = view[num_written:]


def _make_durable_dir(full: str) -> None:
    """Makes a directory and its missing parents, and their entries durable."""
    if os.path.isdir(full):
        return
    parent = os.path.dirname(full)
    _make_durable_dir(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(full)
    try:
        _sync_dir(parent)
    except BaseException:
        # So that the next attempt does not take it for durable.
        with contextlib.suppress(OSError):
            os.rmdir(full)
        raise
    if not os.path.isdir(full):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _sync_dir(full: str) -> None:
    descriptor = os.open(full, _DIR_FLAGS & ~os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        close_unwritten(descriptor)
