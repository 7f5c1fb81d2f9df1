"""A program: a directory seen through a file system in user space.

It can do what such file systems usually can: no exchange of two names, no reserved
room, no file without a name. Arguments: the directory behind it, and where it is seen.
"""

import errno
import os
import sys

import mfusepy


class Mirror(mfusepy.Operations):
    use_ns = True

    def __init__(self, behind: str) -> None:
        self._behind = behind

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._behind + path, mode)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._behind + path, mode)

    def readlink(self, path: str) -> str:
        return os.readlink(self._behind + path)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._behind + path)

    def unlink(self, path: str) -> None:
        os.unlink(self._behind + path)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        status = os.lstat(self._behind + path) if fh is None else os.fstat(fh)
        kept = ("mode", "nlink", "uid", "gid", "size", "ino")
        told = {f"st_{name}": getattr(status, f"st_{name}") for name in kept}
        times = {f"st_{t}time": getattr(status, f"st_{t}time_ns") for t in "acm"}
        return told | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._behind + path)]

    def create(self, path: str, mode: int) -> int:
        return os.open(self._behind + path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def open(self, path: str, flags: int) -> int:
        return os.open(self._behind + path, flags & (os.O_ACCMODE | os.O_APPEND))

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._behind + path if fh is None else fh, length)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
        descriptor = os.open(self._behind + path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._behind + old, self._behind + new)

    def link(self, target: str, source: str) -> None:
        os.link(self._behind + source, self._behind + target)

    def symlink(self, target: str, source: str) -> None:
        os.symlink(source, self._behind + target)

    def utimens(self, path: str, times: tuple[int, int]) -> None:
        os.utime(self._behind + path, ns=times)

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._behind + path)
        return {key: getattr(found, key) for key in dir(found) if key[:2] == "f_"}

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        raise mfusepy.FuseOSError(errno.ENOTSUP)


if __name__ == "__main__":
    mfusepy.FUSE(Mirror(sys.argv[1]), sys.argv[2], foreground=True, nothreads=True)
