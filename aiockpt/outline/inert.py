"""The stack machine of pickle, with its dangerous instructions made inert.

Opcodes are those that CPython's picklers write for protocols 2 to 5, as the
standard library's `pickletools` defines them. Time and memory are linear in the
pickle's length: a length that the pickle declares is checked against what is there.
"""

__all__ = ["Call", "Global", "Machine", "hashable", "keep_state"]

import pickle
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from aiockpt.errors import CorruptCheckpointError

# A million tensors take 45 million opcodes.
_MAX_OPCODES: Final = 1 << 26
# What a key of a dictionary may be: hashing is repeated and, in tuples, recursive.
_MAX_KEY_PARTS: Final = 1000
_MAX_KEY_DEPTH: Final = 100
_MAX_KEY_BITS: Final = 1 << 13
_MAX_KEY_CHARACTERS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names. Nothing was looked up.

    Attributes:
        module: Its module, as spelled in the pickle.
        qualname: Its name in the module, as spelled in the pickle.
    """

    module: str
    qualname: str

    @property
    def name(self) -> str:
        """Dotted name, in the spelling of Python 3."""
        pair = NAME_MAPPING.get((self.module, self.qualname))
        if pair is not None:
            return ".".join(pair)
        return f"{IMPORT_MAPPING.get(self.module, self.module)}.{self.qualname}"


@dataclass(slots=True, eq=False)
class Call:
    """An object that the pickle makes by a call. The call was not made.

    Attributes:
        function: What is called: a `Global`, or the result of another call.
        args: Positional arguments.
        opcode: `REDUCE`, `NEWOBJ` or `NEWOBJ_EX` of the `pickle` module.
        kwargs: Keyword arguments, where the opcode takes them.
        list_items: What is then appended to the object.
        dict_items: Keys and values that are then set on the object.
        states: What is then given to its `__setstate__`.
    """

    function: "Global | Call"
    args: tuple[object, ...]
    opcode: bytes
    kwargs: object = None
    # Absent by default: most calls have none, and a pickle can hold many calls.
    list_items: list[object] | None = None
    dict_items: list[tuple[object, object]] | None = None
    states: list[object] | None = None

    @property
    def name(self) -> str:
        """Dotted name of what is called, where it has one."""
        return self.function.name if isinstance(self.function, Global) else "?"


class Machine:
    """Runs one pickle.

    Attributes:
        data: The pickle.
        at: Offset of the next byte to be read.
    """

    def __init__(
        self,
        data: bytes,
        *,
        refer: Callable[[object], object],
        call: Callable[[Call], object],
        build: Callable[[object, object], None] | None = None,
        opcodes: Collection[bytes] | None = None,
    ) -> None:
        """Makes a machine that has read nothing.

        Args:
            data: The pickle.
            refer: Gives what stands for a persistent reference.
            call: Gives what stands for a call, mostly the `Call` itself.
            build: Gives a state to what stands for a call; `keep_state` by default.
            opcodes: Those that are allowed; all by default.
        """
        self.data = data
        self.at = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.globals: dict[tuple[str, str], Global] = {}
        self.refer = refer
        self.call = call
        self.build = build or keep_state
        self.instructions = _INSTRUCTIONS
        if opcodes is not None:
            self.instructions = {code[0]: _TABLE[code] for code in opcodes}

    def run(self) -> object:
        """Returns what the pickle describes.

        Raises:
            CorruptCheckpointError: This is no pickle, or one with opcodes that no
                checkpoint needs, or one that never ends.
        """
        instructions = self.instructions
        try:
            for _ in range(_MAX_OPCODES):
                opcode = self.data[self.at]
                self.at += 1
                if opcode == _STOP:
                    return self.stack.pop()
                instructions[opcode](self)
        except (LookupError, TypeError, ValueError, struct.error) as error:
            text = f"malformed pickle at byte {self.at}: {error!r}"
            raise CorruptCheckpointError(text) from error
        raise CorruptCheckpointError(f"a pickle of more than {_MAX_OPCODES} steps")

    def take(self, nbytes: int) -> bytes:
        """Consumes and returns the next `nbytes` bytes of the pickle."""
        start = self.at
        self.at = start + nbytes
        if self.at > len(self.data):
            raise ValueError("the pickle ends too early")
        return self.data[start : self.at]

    def take_line(self) -> str:
        """Consumes a line and returns it without its end."""
        stop = self.data.index(b"\n", self.at)
        line = self.data[self.at : stop].decode()
        self.at = stop + 1
        return line

    def pop_to_mark(self) -> list[object]:
        """Removes and returns what was pushed since the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def push_global(self, module: object, qualname: object) -> None:
        """Pushes the name of a class or function."""
        if not isinstance(module, str) or not isinstance(qualname, str):
            raise TypeError("a global needs two names")
        if "\n" in module + qualname:
            raise ValueError("a line break in the name of a global")
        name = module, qualname
        self.stack.append(self.globals.setdefault(name, Global(*name)))

    def push_call(self, function: object, call: tuple[object, bytes, object]) -> None:
        """Pushes what stands for a call."""
        args, opcode, kwargs = call
        if not isinstance(function, Global | Call) or not isinstance(args, tuple):
            # By its type alone: written out, what is shared has no end.
            raise TypeError(f"a call of a {type(function).__name__}")
        self.stack.append(self.call(Call(function, args, opcode, kwargs)))


