"""Makes a whole file from its layout, the way the engine does: chunk by chunk."""

import zlib
from collections.abc import Sequence

from aiockpt.image import Chunk, Layout, Seal, chunks


def render(layout: Layout, records: Sequence[bytes], chunk_bytes: int) -> bytes:
    """Returns the file, having checked that its chunks state every byte once."""
    crcs = [zlib.crc32(record) for record in records]
    file = bytearray()
    for index, chunk in enumerate(chunks(layout, chunk_bytes)):
        assert (chunk.index, chunk.offset) == (index, len(file))
        assert 0 < chunk.nbytes <= chunk_bytes
        for at, piece in sorted(pieces(chunk, records, crcs)):
            assert chunk.offset + at == len(file)
            assert piece
            file += piece
        assert chunk.offset + chunk.nbytes == len(file)
        assert chunk.nbytes == chunk_bytes or len(file) == layout.nbytes
    assert len(file) == layout.nbytes
    return bytes(file)


def pieces(
    chunk: Chunk, records: Sequence[bytes], crcs: Sequence[int]
) -> list[tuple[int, bytes]]:
    found = list(chunk.literals)
    for copy in chunk.copies:
        piece = records[copy.record][copy.start : copy.start + copy.nbytes]
        assert len(piece) == copy.nbytes
        found.append((copy.at, piece))
    for at, start, stop, seal in chunk.seals:
        found.append((at, rendered(seal, crcs)[start:stop]))
    return found


def rendered(seal: Seal, crcs: Sequence[int]) -> bytes:
    """The seal's bytes, made without the CRCs that it does not ask for."""
    known = [
        crc if seal.first <= record < seal.stop else None
        for record, crc in enumerate(crcs)
    ]
    data = seal.render(known)
    assert len(data) == seal.nbytes
    return data
