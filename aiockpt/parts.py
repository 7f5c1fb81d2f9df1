"""Which part of a file each replica writes, and what the parts' checksums make.

Every replica has the plan of the whole file. Its chunks are dealt out in runs, one
to each member of the group. Whoever has a run can render the seals of records that
begin in it; a seal of a record that begins before it is *late*: it is written as
zeros, and over again when the members have put their checksums together.

Everything here is pure; what takes long is called in a worker.
"""

__all__ = ["LateSeal", "Part", "Totals", "combine", "digest", "part_of"]

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from isal.isal_zlib import crc32, crc32_combine

from aiockpt.image import Chunk, Seal
from aiockpt.plan import FilePlan

_DIGEST_BYTES = 16


class LateSeal(NamedTuple):
    """Bytes `start` to `stop` of a seal, to be written over zeros at `offset`."""

    offset: int
    start: int
    stop: int
    seal: Seal

    def render(self, record_crcs: Sequence[int]) -> bytes:
        """The bytes, given the CRC-32 of every record."""
        return self.seal.render(record_crcs)[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Part:
    """What one member writes.

    Attributes:
        plan: Its run of the chunks, numbered from 0, with zeros for late seals; its
            length is that of the run. The sources are those of the whole file's plan.
        late_seals: What it writes over again, in image order.
        piece_nbytes: How many bytes of which records are in the run, in image order.
    """

    plan: FilePlan
    late_seals: Sequence[LateSeal]
    piece_nbytes: dict[int, int]

    def word(self, crc: int, record_crcs: Sequence[int]) -> bytes:
        """What the others need to know of the part once it is written.

        Args:
            crc: CRC-32 of the part, with zeros for late seals.
            record_crcs: For each record the CRC-32 of its bytes in the part.
        """
        return _pack([crc, *(record_crcs[record] for record in self.piece_nbytes)])


class Totals(NamedTuple):
    """The checksums of a whole file.

    Attributes:
        file_crc: CRC-32 of all its bytes.
        record_crcs: CRC-32 of each record; empty where no seal is late.
    """

    file_crc: int
    record_crcs: Sequence[int]

    def pack(self) -> bytes:
        """As bytes, for `unpack`."""
        return _pack([self.file_crc, *self.record_crcs])

    @classmethod
    def unpack(cls, data: bytes) -> "Totals":
        """From the bytes that `pack` made."""
        file_crc, *record_crcs = _unpack(data)
        return cls(file_crc, record_crcs)


def digest(plan: FilePlan) -> tuple[bytes, bytes]:
    """What plans of identical state have in common: of its tensors, and of the rest.

    The first is of the sizes of the tensors' records, the second of every byte that
    is no tensor's: pickle and header. The tensors' own bytes are not looked at.
    """
    sizes = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    rest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for source in plan.sources:
        if isinstance(source, bytes):
            rest.update(source)
        else:
            sizes.update(struct.pack("<Q", source.nbytes))
    for chunk in plan.chunks:
        for _, data in chunk.literals:
            rest.update(data)
    return sizes.digest(), rest.digest()


def part_of(plan: FilePlan, member: int, num_members: int) -> Part:
    """The part of one member: of `n` chunks, chunk `i` goes to `i * num_members // n`.

    With fewer chunks than members, some parts are empty.
    """
    num_chunks = len(plan.chunks)
    start = -(-member * num_chunks // num_members)
    stop = -(-(member + 1) * num_chunks // num_members)
    run = plan.chunks[start:stop]
    copies = [copy for chunk in run for copy in chunk.copies]
    begun = (copy.record for copy in copies if copy.start == 0)
    first_record = next(begun, plan.num_records) if start > 0 else 0
    late_seals: list[LateSeal] = []
    chunks = [
        _without_late_seals(replace(chunk, index=index), first_record, late_seals)
        for index, chunk in enumerate(run)
    ]
    piece_nbytes: dict[int, int] = {}
    for copy in copies:
        piece_nbytes[copy.record] = piece_nbytes.get(copy.record, 0) + copy.nbytes
    nbytes = sum(chunk.nbytes for chunk in chunks)
    return Part(replace(plan, nbytes=nbytes, chunks=chunks), late_seals, piece_nbytes)


def _without_late_seals(
    chunk: Chunk, first_record: int, late_seals: list[LateSeal]
) -> Chunk:
    """The chunk with zeros for seals of records before `first_record`."""
    # A seal stands behind its records, so those from `first_record` on are in the run.
    late = [each for each in chunk.seals if each[3].first < first_record]
    if not late:
        return chunk
    for at, start, stop, seal in late:
        previous = late_seals[-1] if late_seals else None
        if previous is not None and previous.seal is seal:
            # It goes on from the chunk before: one write, and rendered once.
            late_seals[-1] = previous._replace(stop=stop)
        else:
            late_seals.append(LateSeal(chunk.offset + at, start, stop, seal))
    return replace(
        chunk,
        literals=[
            *chunk.literals,
            *((at, bytes(stop - start)) for at, start, stop, _ in late),
        ],
        seals=[each for each in chunk.seals if each[3].first >= first_record],
    )


def combine(plan: FilePlan, words: Sequence[bytes]) -> Totals:
    """The checksums of the file, late seals included, from the words of all parts.

    Args:
        plan: Of the whole file.
        words: What `Part.word` made, in the order of the members.
    """
    parts = [part_of(plan, member, len(words)) for member in range(len(words))]
    total = 0
    record_crcs = [0] * plan.num_records
    for part, word in zip(parts, words, strict=True):
        crc, *piece_crcs = _unpack(word)
        total = crc32_combine(total, crc, part.plan.nbytes)
        pieces = zip(part.piece_nbytes.items(), piece_crcs, strict=True)
        for (record, nbytes), piece_crc in pieces:
            record_crcs[record] = crc32_combine(record_crcs[record], piece_crc, nbytes)
    late_seals = [late for part in parts for late in part.late_seals]
    for late in late_seals:
        data = late.render(record_crcs)
        total ^= _change(data, plan.nbytes - late.offset - len(data))
    return Totals(total, record_crcs if late_seals else ())


def _change(data: bytes, num_behind: int) -> int:
    """What XOR does to a file's CRC-32 when `data` takes the place of zeros.

    CRC-32 is affine: the CRCs of two files of one length differ by what depends on
    the difference of the files only, moved over the bytes that stand behind it.
    """
    return crc32_combine(crc32(data) ^ crc32(bytes(len(data))), 0, num_behind)


def _pack(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def _unpack(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)