def keep_state(target: object, state: object) -> None:
    """Notes a state with the call that made its target."""
    if not isinstance(target, Call):
        raise TypeError(f"a state for {type(target).__name__}")
    if target.states is None:
        target.states = []
    target.states.append(state)


# --- instructions -----------------------------------------------------------------

_Instruction = Callable[[Machine], None]
_STOP: Final = pickle.STOP[0]


def _skip(nbytes: int) -> _Instruction:
    def instruction(machine: Machine) -> None:
        machine.take(nbytes)

    return instruction


def _constant(value: object) -> _Instruction:
    def instruction(machine: Machine) -> None:
        machine.stack.append(value)

    return instruction


def _number(code: str) -> _Instruction:
    form = struct.Struct(code)

    def instruction(machine: Machine) -> None:
        (value,) = form.unpack_from(machine.data, machine.at)
        machine.at += form.size
        machine.stack.append(value)

    return instruction


def _counted(code: str, decode: Callable[[bytes], object]) -> _Instruction:
    """Pushes what `decode` makes of bytes whose number stands before them."""
    form = struct.Struct(code)

    def instruction(machine: Machine) -> None:
        (nbytes,) = form.unpack_from(machine.data, machine.at)
        machine.at += form.size
        machine.stack.append(decode(machine.take(nbytes)))

    return instruction


def _text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _put(code: str) -> _Instruction:
    form = struct.Struct(code)

    def instruction(machine: Machine) -> None:
        (index,) = form.unpack_from(machine.data, machine.at)
        machine.at += form.size
        machine.memo[index] = machine.stack[-1]

    return instruction


def _get(code: str) -> _Instruction:
    form = struct.Struct(code)

    def instruction(machine: Machine) -> None:
        (index,) = form.unpack_from(machine.data, machine.at)
        machine.at += form.size
        machine.stack.append(machine.memo[index])

    return instruction


