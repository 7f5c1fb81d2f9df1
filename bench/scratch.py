"""Where a run writes, and what one that was killed has left there.

A run holds a lock on each of its places. The system takes it away with the process.
"""

__all__ = ["SHARED_MEMORY", "room_for", "scratch", "shared_file", "swept"]

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

# In memory, and yet a file, so that processes can share it.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - nothing is written there but through a handle
_FILE_PREFIX = "aiockpt-bench-"
_DIRECTORY_PREFIX = "bench-run-"
_MARGIN = 1.1
_GIB = 1 << 30


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A directory of this run; gone afterwards."""
    with TemporaryDirectory(prefix=_DIRECTORY_PREFIX, dir=parent) as name:
        descriptor = os.open(name, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield Path(name).resolve()
        finally:
            os.close(descriptor)


@contextmanager
def shared_file(nbytes: int) -> Iterator[Path]:
    """A file in memory, of zeros; gone afterwards."""
    with NamedTemporaryFile(dir=SHARED_MEMORY, prefix=_FILE_PREFIX) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(nbytes)
        yield Path(file.name)


def swept(parent: Path) -> list[Path]:
    """Removes what no living run holds; says what that was."""
    found = [
        *parent.glob(f"{_DIRECTORY_PREFIX}*"),
        *SHARED_MEMORY.glob(f"{_FILE_PREFIX}*"),
    ]
    left = [path for path in found if not _is_held(path)]
    for path in left:
        if path.is_dir():
            # What is still written there goes with the next run.
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    return left


def room_for(nbytes: int, directory: Path) -> None:
    """Returns if so many bytes, and some more, can be written.

    Raises:
        OSError: They cannot.
    """
    free = shutil.disk_usage(directory).free
    if free < _MARGIN * nbytes:
        needed, there = (f"{each / _GIB:.1f} GiB" for each in (_MARGIN * nbytes, free))
        raise OSError(f"{needed} needed in {directory}, {there} free")


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
