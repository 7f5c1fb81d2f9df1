"""A disk in user space that logs what reaches it: writes, flushes, and marks.

`logged` mounts a file system of two files, served by a process of its own: `disk`, the
image of a block device, and `marks`, where a writer tells what was acknowledged. What
comes is logged in the order in which it came: a mark stands behind the last write that
had ended when it was made. Run as a program, this file is that process.
"""

import contextlib
import errno
import os
import stat
import struct
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.user_space import served

# Kind of the entry, offset in the image, length of the bytes that follow.
_HEADER = struct.Struct("<cQQ")
WRITE, FLUSH, MARK = b"W", b"F", b"M"
# So that the loop device, which cuts its requests to that, writes in one piece.
_MAX_WRITE_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """What reached the disk, once.

    Attributes:
        kind: `WRITE`, `FLUSH` or `MARK`.
        offset: Of a write, in bytes.
        data: What was written, or the mark.
    """

    kind: bytes
    offset: int
    data: bytes


def read_log(path: Path) -> Iterator[Entry]:
    """The entries of a log, in their order."""
    with path.open("rb") as log:
        while header := log.read(_HEADER.size):
            kind, offset, length = _HEADER.unpack(header)
            yield Entry(kind, offset, log.read(length))


@contextlib.contextmanager
def logged(image: Path, log: Path, point: Path) -> Generator[Path]:
    """A directory with `disk`, which is the image, and `marks`; the log is new."""
    with served(Path(__file__), image, log, at=point):
        yield point


# --- in the process of the disk ---------------------------------------------------


def serve(image: str, log: str, point: str) -> None:
    """Serves the two files until they are unmounted."""
    import mfusepy

    descriptor = os.open(image, os.O_RDWR)
    entries = open(log, "wb", buffering=0)  # noqa: SIM115 - until the process ends

    def enter(kind: bytes, offset: int = 0, data: bytes = b"") -> None:
        entries.write(_HEADER.pack(kind, offset, len(data)) + data)

    class Disk(mfusepy.Operations):
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
            sizes = {"/disk": os.fstat(descriptor).st_size, "/marks": 0}
            if path not in sizes:
                raise mfusepy.FuseOSError(errno.ENOENT)
            mode = stat.S_IFREG | 0o600
            return {"st_mode": mode, "st_nlink": 1, "st_size": sizes[path]}

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return os.pread(descriptor, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            if path == "/marks":
                enter(MARK, data=data)
                return len(data)
            enter(WRITE, offset, data)
            return os.pwrite(descriptor, data, offset)

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            enter(FLUSH)
            return 0

    # One thread, and nothing kept by the kernel: the log's order is the true one.
    mfusepy.FUSE(
        Disk(),
        point,
        foreground=True,
        nothreads=True,
        direct_io=True,
        big_writes=True,
        max_write=_MAX_WRITE_BYTES,
    )


if __name__ == "__main__":
    serve(*sys.argv[1:])