def _memoize(machine: Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _mark(machine: Machine) -> None:
    machine.marks.append(len(machine.stack))


def _pop(machine: Machine) -> None:
    machine.stack.pop()


def _pop_mark(machine: Machine) -> None:
    machine.pop_to_mark()


def _empty(kind: type[object]) -> _Instruction:
    def instruction(machine: Machine) -> None:
        machine.stack.append(kind())

    return instruction


def _tuple(size: int) -> _Instruction:
    def instruction(machine: Machine) -> None:
        machine.stack[-size:] = [tuple(machine.stack[-size:])]

    return instruction


def _tuple_to_mark(machine: Machine) -> None:
    machine.stack.append(tuple(machine.pop_to_mark()))


def _frozenset(machine: Machine) -> None:
    items = machine.pop_to_mark()
    machine.stack.append(frozenset(map(hashable, items)))


def _global(machine: Machine) -> None:
    machine.push_global(machine.take_line(), machine.take_line())


def _stack_global(machine: Machine) -> None:
    qualname, module = machine.stack.pop(), machine.stack.pop()
    machine.push_global(module, qualname)


def _reduce(machine: Machine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    machine.push_call(function, (args, pickle.REDUCE, None))


def _new_object(machine: Machine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    machine.push_call(function, (args, pickle.NEWOBJ, None))


def _new_object_ex(machine: Machine) -> None:
    kwargs, args, function = (machine.stack.pop() for _ in range(3))
    machine.push_call(function, (args, pickle.NEWOBJ_EX, kwargs))


def _build(machine: Machine) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    machine.build(target, state)


def _extend(machine: Machine, items: list[object]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Call):
        if target.list_items is None:
            target.list_items = []
        target.list_items += items
    elif isinstance(target, list):
        target += items
    else:
        raise TypeError(f"items for {type(target).__name__}")


def _append(machine: Machine) -> None:
    _extend(machine, [machine.stack.pop()])


def _appends(machine: Machine) -> None:
    _extend(machine, machine.pop_to_mark())


def _set_pairs(machine: Machine, items: list[object]) -> None:
    keys = map(hashable, items[::2])
    pairs = zip(keys, items[1::2], strict=True)
    target = machine.stack[-1]
    if isinstance(target, Call):
        if target.dict_items is None:
            target.dict_items = []
        target.dict_items.extend(pairs)
    elif isinstance(target, dict):
        target.update(pairs)
    else:
        raise TypeError(f"keys for {type(target).__name__}")


def _set_item(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set_pairs(machine, [key, value])


def _set_items(machine: Machine) -> None:
    _set_pairs(machine, machine.pop_to_mark())


def _add_items(machine: Machine) -> None:
    items = machine.pop_to_mark()
    target = machine.stack[-1]
    if not isinstance(target, set):
        raise TypeError(f"members for {type(target).__name__}")
    target.update(map(hashable, items))


def _refer(machine: Machine) -> None:
    machine.stack.append(machine.refer(machine.stack.pop()))


def hashable(key: object) -> object:
    """Returns the key; refuses one that takes too long or too deep to hash or name."""
    pending, num_parts, num_characters = [(key, 0)], 0, 0
    while pending:
        part, depth = pending.pop()
        if isinstance(part, tuple):
            num_parts += len(part)
            if num_parts > _MAX_KEY_PARTS or depth > _MAX_KEY_DEPTH:
                raise ValueError("a key of too many parts")
            pending.extend((inner, depth + 1) for inner in part)
        elif isinstance(part, str) and depth:
            # Parts may be shared: a text in many places is spelled out in each.
            num_characters += len(part)
            if num_characters > _MAX_KEY_CHARACTERS:
                raise ValueError("a key of too many characters")
        elif isinstance(part, int) and part.bit_length() > _MAX_KEY_BITS:
            raise ValueError("a key of too many digits")
    return key


_TABLE: dict[bytes, _Instruction] = {
    pickle.PROTO: _skip(1),
    pickle.FRAME: _skip(8),
    pickle.NONE: _constant(None),
    pickle.NEWTRUE: _constant(True),  # noqa: FBT003
    pickle.NEWFALSE: _constant(False),  # noqa: FBT003
    pickle.BININT: _number("<i"),
    pickle.BININT1: _number("<B"),
    pickle.BININT2: _number("<H"),
    pickle.BINFLOAT: _number(">d"),
    pickle.LONG1: _counted("<B", _integer),
    pickle.LONG4: _counted("<I", _integer),
    pickle.SHORT_BINSTRING: _counted("<B", _text),
    pickle.BINUNICODE: _counted("<I", _text),
    pickle.SHORT_BINUNICODE: _counted("<B", _text),
    pickle.BINUNICODE8: _counted("<Q", _text),
    pickle.BINBYTES: _counted("<I", bytes),
    pickle.SHORT_BINBYTES: _counted("<B", bytes),
    pickle.BINBYTES8: _counted("<Q", bytes),
    pickle.BYTEARRAY8: _counted("<Q", bytearray),
    pickle.BINPUT: _put("<B"),
    pickle.LONG_BINPUT: _put("<I"),
    pickle.BINGET: _get("<B"),
    pickle.LONG_BINGET: _get("<I"),
    pickle.MEMOIZE: _memoize,
    pickle.MARK: _mark,
    pickle.POP: _pop,
    pickle.POP_MARK: _pop_mark,
    pickle.EMPTY_TUPLE: _constant(()),
    pickle.EMPTY_LIST: _empty(list),
    pickle.EMPTY_DICT: _empty(dict),
    pickle.EMPTY_SET: _empty(set),
    pickle.TUPLE1: _tuple(1),
    pickle.TUPLE2: _tuple(2),
    pickle.TUPLE3: _tuple(3),
    pickle.TUPLE: _tuple_to_mark,
    pickle.FROZENSET: _frozenset,
    pickle.GLOBAL: _global,
    pickle.STACK_GLOBAL: _stack_global,
    pickle.REDUCE: _reduce,
    pickle.NEWOBJ: _new_object,
    pickle.NEWOBJ_EX: _new_object_ex,
    pickle.BUILD: _build,
    pickle.APPEND: _append,
    pickle.APPENDS: _appends,
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: _set_items,
    pickle.ADDITEMS: _add_items,
    pickle.BINPERSID: _refer,
}
_INSTRUCTIONS: dict[int, _Instruction] = {code[0]: run for code, run in _TABLE.items()}
