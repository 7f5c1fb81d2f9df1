"""Loading from a safetensors file: all of it, some tensors, or into given tensors."""

__all__ = ["SafetensorsLoading", "read_header"]

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from aiockpt.formats.safetensors import (
    Header,
    TensorEntry,
    header_nbytes,
    parse_header,
)
from aiockpt.loading.filling import Piece, fill
from aiockpt.loading.placing import Placement
from aiockpt.loading.reading import (
    Fetch,
    Region,
    named,
    open_mapping,
    read_bytes,
    read_storage,
)
from aiockpt.loading.selecting import Described, check_targets, select, targets_by_key
from aiockpt.storage.base import ReadFile

# The format does not say where tensors were: `map_location` is told they were here.
_LOCATION = "cpu"


def read_header(file: ReadFile) -> Header:
    """Reads and checks what the file says of itself.

    Raises:
        CorruptCheckpointError: It is malformed, or does not fit the file's length.
        StorageError: The file system refused.
    """
    length = read_bytes(file, Region("the header's length", 0, 8, None))
    with named(file):
        nbytes = header_nbytes(length, file.nbytes)
        prefix = read_bytes(file, Region("the header", 0, nbytes, None))
        return parse_header(prefix, file.nbytes)


@dataclass(frozen=True, slots=True)
class SafetensorsLoading:
    """One load from one safetensors file.

    Attributes:
        file: The file.
        placement: Where tensors go.
        is_mapped: Whether tensors are slices of a mapping of the file.
    """

    file: ReadFile
    placement: Placement
    is_mapped: bool

    def load(self, into: object, keys: Sequence[str] | None) -> dict[str, torch.Tensor]:
        """Does what `load_file` promises; tensors in the order of their bytes."""
        if into is not None:
            return self._load_into(into, keys)
        fetch: Fetch = partial(read_storage, self.file)
        if self.is_mapped:
            fetch = open_mapping(self.file)
        entries = self._entries(keys)
        return {name: self._tensor(entry, fetch) for name, entry in entries.items()}

    def _load_into(
        self, into: object, keys: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """Fills the tensors in `into`, which it returns by name.

        What can be refused is refused before any of them is changed.
        """
        entries = self._entries(keys)
        targets = targets_by_key(into)
        if keys is not None:
            targets = {name: targets[name] for name in entries if name in targets}
        described = {
            name: Described(entry.dtype, entry.shape) for name, entry in entries.items()
        }
        check_targets(self.file.path, described, targets)
        for name, entry in entries.items():
            piece = Piece(targets[name], 0, _row_major(entry.shape))
            fill(self.file, _region(entry), [piece])
        return {name: targets[name] for name in entries}

    def _entries(self, keys: Sequence[str] | None) -> dict[str, TensorEntry]:
        entries = dict(read_header(self.file).entries)
        return entries if keys is None else select(self.file.path, keys, entries)

    def _tensor(self, entry: TensorEntry, fetch: Fetch) -> torch.Tensor:
        if self.placement.is_meta(_LOCATION):
            return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        storage = self.placement.place(fetch(_region(entry)), _LOCATION)
        flat = torch.empty(0, dtype=entry.dtype, device=storage.device)
        return flat.set_(storage, 0, entry.shape, _row_major(entry.shape))


def _region(entry: TensorEntry) -> Region:
    return Region(entry.name, entry.start, entry.nbytes, None)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
