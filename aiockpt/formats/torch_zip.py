"""The zip container of `torch.save`, laid out before a byte is copied.

The order, the alignment and every byte are those of `torch.save(obj, BytesIO())`
in torch 2.13, so any torch since 2.0 reads the file in every mode (plain,
`mmap=True`, `weights_only=True`, offsets computed under `map_location="meta"`).
Only the serialization id differs: torch derives it from the iteration order of
a hash set, here it is a digest of the same things.

Two of torch's choices are not in the zip specification, and are kept because
torch computes offsets from them: a zip64 extra in a local header also holds the
header's own offset, and a record that has one is followed by the long form of
the data descriptor.

The reading side is `aiockpt.formats.zip_directory`.
"""

__all__ = ["layout"]

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from aiockpt.image import Data, Extent, Layout, Literal, Seal

_ALIGNMENT_BYTES = 64
_U16_MAX = 0xFFFF
_U32_MAX = 0xFFFF_FFFF
_ID_DIGITS = 40

_UTF8_FLAG = 0x0800
_DESCRIPTOR_FLAG = 0x0008
_VERSION_MADE_BY = 0x031E
_VERSION_NEEDED = 0x002D
_END64_NBYTES = 56

# signature, version, flags, (method, time, date, crc, sizes: 0), lengths
_LOCAL_HEADER = struct.Struct("<IHH18xHH")
# signature, versions, flags, (method, time, date: 0), crc, sizes, lengths of
# name and extra, (comment, disk, attributes: 0), local header offset
_ENTRY = struct.Struct("<IIH6xIIIHH10xI")
_ENTRY_CRC_AT = 16
_DESCRIPTOR = struct.Struct("<IIII")
_DESCRIPTOR64 = struct.Struct("<IIQQ")
_EXTRA = struct.Struct("<HH")
_CRC = struct.Struct("<I")

# The extra that aligns the data: id "FB", length, that many "Z".
_PADDINGS = [b"FB" + struct.pack("<H", n) + b"Z" * n for n in range(_ALIGNMENT_BYTES)]

_AFTER_PICKLE = (
    (b"archive/.format_version", b"1"),
    (b"archive/.storage_alignment", b"64"),
    (b"archive/byteorder", b"little"),
)


def layout(sizes: Sequence[int]) -> Layout:
    """Returns the image of a torch file whose record `i` has `sizes[i]` bytes.

    Record 0 is the pickle (`archive/data.pkl`), record `i` is the storage
    `archive/data/{i - 1}`. A record of no bytes has no `Data` extent. Between two
    records stands one `Literal` or one `Seal`; everything behind the last record
    is one `Seal` over all of them, to be rendered once per file.

    Args:
        sizes: Length of each record in bytes, at least that of the pickle.
    """
    plan = _Plan()
    plan.add_record(b"archive/data.pkl", sizes[0])
    for name, data in _AFTER_PICKLE:
        plan.add_fixed(name, data)
    for index in range(1, len(sizes)):
        plan.add_record(b"archive/data/%d" % (index - 1), sizes[index])
    plan.add_fixed(b"archive/version", b"3\n")
    return plan.close()


@dataclass(slots=True)
class _Plan:
    """A layout in the making.

    Attributes:
        offset: Where the next local header will stand.
        extents: What is laid out so far, up to `offset - len(glue)`, less the
            descriptor of `open_record`.
        glue: Known bytes behind the last record.
        glue_offset: Where the glue starts, the descriptor of `open_record` first.
        open_record: `(record, nbytes, is_wide)` of the record before the glue.
        names: Names of all zip entries so far.
        directory: Central directory so far, with zeros for the CRCs of records.
        crc_positions: Where in `directory` the CRC of record `i` belongs.
    """

    offset: int = 0
    extents: list[Extent] = field(default_factory=list[Extent])
    glue: bytearray = field(default_factory=bytearray)
    glue_offset: int = 0
    open_record: tuple[int, int, bool] | None = None
    names: list[bytes] = field(default_factory=list[bytes])
    directory: bytearray = field(default_factory=bytearray)
    crc_positions: list[int] = field(default_factory=list[int])

    def add_record(self, name: bytes, nbytes: int) -> None:
        """Lays out a record whose bytes and CRC are known only later."""
        record = len(self.crc_positions)
        self.crc_positions.append(len(self.directory) + _ENTRY_CRC_AT)
        is_wide = self._add_header(name, nbytes, 0)
        if nbytes == 0:
            return
        self._close_glue()
        self.extents.append(Data(self.offset, nbytes, record))
        self.glue_offset = self.offset + nbytes
        self.offset = self.glue_offset + _descriptor_nbytes(is_wide=is_wide)
        self.open_record = (record, nbytes, is_wide)

    def add_fixed(self, name: bytes, data: bytes) -> None:
        """Lays out an entry whose bytes are known now."""
        crc = zlib.crc32(data)
        is_wide = self._add_header(name, len(data), crc)
        behind = data + _descriptor(crc, len(data), is_wide=is_wide)
        self.glue += behind
        self.offset += len(behind)

    def close(self) -> Layout:
        """Lays out the serialization id, the directory and the end records."""
        id_crc_position = len(self.directory) + _ENTRY_CRC_AT
        is_wide = self._add_header(b"archive/.data/serialization_id", _ID_DIGITS, 0)
        directory_offset = (
            self.offset + _ID_DIGITS + _descriptor_nbytes(is_wide=is_wide)
        )
        end = _end_records(len(self.names), directory_offset, len(self.directory))
        nbytes = directory_offset + len(self.directory) + len(end)
        tail = _Tail(
            open_record=self.open_record,
            glue=bytes(self.glue),
            names_digits=_twenty_digits(b"\n".join(self.names)),
            is_id_wide=is_wide,
            directory=bytes(self.directory),
            crc_positions=self.crc_positions,
            id_crc_position=id_crc_position,
            end=end,
        )
        num_records = len(self.crc_positions)
        at = self.glue_offset
        self.extents.append(Seal(at, nbytes - at, 0, num_records, tail.render))
        return Layout(nbytes, self.extents)

    def _add_header(self, name: bytes, nbytes: int, crc: int) -> bool:
        """Adds the local header and the directory entry; is the record wide?"""
        offset = self.offset
        flags = _UTF8_FLAG | _DESCRIPTOR_FLAG if nbytes else _UTF8_FLAG
        local_extra = entry_extra = b""
        if nbytes >= _U32_MAX or offset >= _U32_MAX:
            local_extra = _zip64_extra(nbytes, 0, offset)
            entry_extra = _zip64_extra(nbytes, nbytes, offset)
        padding = _PADDINGS[
            -(offset + 34 + len(name) + len(local_extra)) % _ALIGNMENT_BYTES
        ]
        extra = local_extra + padding
        header = (
            _LOCAL_HEADER.pack(0x04034B50, 0, flags, len(name), len(extra))
            + name
            + extra
        )
        self.glue += header
        self.offset = offset + len(header)
        size = min(nbytes, _U32_MAX)
        at = min(offset, _U32_MAX)
        num_name, num_extra = len(name), len(entry_extra)
        self.directory += _ENTRY.pack(
            0x02014B50, 0, flags, crc, size, size, num_name, num_extra, at
        )
        self.directory += name + entry_extra
        self.names.append(name)
        return bool(local_extra)

    def _close_glue(self) -> None:
        """Turns the glue into the one extent before a record."""
        at, glue = self.glue_offset, bytes(self.glue)
        if self.open_record is None:
            self.extents.append(Literal(at, len(glue), glue))
        else:
            record = self.open_record[0]
            render = partial(_render_glue, self.open_record, glue)
            nbytes = self.offset - at
            self.extents.append(Seal(at, nbytes, record, record + 1, render))
        self.glue.clear()


