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
# Containers may be shared, so that there are more paths than bytes in the pickle. A
# walk may go over what it has met before in proportion to what is there: honest files
# stay far below, bombs do not. Steps are characters of key paths, more or less.
_FREE_STEPS: Final = 1 << 22
_STEPS_PER_VISIT: Final = 8
_STEPS_PER_PART: Final = 16
_MAX_GAIN: Final = 256
_GAIN_FACTOR: Final = 3


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
    budget = _Budget()
    # The containers that lead to the present node, and what is still to be visited
    # below each. No path is made before it is due: there may be no end of them.
    parents: dict[int, None] = {}
    pending = [(iter([("", root)]), True)]
    while pending:
        paths, is_new = pending[-1]
        key, node = next(paths, (None, None))
        if key is None:
            pending.pop()
            if parents:
                parents.popitem()
            continue
        budget.spend_path(key, is_new=is_new)
        children = _children(node)
        if children is None:
            if isinstance(node, Call):
                budget.spend_parts(node)
            yield Leaf(key, node)
        elif id(node) not in parents:
            if len(parents) > _MAX_DEPTH:
                raise CorruptCheckpointError("the pickle nests beyond all measure")
            parents[id(node)] = None
            pending.append((_paths(key, children), budget.is_new(node)))


def _paths(
    key: str, children: list[tuple[object, object]]
) -> Iterator[tuple[str, object]]:
    prefix = f"{key}." if key else ""
    for name, child in children:
        yield f"{prefix}{segment(name)}", child


class _Budget:
    """How far a walk may go."""

    def __init__(self) -> None:
        self._steps = _FREE_STEPS
        self._met: set[int] = set()

    def is_new(self, node: object) -> bool:
        """Whether it is met for the first time."""
        num_met = len(self._met)
        self._met.add(id(node))
        return len(self._met) > num_met

    def spend_path(self, key: str, *, is_new: bool) -> None:
        """Takes off what the visit of a node by this path costs."""
        num_steps = len(key) + _STEPS_PER_VISIT
        # A long key stands in the pickle once and in the paths of all its children.
        self._spend(num_steps, min(num_steps, _MAX_GAIN) if is_new else 0)

    def spend_parts(self, node: object) -> None:
        """Takes off what it costs to look at all that an object is made of."""
        for part in _walk(node):
            num_steps = _STEPS_PER_PART * (1 + len(_parts(part)))
            self._spend(num_steps, num_steps if self.is_new(part) else 0)

    def _spend(self, num_steps: int, num_new: int) -> None:
        self._steps += _GAIN_FACTOR * num_new - num_steps
        if self._steps < 0:
            raise CorruptCheckpointError("the pickle has paths beyond all measure")


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
    if isinstance(node, TensorOutline) and node.is_strided:
        # Most leaves; a hostile one may drag along, and share, any number of parts.
        return [] if node.storage_key is None else [node.storage_key]
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
