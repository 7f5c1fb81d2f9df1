"""Loading from a torch zip: all of it, some tensors, or into given tensors."""

__all__ = ["TorchLoading"]

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, cast

import torch

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.guard import changing
from aiockpt.loading.bulk import BulkRead, Reads
from aiockpt.loading.filling import (
    Piece,
    Target,
    copy_into,
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
    content_of,
    open_mapping,
    read_storage,
)
from aiockpt.loading.selecting import (
    Described,
    Targets,
    check_targets,
    is_plain,
    only,
    select,
)
from aiockpt.loading.storages import StorageLoader
from aiockpt.loading.torch_file import TorchFile, storage_record
from aiockpt.loading.unpickling import Unpickling
from aiockpt.outline import TensorOutline, emit, leaves, storage_keys

# Of the widest element, complex128.
_ALIGNMENT_BYTES: Final = 16

_NO_LANDINGS: Final[Mapping[str, Landing]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TorchLoading:
    """One load from one torch file.

    Attributes:
        records: The file.
        placement: Where tensors go.
        unpickling: How the pickle is run.
        reader: What storages are read with.
        is_mapped: Whether storages are slices of a mapping of the file.
        is_whole: Whether a full load reads every byte, to check it.
    """

    records: TorchFile
    placement: Placement
    unpickling: Unpickling
    reader: Reader
    is_mapped: bool
    is_whole: bool

    def load(self) -> tuple[object, int | None]:
        """Returns what was saved, and the file's CRC-32 where all of it was read."""
        data = self.records.pickle
        if self.is_mapped:
            return self._run(data, open_mapping(self.records.file)), None
        if self.placement.may_be_meta:
            return self._run(data, self._fetch(None)), None
        names = [*self.records.entries]
        kept = {name for name in names if name.startswith(storage_record(""))}
        read = names if self.is_whole else kept
        return self._read(data, read, kept, is_whole=self.is_whole)

    def load_keys(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns the tensors named, by key path; reads nothing of the others."""
        return self._make(self._tensors(keys))

    def keys(self) -> list[str]:
        """The key paths of all tensors."""
        return [*self._tensors(None)]

    def window(self, key: str) -> Window:
        """Where the elements of one tensor stand; errors as those of `Loading`."""
        name, node = only(key, self._tensors([key]))
        if not is_plain(node) or node.storage_key is None:
            text = f"{self.records.file.path}: {name!r} is not kept as rows"
            raise InvalidArgumentError(text)
        region = self.records.tensor_region(name, node)
        sizes = node.dtype, node.shape, node.stride, node.offset
        return Window(region, *sizes, node.device)

    def load_into(
        self, targets: Targets, keys: Sequence[str] | None
    ) -> tuple[object, int | None]:
        """Fills the targets; returns what was saved, with these in it.

        What can be refused is refused before any of them is changed. With `keys`,
        or where misfits are left out, only what is filled is returned, by key path.
        The file's CRC-32 comes with it where all of it was read.
        """
        path = self.records.file.path
        nodes = self._tensors(keys)
        nodes, tensors = targets.matched(path, nodes, is_chosen=keys is not None)
        special = {key: node for key, node in nodes.items() if not is_plain(node)}
        sources = self._make(special) if special else {}
        described = {
            key: _described(sources.get(key, node)) for key, node in nodes.items()
        }
        check_targets(path, described, tensors, lambda key: self._source(nodes[key]))
        fills = self._fills(nodes, tensors)
        is_all = keys is None and targets.is_strict
        numbers: dict[int, int] = {}
        for number, node in enumerate(nodes.values()):
            numbers.setdefault(id(node), number)
        shown = self.records.root if is_all else nodes
        pickle = emit(shown, like=self.records.pickle, substitutes=numbers)
        substitutes = [tensors[key] for key in nodes]
        result = self._run(pickle, self._fetch(None), substitutes)
        with changing(substitutes, self.reader.check):
            with self.reader.settling(tensors[key] for key in sources):
                for key, source in sources.items():
                    self._copy(key, source, tensors[key])
            return result, self._fill(fills, is_whole=self.is_whole and is_all)

    def _run(
        self,
        data: bytes,
        fetch: Fetch,
        substitutes: Sequence[object] = (),
        landings: Collection[str] = (),
    ) -> object:
        storages = StorageLoader(
            self.records, fetch, self.placement, substitutes, landings
        )
        return self.unpickling.run(data, storages)

    def _read(
        self,
        pickle: bytes,
        names: Iterable[str],
        kept: AbstractSet[str],
        *,
        is_whole: bool,
    ) -> tuple[object, int | None]:
        """Runs a pickle while records are read, those that it refers to among them.

        Args:
            pickle: What to run.
            names: The records.
            kept: Those of storages that it refers to.
            is_whole: Whether that is the whole file, whose CRC-32 is then returned.
        """
        with self._landing(kept, pickle) as landings:
            fills = {name: [landing.target] for name, landing in landings.items()}
            reads = self._reads(names, kept - landings.keys(), fills, is_whole=is_whole)
            with self.reader.reading(self.records.file, reads) as bulk:
                fetch = self._fetch(bulk, landings)
                made = self._run(pickle, fetch, landings=landings)
                return made, bulk.wait() if is_whole else None

    def _landing(
        self, names: Collection[str], pickle: bytes
    ) -> AbstractContextManager[dict[str, Landing]]:
        """Memory for those storage records that go to a device through the ring.

        Args:
            names: Records of storages.
            pickle: What refers to them.
        """
        targets = dict[str, str]()
        match self.placement.map_location:
            case str() | torch.device():
                targets = dict.fromkeys(names, str(self.placement.map_location))
            case None | Mapping() if b"cuda" in pickle or self.placement.map_location:
                for _, node in leaves(self.records.root):
                    if is_plain(node) and node.storage_key is not None:
                        target = self.placement.target(node.device)
                        if target is not None:
                            targets[storage_record(node.storage_key)] = target
            case _:
                pass  # A function decides, which has to see the storage first.
        targets = {name: target for name, target in targets.items() if name in names}
        sizes = {name: self.records.region(name).nbytes for name in targets}
        return self.reader.landing(targets, sizes)

    def _fetch(
        self, bulk: BulkRead | None, landings: Mapping[str, Landing] = _NO_LANDINGS
    ) -> Fetch:
        """Takes storages from the bulk read, and reads what is not in it."""

        def fetch(region: Region) -> torch.UntypedStorage:
            if bulk is not None and region.name in landings:
                bulk.wait_for(region)
                return landings[region.name].storage
            if bulk is not None and bulk.holds(region):
                storage = bulk.storage(region)
                # torch aligns records; who repacked the file may not have done so.
                is_aligned = region.offset % _ALIGNMENT_BYTES == 0
                return storage if is_aligned else storage.clone()  # type: ignore[no-untyped-call]
            self.reader.check()
            with self.records.keyed(region.name):
                return read_storage(self.records.file, region)

        return fetch

    def _reads(
        self,
        names: Iterable[str],
        kept: Collection[str],
        fills: Mapping[str, Sequence[Target]] | None = None,
        *,
        is_whole: bool | None = None,
    ) -> Reads:
        return Reads(
            regions=[self.records.region(name) for name in names],
            kept=kept,
            fills=fills or {},
            is_whole=self.is_whole if is_whole is None else is_whole,
            mismatch=self.records.mismatch,
        )

    def _make(self, nodes: Mapping[str, object]) -> dict[str, torch.Tensor]:
        # A pickle of just these tensors: whatever a tensor of any kind is made of,
        # and nothing else, is read and made as it would be in a full load.
        pickle = emit(dict(nodes), like=self.records.pickle)
        if self.is_mapped:
            made = self._run(pickle, open_mapping(self.records.file))
        elif self.placement.may_be_meta:
            made = self._run(pickle, self._fetch(None))
        else:
            found = (key for node in nodes.values() for key in storage_keys(node))
            names = dict.fromkeys(map(storage_record, found))
            kept = names.keys() & self.records.entries.keys()
            made, _ = self._read(pickle, kept, kept, is_whole=False)
        return cast("dict[str, torch.Tensor]", made)

    def _tensors(self, keys: Sequence[str] | None) -> dict[str, object]:
        """The tensors meant, by key path."""
        nodes, clashes = self.records.tensors
        path = self.records.file.path
        chosen = dict(nodes) if keys is None else select(path, keys, nodes)
        for key in clashes & chosen.keys():
            text = f"{path}: two tensors have the key path {key!r}"
            raise InvalidArgumentError(text)
        return chosen

    def _source(self, node: object) -> Source:
        """Where the elements of a tensor are; equal for the same ones."""
        if is_plain(node) and node.storage_key is not None:
            name = storage_record(node.storage_key)
            entry = self.records.entries.get(name)
            # Tied weights that were copied on their way to the file are two records.
            known = entry is not None and entry.crc32 and (entry.nbytes, entry.crc32)
            content = known or content_of(self.records.file, self.records.region(name))
            return Source(content, node.offset, node.stride)
        # Whatever it is made of and how: what makes the same says the same.
        return Source(emit(node, like=self.records.pickle))

    def _fills(
        self, nodes: Mapping[str, object], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[Region, list[Piece]]]:
        """What to read where, by record: each is read once for all its tensors."""
        fills: dict[str, tuple[Region, list[Piece]]] = {}
        for key, node in nodes.items():
            if is_plain(node) and node.storage_key is not None:
                region = self.records.tensor_region(key, node)
                piece = Piece(targets[key], node.offset, node.stride)
                fills.setdefault(region.name, (region, []))[1].append(piece)
        return fills

    def _fill(
        self, fills: Mapping[str, tuple[Region, list[Piece]]], *, is_whole: bool
    ) -> int | None:
        direct = {
            name: [piece.target for piece in pieces]
            for name, (region, pieces) in fills.items()
            if all(
                is_image(piece, region, self.reader.device_of(piece.target))
                for piece in pieces
            )
        }
        names = self.records.entries if is_whole else direct
        with filling(direct, self.reader.device_of) as targets:
            reads = self._reads(names, (), targets, is_whole=is_whole)
            with self.reader.reading(self.records.file, reads) as bulk:
                total = bulk.wait()
        for name, (region, pieces) in fills.items():
            if name not in direct:
                self._fill_by_copy(region, pieces)
        return total if is_whole else None

    def _fill_by_copy(self, region: Region, pieces: Sequence[Piece]) -> None:
        # One record after the other, so that only one is in memory twice.
        names = (region.name,)
        reads = self._reads(names, names, is_whole=False)
        with self.reader.reading(self.records.file, reads) as bulk:
            storage = bulk.storage(region)
            with self.reader.settling(piece.target for piece in pieces):
                for piece in pieces:
                    fill(piece, storage, self.reader.device_of(piece.target))

    def _copy(self, key: str, source: torch.Tensor, target: torch.Tensor) -> None:
        try:
            copy_into(target, source)
        except RuntimeError as error:
            text = f"{self.records.file.path}: {key!r} cannot be filled: {error}"
            raise InvalidArgumentError(text) from error


def _described(tensor: object) -> Described:
    match tensor:
        case TensorOutline():
            return Described(tensor.dtype, tensor.shape)
        case torch.Tensor():
            described = Described.of(tensor)
            if tensor.is_meta:
                return described._replace(reason="saved without data")
            return described
        case _:
            text = f"the pickle makes a {type(tensor).__name__} where a tensor is due"
            raise CorruptCheckpointError(text)
