"""Which bytes of which storages a pickle refers to, and under which keys.

`StorageLedger` gives every storage that is met the next key and answers with the
persistent id that torch would write. Where only parts of a storage were referred
to, `cuts_needed` says how to cut it; a second ledger, made with these cuts, refers
to each part as to a storage of its own.
"""

# ruff: noqa: SLF001 - a storage's identity has no other name
# pyright: reportPrivateUsage=false

__all__ = [
    "Cuts",
    "Element",
    "PersistentId",
    "Span",
    "StorageConflictError",
    "StorageLedger",
]

import bisect
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, TypedStorage, UntypedStorage
from torch.serialization import location_tag

from aiockpt.capturing.key_paths import key_path
from aiockpt.capturing.marks import storage_ptrs

_CPU: Final = torch.device("cpu")

PersistentId: TypeAlias = tuple[object, ...]

# Ranges `(start, stop)` of a storage in bytes, sorted and disjoint, by the address of
# the storage's C++ object.
Cuts: TypeAlias = Mapping[int, Sequence[tuple[int, int]]]


class Span(NamedTuple):
    """A run of bytes of a storage, which it keeps alive.

    Attributes:
        storage: The storage, on whatever device.
        start: Its first byte that is meant.
        nbytes: How many are.
    """

    storage: UntypedStorage
    start: int
    nbytes: int


class Element(NamedTuple):
    """How torch takes the bytes of a storage.

    Attributes:
        storage_type: Class in the persistent id, or what is written in its place.
        storage_dtype: All who refer to the same data must agree on it.
        unit_nbytes: What the persistent id's "number of elements" counts.
        itemsize: Bytes of a tensor's element.
    """

    storage_type: type | int
    storage_dtype: torch.dtype
    unit_nbytes: int
    itemsize: int


class StorageConflictError(Exception):
    """Data at `pointer` is referred to as data of two dtypes; torch refuses that."""

    def __init__(self, pointer: int) -> None:
        """`describe` says the rest."""
        super().__init__(f"data at {pointer:#x} is viewed as different dtypes")
        self.pointer = pointer

    def describe(self, tree: object) -> str:
        """Names a value in `tree` that refers to the data, and one of another dtype."""
        dtypes: list[torch.dtype] = []

        def is_of_new_dtype(node: object) -> bool:
            dtype = _dtype_of_data(node, self.pointer)
            if dtype is None or dtype in dtypes:
                return False
            dtypes.append(dtype)
            return True

        paths = [key_path(tree, is_of_new_dtype) or "another value" for _ in range(2)]
        return (
            f"{paths[0]} and {paths[1]} view the same data as different dtypes "
            f"({' and '.join(map(str, dtypes))}), which torch cannot load: save one "
            "of them, or a clone"
        )


