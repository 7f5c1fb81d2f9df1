"""Whether a pickle is safe to be handed to torch's restricted unpickler.

That one runs no code from the file, but it does hash, copy and write out what the
pickle makes of objects that it allows: a few bytes are enough to keep it busy for
ever, to fill the memory or to exhaust the stack. So the pickle is run here first.
"""

__all__ = ["screen"]

import re
from typing import Final, cast

from aiockpt.errors import CorruptCheckpointError
from aiockpt.outline.inert import Call, Machine, hashable, keep_state

# How much the arguments of all calls may have together, in characters and elements:
# so much for nothing, and so much for each byte of the pickle. Arguments may be
# shared, and every call copies its own.
_FREE_ARGUMENTS: Final = 1 << 20
_ARGUMENTS_PER_BYTE: Final = 16
_SIZED: Final = (str, bytes, bytearray, tuple, list, dict, set, frozenset)

_COUNTED: Final = {"builtins.set", "collections.Counter"}
_PAIRED: Final = "collections.OrderedDict"
# Constructors, which fill as much memory as they are told to. Picklers name the
# rebuild functions of torch instead.
_TENSOR_CLASS: Final = re.compile(r"torch\.((cuda|sparse)\.)*\w*Tensor")
# Picklers write bytes as text of these, and never the result of a call.
_ENCODINGS: Final = {"latin1", "latin-1"}


def screen(data: bytes) -> None:
    """Returns if the pickle takes time and memory in proportion to its length.

    Names of globals are not judged: the restricted unpickler does that.

    Raises:
        CorruptCheckpointError: It takes more, or is no pickle of a checkpoint.
    """
    screening = _Screening(_FREE_ARGUMENTS + _ARGUMENTS_PER_BYTE * len(data))
    Machine(
        data,
        refer=lambda reference: reference,
        call=screening.call,
        build=screening.build,
    ).run()


class _Screening:
    """What the calls of one pickle have cost so far."""

    def __init__(self, num_arguments: int) -> None:
        self._left = num_arguments

    def call(self, call: Call) -> Call:
        """Returns the call if it can be made."""
        for part in call.args:
            self._charge(part)
        name, args = call.name, call.args
        if name in _COUNTED:
            for argument in args:
                _check_hashable(argument)
        elif name == _PAIRED:
            for argument in args:
                _check_hashable(_keys(argument))
        elif name == "_codecs.encode" and not _is_text_as_bytes(args):
            raise CorruptCheckpointError("an encoding that no pickler writes")
        elif name == "builtins.bytearray" and not all(map(_is_written, args)):
            raise CorruptCheckpointError("a bytearray that no pickler writes")
        elif _TENSOR_CLASS.fullmatch(name):
            raise CorruptCheckpointError("a tensor that no pickler writes")
        return call

    def build(self, target: object, state: object) -> None:
        """Notes the state if it can be given to the target."""
        self._charge(state)
        keep_state(target, state)

    def _charge(self, part: object) -> None:
        if isinstance(part, _SIZED):
            self._left -= len(part)
        if self._left < 0:
            raise CorruptCheckpointError("the pickle copies beyond all measure")


def _check_hashable(items: object) -> None:
    if isinstance(items, list | tuple):
        for item in cast("list[object]", items):
            hashable(item)


def _keys(pairs: object) -> object:
    """What stands first in each pair, where there are pairs."""
    if not isinstance(pairs, list | tuple):
        return ()
    items = cast("list[object]", pairs)
    return [pair[0] for pair in items if isinstance(pair, list | tuple) and pair]


def _is_text_as_bytes(args: tuple[object, ...]) -> bool:
    match args:
        case str(), str(encoding):
            return encoding in _ENCODINGS
        case _:
            return False


def _is_written(argument: object) -> bool:
    # The content: a text, or a call that makes bytes of one. Not a number of zeros.
    return isinstance(argument, str | bytes | bytearray | Call)
