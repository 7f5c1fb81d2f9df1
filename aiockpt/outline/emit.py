"""An outline, or a part of one, as a pickle again."""

__all__ = ["emit"]

import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from aiockpt.errors import CorruptCheckpointError
from aiockpt.outline.inert import Call, Global
from aiockpt.outline.tensors import StorageOutline, TensorOutline

_U32_MAX: Final = 0xFFFF_FFFF


def emit(
    node: object, *, like: bytes, substitutes: Mapping[int, int] | None = None
) -> bytes:
    """Returns a pickle that makes what the outline describes.

    What is shared in the outline is shared in what the pickle makes, and nothing
    but the node's own parts is named. Written are the opcodes that the node was
    read from, so whatever reads the original pickle reads this one.

    Args:
        node: An outline, or a part of one, or builtin containers of parts.
        like: The pickle that the outline was read from. The new one declares the
            same protocol, which tells how names of globals are to be taken.
        substitutes: For the `id` of a node, the number to write in its place, as
            a persistent reference. Nodes in here must be kept alive by the caller.

    Raises:
        CorruptCheckpointError: The outline nests too deeply.
    """
    emitter = _Emitter(substitutes or {})
    try:
        emitter.save(node)
    except RecursionError as error:
        raise CorruptCheckpointError("the pickle nests beyond all measure") from error
    declared = like[:2] if like.startswith(pickle.PROTO) else pickle.PROTO + b"\2"
    return b"".join((declared, emitter.output, pickle.STOP))


class _Emitter:
    def __init__(self, substitutes: Mapping[int, int]) -> None:
        self.output = bytearray()
        self._substitutes = substitutes
        # Position in the memo, and the node itself: its `id` must stay its own.
        self._memo: dict[int, tuple[int, object]] = {}

    def save(self, node: object) -> None:
        """Writes what pushes the node onto the stack."""
        substitute = self._substitutes.get(id(node))
        known = self._memo.get(id(node))
        if substitute is not None:
            self.output += pickle.BININT + struct.pack("<i", substitute)
            self.output += pickle.BINPERSID
        elif known is not None:
            self.output += pickle.LONG_BINGET + struct.pack("<I", known[0])
        else:
            _SAVERS[type(node)](self, node)

    def remember(self, node: object) -> bool:
        """Puts the node, which is on top of the stack, into the memo.

        Where a part of the node led back to it, it has been written by then: that
        one is put on top instead, and False is returned.
        """
        known = self._memo.get(id(node))
        if known is not None:
            self.output += pickle.POP
            self.output += pickle.LONG_BINGET + struct.pack("<I", known[0])
            return False
        index = len(self._memo)
        self._memo[id(node)] = index, node
        self.output += pickle.LONG_BINPUT + struct.pack("<I", index)
        return True

    def save_all(self, nodes: Iterable[object], opcode: bytes) -> None:
        """Writes a mark, the nodes, and the opcode that takes them up."""
        self.output += pickle.MARK
        for node in nodes:
            self.save(node)
        self.output += opcode


def _save_atom(emitter: _Emitter, node: object) -> None:
    # None, booleans and numbers are written without a memo: opcodes and nothing else.
    emitter.output += pickle.dumps(node, 2)[2:-1]


def _save_text(emitter: _Emitter, node: str) -> None:
    _save_counted(emitter, node, node.encode("utf-8", "surrogatepass"))


def _save_counted(
    emitter: _Emitter, node: str | bytes | bytearray, data: bytes | bytearray
) -> None:
    short, long = _COUNTED[type(node)]
    if short and len(data) <= _U32_MAX:
        emitter.output += short + struct.pack("<I", len(data))
    else:
        emitter.output += long + struct.pack("<Q", len(data))
    emitter.output += data
    emitter.remember(node)


def _save_bytes(emitter: _Emitter, node: bytes | bytearray) -> None:
    _save_counted(emitter, node, node)


def _save_tuple(emitter: _Emitter, node: tuple[object, ...]) -> None:
    emitter.save_all(node, pickle.TUPLE)
    emitter.remember(node)


def _save_frozenset(emitter: _Emitter, node: frozenset[object]) -> None:
    emitter.save_all(node, pickle.FROZENSET)
    emitter.remember(node)


def _save_set(emitter: _Emitter, node: set[object]) -> None:
    emitter.output += pickle.EMPTY_SET
    emitter.remember(node)
    emitter.save_all(node, pickle.ADDITEMS)


def _save_list(emitter: _Emitter, node: list[object]) -> None:
    emitter.output += pickle.EMPTY_LIST
    emitter.remember(node)
    emitter.save_all(node, pickle.APPENDS)


def _save_dict(emitter: _Emitter, node: dict[object, object]) -> None:
    emitter.output += pickle.EMPTY_DICT
    emitter.remember(node)
    pairs = (part for pair in node.items() for part in pair)
    emitter.save_all(pairs, pickle.SETITEMS)


def _save_global(emitter: _Emitter, node: Global) -> None:
    emitter.output += pickle.GLOBAL
    emitter.output += f"{node.module}\n{node.qualname}\n".encode()
    emitter.remember(node)


def _save_call(emitter: _Emitter, node: Call) -> None:
    emitter.save(node.function)
    emitter.save(node.args)
    if node.opcode == pickle.NEWOBJ_EX:
        emitter.save(node.kwargs)
    emitter.output += node.opcode
    if not emitter.remember(node):
        return
    if node.list_items is not None:
        emitter.save_all(node.list_items, pickle.APPENDS)
    if node.dict_items is not None:
        pairs = (part for pair in node.dict_items for part in pair)
        emitter.save_all(pairs, pickle.SETITEMS)
    for state in node.states or ():
        emitter.save(state)
        emitter.output += pickle.BUILD


def _save_tensor(emitter: _Emitter, node: TensorOutline) -> None:
    emitter.save(node.call)


def _save_storage(emitter: _Emitter, node: StorageOutline) -> None:
    emitter.save(node.pid)
    emitter.output += pickle.BINPERSID
    emitter.remember(node)


_COUNTED: Final = {
    str: (pickle.BINUNICODE, pickle.BINUNICODE8),
    bytes: (pickle.BINBYTES, pickle.BINBYTES8),
    bytearray: (b"", pickle.BYTEARRAY8),
}
# Any, since each takes nodes of its own type only.
_SAVERS: Final[dict[type, Callable[[_Emitter, Any], None]]] = {
    type(None): _save_atom,
    bool: _save_atom,
    int: _save_atom,
    float: _save_atom,
    str: _save_text,
    bytes: _save_bytes,
    bytearray: _save_bytes,
    tuple: _save_tuple,
    frozenset: _save_frozenset,
    set: _save_set,
    list: _save_list,
    dict: _save_dict,
    Global: _save_global,
    Call: _save_call,
    TensorOutline: _save_tensor,
    StorageOutline: _save_storage,
}
