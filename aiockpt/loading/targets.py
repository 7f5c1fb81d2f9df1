"""Where in `into` tensors are, and which of them it would be no use to fill."""

__all__ = ["FoundTargets", "find_targets"]

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple, Self, cast

import torch

from aiockpt.capturing.marks import storage_ptrs
from aiockpt.errors import InvalidArgumentError
from aiockpt.outline import segment

_MAX_DEPTH: Final = 200

_FILLED: Final = (torch.Tensor, torch.nn.Module, torch.optim.Optimizer)


class FoundTargets(NamedTuple):
    """The tensors of a structure.

    Attributes:
        tensors: Those in nested mappings, lists and tuples, by key path.
        copies: Keys of those that a module made for its state dict: what they are
            filled with does not get into the module.
        closed: The class of what else holds tensors, by key path: a named tuple or
            another container that has no keys for them.
    """

    tensors: dict[str, torch.Tensor]
    copies: set[str]
    closed: dict[str, str]


def find_targets(into: object) -> FoundTargets:
    """Finds the tensors in nested mappings, lists and tuples.

    A module or an optimizer stands for its state dict. Where a container leads back
    to itself, that way is not followed.

    Raises:
        InvalidArgumentError: Two tensors have the same key path, or the structure
            nests more than 200 levels.
    """
    found = FoundTargets({}, set(), {})
    _visit(found, "", into, ())
    return found


def _visit(
    found: FoundTargets, key: str, node: object, parents: tuple[int, ...]
) -> None:
    if len(parents) > _MAX_DEPTH:
        raise InvalidArgumentError(f"into nests deeper than {_MAX_DEPTH} levels")
    if isinstance(node, torch.Tensor):
        _add(found, key, node)
    elif id(node) in parents:
        return
    elif isinstance(node, torch.nn.Module):
        _visit_module(found, key, node, (*parents, id(node)))
    elif (items := _items(node)) is not None:
        prefix = f"{key}." if key else ""
        for name, child in items:
            _visit(found, f"{prefix}{name}", child, (*parents, id(node)))
    elif any(isinstance(part, _FILLED) for part in _walk(node)):
        found.closed[key] = type(node).__name__


def _add(found: FoundTargets, key: str, tensor: torch.Tensor) -> None:
    if found.tensors.setdefault(key, tensor) is not tensor:
        raise InvalidArgumentError(f"into has two tensors with the key {key!r}")


def _items(node: object) -> Iterable[tuple[str, object]] | None:
    """Of a container that has them, the parts and how a key path goes on to them."""
    if isinstance(node, torch.optim.Optimizer):
        node = node.state_dict()
    if isinstance(node, Mapping):
        items = cast("Mapping[object, object]", node).items()
        return ((segment(name), child) for name, child in items)
    if type(node) in (list, tuple):
        sequence = cast("Sequence[object]", node)
        return ((str(index), child) for index, child in enumerate(sequence))
    return None


def _visit_module(
    found: FoundTargets, key: str, module: torch.nn.Module, parents: tuple[int, ...]
) -> None:
    own = FoundTargets({}, found.copies, found.closed)
    _visit(own, key, module.state_dict(), parents)
    for name, tensor in own.tensors.items():
        _add(found, name, tensor)
    # Asked afterwards: some modules put other parameters in place for `state_dict`.
    named = _Memory.of([*module.parameters(), *module.buffers()])
    if all(map(named.has, own.tensors.values())):
        return
    # Modules may also hand out what they keep without its being a parameter or buffer.
    kept = _Memory.of(part for part in _walk(module) if isinstance(part, torch.Tensor))
    # What it keeps where nobody looks (in an object of another class) comes twice; what
    # it makes for the call does not, while the first is still there.
    again = FoundTargets({}, set(), {})
    _visit(again, key, module.state_dict(), parents)
    known = [kept, _Memory.of(again.tensors.values())]
    found.copies.update(
        name
        for name, tensor in own.tensors.items()
        if not any(memory.has(tensor) for memory in known)
    )


class _Memory(NamedTuple):
    """The memory of some tensors.

    Attributes:
        pointers: Where their storages begin.
        ids: The tensors themselves, which somebody else keeps alive.
    """

    pointers: set[int]
    ids: set[int]

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> Self:
        known = list(tensors)
        return cls(storage_ptrs(known), set(map(id, known)))

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether one of them has what the tensor is filled with."""
        if id(tensor) in self.ids:
            return True
        if tensor.layout is torch.sparse_coo:
            return False  # It is filled by giving it other parts.
        pointers = storage_ptrs([tensor])
        return not pointers or not pointers.isdisjoint(self.pointers)


def _walk(node: object) -> Iterator[object]:
    """The node and what containers and modules in it hold, each once.

    Plain objects are not looked into: they may refer to anything, as a learning rate
    scheduler does to its optimizer.
    """
    seen: set[int] = set()
    pending = [node]
    while pending:
        part = pending.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            pending += _parts(part)


def _parts(node: object) -> Iterable[object]:
    if isinstance(node, torch.nn.Module):
        return vars(node).values()
    if isinstance(node, Mapping):
        return cast("Mapping[object, object]", node).values()
    if isinstance(node, list | tuple | deque | AbstractSet):
        return cast("Iterable[object]", node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = dataclasses.fields(node)
        return [getattr(node, field.name, None) for field in fields]
    return ()
