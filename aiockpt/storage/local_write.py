"""Writing one local file: room reserved, around the page cache, by several threads.

Several writers, of one process or of many, may write parts of one file.
"""

__all__ = ["LocalWriteFile", "create_file", "open_file"]

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import stat
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Literal

import aiofiles
from aiofiles.threadpool.binary import AsyncFileIO

from aiockpt.errors import CheckpointNotFoundError, StorageError
from aiockpt.storage.local_calls import close_unwritten, errors_name
from aiockpt.threads import outlast, run_blocking

_libc = ctypes.CDLL(None, use_errno=True)
_ALIGNMENT = 4096
_SYNC_FILE_RANGE_WRITE = 2
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class LocalWriteFile:
    """See `WriteFile`."""

    def __init__(
        self, full: str, nbytes: int, handle: AsyncFileIO, workers: Executor
    ) -> None:
        """Takes over the handle; `nbytes` is what the file will be cut to."""
        self._full = full
        self._nbytes = nbytes
        self._handle: AsyncFileIO | None = handle
        self._descriptor: int = handle.fileno()
        self._workers = workers
        self._is_direct = bool(_flags(self._descriptor) & _O_DIRECT)

    @property
    def is_direct(self) -> bool:
        """See `WriteFile.is_direct`."""
        return self._is_direct

    async def write(
        self, offset: int, view: memoryview, prepare: Callable[[], None]
    ) -> None:
        """See `WriteFile.write`."""
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
        with errors_name(self._full):
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
        """See `WriteFile.amend`."""
        await run_blocking(self._workers, self._amend, offset, data)

    def _amend(self, offset: int, data: bytes) -> None:
        # Through the cache, where the kernel completes the blocks around it. No direct
        # write is under way, and none follows: the two are never mixed.
        with errors_name(self._full):
            _set_flags(self._descriptor, _flags(self._descriptor) & ~_O_DIRECT)
        self._write_whole(offset, memoryview(data))

    async def sync(self) -> None:
        """See `WriteFile.sync`."""
        await run_blocking(self._workers, self._sync)

    def _sync(self) -> None:
        with errors_name(self._full):
            os.ftruncate(self._descriptor, self._nbytes)
            os.fsync(self._descriptor)

    async def close(self) -> None:
        """See `WriteFile.close`."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with errors_name(self._full):
                await outlast(handle.close())


async def create_file(
    full: str, nbytes: int, openers: Executor, workers: Executor
) -> LocalWriteFile:
    """Makes a file with room for `nbytes`; see `Storage.create`."""
    opener = functools.partial(_open_new, nbytes=nbytes)
    handle = await _opened(full, "xb", opener, openers)
    return LocalWriteFile(full, nbytes, handle, workers)


async def open_file(
    full: str, nbytes: int, openers: Executor, workers: Executor
) -> LocalWriteFile:
    """Opens a file that stands there; see `Storage.open_write`."""
    try:
        handle = await _opened(full, "r+b", _open_old, openers)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
        raise CheckpointNotFoundError(f"there is no file {full!r}") from error
    return LocalWriteFile(full, nbytes, handle, workers)


async def _opened(
    full: str,
    mode: Literal["xb", "r+b"],
    opener: Callable[[str, int], int],
    openers: Executor,
) -> AsyncFileIO:
    opened: list[AsyncFileIO] = []

    async def open_it() -> None:
        handle = await aiofiles.open(
            full, mode, buffering=0, opener=opener, executor=openers
        )
        opened.append(handle)

    try:
        await outlast(open_it())
    except asyncio.CancelledError:
        # Opened all the same: nobody else knows of it.
        for handle in opened:
            await outlast(handle.close())
        raise
    return opened[0]


def _open_new(full: str, flags: int, *, nbytes: int) -> int:
    """Opens a new file for direct writes and reserves its blocks."""
    with errors_name(full):
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
            close_unwritten(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(full)
            raise
        return descriptor


def _open_old(full: str, flags: int) -> int:
    """Opens a file for direct writes, and leaves what is in it."""
    with errors_name(full):
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
            close_unwritten(descriptor)
            raise
        if not is_file:
            close_unwritten(descriptor)
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
    while _libc.fallocate(descriptor, 0, ctypes.c_int64(0), size) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _flags(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def _set_flags(descriptor: int, flags: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
