"""A pickle with blanks, for the numbers that change from save to save.

A step or a loss makes the pickle of a large state another one, though nearly all of it
is as it was. pickle writes a number as an opcode and its value, whatever stands around
it, and remembers none. So two pickles that differ in nothing but some numbers tell where
those stand, and the next one is made by writing others there.
"""

__all__ = ["Number", "PickleTemplate", "is_number", "number"]

import pickle
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

_PROTOCOL: Final = 2
_FLOAT: Final = struct.Struct(">d")
# Pickles are compared so many bytes at a time.
_WINDOW_BYTES: Final = 4096
# Larger integers are like texts: rarely others, and long.
_MAX_BITS: Final = 64
# To fill in more of them takes as long as to pickle.
_MAX_BLANKS: Final = 1000

# An integer, or the bytes of a floating point number in hexadecimal. Equal where they
# are pickled alike, unlike 0.0 and -0.0, 1 and 1.0, or a NaN and itself.
Number: TypeAlias = int | str


def is_number(value: Any, kind: type) -> bool:
    """Whether something of a class can stand in a blank: an `int` or `float`."""
    return kind is float or (kind is int and value.bit_length() <= _MAX_BITS)


def number(value: float) -> Number:
    """What tells how a number is pickled."""
    return _FLOAT.pack(value).hex() if type(value) is float else int(value)


class PickleTemplate(NamedTuple):
    """What pickles have in common that differ in some of their numbers.

    Attributes:
        data: One of them.
        numbers: Its numbers, in the order in which they stand in it.
        blanks: Where in `data` a number stands, by its index in `numbers`, for those
            that may be others; ascending.
    """

    data: bytes
    numbers: Sequence[Number]
    blanks: Mapping[int, int] = {}

    def filled(self, numbers: Sequence[Number]) -> bytes | None:
        """The pickle with other numbers; None where one without a blank differs."""
        if not self.blanks.keys() >= self._changed(numbers):
            return None
        parts: list[bytes] = []
        end = 0
        for index, start in self.blanks.items():
            parts += (self.data[end:start], _opcodes(numbers[index]))
            end = start + len(_opcodes(self.numbers[index]))
        return b"".join((*parts, self.data[end:]))

    def learnt(self, data: bytes, numbers: Sequence[Number]) -> "PickleTemplate":
        """The template of `data`, with blanks for what differs, and those there were.

        It has none where the two differ in something that is no number, or where there
        would be too many.
        """
        blanks: dict[int, int] = {}
        at = new_at = 0
        indices = sorted(self.blanks.keys() | self._changed(numbers))
        if len(indices) > _MAX_BLANKS:
            return PickleTemplate(data, numbers)
        for index in indices:
            old, new = _opcodes(self.numbers[index]), _opcodes(numbers[index])
            start = self.blanks.get(index)
            if start is None:
                num_alike = _num_alike(self.data, at, data, new_at)
                start = at + num_alike - _num_alike(old, 0, new, 0)
            blanks[index] = new_start = new_at + start - at
            is_so = (
                self.data[at:start] == data[new_at:new_start]
                and self.data.startswith(old, start)
                and data.startswith(new, new_start)
            )
            if not is_so:
                return PickleTemplate(data, numbers)
            at, new_at = start + len(old), new_start + len(new)
        if self.data[at:] != data[new_at:]:
            return PickleTemplate(data, numbers)
        return PickleTemplate(data, numbers, blanks)

    def _changed(self, numbers: Sequence[Number]) -> set[int]:
        pairs = zip(self.numbers, numbers, strict=True)
        return {index for index, (old, new) in enumerate(pairs) if old != new}


def _opcodes(of: Number) -> bytes:
    if isinstance(of, str):
        return pickle.BINFLOAT + bytes.fromhex(of)
    return pickle.dumps(of, _PROTOCOL)[2:-1]  # the protocol and a stop are around it


def _num_alike(old: bytes, old_at: int, new: bytes, new_at: int) -> int:
    """How many bytes from these places on are the same."""
    most = min(len(old) - old_at, len(new) - new_at)
    for num in range(0, most, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, most - num)
        before = old[old_at + num : old_at + num + length]
        after = new[new_at + num : new_at + num + length]
        if before != after:
            pairs = zip(before, after, strict=True)
            return num + next(n for n, (a, b) in enumerate(pairs) if a != b)
    return most
