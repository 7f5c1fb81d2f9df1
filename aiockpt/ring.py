"""The ring: all host memory that staging may use, leased chunk by chunk.

One anonymous mapping is reserved at its full size; the kernel gives memory as
chunks are first written. Free chunks are handed out lowest first, so a ring that
is never full never costs its full size, and memory that was touched once is
touched again before fresh memory is.
"""

__all__ = ["Lease", "Ring", "chunk_bytes_for"]

import asyncio
import collections
import contextlib
import ctypes
import heapq
import mmap

from aiockpt.errors import InvalidArgumentError

# Big enough that the hand-overs between threads, some for each chunk, cost little beside
# the copy (a trainer that runs plain Python lets each wait for milliseconds), small
# enough that a ring of a few hundred MiB keeps all workers busy.
_CHUNK_BYTES = 16 << 20
_MIN_CHUNKS = 8
_ALIGNMENT = mmap.PAGESIZE

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
# Linux 5.14; Python has no name for it yet.
_MADV_POPULATE_WRITE = 23


def chunk_bytes_for(capacity_bytes: int) -> int:
    """The chunk size of a ring: up to 16 MiB, at least eight to the ring, aligned."""
    chunk_bytes = min(_CHUNK_BYTES, capacity_bytes // _MIN_CHUNKS)
    return chunk_bytes // _ALIGNMENT * _ALIGNMENT


class Lease:
    """One chunk of the ring, owned until `release`.

    Attributes:
        view: The chunk's bytes, writable, page-aligned.
        address: Where they are in memory.
    """

    __slots__ = ("_index", "_ring", "address", "view")

    def __init__(
        self, ring: "Ring", index: int, view: memoryview, address: int
    ) -> None:
        """Made by `Ring.lease`."""
        self._ring = ring
        self._index = index
        self.view = view
        self.address = address

    def release(self) -> None:
        """Gives the chunk back. Call it once, when the last reader has ended."""
        # Twice would give one chunk to two owners.
        assert self._index >= 0, "the lease has been released already"
        index, self._index = self._index, -1
        self.view.release()
        self._ring.take_back(index)


class Ring:
    """A bounded pool of equal, page-aligned chunks in one mapping.

    Used from one event loop; the bytes themselves may be touched by any thread.

    Attributes:
        capacity_bytes: Bytes of all chunks.
        chunk_bytes: Bytes of one chunk.
        address: Where the first chunk is in memory; the others follow without gaps.
        leased_bytes: Bytes leased now.
        peak_bytes: The most that were leased at once.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """Reserves the mapping; takes no memory yet.

        Raises:
            InvalidArgumentError: The system cannot even reserve that many bytes.
        """
        self.chunk_bytes = chunk_bytes_for(capacity_bytes)
        num_chunks = capacity_bytes // self.chunk_bytes
        self.capacity_bytes = num_chunks * self.chunk_bytes
        self.leased_bytes = 0
        self.peak_bytes = 0
        self._map = _reserve(self.capacity_bytes)
        self._bytes = memoryview(self._map)
        anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(anchor)
        self._free = list(range(num_chunks))
        self._waiters: collections.deque[asyncio.Future[int]] = collections.deque()

    async def lease(self) -> Lease:
        """The lowest free chunk, first come first served, waiting while all are out.

        If cancelled: nothing is leased.
        """
        # Where a chunk is free, nobody waits: `_pass_on` sees to that.
        if self._free:
            return self._grant(heapq.heappop(self._free))
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return self._grant(await waiter)
        except asyncio.CancelledError:
            if not waiter.cancelled():
                # The chunk arrived together with the cancellation.
                self._pass_on(waiter.result())
            # A cancelled waiter may be in the queue or not; `_pass_on` drops it.
            raise

    def _grant(self, index: int) -> Lease:
        self.leased_bytes += self.chunk_bytes
        self.peak_bytes = max(self.peak_bytes, self.leased_bytes)
        start = index * self.chunk_bytes
        view = self._bytes[start : start + self.chunk_bytes]
        return Lease(self, index, view, self.address + start)

    def take_back(self, index: int) -> None:
        """Frees chunk `index`, or hands it to whoever waited longest."""
        self.leased_bytes -= self.chunk_bytes
        self._pass_on(index)

    def _pass_on(self, index: int) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(index)
                return
        heapq.heappush(self._free, index)

    def populate(self, index: int) -> None:
        """Has the system give chunk `index` its memory now, if it knows how to.

        From any thread, and whoever has leased the chunk: its bytes stay as they are.
        """
        # What is refused here is asked for again when the chunk is first written.
        start = self.address + index * self.chunk_bytes
        _libc.madvise(start, self.chunk_bytes, _MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Returns the memory to the system. Every lease must have been released."""
        self._bytes.release()
        self._map.close()


def _reserve(nbytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        region = mmap.mmap(-1, nbytes, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        message = f"host_cache_size: {nbytes} bytes cannot be reserved: {error}"
        raise InvalidArgumentError(message) from error
    # Advice, which a kernel may refuse: fewer page faults, and no copy of the ring
    # for a child that the trainer forks (a data loader's worker).
    for name in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, name):
            with contextlib.suppress(OSError):
                region.madvise(getattr(mmap, name))
    return region
