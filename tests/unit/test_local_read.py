"""Blocks of a local file: around the page cache, from it, or through it."""

import errno
import mmap
import os
from contextlib import closing
from pathlib import Path

import pytest

from aiockpt.errors import CorruptCheckpointError, StorageError
from aiockpt.storage import local_read
from aiockpt.storage.local_read import LocalReadFile

SIZES = [1, 511, 4096, 4097, 100_000, 1 << 20]


def opened(path: Path) -> LocalReadFile:
    return LocalReadFile(str(path), os.open(path, os.O_RDONLY))


def blocks_of(path: Path, block_bytes: int = 64 << 10) -> bytes:
    """The file's bytes, read block by block."""
    found = bytearray()
    with closing(opened(path)) as file, mmap.mmap(-1, block_bytes) as memory:
        for offset in range(0, file.nbytes, block_bytes):
            memory[:] = b"?" * block_bytes
            with memoryview(memory) as view:
                file.read_block(offset, view)
            found += memory[: file.nbytes - offset]
    return bytes(found)


@pytest.fixture(params=SIZES)
def path(request, root):
    """A file that is on the disk and not in the page cache."""
    path = root.parent / "file"
    path.write_bytes(os.urandom(request.param))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return path


def flags_of(descriptor: int) -> int:
    with open(f"/proc/self/fdinfo/{descriptor}") as info:
        line = next(line for line in info if line.startswith("flags"))
    return int(line.split()[1], 8)


class Calls:
    """The reads that reach the kernel: directly or not."""

    def __init__(self, monkeypatch, spoil=lambda is_direct, count: None):
        self.are_direct = []

        def preadv(descriptor, buffers, offset):
            self.are_direct.append(bool(flags_of(descriptor) & os.O_DIRECT))
            spoil(self.are_direct[-1], len(self.are_direct))
            return real(descriptor, buffers, offset)

        real = os.preadv
        monkeypatch.setattr(local_read.os, "preadv", preadv)


@pytest.fixture
def calls(monkeypatch):
    return lambda *spoil: Calls(monkeypatch, *spoil)


def test_a_cold_file_is_read_around_the_page_cache(path, calls):
    expected = path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    with closing(opened(path)) as file:
        if file._is_cached(0, file.nbytes):
            pytest.skip("this file system keeps its files in memory")
    seen = calls()
    assert blocks_of(path) == expected
    assert all(seen.are_direct)


def test_a_cached_file_is_taken_from_the_page_cache(path, calls):
    expected = path.read_bytes()
    seen = calls()
    assert blocks_of(path) == expected
    assert not any(seen.are_direct)


def uncached(monkeypatch):
    monkeypatch.setattr(LocalReadFile, "_is_cached", lambda *_: False)


@pytest.mark.parametrize("refusal", ["flag", "open", "read"])
def test_a_file_system_without_direct_reads_is_read_through_the_cache(
    path, calls, monkeypatch, refusal
):
    uncached(monkeypatch)
    real_open = os.open

    def refusing_open(name, flags, *args, **kwargs):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(name, flags, *args, **kwargs)

    def refuse(is_direct, _count):
        if is_direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    expected = path.read_bytes()
    match refusal:
        case "flag":
            monkeypatch.setattr(local_read, "_O_DIRECT", 0)
        case "open":
            monkeypatch.setattr(local_read.os, "open", refusing_open)
    seen = calls(*([refuse] if refusal == "read" else []))
    assert blocks_of(path) == expected
    assert seen.are_direct.count(True) <= (refusal == "read")


@pytest.mark.parametrize("count", [1, 512, 4096, 5000])
def test_a_short_direct_read_is_continued(path, monkeypatch, count):
    uncached(monkeypatch)
    expected = path.read_bytes()
    real = os.preadv

    def short(descriptor, buffers, offset):
        if not flags_of(descriptor) & os.O_DIRECT:
            return real(descriptor, buffers, offset)
        num_read = real(descriptor, buffers, offset)
        # What a short read leaves behind it in the buffer is undefined.
        view = memoryview(buffers[0])
        view[min(count, num_read) : num_read] = b"!" * max(num_read - count, 0)
        return min(count, num_read)

    monkeypatch.setattr(local_read.os, "preadv", short)
    assert blocks_of(path) == expected


def test_an_error_names_errno_and_file(path, calls, monkeypatch):
    uncached(monkeypatch)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    calls(fail)
    with pytest.raises(StorageError) as caught:
        blocks_of(path)
    assert caught.value.errno == errno.EIO
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_file_that_was_cut_meanwhile_is_corrupt(path, monkeypatch, is_cached):
    monkeypatch.setattr(LocalReadFile, "_is_cached", lambda *_: is_cached)
    size = path.stat().st_size
    with closing(opened(path)) as file, mmap.mmap(-1, 1 << 20) as memory:
        os.truncate(path, size // 2)
        with (
            memoryview(memory) as view,
            pytest.raises(CorruptCheckpointError) as caught,
        ):
            file.read_block(0, view)
    assert caught.value.offset == size // 2
    assert caught.value.path == str(path)


def test_the_name_may_be_another_files_by_then(path):
    expected = path.read_bytes()
    with closing(opened(path)) as file, mmap.mmap(-1, 1 << 20) as memory:
        path.unlink()
        path.write_bytes(b"another")
        with memoryview(memory) as view:
            file.read_block(0, view)
        assert memory[: file.nbytes] == expected


def test_closing_twice_closes_nothing_of_others(path):
    file = opened(path)
    with mmap.mmap(-1, 1 << 20) as memory, memoryview(memory) as view:
        file.read_block(0, view)
    file.close()
    other = os.open(path, os.O_RDONLY)
    file.close()
    os.fstat(other)
    os.close(other)
