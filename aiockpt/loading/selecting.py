"""Which tensors of a file are meant: those named, or those that have a target."""

__all__ = [
    "Described",
    "Targets",
    "check_targets",
    "is_plain",
    "only",
    "select",
    "tensors_by_key",
]

import difflib
import fnmatch
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NamedTuple, Self, TypeGuard, TypeVar, cast

import torch

from aiockpt.errors import CheckpointNotFoundError, InvalidArgumentError
from aiockpt.loading.overlaps import Overlap, Source, overlaps, shares_elements
from aiockpt.loading.targets import find_targets
from aiockpt.outline import TensorOutline, is_tensor, leaves
from aiockpt.weights import memory_of

_MAX_COMPARED: Final = 5000
_MAX_SHOWN: Final = 50

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Described(NamedTuple):
    """What a file says of a tensor.

    Attributes:
        dtype: Element type.
        shape: Size of each dimension `(ndim,)`.
        layout: How its elements are kept.
        wrapper: Name of its class, where that wraps other tensors (`DTensor`).
        reason: Why nothing can be filled from it, if so.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: torch.layout = torch.strided
    wrapper: str = ""
    reason: str | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Describes a tensor that has been made."""
        is_wrapper = hasattr(tensor, "__tensor_flatten__")
        wrapper = type(tensor).__name__ if is_wrapper else ""
        if tensor.is_nested:
            reason = "a nested tensor cannot be filled"
            return cls(tensor.dtype, (), tensor.layout, wrapper, reason)
        return cls(tensor.dtype, tuple(tensor.shape), tensor.layout, wrapper)


def tensors_by_key(root: object) -> tuple[dict[str, object], set[str]]:
    """Returns the tensors of an outline, and key paths that two of them have."""
    nodes: dict[str, object] = {}
    clashes: set[str] = set()
    for key, node in leaves(root):
        if is_tensor(node) and nodes.setdefault(key, node) is not node:
            clashes.add(key)
    return nodes, clashes


def is_plain(node: object) -> TypeGuard[TensorOutline]:
    """Whether bytes, dtype, shape and stride are all there is to the tensor."""
    return isinstance(node, TensorOutline) and node.is_strided


def select(
    path: str, patterns: Sequence[str], tensors: Mapping[str, T]
) -> dict[str, T]:
    """Returns the tensors that any pattern names, in the file's order.

    Args:
        path: The file, for messages.
        patterns: Key paths, or globs over them: `*` and `?` also match dots. One
            that is itself a key path names just that.
        tensors: What the file has, by key path.

    Raises:
        CheckpointNotFoundError: A pattern names nothing; the message says what
            comes near.
        InvalidArgumentError: The patterns are no list of strings.
    """
    texts = cast("object", patterns)
    if isinstance(texts, str) or not all(isinstance(item, str) for item in patterns):
        raise InvalidArgumentError("keys must be a list of key paths or globs")
    chosen: set[str] = set()
    for pattern in patterns:
        names = _matches(pattern, tensors)
        if not names:
            near = _near(pattern, tensors)
            hint = f"; near: {', '.join(near)}" if near else ""
            text = f"{path}: no tensor has the key {pattern!r}{hint}"
            raise CheckpointNotFoundError(text)
        chosen.update(names)
    return {name: value for name, value in tensors.items() if name in chosen}


def only(pattern: str, chosen: Mapping[str, T]) -> tuple[str, T]:
    """Returns the one tensor that a pattern was to name, and its key path.

    Raises:
        InvalidArgumentError: It names several.
    """
    if len(chosen) > 1:
        names = ", ".join(list(chosen)[:_MAX_SHOWN])
        raise InvalidArgumentError(f"{pattern!r} names several tensors: {names}")
    return next(iter(chosen.items()))


def _matches(pattern: str, names: Mapping[str, object]) -> list[str]:
    if pattern in names:
        return [pattern]
    glob = re.compile(fnmatch.translate(pattern))
    return [name for name in names if glob.match(name)]


def _near(pattern: str, names: Mapping[str, object]) -> list[str]:
    below = [name for name in names if name.startswith(f"{pattern}.")]
    if below:
        return [f"{pattern}.*", *below[:3]]
    compared = list(names)[:_MAX_COMPARED]
    return difflib.get_close_matches(pattern, compared, n=5, cutoff=0.5)


