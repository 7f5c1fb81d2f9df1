"""Copying a state: containers structurally, other objects by their reduction.

A clone is what a pickle round trip would return, made without the bytes: the
object's reduction (`copyreg`, `__reduce_ex__`) is carried out at once, on copies
of its parts. Therefore whatever cannot be pickled is refused here, by key path,
and aliasing survives between the inside of an object and the rest of the state.
"""

__all__ = ["RefusedError", "Walk"]

import collections
import copyreg
import enum
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from aiockpt.capturing.key_paths import ROOT, attribute_step, item_step
from aiockpt.capturing.marks import wrapped_tensors

# The protocol of pickles in torch's zip container: classes may reduce to other
# things under another one.
_PROTOCOL: Final = 2

_IMMUTABLE_TYPES = frozenset(
    {
        type(None), type(Ellipsis), type(NotImplemented),
        bool, int, float, complex, str, bytes, range,
        torch.dtype, torch.device, torch.layout, torch.memory_format, torch.qscheme,
        torch.Size,
    }
)  # fmt: skip
_NEW_OBJECT = object().__reduce_ex__(_PROTOCOL)[0]


class RefusedError(Exception):
    """A value cannot be pickled; its key path is gathered on the way up.

    Attributes:
        cause: What the value's class, or pickle, raised.
        steps: The steps of the path, the last one first.
    """

    def __init__(self, cause: Exception) -> None:
        """Starts at the value itself, with no steps."""
        super().__init__(cause)
        self.cause = cause
        self.steps: list[str] = []

    def path(self) -> str:
        """Returns the key path of the value."""
        return ROOT + "".join(reversed(self.steps))