class StorageLedger:
    """The storages that a pickle refers to, and which of their bytes.

    Attributes:
        spans: What was referred to, in the order of the keys: whole storages, or
            parts where the ledger was made with cuts.
    """

    def __init__(self, cuts: Cuts) -> None:
        """Nothing has been referred to; storages in `cuts` are taken apart."""
        self.spans: list[Span] = []
        self._cuts = cuts
        self._keys: list[str] = []
        self._numbers: dict[int | tuple[int, int], int] = {}
        self._ranges: dict[int, list[tuple[int, int, int]]] = {}
        self._whole: set[int] = set()
        self._dtypes: dict[int, torch.dtype] = {}

    def refer(
        self, storage: UntypedStorage, element: Element, offset: int, num_elements: int
    ) -> tuple[PersistentId, int]:
        """Refers to a run of elements, from a tensor's first to its last.

        Args:
            storage: Where they stand.
            element: What they are.
            offset: Elements before the first.
            num_elements: Length of the run; 0 for an empty tensor.

        Returns:
            The persistent id and the offset in the storage that it means.

        Raises:
            ValueError: The run reaches beyond the storage: no reader could make the
                tensor again.
        """
        itemsize = element.itemsize
        start, stop = offset * itemsize, (offset + num_elements) * itemsize
        address = storage._cdata
        if address in self._cuts:
            number = self._number_of_cut(storage, start, stop)
            span = self.spans[number]
            num_before = offset - span.start // itemsize
            offset = max(0, min(num_before, span.nbytes // itemsize))
        else:
            number = self._number_of(storage, address)
        _check_within(self.spans[number], start, stop)
        persistent_id = self._persistent_id(number, element)
        if start == 0 and stop == self.spans[number].nbytes:
            self._whole.add(address)
        else:
            self._ranges.setdefault(address, []).append((start, stop, itemsize))
        return persistent_id, offset

    def refer_whole(self, storage: UntypedStorage, element: Element) -> PersistentId:
        """Refers to all of a storage and returns its persistent id."""
        if storage.device.type == "meta":
            message = "a storage on the meta device has no bytes"
            raise ValueError(message)
        address = storage._cdata
        self._whole.add(address)
        return self._persistent_id(self._number_of(storage, address), element)

    def cuts_needed(self) -> Cuts:
        """Returns how to cut the storages of which only parts were referred to."""
        cuts: dict[int, Sequence[tuple[int, int]]] = {}
        for address, ranges in self._ranges.items():
            if address in self._whole or address in self._cuts:
                continue
            nbytes = self.spans[self._numbers[address]].nbytes
            merged = _merged(ranges)
            if merged != [(0, nbytes)]:
                cuts[address] = merged
        return cuts

    def _number_of(self, storage: UntypedStorage, address: int) -> int:
        number = self._numbers.get(address)
        if number is None:
            number = self._add(address, Span(storage, 0, storage.nbytes()))
        return number

    def _number_of_cut(self, storage: UntypedStorage, start: int, stop: int) -> int:
        address = storage._cdata
        cuts = self._cuts[address]
        index = bisect.bisect_right(cuts, (start, sys.maxsize)) - 1
        first, end = cuts[max(index, 0)]
        key: int | tuple[int, int] = (address, first)
        if start != stop and not first <= start < stop <= end:
            # A reduction gave other tensors than the first time.
            key, first, end = address, 0, storage.nbytes()
        number = self._numbers.get(key)
        if number is None:
            number = self._add(key, Span(storage, first, end - first))
        return number

    def _add(self, key: int | tuple[int, int], span: Span) -> int:
        number = self._numbers[key] = len(self.spans)
        self.spans.append(span)
        self._keys.append(str(number))
        return number

    def _persistent_id(self, number: int, element: Element) -> PersistentId:
        storage, _, nbytes = self.spans[number]
        storage_type, storage_dtype, unit_nbytes, _ = element
        pointer = storage.data_ptr()
        if pointer:
            dtype = self._dtypes.setdefault(pointer, storage_dtype)
            if dtype is not storage_dtype:
                raise StorageConflictError(pointer)
        # torch gives the same string for all of these; to ask for it takes long.
        location = "cpu" if storage.device == _CPU else str(location_tag(storage))
        num_units = nbytes // unit_nbytes
        return "storage", storage_type, self._keys[number], location, num_units


def _check_within(span: Span, start: int, stop: int) -> None:
    """Refuses a tensor that has elements where its storage has no bytes left."""
    if start != stop and stop > span.start + span.nbytes:
        nbytes = span.storage.nbytes()
        message = (
            f"its elements end at byte {stop} of a storage of {nbytes} bytes, which "
            "was shrunk or freed (as FSDP frees parameters that are not in use)"
        )
        raise ValueError(message)


def _merged(ranges: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Merges ranges of bytes that overlap; those that only touch stay apart.

    Args:
        ranges: `(start, stop, itemsize)`. Merged ranges start at a multiple of the
            largest itemsize, so that any element in them is aligned.
    """
    step = max(itemsize for _, _, itemsize in ranges)
    merged: list[tuple[int, int]] = []
    for start, stop, _ in sorted(ranges):
        first = start - start % step
        if start == stop:
            continue
        if merged and first < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged or [(0, 0)]


def _dtype_of_data(node: object, pointer: int) -> torch.dtype | None:
    """As what `node` views the storage at `pointer`, if it does."""
    if isinstance(node, Tensor) and pointer in storage_ptrs([node]):
        return node.dtype
    if isinstance(node, TypedStorage) and node._untyped_storage.data_ptr() == pointer:
        return node.dtype
    if isinstance(node, UntypedStorage) and node.data_ptr() == pointer:
        return torch.uint8
    return None
