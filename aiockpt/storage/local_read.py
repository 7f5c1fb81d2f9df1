"""Reading one local file: small pieces through the page cache, blocks around it."""

__all__ = ["LocalReadFile"]

import contextlib
import ctypes
import errno
import os
import stat
import threading

from aiockpt.errors import CorruptCheckpointError, StorageError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_MAP_FAILED = ctypes.c_void_p(-1).value
_PROT_READ = 1
_MAP_SHARED = 1
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_ALIGNMENT = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_UNTRIED = -1


class LocalReadFile:
    """See `ReadFile`.

    Attributes:
        path: Where the file is, for messages.
        nbytes: Its length when it was opened.
    """

    def __init__(self, full: str, descriptor: int) -> None:
        """Takes over the descriptor, unless it raises.

        Raises:
            StorageError: It is not a regular file's.
        """
        self.path = full
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(errno.EINVAL, "not a regular file", full)
        self.nbytes = status.st_size
        self._is_owned = status.st_uid == os.geteuid()
        # What is read in small pieces is scattered: reading ahead of it, megabytes
        # at a time, would read many times what a partial load needs.
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._lock = threading.Lock()
        # A second descriptor for direct reads; None where there can be none.
        self._direct: int | None = _UNTRIED
        self._is_refused = False
        # Where the file is mapped, only to ask which pages are cached.
        self._mapping: int | None = _UNTRIED

    def read_into(self, offset: int, view: memoryview) -> None:
        """See `ReadFile.read_into`."""
        self._fill(self._descriptor, offset, view, len(view))

    def read_block(self, offset: int, view: memoryview) -> None:
        """See `ReadFile.read_block`."""
        nbytes = min(len(view), self.nbytes - offset)
        direct = self._direct_descriptor()
        num_read = 0
        if direct is not None and not self._is_cached(offset, nbytes):
            num_read = self._read_direct(direct, offset, view, nbytes)
        if num_read < nbytes:
            with view[num_read:nbytes] as rest:
                self._fill(self._descriptor, offset + num_read, rest, len(rest))

    def _read_direct(
        self, descriptor: int, offset: int, view: memoryview, nbytes: int
    ) -> int:
        """Reads directly as long as that goes; returns how far it got."""
        num_read = 0
        # A read that ended off a boundary cannot be continued directly.
        while num_read < nbytes and num_read % _ALIGNMENT == 0:
            with view[num_read:] as rest:
                try:
                    count = os.preadv(descriptor, [rest], offset + num_read)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise self._error(error) from error
                    # Some file systems take the flag at open and refuse it here.
                    self._is_refused = True
                    break
            if count == 0:
                break
            num_read += count
        return num_read

    def _fill(
        self, descriptor: int, offset: int, view: memoryview, nbytes: int
    ) -> None:
        num_read = 0
        while num_read < nbytes:
            with view[num_read:] as rest:
                try:
                    count = os.preadv(descriptor, [rest], offset + num_read)
                except OSError as error:
                    raise self._error(error) from error
            if count == 0:
                end = offset + num_read
                message = f"{self.path}: the file ends at byte {end}"
                raise CorruptCheckpointError(message, path=self.path, offset=end)
            num_read += count

    def _direct_descriptor(self) -> int | None:
        with self._lock:
            if self._direct == _UNTRIED:
                self._direct = None
                if _O_DIRECT:
                    # The same file, whatever now has its name.
                    name = f"/proc/self/fd/{self._descriptor}"
                    with contextlib.suppress(OSError):
                        flags = os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT
                        self._direct = os.open(name, flags)
            return None if self._is_refused else self._direct

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether all these bytes are in the page cache: copying them is faster."""
        with self._lock:
            if self._mapping == _UNTRIED:
                self._mapping = self._map()
            mapping = self._mapping
        if mapping is None:
            return False
        num_pages = -(-nbytes // _PAGE_BYTES)
        pages = (ctypes.c_ubyte * num_pages)()
        if _libc.mincore(mapping + offset, nbytes, pages) != 0:
            return False
        return b"\0" not in bytes(pages)

    def _map(self) -> int | None:
        if _ALIGNMENT % _PAGE_BYTES:
            return None  # Blocks do not start at pages, of which `mincore` speaks.
        descriptor = self._descriptor
        # To others the kernel calls every page cached.
        if not (self._is_owned or os.access(f"/proc/self/fd/{descriptor}", os.W_OK)):
            return None
        address = _libc.mmap(
            None, self.nbytes, _PROT_READ, _MAP_SHARED, descriptor, ctypes.c_int64(0)
        )
        return None if address == _MAP_FAILED else address

    def _error(self, error: OSError) -> StorageError:
        text = error.strerror or str(error)
        return StorageError(error.errno, text, self.path)

    def fileno(self) -> int:
        """See `ReadFile.fileno`."""
        return self._descriptor

    def close(self) -> None:
        """See `ReadFile.close`."""
        descriptors = (self._descriptor, self._direct)
        mapping, self._mapping = self._mapping, None
        self._descriptor, self._direct = -1, None
        for descriptor in descriptors:
            if descriptor is not None and descriptor >= 0:
                # Nothing was written: a failure says nothing of use.
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        if mapping not in (None, _UNTRIED):
            _libc.munmap(mapping, self.nbytes)
