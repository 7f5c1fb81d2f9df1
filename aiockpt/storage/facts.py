"""What the operating system says of a directory and of this process, before a save."""

__all__ = ["DiskFacts", "Limits", "disk_facts", "limits"]

import contextlib
import os
import resource
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """Where a directory lies.

    Attributes:
        filesystem: Its type, as `mount` says it ("ext4"); "unknown" where nothing does.
        free_bytes: What this user may still write; None where the file system does
            not say.
        is_writable: Whether this user may make entries in the directory.
    """

    filesystem: str
    free_bytes: int | None
    is_writable: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """What this process may have; None where there is no limit.

    Attributes:
        num_free_descriptors: Files that it may still open.
        locked_bytes: Memory that it may pin.
    """

    num_free_descriptors: int | None
    locked_bytes: int | None


def disk_facts(directory: str) -> DiskFacts:
    """Looks at an existing directory; blocks.

    Raises:
        OSError: The file system refused.
    """
    status = os.statvfs(directory)
    # Some network and virtual file systems report no size at all.
    free = status.f_bavail * status.f_frsize if status.f_blocks else None
    return DiskFacts(
        filesystem=_filesystem(directory),
        free_bytes=free,
        is_writable=os.access(directory, os.W_OK | os.X_OK),
    )


def _filesystem(directory: str) -> str:
    """The type of the mount that the directory's device belongs to."""
    number = os.stat(directory).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            # "36 35 98:0 / /mnt rw,noatime - ext4 /dev/root rw", with any number of
            # fields before the dash.
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == device:
                return rest.split()[0]
    return "unknown"


def limits() -> Limits:
    """Looks at this process; blocks."""
    allowed = _limit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):
        num_open = len(os.listdir("/proc/self/fd"))
        free = None if allowed is None else allowed - num_open
        return Limits(free, _limit(resource.RLIMIT_MEMLOCK))
    return Limits(allowed, _limit(resource.RLIMIT_MEMLOCK))


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
