"""Which bytes of a file are read together: regions and what stands between them.

A file (or the wanted parts of it) is cut into *segments*, runs of bytes that share
one piece of memory and are checked when the last of them is there. A segment is a
row of *tiles*, each of which belongs to one region, or to none. Pure arithmetic.
"""

__all__ = ["Segment", "Tile", "segments"]

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from aiockpt.loading.reading import Region

# A kept region of this size has its memory for itself, and so is freed by itself.
# Many times smaller ones would each cost a mapping and a system call.
_LARGE_BYTES: Final = 4 << 20
# So much of smaller ones shares memory, and is not freed before the last is.
_SHARED_BYTES: Final = 16 << 20
# Reading over so large a gap is faster than a second read, and costs no memory
# that is worth saving.
_GAP_BYTES: Final = 64 << 10


class Tile(NamedTuple):
    """Consecutive bytes of the file.

    Attributes:
        start: File offset of the first.
        stop: File offset behind the last.
        region: The region that they are, or whose header they are; else None.
        is_header: Whether they are the region's header, and what little stands before
            it, and not its data.
    """

    start: int
    stop: int
    region: Region | None = None
    is_header: bool = False


@dataclass(slots=True, eq=False)
class Segment:
    """A run of bytes with one piece of memory.

    Attributes:
        tiles: What it consists of, in order, without holes.
        is_kept: Whether the memory is handed out; else it is the ring's, for a
            moment.
        is_large: Whether it holds more than small things.
    """

    tiles: list[Tile]
    is_kept: bool
    is_large: bool

    @property
    def start(self) -> int:
        """File offset of the first byte."""
        return self.tiles[0].start

    @property
    def stop(self) -> int:
        """File offset behind the last byte."""
        return self.tiles[-1].stop

    def add(self, other: "Segment") -> None:
        """Takes in what follows."""
        self.tiles += other.tiles
        self.is_kept |= other.is_kept
        self.is_large |= other.is_large


def segments(
    regions: Sequence[Region], kept: Collection[str], whole_nbytes: int | None
) -> list[Segment]:
    """Returns the segments that hold the regions, in the file's order.

    Args:
        regions: Regions of one file; they do not overlap.
        kept: Names of those whose memory is handed out.
        whole_nbytes: The file's length, where all of it is to be read; None where
            only the regions are.
    """
    found: list[Segment] = []
    for run in _runs(regions, kept, whole_nbytes):
        if found and _is_shared(found[-1], run):
            found[-1].add(run)
        else:
            found.append(run)
    return found


def _is_shared(segment: Segment, run: Segment) -> bool:
    """Whether `run` gets its memory from the segment before it."""
    if run.start != segment.stop:
        return False
    is_small_gap = not run.is_large and run.tiles[0].region is None
    # A large region has its memory for itself, and what little follows it.
    return is_small_gap or not (
        run.is_large or segment.is_large or segment.stop - segment.start > _SHARED_BYTES
    )


def _runs(
    regions: Sequence[Region], kept: Collection[str], whole_nbytes: int | None
) -> Iterator[Segment]:
    """Each region with its header, and the gaps between them, in order."""
    position = None if whole_nbytes is None else 0
    for region in sorted(regions, key=lambda region: (region.start, region.stop)):
        start, offset, stop = region.start, region.offset, region.stop
        if position is not None and position < start:
            is_small = start - position <= _GAP_BYTES
            if is_small and start < offset:
                # One tile less for each of what may be a hundred thousand records.
                start = position
            elif is_small or whole_nbytes is not None:
                yield _gap(position, start)
        tiles = [Tile(offset, stop, region)]
        if start < offset:
            tiles.insert(0, Tile(start, offset, region, is_header=True))
        yield Segment(tiles, region.name in kept, region.nbytes >= _LARGE_BYTES)
        position = stop
    if whole_nbytes is not None and position is not None and position < whole_nbytes:
        yield _gap(position, whole_nbytes)


def _gap(start: int, stop: int) -> Segment:
    is_large = stop - start > _GAP_BYTES
    return Segment([Tile(start, stop)], is_kept=False, is_large=is_large)
