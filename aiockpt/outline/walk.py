"""What is in an outline, by key path.

A key path is the way from the root through dictionaries (by key) and sequences (by
index), joined with dots: `optimizer.state.0.exp_avg`. Objects that only a call can
make are leaves, except mappings and sequences such as `OrderedDict`.
"""

__all__ = ["Leaf", "leaves", "segment", "storage_keys", "tensors_in"]

from collections.abc import Iterator
from typing import Final, NamedTuple

from aiockpt.errors import CorruptCheckpointError
from aiockpt.outline.inert import Call
from aiockpt.outline.tensors import StorageOutline, TensorOutline

_MAPPINGS: Final = {
    "collections.Counter",
    "collections.OrderedDict",
    "collections.defaultdict",
}
_MAX_DEPTH: Final = 200
# Stands behind a container's children on the list of what is still to be visited.
_END: Final = object()
# Containers may be shared, so that there are more paths than bytes in the pickle:
# honest files stay far below this many characters of key paths, bombs do not.
_MAX_KEY_CHARACTERS: Final = 1 << 28


class Leaf(NamedTuple):
    """Something that is no container.

    Attributes:
        key: Its key path, empty for the root itself.
        node: What the outline has there.
    """

    key: str
    node: object


def leaves(root: object) -> Iterator[Leaf]:
    """Yields every leaf of an outline, in pickle order.

    A leaf that can be reached by several paths is yielded for each of them. Where a
    container leads back to itself, that way is not followed.

    Raises:
        CorruptCheckpointError: The outline nests more than 200 levels, or has far
            more paths than any checkpoint.
    """
    pending: list[tuple[str, object]] = [("", root)]
    # The containers that lead to the present node, in order.
    parents: dict[int, None] = {}
    num_characters = 0
    while pending:
        key, node = pending.pop()
        if node is _END:
            parents.popitem()
            continue
        num_characters += len(key) + 8
        if len(parents) > _MAX_DEPTH or num_characters > _MAX_KEY_CHARACTERS:
            raise CorruptCheckpointError("the pickle nests beyond all measure")
        children = _children(node)
        if children is None:
            yield Leaf(key, node)
        elif id(node) not in parents:
            parents[id(node)] = None
            pending.append(("", _END))
            prefix = f"{key}." if key else ""
            pending.extend(
                (f"{prefix}{segment(name)}", child)
                for name, child in reversed(children)
            )


def segment(name: object) -> str:
    """The part of a key path that a dictionary's key or an index makes."""
    if _is_plain(name):
        return str(name)
    return f"<{type(name).__name__}>"


def _is_plain(name: object) -> bool:
    if type(name) is tuple:
        return all(map(_is_plain, name))
    return name is None or type(name) in (str, bool, int, float)


def tensors_in(node: object) -> list[TensorOutline]:
    """The tensors that a leaf is made of, each once, in pickle order."""
    return [part for part in _walk(node) if isinstance(part, TensorOutline)]


def storage_keys(node: object) -> list[str]:
    """Keys of the storages that a node refers to, each once, in pickle order."""
    references = (part for part in _walk(node) if isinstance(part, StorageOutline))
    return list(dict.fromkeys(part.key for part in references))


def _children(node: object) -> list[tuple[object, object]] | None:
    match node:
        case dict():
            return list(node.items())
        case list() | tuple():
            return list(enumerate(node))
        case Call() if node.dict_items is not None:
            return node.dict_items
        case Call() if node.list_items is not None:
            return list(enumerate(node.list_items))
        case Call() if node.name in _MAPPINGS:
            return []
        case _:
            return None


def _walk(node: object) -> Iterator[object]:
    """Yields the node and all that it is made of, each once."""
    seen: set[int] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            pending.extend(reversed(_parts(node)))


def _parts(node: object) -> list[object]:
    match node:
        case TensorOutline():
            return [node.call]
        case Call():
            return [
                node.function,
                *node.args,
                node.kwargs,
                *(node.list_items or ()),
                *(part for pair in node.dict_items or () for part in pair),
                *(node.states or ()),
            ]
        case dict():
            return [part for pair in node.items() for part in pair]
        case list() | tuple() | set() | frozenset():
            return list(node)
        case _:
            return []
