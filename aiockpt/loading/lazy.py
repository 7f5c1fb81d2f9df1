"""A file that stays open, of which tensors, or rows of one, are read one by one."""

__all__ = ["LazyFile", "Loading"]

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from aiockpt.errors import InvalidArgumentError
from aiockpt.loading.bulk import Reads
from aiockpt.loading.inspecting import FileInfo
from aiockpt.loading.placing import Placement
from aiockpt.loading.reader import Reader
from aiockpt.loading.reading import (
    Region,
    Window,
    check_header,
    checksum_mismatch,
    named,
)
from aiockpt.storage.base import ReadFile


class Loading(Protocol):
    """What both containers can be asked."""

    def keys(self) -> list[str]:
        """The key paths of all tensors."""
        ...

    def load_keys(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors that the key paths or globs name, by key path."""
        ...

    def window(self, key: str) -> Window:
        """Where the elements of one tensor stand.

        Raises:
            CheckpointNotFoundError: There is no such tensor.
            InvalidArgumentError: It is of a kind that is more than its elements.
        """
        ...


class LazyFile:
    """One open file. Its methods block: call them in a worker, one at a time.

    Attributes:
        info: What is in the file.
        keys: Key paths of the tensors that `load` takes.
    """

    def __init__(
        self,
        file: ReadFile,
        placement: Placement,
        loading: Callable[[Reader], Loading],
        info: FileInfo,
        reader: Reader,
    ) -> None:
        """Finds the tensors in it; errors as those of `inspect_file`.

        Args:
            file: Becomes this object's, unless it raises.
            placement: Where tensors go.
            loading: How a reader loads from the file.
            info: What is in the file.
            reader: What this call reads with.
        """
        self._file = file
        self._placement = placement
        self._loading = loading
        self.info = info
        self.keys = tuple(loading(reader).keys())

    def load(self, keys: Sequence[str], reader: Reader) -> dict[str, torch.Tensor]:
        """The tensors that the key paths or globs name, by key path."""
        with named(self._file):
            return self._loading(reader).load_keys(keys)

    def rows(
        self, key: str, start: int, stop: int | None, reader: Reader
    ) -> torch.Tensor:
        """The part `[start:stop]` of a tensor along its first dimension."""
        with named(self._file):
            window = self._loading(reader).window(key)
            if not window.shape:
                raise InvalidArgumentError(f"{self._file.path}: {key!r} has no rows")
            check_header(self._file, window.region)
            chosen = range(window.shape[0])[start:stop]
            shape = (len(chosen), *window.shape[1:])
            part = _part(window, chosen.start, shape)
            # A part has no checksum of its own.
            mismatch = partial(checksum_mismatch, self._file)
            reads = Reads([part], mismatch, kept=(part.name,))
            with reader.reading(self._file, reads) as bulk:
                storage = self._placement.place(bulk.storage(part), window.location)
            rows = torch.empty(0, dtype=window.dtype, device=storage.device)
            return rows.set_(storage, 0, shape, window.stride)

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._file.close()


def _part(window: Window, start: int, shape: tuple[int, ...]) -> Region:
    """The bytes from the first to the last element of some rows."""
    span = first = 0
    if 0 not in shape:
        first = window.offset + start * window.stride[0]
        pairs = zip(shape, window.stride, strict=True)
        span = 1 + sum((size - 1) * step for size, step in pairs)
    width = window.dtype.itemsize
    region = window.region
    return Region(region.name, region.offset + first * width, span * width, None)
