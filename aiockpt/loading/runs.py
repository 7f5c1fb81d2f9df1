"""A segment on its way from the file to memory, in blocks.

A block is one request to the file system. Several workers may have blocks of the same
run; whoever has the last one checks the run.
"""

__all__ = ["Block", "Part", "Run"]

import bisect
import concurrent.futures
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from aiockpt.loading.arenas import Arena
from aiockpt.loading.segments import Segment
from aiockpt.ring import Lease

_ALIGNMENT: Final = 4096


class Part(NamedTuple):
    """What a block had of one tile: its checksum, or the bytes of a header."""

    tile: int
    nbytes: int
    crc32: int
    header: bytes


@dataclass(frozen=True, slots=True)
class Block:
    """One request to the file system: the `index`th of its run."""

    run: "Run"
    index: int
    offset: int
    nbytes: int

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """The tiles in it: `(tile, start, stop)`."""
        segment = self.run.segment
        start = max(self.offset, segment.start)
        stop = min(self.offset + self.nbytes, segment.stop)
        return self.run.pieces(start, stop)


class Run:
    """A segment and how far it has been read.

    Attributes:
        segment: What is wanted; the blocks reach to the next multiples of 4096.
        base: File offset of the first block.
        nbytes: Length of all blocks together.
        num_left: Blocks that have not been read.
        parts: What each block had, by its index; empty once the run is checked.
        arena: The memory that is handed out, if it is to be: from the first block on,
            until all of it has been.
        num_kept: Storages that have yet to be handed out.
        crc32: Of the segment, once checked.
        is_checked: Whether it has been, for those who ask ten thousand times.
        ready: Done when the run is checked, or will not be.
    """

    def __init__(
        self, segment: Segment, block_bytes: int, blocks_per_turn: int
    ) -> None:
        """Cuts the segment into blocks.

        Args:
            segment: What to read.
            block_bytes: Length of a block, a multiple of 4096; the last may be shorter.
            blocks_per_turn: So many are read by one worker, one after the other.
        """
        self.segment = segment
        self.base = segment.start // _ALIGNMENT * _ALIGNMENT
        self.nbytes = -(-segment.stop // _ALIGNMENT) * _ALIGNMENT - self.base
        self.num_left = -(-self.nbytes // block_bytes)
        self.parts: list[list[Part]] = [[]] * self.num_left
        self.arena: Arena | None = None
        self.num_kept = 0
        self.crc32 = 0
        self.is_checked = False
        self.ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        if self.num_left == 0:
            self.ready.set_result(None)  # Empty regions at the start of a block.
        self._block_bytes = block_bytes
        self._blocks_per_turn = blocks_per_turn
        self._starts = [tile.start for tile in segment.tiles]

    def turns(self) -> Iterator[list[Block]]:
        """Its blocks, as many together as a worker reads in one go."""
        blocks = self._blocks()
        while turn := list(itertools.islice(blocks, self._blocks_per_turn)):
            yield turn

    def _blocks(self) -> Iterator[Block]:
        for index, at in enumerate(range(0, self.nbytes, self._block_bytes)):
            nbytes = min(self._block_bytes, self.nbytes - at)
            yield Block(self, index, self.base + at, nbytes)

    def reserve(self) -> None:
        """Makes the arena, once; the caller sees to it that no other thread does."""
        self.arena = self.arena or Arena(self.nbytes)

    def place(self, block: Block, lease: Lease | None) -> tuple[memoryview, int]:
        """The memory that a block is read to: in the arena, or at the lease's start."""
        if self.arena is None:
            assert lease is not None
            return lease.view[: block.nbytes], lease.address
        start = block.offset - self.base
        view = self.arena.view[start : start + block.nbytes]
        return view, self.arena.address + start

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The tiles in a range of the file: `(tile, start, stop)`."""
        tiles = self.segment.tiles
        first = bisect.bisect_right(self._starts, start) - 1
        for index in range(max(first, 0), len(tiles)):
            tile = tiles[index]
            if tile.start >= stop:
                return
            piece = max(tile.start, start), min(tile.stop, stop)
            if piece[0] < piece[1]:
                yield index, *piece
