"""Loading from a torch zip: all of it, some tensors, or into given tensors."""

__all__ = ["TorchLoading"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard, cast

import torch

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.loading.filling import Piece, copy_into, fill
from aiockpt.loading.placing import Placement
from aiockpt.loading.reading import Region, open_mapping, read_storage
from aiockpt.loading.selecting import Described, check_targets, select, targets_by_key
from aiockpt.loading.storages import StorageLoader
from aiockpt.loading.torch_file import PICKLE_RECORD, TorchFile
from aiockpt.loading.unpickling import Unpickling
from aiockpt.outline import TensorOutline, emit, is_tensor, leaves


@dataclass(frozen=True, slots=True)
class TorchLoading:
    """One load from one torch file.

    Attributes:
        records: The file.
        placement: Where tensors go.
        unpickling: How the pickle is run.
        is_mapped: Whether storages are slices of a mapping of the file.
    """

    records: TorchFile
    placement: Placement
    unpickling: Unpickling
    is_mapped: bool

    def load(self, into: object, keys: Sequence[str] | None) -> object:
        """Does what `load_file` promises."""
        if into is not None:
            return self._load_into(into, keys)
        if keys is not None:
            return self._load_keys(keys)
        return self._run(self.records.read(PICKLE_RECORD))

    def _load_keys(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns the tensors named, by key path; reads nothing of the others."""
        data = self.records.read(PICKLE_RECORD)
        nodes = self._tensors(self.records.outline(data), keys)
        return self._make(nodes, data)

    def _load_into(self, into: object, keys: Sequence[str] | None) -> object:
        """Fills the tensors in `into`; returns what was saved, with these in it.

        What can be refused is refused before any of them is changed. With `keys`,
        only these are filled, and returned by key path.
        """
        data = self.records.read(PICKLE_RECORD)
        root = self.records.outline(data)
        nodes = self._tensors(root, keys)
        targets = targets_by_key(into)
        if keys is not None:
            targets = {key: targets[key] for key in nodes if key in targets}
        special = {key: node for key, node in nodes.items() if not _is_plain(node)}
        sources = self._make(special, data)
        described = {
            key: _described(sources.get(key, node)) for key, node in nodes.items()
        }
        check_targets(self.records.file.path, described, targets)
        fills = self._fills(nodes, targets)
        chosen = root if keys is None else nodes
        numbers: dict[int, int] = {}
        for number, node in enumerate(nodes.values()):
            numbers.setdefault(id(node), number)
        pickle = emit(chosen, like=data, substitutes=numbers)
        result = self._run(pickle, [targets[key] for key in nodes])
        for key, source in sources.items():
            self._copy(key, source, targets[key])
        for region, pieces in fills.values():
            with self.records.keyed(region.name):
                fill(self.records.file, region, pieces)
        return result

    def _run(self, data: bytes, substitutes: Sequence[object] = ()) -> object:
        file = self.records.file
        fetch = open_mapping(file) if self.is_mapped else partial(read_storage, file)
        storages = StorageLoader(self.records, fetch, self.placement, substitutes)
        return self.unpickling.run(data, storages)

    def _make(
        self, nodes: Mapping[str, object], data: bytes
    ) -> dict[str, torch.Tensor]:
        # A pickle of just these tensors: whatever a tensor of any kind is made of,
        # and nothing else, is read and made as it would be in a full load.
        made = self._run(emit(dict(nodes), like=data))
        return cast("dict[str, torch.Tensor]", made)

    def _tensors(self, root: object, keys: Sequence[str] | None) -> dict[str, object]:
        """The tensors meant, by key path."""
        nodes: dict[str, object] = {}
        clashes: set[str] = set()
        for key, node in leaves(root):
            if is_tensor(node) and nodes.setdefault(key, node) is not node:
                clashes.add(key)
        path = self.records.file.path
        chosen = nodes if keys is None else select(path, keys, nodes)
        for key in clashes & chosen.keys():
            text = f"{path}: two tensors have the key path {key!r}"
            raise InvalidArgumentError(text)
        return chosen

    def _fills(
        self, nodes: Mapping[str, object], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, tuple[Region, list[Piece]]]:
        """What to read where, by storage: each is read once for all its tensors."""
        fills: dict[str, tuple[Region, list[Piece]]] = {}
        for key, node in nodes.items():
            if _is_plain(node) and node.storage_key is not None:
                region = self.records.tensor_region(key, node)
                piece = Piece(targets[key], node.offset, node.stride)
                fills.setdefault(node.storage_key, (region, []))[1].append(piece)
        return fills

    def _copy(self, key: str, source: torch.Tensor, target: torch.Tensor) -> None:
        try:
            copy_into(target, source)
        except RuntimeError as error:
            text = f"{self.records.file.path}: {key!r} cannot be filled: {error}"
            raise InvalidArgumentError(text) from error


def _is_plain(node: object) -> TypeGuard[TensorOutline]:
    """Whether bytes, dtype, shape and stride are all there is to the tensor."""
    return isinstance(node, TensorOutline) and node.is_strided


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
