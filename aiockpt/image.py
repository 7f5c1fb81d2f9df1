"""A file as an image: what stands at which offset, known before a byte is copied.

A format lays a file out as a list of *extents* that tile it. A `Literal` is
known bytes, `Data` is the bytes of one record (a tensor's storage, the pickle),
and a `Seal` is bytes that depend on the records' checksums and can therefore be
made only after them (zip data descriptors, the zip directory).

`chunks` cuts an image into aligned pieces, the unit that is staged and written.
Everything here is pure.
"""

__all__ = ["Chunk", "Copy", "Data", "Extent", "Layout", "Literal", "Seal", "chunks"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Literal(NamedTuple):
    """Bytes that are known when the file is planned."""

    offset: int
    nbytes: int
    data: bytes


class Data(NamedTuple):
    """The whole of record number `record`, `nbytes` long."""

    offset: int
    nbytes: int
    record: int


class Seal(NamedTuple):
    """Bytes made from the CRC-32 of the records `first` to `stop - 1`.

    `render` takes the CRCs of all records (those in the range are final) and
    returns exactly `nbytes` bytes.
    """

    offset: int
    nbytes: int
    first: int
    stop: int
    render: Callable[[Sequence[int]], bytes]


Extent = Literal | Data | Seal


class Layout(NamedTuple):
    """A file image: extents sorted by offset that tile `[0, nbytes)`."""

    nbytes: int
    extents: Sequence[Extent]


class Copy(NamedTuple):
    """Bytes `[start, start + nbytes)` of a record, to stand at `at` in a chunk."""

    at: int
    record: int
    start: int
    nbytes: int


@dataclass(slots=True)
class Chunk:
    """A run of the image: `nbytes` bytes from `offset`, and what stands in it.

    Attributes:
        index: Position among the file's chunks, from 0.
        offset: Image offset of the first byte; a multiple of the chunk size.
        nbytes: Length; shorter than the chunk size only for the last chunk.
        literals: `(at, bytes)` pairs, `at` relative to the chunk.
        copies: Pieces of records, in image order.
        seals: `(at, lo, hi, seal)`: `render(...)[lo:hi]` stands at `at`.
    """

    index: int
    offset: int
    nbytes: int = 0
    literals: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    copies: list[Copy] = field(default_factory=list[Copy])
    seals: list[tuple[int, int, int, Seal]] = field(
        default_factory=list[tuple[int, int, int, Seal]]
    )


def chunks(layout: Layout, chunk_bytes: int) -> Iterator[Chunk]:
    """Cuts the image into consecutive chunks of `chunk_bytes`, the last shorter."""
    chunk = Chunk(0, 0)
    for extent in layout.extents:
        done = 0
        at = extent.offset - chunk.offset
        while at + extent.nbytes - done > chunk_bytes:
            if at < chunk_bytes:
                _place(chunk, extent, at, done, chunk_bytes - at)
                done += chunk_bytes - at
            yield chunk
            chunk = Chunk(chunk.index + 1, chunk.offset + chunk_bytes)
            at = 0
        if done < extent.nbytes:
            _place(chunk, extent, at, done, extent.nbytes - done)
    if chunk.nbytes:
        yield chunk


def _place(chunk: Chunk, extent: Extent, at: int, done: int, take: int) -> None:
    chunk.nbytes = at + take
    if isinstance(extent, Data):
        chunk.copies.append(Copy(at, extent.record, done, take))
    elif isinstance(extent, Literal):
        chunk.literals.append((at, extent.data[done : done + take]))
    else:
        chunk.seals.append((at, done, done + take, extent))
