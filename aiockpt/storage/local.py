"""A local (or mounted) file system as storage: POSIX calls, O_DIRECT, aiofiles."""

__all__ = ["LocalStorage"]

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import shutil
import stat
from collections.abc import Callable, Generator
from concurrent.futures import Executor
from typing import Literal

import aiofiles
from aiofiles.threadpool.binary import AsyncFileIO

from aiockpt.errors import CheckpointNotFoundError, StorageError
from aiockpt.storage.base import Stamp
from aiockpt.storage.local_read import LocalReadFile
from aiockpt.storage.notices import LocalNotices
from aiockpt.threads import outlast, run_blocking

_libc = ctypes.CDLL(None, use_errno=True)
_ALIGNMENT = 4096
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_O_DIRECT = getattr(os, "O_DIRECT", 0)
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

    async def create(self, path: str, nbytes: int) -> "_LocalWriteFile":
        """See `Storage.create`."""
        opener = functools.partial(_open_new, nbytes=nbytes)
        return await self._open_for_writing(path, nbytes, "xb", opener)

    async def open_write(self, path: str, nbytes: int) -> "_LocalWriteFile":
        """See `Storage.open_write`."""
        try:
            return await self._open_for_writing(path, nbytes, "r+b", _open_old)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            full = self._full(path)
            raise CheckpointNotFoundError(f"there is no file {full!r}") from error

    async def _open_for_writing(
        self,
        path: str,
        nbytes: int,
        mode: Literal["xb", "r+b"],
        opener: Callable[[str, int], int],
    ) -> "_LocalWriteFile":
        full = self._full(path)
        opened: list[AsyncFileIO] = []

        async def open_file() -> None:
            handle = await aiofiles.open(
                full, mode, buffering=0, opener=opener, executor=self._openers
            )
            opened.append(handle)

        try:
            await outlast(open_file())
        except asyncio.CancelledError:
            # Opened all the same: nobody else knows of it.
            for handle in opened:
                await outlast(handle.close())
            raise
        return _LocalWriteFile(full, nbytes, opened[0], self._workers)

    def open_read(self, path: str) -> LocalReadFile:
        """See `Storage.open_read`."""
        full = self._full(path)
        with _errors_name(full):
            try:
                descriptor = self._open_beneath(path)
            except FileNotFoundError as error:
                raise CheckpointNotFoundError(f"there is no file {full!r}") from error
            try:
                return LocalReadFile(full, descriptor)
            except BaseException:
                _close_unwritten(descriptor)
                raise

    def _open_beneath(self, path: str) -> int:
        # Component by component, so that no link below the root leads out of it.
        *parents, name = path.split("/")
        with contextlib.ExitStack() as stack:
            directory = os.open(self.root, _DIR_FLAGS & ~os.O_NOFOLLOW)
            stack.callback(_close_unwritten, directory)
            for parent in parents:
                directory = os.open(parent, _DIR_FLAGS, dir_fd=directory)
                stack.callback(_close_unwritten, directory)
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
        with _errors_name(full):
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
        with _errors_name(self._full(path)):
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
        with _errors_name(full):
            try:
                with os.scandir(full) as entries:
                    return sorted(entries, key=lambda entry: entry.name)
            except FileNotFoundError:
                return []

    def exists(self, path: str) -> bool:
        """See `Storage.exists`."""
        return os.path.lexists(self._full(path))

    def stamp(self, path: str) -> Stamp | None:
        """See `Storage.stamp`."""
        full = self._full(path)
        with _errors_name(full):
            try:
                status = os.lstat(full)
            except (FileNotFoundError, NotADirectoryError):
                return None
        identity = status.st_dev, status.st_ino, status.st_size
        return Stamp(identity, status.st_ctime_ns)

    def sync_dir(self, path: str) -> None:
        """See `Storage.sync_dir`."""
        full = self._full(path)
        with _errors_name(full):
            _sync_dir(full)

    def rename_dir(self, source: str, target: str) -> None:
        """See `Storage.rename_dir`."""
        # rename(2) replaces an empty directory and nothing else, which is what is
        # wanted: trainers make the tag's directory before they save into it.
        with _errors_name(self._full(target)):
            os.rename(self._full(source), self._full(target))

    def exchange(self, one: str, other: str) -> None:
        """See `Storage.exchange`."""
        names = os.fsencode(self._full(one)), os.fsencode(self._full(other))
        with _errors_name(self._full(other)):
            code = _code(
                _libc.renameat2(
                    _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
                )
            )
            if code != 0:
                raise OSError(code, os.strerror(code))

    def replace(self, source: str, target: str) -> None:
        """See `Storage.replace`."""
        with _errors_name(self._full(target)):
            os.replace(self._full(source), self._full(target))

    def link(self, source: str, target: str) -> None:
        """See `Storage.link`."""
        full = self._full(target)
        with _errors_name(full):
            try:
                os.link(self._full(source), full, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                is_link = os.path.islink(self._full(source))
                copy = shutil.copyfile if is_link else shutil.copy2
                copy(self._full(source), full, follow_symlinks=False)

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        with _errors_name(self._full(path)), contextlib.suppress(FileNotFoundError):
            os.unlink(self._full(path))

    def remove_tree(self, path: str) -> None:
        """See `Storage.remove_tree`."""
        with _errors_name(self._full(path)), contextlib.suppress(FileNotFoundError):
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
        with _errors_name(full):
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
        _close_unwritten(descriptor)


class _LocalWriteFile:
    def __init__(
        self, full: str, nbytes: int, handle: AsyncFileIO, workers: Executor
    ) -> None:
        self._full = full
        self._nbytes = nbytes
        self._handle: AsyncFileIO | None = handle
        self._descriptor: int = handle.fileno()
        self._workers = workers
        self._is_direct = bool(_flags(self._descriptor) & _O_DIRECT)

    @property
    def is_direct(self) -> bool:
        return self._is_direct

    async def write(
        self, offset: int, view: memoryview, prepare: Callable[[], None]
    ) -> None:
        await run_blocking(self._workers, self._write, offset, view, prepare)

    def _write(
        self, offset: int, view: memoryview, prepare: Callable[[], None]
    ) -> None:
        prepare()
        self._write_whole(offset, view)
        if not self._is_direct:
            # Starts write-back now, so that the sync at the end finds little to do.
            _libc.sync_file_range(
                self._descriptor,
                ctypes.c_int64(offset),
                ctypes.c_int64(len(view)),
                _SYNC_FILE_RANGE_WRITE,
            )

    def _write_whole(self, offset: int, view: memoryview) -> None:
        with _errors_name(self._full):
            num_written = 0
            while num_written < len(view):
                # Released: a traceback that kept it would keep the ring mapped.
                with view[num_written:] as left:
                    num_written += self._write_once(left, offset + num_written)

    def _write_once(self, view: memoryview, offset: int) -> int:
        was_direct = self._is_direct
        try:
            num_written = os.pwrite(self._descriptor, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not was_direct:
                raise
            # Some file systems accept O_DIRECT at open and refuse it here; all refuse
            # to go on directly where a short write ended off a boundary.
            self._fall_back()
            return 0
        if num_written == 0:
            raise OSError(errno.EIO, "the file system wrote nothing")
        return num_written

    def _fall_back(self) -> None:
        # In this order: a worker that reads False then writes through the cache.
        _set_flags(self._descriptor, _flags(self._descriptor) & ~_O_DIRECT)
        self._is_direct = False

    async def amend(self, offset: int, data: bytes) -> None:
        await run_blocking(self._workers, self._amend, offset, data)

    def _amend(self, offset: int, data: bytes) -> None:
        # Through the cache, where the kernel completes the blocks around it. No direct
        # write is under way, and none follows: the two are never mixed.
        with _errors_name(self._full):
            _set_flags(self._descriptor, _flags(self._descriptor) & ~_O_DIRECT)
        self._write_whole(offset, memoryview(data))

    async def sync(self) -> None:
        await run_blocking(self._workers, self._sync)

    def _sync(self) -> None:
        with _errors_name(self._full):
            os.ftruncate(self._descriptor, self._nbytes)
            os.fsync(self._descriptor)

    async def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with _errors_name(self._full):
                await outlast(handle.close())


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
        _close_unwritten(descriptor)


def _close_unwritten(descriptor: int) -> None:
    """Closes what nothing was written through: a failure says nothing of use."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _open_new(full: str, flags: int, *, nbytes: int) -> int:
    """Opens a new file for direct writes and reserves its blocks."""
    with _errors_name(full):
        _check_room(full, nbytes)
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(full, flags | _O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems make the file before they refuse the flag.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(full)
            descriptor = os.open(full, flags, 0o666)
        try:
            _reserve(descriptor, nbytes)
        except BaseException:
            _close_unwritten(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(full)
            raise
        return descriptor


def _open_old(full: str, flags: int) -> int:
    """Opens a file for direct writes, and leaves what is in it."""
    with _errors_name(full):
        # Without O_NONBLOCK, opening a FIFO could wait for its other end.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(full, flags | _O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            descriptor = os.open(full, flags)
        try:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        except BaseException:
            _close_unwritten(descriptor)
            raise
        if not is_file:
            _close_unwritten(descriptor)
            raise OSError(errno.EINVAL, "not a regular file")
        return descriptor


def _check_room(full: str, nbytes: int) -> None:
    status = os.statvfs(os.path.dirname(full))
    # Some network and virtual file systems report no size at all.
    if status.f_blocks and status.f_bavail * status.f_frsize < nbytes:
        free = status.f_bavail * status.f_frsize
        text = f"{os.strerror(errno.ENOSPC)}: {nbytes} bytes needed, {free} free"
        raise OSError(errno.ENOSPC, text)


def _reserve(descriptor: int, nbytes: int) -> None:
    if nbytes == 0:
        return
    # fallocate(2), not posix_fallocate(3): the latter writes zeros where the file
    # system cannot reserve, which would write every checkpoint twice.
    padded = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    size = ctypes.c_int64(padded)
    # A signal may interrupt it, and nothing but this loop then tries again.
    while (code := _code(_libc.fallocate(descriptor, 0, ctypes.c_int64(0), size))) != 0:
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _flags(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def _set_flags(descriptor: int, flags: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _code(result: int) -> int:
    return ctypes.get_errno() if result != 0 else 0


@contextlib.contextmanager
def _errors_name(full: str) -> Generator[None]:
    """Turns an `OSError` into a `StorageError` that names the file."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        text = error.strerror or str(error)
        raise StorageError(error.errno, text, full) from error