@dataclass(frozen=True, slots=True)
class _Tail:
    """Everything behind the last record that has bytes."""

    open_record: tuple[int, int, bool] | None
    glue: bytes
    names_digits: bytes
    is_id_wide: bool
    directory: bytes
    crc_positions: Sequence[int]
    id_crc_position: int
    end: bytes

    def render(self, crcs: Sequence[int]) -> bytes:
        """Returns the tail, given the CRC-32 of every record."""
        head = self.glue
        if self.open_record is not None:
            head = _render_glue(self.open_record, head, crcs)
        digits = _serialization_id(self.names_digits, crcs)
        digits_crc = zlib.crc32(digits)
        directory = bytearray(self.directory)
        for position, crc in zip(self.crc_positions, crcs, strict=True):
            _CRC.pack_into(directory, position, crc)
        _CRC.pack_into(directory, self.id_crc_position, digits_crc)
        descriptor = _descriptor(digits_crc, _ID_DIGITS, is_wide=self.is_id_wide)
        return b"".join((head, digits, descriptor, directory, self.end))


def _render_glue(
    record: tuple[int, int, bool], glue: bytes, crcs: Sequence[int]
) -> bytes:
    index, nbytes, is_wide = record
    return _descriptor(crcs[index], nbytes, is_wide=is_wide) + glue


def _descriptor(crc: int, nbytes: int, *, is_wide: bool) -> bytes:
    descriptor = _DESCRIPTOR64 if is_wide else _DESCRIPTOR
    return descriptor.pack(0x08074B50, crc, nbytes, nbytes)


def _descriptor_nbytes(*, is_wide: bool) -> int:
    return _DESCRIPTOR64.size if is_wide else _DESCRIPTOR.size


def _zip64_extra(nbytes: int, stored_nbytes: int, offset: int) -> bytes:
    """The fields that do not fit 32 bits; torch writes the offset here too."""
    fields = b""
    if nbytes >= _U32_MAX:
        fields += struct.pack("<QQ", nbytes, stored_nbytes)
    if offset >= _U32_MAX:
        fields += struct.pack("<Q", offset)
    return _EXTRA.pack(0x0001, len(fields)) + fields


def _end_records(num_entries: int, offset: int, nbytes: int) -> bytes:
    """Zip64 end record, its locator, end record: torch writes all three always."""
    end64 = struct.pack(
        "<IQHHIIQQQQ",
        0x06064B50,
        _END64_NBYTES - 12,
        _VERSION_MADE_BY,
        _VERSION_NEEDED,
        0,
        0,
        num_entries,
        num_entries,
        nbytes,
        offset,
    )
    locator = struct.pack("<IIQI", 0x07064B50, 0, offset + nbytes, 1)
    count = min(num_entries, _U16_MAX)
    end = struct.pack(
        "<IHHHHIIH",
        0x06054B50,
        0,
        0,
        count,
        count,
        min(nbytes, _U32_MAX),
        min(offset, _U32_MAX),
        0,
    )
    return end64 + locator + end


def _serialization_id(names_digits: bytes, crcs: Sequence[int]) -> bytes:
    """40 digits that tell two files apart: 20 for the names, 20 for the contents."""
    return names_digits + _twenty_digits(struct.pack(f"<{len(crcs)}I", *crcs))


def _twenty_digits(data: bytes) -> bytes:
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return b"%020d" % int.from_bytes(digest, "little")
