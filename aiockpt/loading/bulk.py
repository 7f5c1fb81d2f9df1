"""Many regions of one file, read by several workers at once.

The loading thread says what it wants, and goes on to unpickle; tasks on the
engine's loop hand blocks of the file to the workers. Each block is read, summed
and, where its bytes do not stay where they were read to, copied to their place.
When all blocks of a segment are there it is checked, and whoever waits for one of
its storages gets it.
"""

__all__ = ["BulkRead", "Reads"]

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from isal.isal_zlib import crc32_combine

from aiockpt.errors import CorruptCheckpointError
from aiockpt.loading.filling import Target
from aiockpt.loading.reading import Region, compare_header
from aiockpt.loading.runs import Block, Part, Run
from aiockpt.loading.segments import Tile, segments
from aiockpt.memory import copy_bytes, crc32
from aiockpt.ring import Lease, Ring
from aiockpt.staging.devices import Devices, InFlight, failed
from aiockpt.staging.driver import DeviceCopy, DeviceError
from aiockpt.storage.base import ReadFile
from aiockpt.threads import run_blocking

_PURPOSE: Final = "load"
# A request for memory that is kept; long enough for any disk, short enough to be
# summed while others read.
_KEPT_BLOCK_BYTES: Final = 8 << 20
# A request for the ring, to be summed and copied by a processor: those of all lanes
# fit into its cache, so that the ring's memory is not asked again. A worker reads some
# of them in a turn: handing over each would take as long as its copy.
_CACHED_BLOCK_BYTES: Final = 2 << 20
_TURN_BYTES: Final = 8 << 20


class Reads(NamedTuple):
    """What to read from a file.

    Attributes:
        regions: All that is to be read and checked.
        mismatch: Makes the error for a region that does not have its checksum.
        kept: Names of those that are handed out as storages.
        fills: Memory that the bytes of a region are copied to, by the region's name.
            It must outlive the read.
        is_whole: Whether every byte of the file is read, for its checksum.
        noted: Names of regions whose CRC-32 is wanted; for a read of the whole file.
        progress: Told by the workers the number of further bytes that were read.
    """

    regions: Sequence[Region]
    mismatch: Callable[[Region], CorruptCheckpointError]
    kept: Collection[str] = ()
    fills: Mapping[str, Sequence[Target]] = MappingProxyType({})
    is_whole: bool = False
    noted: Collection[str] = ()
    progress: Callable[[int], None] | None = None


