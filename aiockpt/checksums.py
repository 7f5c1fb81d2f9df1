"""CRC-32 of a file and its records, computed by several workers at once.

Workers take chunks of one file in any order of finishing. Each computes the CRCs
of its own pieces; `Checksums` folds them in image order with CRC combination
(Mark Adler's `crc32_combine`, as in zlib), so that bytes which depend on a
record's CRC can be made as soon as the record's last piece is known.
"""

__all__ = ["AbandonedError", "Checksums"]

import threading
from collections.abc import Sequence
from typing import Final

from isal.isal_zlib import crc32_combine

from aiockpt.image import Chunk
from aiockpt.memory import crc32

# In the time that it takes to combine two checksums so many bytes are summed, and many
# of them without the interpreter's lock.
_COMBINED_BYTES: Final = 16 << 10


class AbandonedError(Exception):
    """Another worker's chunk failed, so this one's turn will never come."""


class Checksums:
    """The running CRCs of one file.

    `seal` may be called from several threads, once per chunk. The call for a chunk
    waits for the calls for the chunks before it, so these must have been started
    (or queued before it in the same first-in-first-out pool).

    Attributes:
        record_crcs: CRC-32 of each record, as far as its pieces have been folded.
    """

    def __init__(self, num_records: int, num_chunks: int) -> None:
        """Starts with nothing summed."""
        self.record_crcs = [0] * num_records
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}
        self._num_folded = 0
        self._chunks: list[tuple[int, int]] = [(0, 0)] * num_chunks
        self._changed = threading.Condition()
        self._is_abandoned = False

    def seal(self, chunk: Chunk, view: memoryview) -> None:
        """Sums a filled chunk and writes into `view` what depends on checksums.

        Afterwards `view[:chunk.nbytes]` is exactly what belongs on disk.

        Raises:
            AbandonedError: A chunk before this one will not come; its failure is the
                cause, wherever that is reported.
        """
        try:
            pieces = [
                (copy.record, crc32(view[copy.at : copy.at + copy.nbytes]), copy.nbytes)
                for copy in chunk.copies
            ]
            self._post(chunk.index, pieces, wait=bool(chunk.seals))
            for at, start, stop, seal in chunk.seals:
                view[at : at + stop - start] = seal.render(self.record_crcs)[start:stop]
            self._chunks[chunk.index] = (_whole(chunk, view, pieces), chunk.nbytes)
        except BaseException:
            self.abandon()
            raise

    def _post(
        self, index: int, pieces: list[tuple[int, int, int]], *, wait: bool
    ) -> None:
        with self._changed:
            self._pieces[index] = pieces
            while (ready := self._pieces.pop(self._num_folded, None)) is not None:
                self._fold(ready)
                self._num_folded += 1
            self._changed.notify_all()
            while wait and self._num_folded <= index:
                if self._is_abandoned:
                    raise AbandonedError
                self._changed.wait()

    def _fold(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        for record, crc, nbytes in pieces:
            before = self.record_crcs[record]
            # Most records are of one piece, and to combine takes longer than to sum.
            self.record_crcs[record] = (
                crc32_combine(before, crc, nbytes) if before else crc
            )

    def abandon(self) -> None:
        """Wakes every worker that waits for a chunk that will not come."""
        with self._changed:
            self._is_abandoned = True
            self._changed.notify_all()

    def file_crc32(self) -> int:
        """The CRC-32 of all chunks, once every one has been sealed."""
        total = 0
        for crc, nbytes in self._chunks:
            total = crc32_combine(total, crc, nbytes)
        return total


def _whole(
    chunk: Chunk, view: memoryview, pieces: Sequence[tuple[int, int, int]]
) -> int:
    """The CRC-32 of all of a chunk, from those of its pieces where they are large."""
    if chunk.nbytes < len(pieces) * _COMBINED_BYTES:
        return crc32(view[: chunk.nbytes])
    total = done = 0
    for copy, (_, crc, nbytes) in zip(chunk.copies, pieces, strict=True):
        total = crc32_combine(crc32(view[done : copy.at], total), crc, nbytes)
        done = copy.at + nbytes
    return crc32(view[done : chunk.nbytes], total)
