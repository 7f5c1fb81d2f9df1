"""Loading from a safetensors file: all of it, some tensors, or into given tensors."""

__all__ = ["SafetensorsLoading", "read_header", "tensor_region"]

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from aiockpt.formats.safetensors import (
    Header,
    TensorEntry,
    header_nbytes,
    parse_header,
)
from aiockpt.guard import changing
from aiockpt.loading.bulk import BulkRead, Reads
from aiockpt.loading.filling import (
    Piece,
    Target,
    fill,
    filling,
    is_image,
)
from aiockpt.loading.overlaps import Source
from aiockpt.loading.placing import Placement
from aiockpt.loading.reader import Landing, Reader
from aiockpt.loading.reading import (
    Fetch,
    Region,
    Window,
    checksum_mismatch,
    content_of,
    named,
    open_mapping,
    read_bytes,
)
from aiockpt.loading.selecting import Described, Targets, check_targets, only, select
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
        header: What it says of itself.
        placement: Where tensors go.
        reader: What tensors are read with.
        is_mapped: Whether tensors are slices of a mapping of the file.
        is_whole: Whether a full load reads every byte, to check it.
    """

    file: ReadFile
    header: Header
    placement: Placement
    reader: Reader
    is_mapped: bool
    is_whole: bool

    def load(
        self, keys: Sequence[str] | None = None
    ) -> tuple[dict[str, torch.Tensor], int | None]:
        """Returns the tensors (named by `keys`), in the order of their bytes.

        With them comes the file's CRC-32 where all of it was read.
        """
        entries = self._entries(keys)
        if self.is_mapped:
            return self._tensors(entries, open_mapping(self.file)), None
        if self.placement.is_meta(_LOCATION):
            return {name: _meta(entry) for name, entry in entries.items()}, None
        is_whole = self.is_whole and keys is None
        with self._landing(entries) as landings:
            fills = {name: [landing.target] for name, landing in landings.items()}
            kept = entries.keys() - landings.keys()
            regions = map(tensor_region, entries.values())
            reads = self._reads(regions, kept=kept, fills=fills, is_whole=is_whole)
            with self.reader.reading(self.file, reads) as bulk:
                tensors = {
                    name: self._landed(entry, landings[name], bulk)
                    if name in landings
                    else self._tensor(entry, bulk.storage)
                    for name, entry in entries.items()
                }
                return tensors, bulk.wait() if is_whole else None

    def _landing(
        self, entries: Mapping[str, TensorEntry]
    ) -> AbstractContextManager[dict[str, Landing]]:
        """Memory for the tensors, where they go to a device through the ring."""
        # Where a function decides, it has to see the tensor first.
        target = self.placement.target(_LOCATION)
        names = entries if target is not None else ()
        sizes = {name: entry.nbytes for name, entry in entries.items()}
        return self.reader.landing(dict.fromkeys(names, target or ""), sizes)

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self.header.entries)

    def load_keys(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors named, by name; reads nothing of the others."""
        return self.load(keys)[0]

    def window(self, key: str) -> Window:
        """Where the elements of one tensor stand."""
        _, entry = only(key, self._entries([key]))
        stride = _row_major(entry.shape)
        region = tensor_region(entry)
        return Window(region, entry.dtype, entry.shape, stride, 0, _LOCATION)

    def load_into(
        self, targets: Targets, keys: Sequence[str] | None
    ) -> tuple[dict[str, torch.Tensor], int | None]:
        """Fills the targets, which it returns by name.

        What can be refused is refused before any of them is changed. The file's
        CRC-32 comes with them where all of it was read.
        """
        path = self.file.path
        is_chosen = keys is not None
        entries, tensors = targets.matched(
            path, self._entries(keys), is_chosen=is_chosen
        )
        described = {
            name: Described(entry.dtype, entry.shape) for name, entry in entries.items()
        }
        check_targets(
            path, described, tensors, lambda name: self._source(entries[name])
        )
        direct: dict[str, list[torch.Tensor]] = {}
        indirect: dict[str, Piece] = {}
        for name, entry in entries.items():
            piece = Piece(tensors[name], 0, _row_major(entry.shape))
            device = self.reader.device_of(piece.target)
            if is_image(piece, tensor_region(entry), device):
                direct[name] = [piece.target]
            else:
                indirect[name] = piece
        is_whole = self.is_whole and targets.is_strict and not is_chosen
        read = entries if is_whole else direct
        regions = [tensor_region(entries[name]) for name in read]
        noted = indirect if is_whole else ()
        targeted = [tensors[name] for name in entries]
        with changing(targeted, self.reader.check):
            with filling(direct, self.reader.device_of) as fills:
                reads = self._reads(
                    regions, fills=fills, noted=noted, is_whole=is_whole
                )
                with self.reader.reading(self.file, reads) as bulk:
                    total, crc32s = bulk.wait(), bulk.crc32s
            for name, piece in indirect.items():
                # Read again where the file's checksum was made of all that is in it.
                region = tensor_region(entries[name])._replace(crc32=crc32s.get(name))
                self._fill_by_copy(region, piece)
        return {name: tensors[name] for name in entries}, total if is_whole else None

    def _source(self, entry: TensorEntry) -> Source:
        """What a tensor is filled with; tied weights may have been copied to the file."""
        return Source((entry.dtype, content_of(self.file, tensor_region(entry))))

    def _fill_by_copy(self, region: Region, piece: Piece) -> None:
        # One after the other, so that only one is in memory twice.
        reads = self._reads([region], kept=(region.name,), is_whole=False)
        with self.reader.reading(self.file, reads) as bulk:
            storage = bulk.storage(region)
            with self.reader.settling([piece.target]):
                fill(piece, storage, self.reader.device_of(piece.target))

    def _reads(
        self,
        regions: Iterable[Region],
        *,
        kept: Collection[str] = (),
        fills: Mapping[str, Sequence[Target]] | None = None,
        noted: Collection[str] = (),
        is_whole: bool,
    ) -> Reads:
        return Reads(
            regions=list(regions),
            kept=kept,
            fills=fills or {},
            is_whole=is_whole,
            noted=noted,
            mismatch=partial(checksum_mismatch, self.file),
        )

    def _entries(self, keys: Sequence[str] | None) -> dict[str, TensorEntry]:
        entries = dict(self.header.entries)
        return entries if keys is None else select(self.file.path, keys, entries)

    def _tensors(
        self, entries: Mapping[str, TensorEntry], fetch: Fetch
    ) -> dict[str, torch.Tensor]:
        return {name: self._tensor(entry, fetch) for name, entry in entries.items()}

    def _tensor(self, entry: TensorEntry, fetch: Fetch) -> torch.Tensor:
        storage = fetch(tensor_region(entry))
        if entry.start % entry.dtype.itemsize:
            # The format allows it, and readers of such memory do not expect it.
            storage = storage.clone()  # type: ignore[no-untyped-call]
        return _shown(self.placement.place(storage, _LOCATION), entry)

    def _landed(
        self, entry: TensorEntry, landing: Landing, bulk: BulkRead
    ) -> torch.Tensor:
        bulk.wait_for(tensor_region(entry))
        return _shown(landing.storage, entry)


def _shown(storage: torch.UntypedStorage, entry: TensorEntry) -> torch.Tensor:
    """The tensor in a storage that holds its bytes."""
    flat = torch.empty(0, dtype=entry.dtype, device=storage.device)
    return flat.set_(storage, 0, entry.shape, _row_major(entry.shape))


def _meta(entry: TensorEntry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def tensor_region(entry: TensorEntry) -> Region:
    """Where a tensor's bytes stand."""
    return Region(entry.name, entry.start, entry.nbytes, None)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
