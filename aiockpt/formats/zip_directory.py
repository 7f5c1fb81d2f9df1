"""What stands where in a torch file, read from the end of the file.

Any file that `torch.save` of torch 2.0 or later wrote is understood. Nothing read
here is trusted: a file is refused where two of its tables disagree, since readers
that each believe another table could be shown different contents.

A caller finds the directory with `formats.zip_end`, reads it for
`parse_directory`, and `Entry.header_nbytes` bytes per record for
`data_offset`. Every function here raises `CorruptCheckpointError` (without the
path, which it does not know) and no other error, whatever the bytes are.

The tables are those of the .ZIP application note, sections 4.3.7 to 4.3.12.
"""

__all__ = ["Directory", "Entry", "data_offset", "parse_directory"]

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from aiockpt.errors import CorruptCheckpointError
from aiockpt.formats.zip_end import DirectorySpan

_U32_MAX = 0xFFFF_FFFF
_MAX_SHOWN_BYTES = 80

_ENTRY = struct.Struct("<IHHHHHHIIIHHHHHII")
_ENTRY_SIGNATURE = 0x02014B50
_LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")
_LOCAL_HEADER_SIGNATURE = 0x04034B50
_EXTRA_LENGTH = struct.Struct("<H")
_EXTRA = struct.Struct("<HH")
_ZIP64_EXTRA = 0x0001

_DESCRIPTOR_BYTES = 16
_DESCRIPTOR64_BYTES = 24

_ENCRYPTED_FLAG = 0x0001
_DESCRIPTOR_FLAG = 0x0008
_UTF8_FLAG = 0x0800


class _Raw(NamedTuple):
    """One entry of the directory as it stands there."""

    offset: int
    nbytes: int
    crc32: int
    full_name: bytes
    flags: int


class Entry(NamedTuple):
    """One record of the file, as the central directory tells it.

    Attributes:
        name: Name without the archive's, such as `data/0`.
        header_offset: File offset of the local header.
        nbytes: Length of the data.
        crc32: Checksum of the data, by the file's own account.
        limit: File offset that the data's end cannot pass: the next local header
            or the directory.
        full_name: Name with the archive's, as it stands in the file.
        has_descriptor: Whether a data descriptor follows the data.
    """

    name: str
    header_offset: int
    nbytes: int
    crc32: int
    limit: int
    full_name: bytes
    has_descriptor: bool

    @property
    def header_nbytes(self) -> int:
        """How many bytes from `header_offset` `data_offset` wants to see."""
        return _LOCAL_HEADER.size + len(self.full_name)

    def expected_offset(self, alignment: int) -> int | None:
        """File offset of the data if the record is laid out as torch does it.

        That is: data and descriptor reach up to `limit`, and the header's extra
        fields are those of zip64 and the padding to a multiple of `alignment`. To be
        held against the header once that has been read. None for any other layout.
        """
        is_wide = max(self.nbytes, self.header_offset) >= _U32_MAX
        descriptor = (_DESCRIPTOR64_BYTES if is_wide else _DESCRIPTOR_BYTES) * (
            self.has_descriptor
        )
        num_fixed = self.header_nbytes + _EXTRA.size
        if is_wide:
            num_fixed += _EXTRA.size + 8 * (self.header_offset >= _U32_MAX)
            num_fixed += 16 * (self.nbytes >= _U32_MAX)
        unpadded = self.header_offset + num_fixed
        offset = unpadded + -unpadded % alignment
        return offset if offset + self.nbytes + descriptor == self.limit else None


@dataclass(frozen=True, slots=True)
class Directory:
    """The records of a file.

    Attributes:
        archive: The directory that all records are in, such as `archive`.
        entries: By name without the archive's, in the directory's order.
    """

    archive: str
    entries: Mapping[str, Entry]


def parse_directory(data: bytes, span: DirectorySpan) -> Directory:
    """Reads the central directory, and refuses what no torch file contains.

    Args:
        data: The `span.nbytes` bytes of the file from `span.offset`.
        span: What `find_directory` returned.

    Raises:
        CorruptCheckpointError: An entry is malformed, compressed, encrypted or a
            duplicate, lies outside the file or in another record, has a name that
            is no plain relative path, or there are more or fewer entries than
            announced; or the file is a TorchScript archive.
    """
    raw: list[_Raw] = []
    at = 0
    for _ in range(span.num_records):
        entry, at = _read_entry(data, at, span.offset)
        raw.append(entry)
    if at != len(data) or at != span.nbytes:
        raise CorruptCheckpointError(
            f"the zip directory has bytes behind its {span.num_records} entries",
            offset=span.offset + at,
        )
    limits = _limits(raw, span.offset)
    archive = raw[0].full_name.partition(b"/")[0]
    entries: dict[str, Entry] = {}
    for offset, nbytes, crc, full_name, flags in raw:
        name = _relative_name(full_name, archive, offset)
        if name in entries:
            raise CorruptCheckpointError(
                f"the zip directory has two records {_shown(full_name)}", offset=offset
            )
        has_descriptor = bool(flags & _DESCRIPTOR_FLAG)
        entries[name] = Entry(
            name, offset, nbytes, crc, limits[offset], full_name, has_descriptor
        )
    if "constants.pkl" in entries:
        raise CorruptCheckpointError("a TorchScript archive, not a checkpoint")
    return Directory(archive.decode(), entries)