class Targets:
    """The tensors to be filled.

    Attributes:
        is_strict: Whether every tensor of the file must have a target, and back.
    """

    def __init__(self, into: object, *, is_strict: bool) -> None:
        """Finds the tensors; errors as those of `find_targets`."""
        self.is_strict = is_strict
        self._found = find_targets(into)

    def matched(
        self, path: str, tensors: Mapping[str, T], *, is_chosen: bool
    ) -> tuple[dict[str, T], dict[str, torch.Tensor]]:
        """Returns the file's tensors and the targets that are to be held together.

        Args:
            path: The file, for the log.
            tensors: Tensors of the file, by key path.
            is_chosen: Whether they were chosen by name: other targets are not meant.

        Raises:
            InvalidArgumentError: Something is meant that cannot be filled, or would be
                filled in vain.
        """
        targets = _without_tied(self._found.tensors, tensors)
        if is_chosen:
            targets = {key: targets[key] for key in tensors if key in targets}
        self._check_copies(path, targets.keys() & tensors.keys())
        if not is_chosen:
            self._check_closed(path)
        if self.is_strict:
            return dict(tensors), targets
        _log_left_out(path, "have no target", tensors.keys() - targets.keys())
        _log_left_out(path, "are not in the file", targets.keys() - tensors.keys())
        common = [key for key in tensors if key in targets]
        return {key: tensors[key] for key in common}, {
            key: targets[key] for key in common
        }

    def _check_copies(self, path: str, filled: Collection[str]) -> None:
        copies = sorted(self._found.copies & set(filled))
        if copies:
            shown = ", ".join(map(repr, copies[:_MAX_SHOWN]))
            text = (
                f"{path}: the state dict of the module has copies, not the module's own "
                f"tensors, and filling them would change nothing: {shown}"
            )
            raise InvalidArgumentError(text)

    def _check_closed(self, path: str) -> None:
        closed = [
            f"{key!r} ({name})" if key else name
            for key, name in self._found.closed.items()
        ]
        if not closed:
            return
        shown = ", ".join(closed[:_MAX_SHOWN])
        text = (
            "tensors in other containers than mappings, lists and tuples cannot be "
            f"filled: {shown}"
        )
        if self.is_strict:
            raise InvalidArgumentError(f"{path}: {text}")
        _logger.warning("%s: %s", path, text)


def _without_tied(
    targets: Mapping[str, torch.Tensor], names: Collection[str]
) -> dict[str, torch.Tensor]:
    """Leaves out targets that the file fills under another of their names."""
    filled = {memory_of(targets[name]) for name in names if name in targets} - {None}
    return {
        name: tensor
        for name, tensor in targets.items()
        if name in names or memory_of(tensor) not in filled
    }


def _log_left_out(path: str, what: str, keys: Collection[str]) -> None:
    if keys:
        shown = ", ".join(sorted(keys)[:_MAX_SHOWN])
        _logger.warning("%s: %d tensors %s: %s", path, len(keys), what, shown)


def check_targets(
    path: str,
    file: Mapping[str, Described],
    targets: Mapping[str, torch.Tensor],
    source_of: Callable[[str], Source],
) -> None:
    """Makes sure that every tensor of the file has a target that it fits, and back.

    Args:
        path: The file, for the message.
        file: What the file says of each tensor.
        targets: What is to be filled.
        source_of: Where in the file a tensor's elements are; asked of targets that
            share memory, which is fine where they are to receive the same.

    Raises:
        InvalidArgumentError: One has not, or two would be given different values in
            the same memory; the message lists all.
    """
    faults = [
        *(f"{key}: only in the file" for key in file if key not in targets),
        *(f"{key}: not in the file" for key in targets if key not in file),
    ]
    sound: dict[str, torch.Tensor] = {}
    for key, described in file.items():
        target = targets.get(key)
        if target is None:
            continue
        fault = _fault(described, target)
        if fault is None:
            sound[key] = target
        else:
            faults.append(f"{key}: {fault}")
    faults += map(_overlap_fault, overlaps(sound, source_of))
    if faults:
        more = len(faults) - _MAX_SHOWN
        shown = faults[:_MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        text = "\n  ".join([f"{path} does not fit the tensors to be filled:", *shown])
        raise InvalidArgumentError(text)


def _fault(described: Described, target: torch.Tensor) -> str | None:
    wanted = Described.of(target)
    if described.reason or wanted.reason:
        return described.reason or wanted.reason
    if described != wanted:
        return f"{_text(described)} in the file, {_text(wanted)} in the target"
    if target.is_meta:
        return "the target is on the meta device, where there is no memory"
    if target.layout == torch.strided and not wanted.wrapper:
        if shares_elements(target):
            return "elements of the target share memory"
        if not _has_memory(target):
            return "the target's storage is smaller than the target"
    return None


def _overlap_fault(overlap: Overlap) -> str:
    if overlap.is_certain:
        shares = f"shares memory with the target of {overlap.other!r}"
        return f"{overlap.key}: {shares}, which is to hold something else"
    return (
        f"{overlap.key}: this target and that of {overlap.other!r} may share memory: "
        "they lie in between each other in too many pieces to tell"
    )


def _has_memory(target: torch.Tensor) -> bool:
    """Whether all elements are in the storage, which somebody may have resized."""
    if not target.numel():
        return True
    pairs = zip(target.shape, target.stride(), strict=True)
    last = target.storage_offset() + sum((size - 1) * step for size, step in pairs)
    nbytes = int(last + 1) * target.itemsize
    return nbytes <= target.untyped_storage().nbytes() and target.data_ptr() != 0


def _text(tensor: Described) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    wrapper = tensor.wrapper and f" {tensor.wrapper}"
    return f"{tensor.dtype} {tensor.shape}{layout}{wrapper}"