class Walk:
    """One walk over a state, which copies it.

    Attributes:
        plain_tensors: Tensors and parameters of exactly these classes, by id.
        odd_tensors: Other tensors, and the inner tensors of wrappers, by id.
        storages: Raw torch storages.
    """

    __slots__ = (
        "_copies",
        "_shared_types",
        "_temporaries",
        "odd_tensors",
        "plain_tensors",
        "storages",
    )

    def __init__(self) -> None:
        """Nothing has been met yet."""
        self.plain_tensors: dict[int, Tensor] = {}
        self.odd_tensors: dict[int, Tensor] = {}
        self.storages: list[torch.UntypedStorage] = []
        self._copies: dict[int, object] = {}
        self._shared_types: set[type] = set(_IMMUTABLE_TYPES)
        # Objects made on the way, known to `_copies` by an id that must not recur.
        self._temporaries: list[object] = []

    def copy(self, obj: object) -> object:
        """Returns the one copy of `obj`, or `obj` itself where it may be shared.

        Raises:
            RefusedError: `obj` or a part of it cannot be pickled.
            RecursionError: It is nested too deeply.
        """
        kind = type(obj)
        if kind is Tensor or kind is Parameter:
            self.plain_tensors[id(obj)] = cast("Tensor", obj)
            return obj
        if kind in self._shared_types:
            return obj
        known = self._copies.get(id(obj))
        if known is not None:
            return known
        copier = _COPIERS.get(kind)
        return self._copy_other(obj) if copier is None else copier(self, obj)

    # Containers. A copy is known before its parts are copied: there are cycles.

    def copy_dict(self, source: dict[object, object]) -> object:
        """Copies a plain dict."""
        copy = self._copies[id(source)] = dict(source)
        self._copy_pairs(copy, item_step)
        return copy

    def copy_ordered_dict(
        self, source: collections.OrderedDict[object, object]
    ) -> object:
        """Copies items and attributes: `state_dict()` sets `_metadata`."""
        copy = collections.OrderedDict(source)
        self._copies[id(source)] = copy
        self._copy_pairs(copy, item_step)
        if vars(source):
            vars(copy).update(cast("dict[str, object]", self._copy_state(vars(source))))
        return copy

    def copy_default_dict(
        self, source: collections.defaultdict[object, object]
    ) -> object:
        """Copies items; the factory is shared or cloned like any object."""
        try:
            factory = self.copy(source.default_factory)
        except RefusedError as refused:
            refused.steps.append(attribute_step("default_factory"))
            raise
        copy = collections.defaultdict(cast("Callable[[], object]", factory), source)
        self._copies[id(source)] = copy
        self._copy_pairs(copy, item_step)
        return copy

    def copy_list(self, source: list[object]) -> object:
        """Copies a list."""
        copy = self._copies[id(source)] = list(source)
        self._copy_items(copy)
        return copy

    def copy_deque(self, source: collections.deque[object]) -> object:
        """Copies a deque of the same `maxlen`."""
        copy: collections.deque[object] = collections.deque(maxlen=source.maxlen)
        self._copies[id(source)] = copy
        items = list(source)
        self._copy_items(items)
        copy.extend(items)
        return copy

    def copy_set(self, source: set[object]) -> object:
        """Copies a set, in the same order where the members are shared."""
        copy = self._copies[id(source)] = set(source)
        members = list(source)
        if self._copy_items(members):
            copy.clear()
            copy.update(members)
        return copy

    def copy_immutable(self, source: tuple[object, ...] | frozenset[object]) -> object:
        """Tuples and frozensets stay themselves where all of their parts do."""
        items = list(source)
        copy = type(source)(items) if self._copy_items(items) else source
        # A part may have led back here, and then the copy was made there.
        return self._copies.setdefault(id(source), copy)

    def copy_bytearray(self, source: bytearray) -> object:
        """Copies the bytes."""
        copy = self._copies[id(source)] = bytearray(source)
        return copy

    def _copy_pairs(self, pairs: dict[Any, Any], step: Callable[[object], str]) -> None:
        """Replaces keys and values by their copies, in place and in order."""
        shared = self._shared_types
        plain_tensors = self.plain_tensors
        copies = self._copies
        are_keys_shared = True
        key: object = None
        try:
            for key, value in pairs.items():
                if type(key) not in shared:
                    are_keys_shared = False
                kind = type(value)
                # As `copy` does; here, nearly all tensors are spared the call.
                if kind is Tensor or kind is Parameter:
                    plain_tensors[id(value)] = value
                elif kind is dict:
                    known = copies.get(id(value))
                    pairs[key] = self.copy_dict(value) if known is None else known
                elif kind not in shared:
                    pairs[key] = self.copy(value)
        except RefusedError as refused:
            refused.steps.append(step(key))
            raise
        if not are_keys_shared:
            keys: list[object] = list(pairs)
            if self._copy_items(keys):
                values = list(pairs.values())
                pairs.clear()
                pairs.update(zip(keys, values, strict=True))

    def _copy_items(self, items: list[Any]) -> bool:
        """Replaces items by their copies, in place. Is any of them another object?"""
        shared = self._shared_types
        is_any_new = False
        index = 0
        try:
            for index, item in enumerate(items):
                if type(item) not in shared:
                    items[index] = copy = self.copy(item)
                    is_any_new = is_any_new or copy is not item
        except RefusedError as refused:
            refused.steps.append(item_step(index))
            raise
        return is_any_new

    # Everything else.

    def _copy_other(self, obj: object) -> object:
        if isinstance(obj, Tensor):
            self.odd_tensors[id(obj)] = obj
            for part in wrapped_tensors(obj).values():
                self.copy(part)
        elif isinstance(obj, torch.TypedStorage):
            # untyped() would warn
            self.storages.append(obj._untyped_storage)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        elif isinstance(obj, torch.UntypedStorage):
            self.storages.append(obj)
        elif isinstance(obj, enum.Enum):
            self.copy(type(obj))
            self._shared_types.add(type(obj))
        elif isinstance(obj, (type, types.FunctionType)):
            return self._share_by_name(obj)
        else:
            return self._copy_numpy(obj)
        return obj

    def _share_by_name(self, obj: object) -> object:
        _attempt(pickle.dumps, obj, _PROTOCOL)  # pickled as a name: does it lead here?
        return self._copies.setdefault(id(obj), obj)

    def _copy_numpy(self, obj: object) -> object:
        # torch may come without it; a process that never imported it has no arrays.
        numpy: Any = sys.modules.get("numpy")
        if numpy is None:
            return self._clone(obj)
        if type(obj) is numpy.ndarray and not cast("Any", obj).dtype.hasobject:
            copy: object = cast("Any", obj).copy(order="K")
            return self._copies.setdefault(id(obj), copy)
        if isinstance(obj, numpy.generic) and not isinstance(obj, numpy.void):
            self._shared_types.add(type(obj))
            return obj
        return self._clone(obj)

    def _clone(self, obj: object) -> object:
        """Carries out the reduction of `obj` as an unpickler would."""
        reduced = _attempt(_reduce, obj)
        if isinstance(reduced, str):
            return self._share_by_name(obj)
        self._temporaries.append((obj, reduced))
        make, args, state, items, pairs, set_state = cast(
            "tuple[Any, ...]", _attempt(_six_parts, reduced)
        )
        clone = _attempt(self.copy(make), *self._copy_arguments(make, args))
        self._copies[id(obj)] = clone
        if items is not None:
            copies = list(items)
            self._temporaries.append(tuple(copies))
            self._copy_items(copies)
            _attempt(_append, clone, copies)
        if pairs is not None:
            copied = dict(pairs)
            self._temporaries.append(dict(copied))
            self._copy_pairs(copied, item_step)
            _attempt(_insert, clone, copied)
        # Last, as pickle has it (`copy` does not): what a class notes while it takes
        # items is replaced by what it had noted.
        if state is not None:
            _attempt(_set_state, clone, self._copy_state(state), self.copy(set_state))
        return clone

    def _copy_arguments(self, make: object, args: tuple[object, ...]) -> list[object]:
        copies = list(args)
        try:
            self._copy_items(copies)
        except RefusedError as refused:
            # Arguments have no names; a namedtuple's are its class and its items.
            index = int(refused.steps.pop()[1:-1])
            if make is _NEW_OBJECT and index > 0:
                refused.steps.append(item_step(index - 1))
            raise
        return copies

    def _copy_state(self, state: object) -> object:
        if type(state) is dict:
            attributes = dict(cast("dict[object, object]", state))
            self._copy_pairs(attributes, attribute_step)
            return attributes
        if type(state) is not tuple:
            return self.copy(state)
        parts = cast("tuple[object, ...]", state)
        if len(parts) == 2:  # noqa: PLR2004 - attributes and slots
            return tuple(map(self._copy_state, parts))
        return tuple(map(self.copy, parts))


