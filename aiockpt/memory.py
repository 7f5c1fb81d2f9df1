"""Copying bytes between addresses, with or without the interpreter's lock."""

__all__ = ["copy_bytes"]

import ctypes
from typing import Final

_SIGNATURE: Final = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_copy_unlocked = ctypes.CDLL(None).memmove
_copy_unlocked.argtypes = _SIGNATURE
_copy_unlocked.restype = ctypes.c_void_p
_copy_locked = ctypes.PyDLL(None).memmove
_copy_locked.argtypes = _SIGNATURE
_copy_locked.restype = ctypes.c_void_p

# Getting the lock back may take a switch interval (5 ms) while a trainer runs plain
# Python; copying this much takes some ten microseconds.
_UNLOCK_BYTES: Final = 128 << 10


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """Copies `nbytes` bytes between two addresses, which the caller keeps alive."""
    copy = _copy_unlocked if nbytes >= _UNLOCK_BYTES else _copy_locked
    copy(target, source, nbytes)
