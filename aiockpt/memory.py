"""Copying and summing bytes, with or without the interpreter's lock."""

__all__ = ["copy_bytes", "crc32"]

import ctypes
from typing import Final

from isal import isal_zlib

_SIGNATURE: Final = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_copy_unlocked = ctypes.CDLL(None).memmove
_copy_unlocked.argtypes = _SIGNATURE
_copy_unlocked.restype = ctypes.c_void_p
_copy_locked = ctypes.PyDLL(None).memmove
_copy_locked.argtypes = _SIGNATURE
_copy_locked.restype = ctypes.c_void_p

# Getting the lock back may take a switch interval (5 ms) while a trainer runs plain
# Python; copying or summing this much takes some ten microseconds.
_UNLOCK_BYTES: Final = 128 << 10
# The library gives the lock away for more than this.
_LOCKED_SUM_BYTES: Final = 5 << 10


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copies `nbytes` bytes between two addresses, which the caller keeps alive."""
    copy = _copy_unlocked if nbytes >= _UNLOCK_BYTES else _copy_locked
    copy(target, source, nbytes)


def crc32(data: bytes | memoryview, start: int = 0) -> int:
    """The CRC-32 of `data`, or of what has the CRC-32 `start` and `data` behind it.

    Args:
        data: Bytes; a view must be flat, with items of one byte.
        start: What to go on from.
    """
    nbytes = len(data)
    if nbytes >= _UNLOCK_BYTES:
        return isal_zlib.crc32(data, start)
    for at in range(0, nbytes, _LOCKED_SUM_BYTES):
        start = isal_zlib.crc32(data[at : at + _LOCKED_SUM_BYTES], start)
    return start