_COPIERS: dict[type, Callable[[Walk, Any], object]] = {
    dict: Walk.copy_dict,
    collections.OrderedDict: Walk.copy_ordered_dict,
    collections.defaultdict: Walk.copy_default_dict,
    list: Walk.copy_list,
    collections.deque: Walk.copy_deque,
    set: Walk.copy_set,
    frozenset: Walk.copy_immutable,
    tuple: Walk.copy_immutable,
    bytearray: Walk.copy_bytearray,
}


def _attempt(function: Any, *args: object) -> object:
    """Calls what the state's classes define; whatever it raises refuses the state."""
    try:
        return cast("object", function(*args))
    except (RecursionError, MemoryError):
        raise
    except Exception as cause:
        raise RefusedError(cause) from cause


def _reduce(obj: object) -> object:
    reducer: Callable[[object], object] | None = copyreg.dispatch_table.get(type(obj))
    return obj.__reduce_ex__(_PROTOCOL) if reducer is None else reducer(obj)


def _six_parts(reduced: object) -> tuple[object, ...]:
    """The parts of a reduction, as `object.__reduce__` documents them."""
    if isinstance(reduced, tuple):
        parts = cast("tuple[object, ...]", reduced)
        if 2 <= len(parts) <= 6 and isinstance(parts[1], tuple):  # noqa: PLR2004
            return parts + (None,) * (6 - len(parts))
    message = f"__reduce__ returned {type(reduced).__name__}, not 2 to 6 parts"
    raise pickle.PicklingError(message)


def _set_state(
    clone: object, state: object, setter: Callable[[object, object], None] | None
) -> None:
    own: Callable[[object], None] | None = getattr(clone, "__setstate__", None)
    if setter is not None:
        setter(clone, state)
    elif own is not None:
        own(state)
    else:
        is_with_slots = isinstance(state, tuple)
        attributes, slots = cast("Any", state if is_with_slots else (state, None))
        if attributes:
            vars(clone).update(attributes)
        for name, value in (slots or {}).items():
            setattr(clone, name, value)


def _append(clone: Any, items: list[object]) -> None:
    if hasattr(clone, "extend"):
        clone.extend(items)
    else:
        for item in items:
            clone.append(item)


def _insert(clone: Any, pairs: dict[object, object]) -> None:
    for key, value in pairs.items():
        clone[key] = value
