"""The machine's own limits: the disk past the page cache, and memory."""

__all__ = ["Copying", "Fresh", "Writing", "WritingAtOnce"]

import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from bench.contenders.base import Contender, Done, Options, Saving, State, sync_tree
from bench.workloads import MIB, SEED, flatten

_FILE = "raw"
_CHUNK_BYTES = 8 * MIB
# As much as aiockpt's ring has in most cells. Some disks of virtual machines are half
# again as fast from some of the memory as from other, so one chunk would be a matter of
# luck; and no state is the same 8 MiB over and over again.
_SOURCE_BYTES = 512 * MIB
_NUM_READERS = 4


@dataclass(frozen=True)
class RawBytes:
    """Bytes of a file as they were read.

    Attributes:
        buffer: They, in whole pages.
        source: What was written, over and over again.
    """

    buffer: mmap.mmap
    source: mmap.mmap

    def are_as_written(self) -> bool:
        """Whether the bytes are those that were written."""
        found = torch.frombuffer(self.buffer, dtype=torch.int64)
        source = torch.frombuffer(self.source, dtype=torch.int64)
        return all(
            torch.equal(
                found[start : start + len(source)], source[: len(found) - start]
            )
            for start in range(0, len(found), len(source))
        )


class Writing(Contender):
    """Direct writes of as many bytes, one after the other, and direct reads.

    Attributes:
        num_writers: Threads that write.
        is_touched: Whether loads go to memory that is there already.
    """

    name = "raw O_DIRECT"
    durability = "fsync of file and directory"
    is_reference = True
    num_writers: ClassVar[int] = 1
    is_touched: ClassVar[bool] = True

    @override
    def setup(self, directory: Path, options: Options) -> None:
        super().setup(directory, options)
        self._source = allocate(_SOURCE_BYTES)
        # The same in every process.
        generator = torch.Generator().manual_seed(SEED)
        torch.frombuffer(self._source, dtype=torch.int64).random_(generator=generator)
        self._read_into: mmap.mmap | None = None

    @override
    def save(self, state: State, tag: str) -> Saving:
        nbytes = _whole(sum(each.nbytes for each in flatten(state).values()))
        path = self.directory / tag / _FILE
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, nbytes)

        def write(offset: int) -> None:
            length = min(_CHUNK_BYTES, nbytes - offset)
            start = offset % _SOURCE_BYTES
            with memoryview(self._source)[start : start + length] as view:
                assert os.pwrite(descriptor, view, offset) == length

        offsets = range(0, nbytes, _CHUNK_BYTES)
        if self.num_writers == 1:
            for offset in offsets:
                write(offset)
        else:
            with ThreadPoolExecutor(self.num_writers) as threads:
                list(threads.map(write, offsets))
        os.close(descriptor)
        sync_tree(self.directory / tag)
        return Done()

    @override
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        """All of the file, or as much as the tensors `keys` have.

        Into memory that was touched by `get_ready`, or else into fresh memory.
        """
        path = self.directory / tag / _FILE
        file_bytes = path.stat().st_size
        if keys is not None:
            file_bytes = _whole(sum(like[key].nbytes for key in keys))
        buffer = self._read_into or allocate(file_bytes)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)

        def read(start: int) -> None:
            with memoryview(buffer)[start : start + _CHUNK_BYTES] as piece:
                assert os.preadv(descriptor, [piece], start) == len(piece)

        with ThreadPoolExecutor(_NUM_READERS) as threads:
            list(threads.map(read, range(0, file_bytes, _CHUNK_BYTES)))
        os.close(descriptor)
        return {"raw": RawBytes(buffer, self._source)}

    def get_ready(self, nbytes: int) -> None:
        """Touches the memory that `load` will fill."""
        self._read_into = allocate(_whole(nbytes))
        torch.frombuffer(self._read_into, dtype=torch.uint8).fill_(1)


class WritingAtOnce(Writing):
    """Direct writes by four threads: some disks are faster so, some are not."""

    name = "raw O_DIRECT, 4 threads"
    num_writers = 4


class Fresh(Writing):
    """The same, but loads go to memory that the system has yet to give."""

    name = "raw O_DIRECT, fresh memory"
    writer = Writing.name
    is_touched = False


class Copying(Contender):
    """A copy of all bytes to memory that was touched before."""

    name = "memcpy"
    durability = "none: in memory"
    is_reference = True

    @override
    def setup(self, directory: Path, options: Options) -> None:
        super().setup(directory, options)
        self._copies: dict[str, torch.Tensor] = {}

    @override
    def save(self, state: State, tag: str) -> Saving:
        for name, tensor in flatten(state).items():
            if name in self._copies:
                self._copies[name].copy_(tensor)
            else:
                self._copies[name] = tensor.clone()
        return Done()

    @override
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        return self._copies


def allocate(nbytes: int) -> mmap.mmap:
    """Memory in whole pages, huge where there are some; not there until touched."""
    buffer = mmap.mmap(-1, _whole(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _whole(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
