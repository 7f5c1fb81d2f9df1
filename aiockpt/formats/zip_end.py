"""Where the central directory of a zip file stands: its end records, read and checked.

The tables are those of the .ZIP application note, sections 4.3.14 to 4.3.16.
"""

__all__ = ["TAIL_BYTES", "DirectorySpan", "find_directory"]

import struct
from typing import NamedTuple

from aiockpt.errors import CorruptCheckpointError

_U16_MAX = 0xFFFF
_U32_MAX = 0xFFFF_FFFF
_MAX_DIRECTORY_BYTES = 1 << 30
_MIN_ENTRY_BYTES = 46

_END = struct.Struct("<IHHHHIIH")
_END_SIGNATURE = b"PK\x05\x06"
_LOCATOR = struct.Struct("<IIQI")
_LOCATOR_SIGNATURE = b"PK\x06\x07"
_END64 = struct.Struct("<IQHHIIQQQQ")
_END64_SIGNATURE = b"PK\x06\x06"

_END64_BYTES = _END64.size + _LOCATOR.size
TAIL_BYTES = _END64_BYTES + _END.size + _U16_MAX
"""So many last bytes of a file always hold its end records, if it has any."""


class DirectorySpan(NamedTuple):
    """Where the central directory stands in the file, and its number of entries."""

    offset: int
    nbytes: int
    num_records: int


def find_directory(tail: bytes, file_nbytes: int) -> DirectorySpan | None:
    """Finds the central directory from the last bytes of a file.

    An end record followed by its comment, or by zeros (padding of the last block),
    is accepted.

    Args:
        tail: The last bytes of the file, at best `TAIL_BYTES` or more.
        file_nbytes: Length of the file.

    Returns:
        The span, or None where `tail` is too short to tell. It is long enough with
        `TAIL_BYTES` bytes, and with the whole of a shorter file.

    Raises:
        CorruptCheckpointError: The file has no consistent end records.
    """
    is_enough = len(tail) >= min(TAIL_BYTES, file_nbytes)
    base = file_nbytes - len(tail)
    lowest = max(0, len(tail) - _END.size - _U16_MAX)
    # A bound below zero would count from the end of a tail too short for a record.
    highest = max(0, len(tail) - _END.size + len(_END_SIGNATURE))
    at = tail.rfind(_END_SIGNATURE, lowest, highest)
    if at < 0 and is_enough:
        raise CorruptCheckpointError(
            "no zip end record: the file is cut off, or is not a torch file",
            offset=file_nbytes,
        )
    if at < 0 or (at < _END64_BYTES and not is_enough):
        return None
    span, end = _read_end_records(tail, at, base)
    _check_span(span, base + end)
    return span


def _check_span(span: DirectorySpan, end: int) -> None:
    """Refuses a directory that does not reach up to its end records at `end`."""
    if span.offset + span.nbytes != end:
        raise CorruptCheckpointError(
            f"the zip directory is said to end at {span.offset + span.nbytes}, "
            f"but its end records start at {end}",
            offset=end,
        )
    if not 0 < span.num_records <= span.nbytes // _MIN_ENTRY_BYTES:
        raise CorruptCheckpointError(
            f"a zip directory of {span.nbytes} bytes cannot have "
            f"{span.num_records} entries",
            offset=end,
        )
    if span.nbytes > _MAX_DIRECTORY_BYTES:
        raise CorruptCheckpointError(
            f"the zip directory has {span.nbytes} bytes, "
            f"more than the {_MAX_DIRECTORY_BYTES} allowed",
            offset=span.offset,
        )


def _read_end_records(tail: bytes, at: int, base: int) -> tuple[DirectorySpan, int]:
    """Reads the end record at `at`, and the zip64 ones where they are there.

    Returns the span as told, and where in `tail` the end records start.
    """
    _, disk, first_disk, on_disk, count, nbytes, offset, num_comment = _END.unpack_from(
        tail, at
    )
    behind = at + _END.size + num_comment
    if tail.count(0, behind) != len(tail) - behind:
        raise CorruptCheckpointError(
            "the zip end record is not followed by its comment and zeros",
            offset=base + at,
        )
    if disk != 0 or first_disk != 0 or on_disk != count:
        raise CorruptCheckpointError(
            "the zip archive is split over several files", offset=base + at
        )
    span = DirectorySpan(offset, nbytes, count)
    locator_at = at - _LOCATOR.size
    if locator_at < 0 or not tail.startswith(_LOCATOR_SIGNATURE, locator_at):
        return span, at
    end64_at = locator_at - _END64.size
    span64 = _read_end64(tail, end64_at, base)
    for told, told64, limit in zip(
        span, span64, (_U32_MAX, _U32_MAX, _U16_MAX), strict=True
    ):
        if told not in (told64, limit):
            raise CorruptCheckpointError(
                f"the zip end records disagree: {told} and {told64}", offset=base + at
            )
    return span64, end64_at


def _read_end64(tail: bytes, at: int, base: int) -> DirectorySpan:
    """Reads the zip64 end record at `at`, which its locator must name."""
    if at < 0 or not tail.startswith(_END64_SIGNATURE, at):
        raise CorruptCheckpointError(
            "no zip64 end record before its locator", offset=base + max(at, 0)
        )
    _, end_disk, end_offset, num_disks = _LOCATOR.unpack_from(tail, at + _END64.size)
    _, rest, _, _, disk, first_disk, on_disk, count, nbytes, offset = (
        _END64.unpack_from(tail, at)
    )
    if (
        (end_disk, num_disks, disk, first_disk) != (0, 1, 0, 0)
        or end_offset != base + at
        or rest != _END64.size - 12
        or on_disk != count
    ):
        raise CorruptCheckpointError(
            "the zip64 end record and its locator disagree", offset=base + at
        )
    return DirectorySpan(offset, nbytes, count)
