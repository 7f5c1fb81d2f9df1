"""Where in a state a value stands, in two styles.

As Python, `state["model"]["weight"]`, for what cannot be saved; and as the key of a
tensor, `model.weight`, by which it would be loaded.
"""

__all__ = ["ROOT", "attribute_step", "item_step", "key_path", "tensor_key"]

import collections
import enum
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import torch

from aiockpt.capturing.marks import wrapped_tensors

ROOT: Final = "state"

# How the way goes on, by an item or an attribute, and to which.
_Step: TypeAlias = tuple[Callable[[object], str], object]

_TYPES_OF_SHORT_KEYS = frozenset({type(None), bool, int, float, complex, bytes})
_WITHOUT_PARTS = (type, types.FunctionType, types.ModuleType, enum.Enum)


def key_path(tree: object, predicate: Callable[[object], bool]) -> str | None:
    """Returns where in `tree` an object for which `predicate` holds is found first.

    An object's parts are asked before the object. Looks into builtin containers, into
    attributes of other objects and into wrapper tensors.
    """
    way = _way(tree, predicate)
    return None if way is None else ROOT + "".join(step(name) for step, name in way)


def tensor_key(tree: object, tensor: torch.Tensor) -> str | None:
    """Returns the key of a tensor of `tree`, `ROOT` if it is all; None if not found.

    It is the key in a file; where that has an object, it goes on to attributes.
    """
    way = _way(tree, lambda node: node is tensor)
    return None if way is None else ".".join(_segment(name) for _, name in way) or ROOT


def _way(tree: object, predicate: Callable[[object], bool]) -> list[_Step] | None:
    seen: set[int] = set()

    def search(node: object) -> list[_Step] | None:
        """The steps, the last one first."""
        if id(node) in seen:
            return None
        seen.add(id(node))
        for step, name, child in _children(node):
            if (found := search(child)) is not None:
                found.append((step, name))
                return found
        return [] if predicate(node) else None

    way = search(tree)
    return None if way is None else way[::-1]


def _segment(name: object) -> str:
    # As loads name what is in a file: see `outline.segment`.
    return str(name) if _is_plain(name) else f"<{type(name).__name__}>"


def _is_plain(name: object) -> bool:
    if type(name) is tuple:
        return all(map(_is_plain, cast("tuple[object, ...]", name)))
    return name is None or type(name) in (str, bool, int, float)


def item_step(key: object) -> str:
    """Returns how a path goes on to the item under `key`."""
    return f"[{_key_text(key)}]"


def attribute_step(name: object) -> str:
    """Returns how a path goes on to the attribute `name`."""
    return f".{name}"


def _key_text(key: object) -> str:
    if isinstance(key, str):
        return json.dumps(key, ensure_ascii=False)
    if type(key) is tuple:
        return f"({', '.join(map(_key_text, cast('tuple[object, ...]', key)))})"
    # Other objects may be large, or costly to show.
    is_short = type(key) in _TYPES_OF_SHORT_KEYS or isinstance(key, enum.Enum)
    return repr(key) if is_short else f"<{type(key).__name__}>"


def _children(
    node: object,
) -> Iterator[tuple[Callable[[object], str], object, object]]:
    """The parts of `node`, each with the step that leads to it."""
    if isinstance(node, _WITHOUT_PARTS):
        return
    if isinstance(node, dict):
        items = cast("Mapping[object, object]", node).items()
        yield from ((item_step, key, value) for key, value in items)
    elif isinstance(node, (list, tuple, collections.deque)):
        sequence = cast("Sequence[object]", node)
        yield from ((item_step, index, item) for index, item in enumerate(sequence))
    elif isinstance(node, (set, frozenset)):
        yield from ((item_step, item, item) for item in cast("set[object]", node))
    elif isinstance(node, torch.Tensor):
        parts = wrapped_tensors(node).items()
        yield from ((attribute_step, name, part) for name, part in parts)
    for name, value in _attributes(node):
        yield attribute_step, name, value


def _attributes(node: Any) -> Iterator[tuple[str, object]]:
    yield from getattr(node, "__dict__", {}).items()
    for base in type(node).__mro__:
        slots: Any = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(node, name):
                yield name, getattr(node, name)