class BulkRead:
    """One read of many regions.

    `storage` and `wait` are for the thread that loads, `run` for the engine's loop,
    `stop` for both.

    Attributes:
        devices: Those, other than the host, whose memory is filled.
        crc32s: Behind `wait`, of the regions that are noted and not empty, by name.
    """

    def __init__(
        self,
        file: ReadFile,
        reads: Reads,
        chunk_bytes: int,
        copiers: Devices | None = None,
    ) -> None:
        """Plans the read; `run` does it.

        Args:
            file: Must stay open until `run` has ended.
            reads: What to read.
            chunk_bytes: Length of a chunk of the ring, a multiple of 4096.
            copiers: What copies to the devices that are to be filled.
        """
        self._file = file
        self._reads = reads
        self._copiers = copiers
        self.devices = {
            target.device
            for group in reads.fills.values()
            for target in group
            if target.device is not None
        }
        self.crc32s: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        nbytes = file.nbytes if reads.is_whole else None
        cut = segments(reads.regions, reads.kept, nbytes)
        passing = (chunk_bytes, 1)
        if not self.devices and chunk_bytes > _CACHED_BLOCK_BYTES:
            turn_bytes = min(chunk_bytes, _TURN_BYTES)
            passing = (_CACHED_BLOCK_BYTES, turn_bytes // _CACHED_BLOCK_BYTES)
        kept = (_KEPT_BLOCK_BYTES, 1)
        self._runs = [
            Run(segment, *(kept if segment.is_kept else passing)) for segment in cut
        ]
        self._run_of = {
            tile.region.name: run
            for run in self._runs
            for tile in run.segment.tiles
            if tile.region is not None
        }
        self._kept = {name for name in reads.kept if name in self._run_of}
        for name in self._kept:
            self._run_of[name].num_kept += 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Lets go of all memory; `run` must have ended."""
        # An error's traceback refers to these objects, which hold the error.
        for run in self._runs:
            run.arena = None
            run.ready = concurrent.futures.Future()
        self._runs.clear()
        self._run_of.clear()

    def holds(self, region: Region) -> bool:
        """Whether `storage` gives this region."""
        return region.name in self._kept

    def storage(self, region: Region) -> torch.UntypedStorage:
        """The bytes of a region that it holds, once its segment is read and checked.

        It then lets go of the region, so that memory ends with the last storage.

        Raises:
            CorruptCheckpointError: Some bytes of the file are not as written.
            StorageError: The file system refused.
            concurrent.futures.CancelledError: The read was stopped.
        """
        run = self._run_of[region.name]
        if not run.is_checked:
            run.ready.result()
        self._kept.discard(region.name)
        run.num_kept -= 1
        arena = run.arena
        if run.num_kept == 0:
            run.arena = None
        if arena is None:
            return torch.empty(0).untyped_storage()  # There was nothing to read.
        return arena.storage(region.offset - run.base, region.nbytes)

    def wait_for(self, region: Region) -> None:
        """Blocks until a region has been read, checked, and copied where it belongs."""
        run = self._run_of[region.name]
        if not run.is_checked:
            run.ready.result()

    def wait(self) -> int:
        """Blocks until all has been read and checked; errors as those of `storage`.

        Returns:
            The CRC-32 of all that was read: where that is the whole file, the file's.
        """
        total = 0
        for run in self._runs:
            run.ready.result()
            nbytes = run.segment.stop - run.segment.start
            total = crc32_combine(total, run.crc32, nbytes)
        return total

    def stop(self) -> None:
        """Begins no further turn, and wakes whoever waits. From any thread."""
        self._fail(concurrent.futures.CancelledError())
        if self._loop is not None:
            with suppress(RuntimeError):  # The loop has ended: nobody waits there.
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        """Interrupts the lanes that wait for a chunk of the ring."""
        for lane in self._waiting:
            lane.cancel()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._stopped.set()
            for run in self._runs:
                if not run.ready.done():
                    run.ready.set_exception(error)

    async def run(
        self, ring: Ring, workers: concurrent.futures.Executor, num_lanes: int
    ) -> None:
        """Reads; returns when nothing of it is going on any more.

        Errors go to those who wait.
        """
        turns = (turn for run in self._runs for turn in run.turns())
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as lanes:
                for _ in range(num_lanes):
                    lanes.create_task(self._take_turns(turns, ring, workers))
        except BaseExceptionGroup as errors:
            self._fail(errors.exceptions[0])
            # The group's frames refer to it, and it to what was being read.
            errors.__traceback__ = None
        finally:
            # Whatever ended it, nobody is left waiting.
            self.stop()

    async def _take_turns(
        self,
        turns: Iterator[list[Block]],
        ring: Ring,
        workers: concurrent.futures.Executor,
    ) -> None:
        for turn in turns:
            if self._stopped.is_set():
                return
            run = turn[0].run
            if run.segment.is_kept:
                run.reserve()
                await self._move(workers, turn, None)
                continue
            lease = await self._lease(ring)
            try:
                if self._stopped.is_set():
                    return
                await self._move(workers, turn, lease)
            finally:
                lease.release()

    async def _lease(self, ring: Ring) -> Lease:
        lane = asyncio.current_task()
        assert lane is not None
        self._waiting.add(lane)
        try:
            return await ring.lease()
        finally:
            self._waiting.discard(lane)

    async def _move(
        self,
        workers: concurrent.futures.Executor,
        turn: list[Block],
        lease: Lease | None,
    ) -> None:
        """Reads blocks, one after the other, and copies what is due."""
        if not self.devices:
            await run_blocking(workers, self._read_and_count, turn, lease)
            return
        (block,) = turn
        assert self._copiers is not None
        is_pinned = lease is not None and await self._pinned(lease, block.nbytes)
        in_flight = InFlight(self._copiers)
        land = partial(self._land, in_flight, is_pinned=is_pinned)
        try:
            parts = await run_blocking(workers, self._read, block, lease, land)
        finally:
            # Devices read the memory until then.
            await in_flight.ended()
        await run_blocking(workers, self._count, block, parts)

    async def _pinned(self, lease: Lease, nbytes: int) -> bool:
        for device in self.devices:
            assert self._copiers is not None
            return await self._copiers.memory.ready(lease.address, nbytes, device)
        return False

    def _land(
        self,
        in_flight: InFlight,
        device: int,
        copies: Sequence[DeviceCopy],
        *,
        is_pinned: bool,
    ) -> None:
        assert self._copiers is not None
        try:
            stream = self._copiers.stream(device, _PURPOSE)
            in_flight.copy(
                device, stream, copies, is_to_host=False, is_pinned=is_pinned
            )
        except DeviceError as error:
            raise failed(device, error) from error

    def _read_and_count(self, turn: list[Block], lease: Lease | None) -> None:
        for block in turn:
            if self._stopped.is_set():
                return
            self._count(block, self._read(block, lease))

    def _read(
        self,
        block: Block,
        lease: Lease | None,
        land: Callable[[int, Sequence[DeviceCopy]], object] | None = None,
    ) -> list[Part]:
        view, address = block.run.place(block, lease)
        with view:
            self._file.read_block(block.offset, view)
            parts = self._summed(block, view)
        for device, copies in self._copies(block, address).items():
            assert land is not None
            land(device, copies)
        if self._reads.progress is not None:
            self._reads.progress(sum(part.nbytes for part in parts))
        return parts

    def _count(self, block: Block, parts: list[Part]) -> None:
        """Notes that a block is there; the last of its run has the run checked."""
        run = block.run
        with self._lock:
            run.parts[block.index] = parts
            run.num_left -= 1
            is_last = run.num_left == 0
        if is_last:
            self._check(run)
            run.is_checked = True
            with self._lock, suppress(concurrent.futures.InvalidStateError):
                run.ready.set_result(None)

    def _copies(self, block: Block, address: int) -> dict[int, list[DeviceCopy]]:
        """Copies what stays on the host; what is to be copied to devices, by device."""
        on_devices: dict[int, list[DeviceCopy]] = {}
        if not self._reads.fills:
            return on_devices
        for index, first, last in block.pieces():
            tile = block.run.segment.tiles[index]
            if tile.region is None or tile.is_header:
                continue
            source, nbytes = address + first - block.offset, last - first
            for target in self._reads.fills.get(tile.region.name, ()):
                to = target.address + first - tile.start
                if target.device is None:
                    copy_bytes(to, source, nbytes)
                else:
                    piece = DeviceCopy(source, to, nbytes)
                    on_devices.setdefault(target.device, []).append(piece)
        return on_devices

    def _summed(self, block: Block, view: memoryview) -> list[Part]:
        run, parts = block.run, list[Part]()
        for index, first, last in block.pieces():
            tile = run.segment.tiles[index]
            at, nbytes = first - block.offset, last - first
            checksum, header = 0, b""
            if tile.is_header:
                header = bytes(view[at : at + nbytes])
            elif self._is_summed(tile):
                with view[at : at + nbytes] as piece:
                    checksum = crc32(piece)
            parts.append(Part(index, nbytes, checksum, header))
        return parts

    def _is_summed(self, tile: Tile) -> bool:
        if self._reads.is_whole:
            return True
        return tile.region is not None and tile.region.crc32 is not None

    def _check(self, run: Run) -> None:
        """Puts the parts together, and holds each region against its checksum."""
        tiles = run.segment.tiles
        sums = [0] * len(tiles)
        headers: dict[int, bytes] = {}
        for part in (part for parts in run.parts for part in parts):
            if tiles[part.tile].is_header:
                headers[part.tile] = headers.get(part.tile, b"") + part.header
            else:
                sums[part.tile] = crc32_combine(
                    sums[part.tile], part.crc32, part.nbytes
                )
        run.parts = []
        total = 0
        for index, tile in enumerate(tiles):
            region = tile.region
            if tile.is_header and region is not None:
                header = headers[index]
                compare_header(self._file, region, header[region.start - tile.start :])
                if self._reads.is_whole:
                    sums[index] = crc32(header)
            elif region is not None and region.crc32 not in (None, sums[index]):
                raise self._reads.mismatch(region)
            elif region is not None and region.name in self._reads.noted:
                self.crc32s[region.name] = sums[index]
            if self._reads.is_whole:
                total = crc32_combine(total, sums[index], tile.stop - tile.start)
        run.crc32 = total
