"""The ring as pinned memory: registered piece by piece, as it is first needed.

Registering 16 GB takes seconds, during which a save would wait. So the ring is cut
into segments, each registered in a thread of its own kind when a chunk of it is first
used, and the next one with it; lowest chunks are leased first, so what is never used
is never pinned.
"""

__all__ = ["PinnedMemory"]

import asyncio
import logging
from concurrent.futures import Executor, Future
from typing import Final

from aiockpt.staging.driver import DeviceError, Driver

_logger = logging.getLogger(__name__)

# Some twenty milliseconds of registering, in which a driver may hold up other calls.
_MAX_SEGMENT_BYTES: Final = 64 << 20


class PinnedMemory:
    """A range of host memory, pinned as far as it has been asked for.

    `ready` is for the engine's loop; `close` comes when nothing is copied any more.

    Attributes:
        pinned_bytes: Bytes that are pinned now.
    """

    def __init__(
        self,
        driver: Driver,
        pinners: Executor,
        address: int,
        nbytes: int,
        chunk_bytes: int,
    ) -> None:
        """Pins nothing yet.

        Args:
            driver: Pins it.
            pinners: One thread, in which that is done.
            address: Where the memory begins.
            nbytes: Its length.
            chunk_bytes: What is copied at once is never on both sides of a multiple of
                this; itself a multiple of a page.
        """
        self._driver = driver
        self._pinners = pinners
        self._address = address
        self._nbytes = nbytes
        # Drivers refuse a copy of memory that is registered in part, or in two pieces.
        num_chunks = max(_MAX_SEGMENT_BYTES // chunk_bytes, 1)
        self._segment_bytes = num_chunks * chunk_bytes
        self._jobs: dict[int, Future[bool]] = {}
        self._is_refused = False
        self._pinned: list[tuple[int, int]] = []
        self.pinned_bytes = 0

    async def prepare(self, nbytes: int, device: int) -> None:
        """Pins the first `nbytes` bytes before they are needed; as `ready`."""
        await self.ready(self._address, nbytes, device)

    async def ready(self, address: int, nbytes: int, device: int) -> bool:
        """Whether a part of the memory is pinned, once that has been tried.

        If cancelled: what is being pinned is pinned on.
        """
        first = (address - self._address) // self._segment_bytes
        last = (address + nbytes - 1 - self._address) // self._segment_bytes
        jobs = [self._job(index, device) for index in range(first, last + 1)]
        if (last + 1) * self._segment_bytes < self._nbytes:
            self._job(last + 1, device)
        for job in jobs:
            if not job.done():
                await asyncio.wait([asyncio.wrap_future(job)])
        return all(job.result() for job in jobs)

    def _job(self, index: int, device: int) -> "Future[bool]":
        job = self._jobs.get(index)
        if job is None:
            start = index * self._segment_bytes
            job = self._jobs[index] = self._pinners.submit(self._pin, start, device)
        return job

    def _pin(self, start: int, device: int) -> bool:
        if self._is_refused:
            return False
        address = self._address + start
        nbytes = min(self._segment_bytes, self._nbytes - start)
        try:
            self._driver.pin(device, address, nbytes)
        except DeviceError as error:
            self._is_refused = True
            _logger.warning(
                "the ring cannot be pinned from byte %d on, so copies between it and "
                "devices are slower: %s; raise the limit of locked memory (ulimit -l), "
                "or lower host_cache_size",
                start,
                error,
            )
            return False
        self._pinned.append((device, address))
        self.pinned_bytes += nbytes
        return True

    def close(self) -> None:
        """Unpins everything. The pinning thread must have ended."""
        while self._pinned:
            device, address = self._pinned.pop()
            try:
                self._driver.unpin(device, address)
            except DeviceError as error:
                # At exit the driver may have gone first, and its pins with it.
                _logger.debug("unpinning %#x: %s", address, error)
        self.pinned_bytes = 0