def data_offset(entry: Entry, header: bytes) -> int:
    """Returns the file offset of a record's data.

    Args:
        entry: The record, from `parse_directory`.
        header: `entry.header_nbytes` bytes or more from `entry.header_offset`.

    Raises:
        CorruptCheckpointError: The local header does not describe the record that
            the directory describes.
    """
    fault = _header_fault(entry, header)
    if fault is None:
        (num_extra,) = _EXTRA_LENGTH.unpack_from(header, _LOCAL_HEADER.size - 2)
        offset: int = entry.header_offset + entry.header_nbytes + num_extra
        if offset + entry.nbytes <= entry.limit:
            return offset
        fault = f"puts its end beyond {entry.limit}"
    raise CorruptCheckpointError(
        f"the local header of record {_shown(entry.full_name)} {fault}",
        offset=entry.header_offset,
    )


def _read_entry(data: bytes, at: int, base: int) -> tuple[_Raw, int]:
    """Reads one entry, and where it ends."""
    if at + _ENTRY.size > len(data):
        raise CorruptCheckpointError("the zip directory is cut off", offset=base + at)
    (
        signature, _, _, flags, method, _, _, crc, stored, size,
        num_name, num_extra, num_comment, disk, _, _, offset,
    ) = _ENTRY.unpack_from(data, at)  # fmt: skip
    name_at = at + _ENTRY.size
    extra_at = name_at + num_name
    comment_at = extra_at + num_extra
    end = comment_at + num_comment
    fault = None
    if signature != _ENTRY_SIGNATURE or end > len(data):
        fault = "is malformed"
    elif reason := _unsupported(method, flags):
        fault = f"is {reason}"
    elif disk != 0:
        fault = "is in another file"
    if fault is not None:
        raise CorruptCheckpointError(
            f"the zip directory entry at {base + at} {fault}", offset=base + at
        )
    if _U32_MAX in (stored, size, offset):
        extra = data[extra_at:comment_at]
        size, stored, offset = _read_zip64(extra, (size, stored, offset), base + at)
    if stored != size:
        raise CorruptCheckpointError(
            f"the zip directory entry at {base + at} has two lengths", offset=base + at
        )
    return _Raw(offset, size, crc, data[name_at:extra_at], flags), end


def _read_zip64(
    extra: bytes, fields: tuple[int, int, int], base: int
) -> tuple[int, int, int]:
    """Replaces the fields of 32 one-bits by the zip64 extra's, in its order."""
    at = 0
    while at + _EXTRA.size <= len(extra):
        kind, nbytes = _EXTRA.unpack_from(extra, at)
        at += _EXTRA.size
        if kind == _ZIP64_EXTRA:
            body = extra[at : at + nbytes]
            wide = iter(struct.unpack_from(f"<{len(body) // 8}Q", body))
            size, stored, offset = (
                next(wide, -1) if value == _U32_MAX else value for value in fields
            )
            if -1 not in (size, stored, offset):
                return size, stored, offset
        at += nbytes
    raise CorruptCheckpointError(
        f"the zip directory entry at {base} lacks its zip64 fields", offset=base
    )


def _limits(raw: Sequence[_Raw], directory_offset: int) -> dict[int, int]:
    """For each header offset, the one that follows; refuses what overlaps."""
    ordered = sorted((entry.offset, entry.nbytes, entry.full_name) for entry in raw)
    ordered.append((directory_offset, 0, b""))
    limits: dict[int, int] = {}
    for (offset, nbytes, name), (limit, _, _) in pairwise(ordered):
        if offset + _LOCAL_HEADER.size + len(name) + nbytes > limit:
            raise CorruptCheckpointError(
                f"record {_shown(name)} reaches beyond {limit}, where another record "
                "or the zip directory starts",
                offset=offset,
            )
        limits[offset] = limit
    return limits


def _relative_name(full_name: bytes, archive: bytes, offset: int) -> str:
    """Returns the name inside the archive, a plain relative path."""
    head, _, tail = full_name.partition(b"/")
    parts = (head, *tail.split(b"/"))
    if (
        head != archive
        or any(part in (b"", b".", b"..") for part in parts)
        or b"\0" in full_name
        or full_name.decode(errors="replace").encode() != full_name
    ):
        raise CorruptCheckpointError(
            f"record {_shown(full_name)} is not a plain path inside the archive "
            f"{_shown(archive)}",
            offset=offset,
        )
    return tail.decode()


def _header_fault(entry: Entry, header: bytes) -> str | None:
    """What a local header says otherwise than the directory, or None."""
    if len(header) < entry.header_nbytes:
        return "is cut off"
    signature, _, flags, method, _, _, crc, stored, size, num_name, _ = (
        _LOCAL_HEADER.unpack_from(header)
    )
    name = header[_LOCAL_HEADER.size : entry.header_nbytes]
    if signature != _LOCAL_HEADER_SIGNATURE:
        return "is not there"
    if num_name != len(name) or name != entry.full_name:
        return "is another record's"
    if reason := _unsupported(method, flags):
        return f"is {reason}"
    # With a data descriptor the header may leave these to it, as torch does.
    # Lengths of 32 one-bits stand in the zip64 extra, so they say nothing here.
    left_out = (0,) if flags & _DESCRIPTOR_FLAG else ()
    sizes = (entry.nbytes, _U32_MAX, *left_out)
    if stored in sizes and size in sizes and crc in (entry.crc32, *left_out):
        return None
    return "has another length or checksum"


def _unsupported(method: int, flags: int) -> str | None:
    """What makes a record unreadable, or None: torch stores its records plainly."""
    if method != 0:
        return f"compressed (method {method})"
    if flags & _ENCRYPTED_FLAG:
        return "encrypted"
    if flags & ~(_UTF8_FLAG | _DESCRIPTOR_FLAG):
        return f"of an unknown kind (flags {flags:#06x})"
    return None


def _shown(name: bytes) -> str:
    """The name for a message, shortened where it would flood it."""
    text = name[:_MAX_SHOWN_BYTES].decode(errors="backslashreplace")
    return repr(text) if len(name) <= _MAX_SHOWN_BYTES else f"{text!r}..."
