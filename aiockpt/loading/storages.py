"""The storages of a torch file, made as the pickle asks for them."""

__all__ = ["StorageLoader"]

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from aiockpt.errors import CorruptCheckpointError
from aiockpt.loading.placing import Placement
from aiockpt.loading.reading import Fetch, Region, check_header
from aiockpt.loading.torch_file import TorchFile, storage_record


class _Placed(NamedTuple):
    """A storage where it belongs, its length then, and that of its record."""

    storage: torch.UntypedStorage
    nbytes: int
    record_nbytes: int


class StorageLoader:
    """Answers the persistent references of one pickle.

    Every storage is fetched, and so checked, before anything sees it; one that
    several tensors share is fetched once.

    Attributes:
        failure: What `load` raised last, to tell it from errors of the pickle.
    """

    def __init__(
        self,
        records: TorchFile,
        fetch: Fetch,
        placement: Placement,
        substitutes: Sequence[object] = (),
        landings: Collection[str] = (),
    ) -> None:
        """Fetches nothing yet.

        Args:
            records: Where the storages stand.
            fetch: Gets the bytes of one.
            placement: Where storages go.
            substitutes: What integer references stand for.
            landings: Names of records that are fetched to where they belong.
        """
        self.failure: Exception | None = None
        self._records = records
        self._fetch = fetch
        self._placement = placement
        self._substitutes = substitutes
        self._landings = landings
        self._placed: dict[str, _Placed] = {}
        self._typed: dict[tuple[str, torch.dtype], torch.TypedStorage] = {}

    def load(self, pid: object) -> object:
        """Returns what the reference stands for.

        Raises:
            CorruptCheckpointError: The reference is malformed, the record is not
                there, has another length or does not have its checksum.
            InvalidArgumentError: There is no such device here.
        """
        try:
            return self._load(pid)
        except Exception as error:
            self.failure = error
            raise

    def untyped(self, key: str, location: str, nbytes: int) -> torch.UntypedStorage:
        """Returns the storage of `nbytes` bytes in a record; errors as those of `load`.

        Args:
            key: The record is `data/<key>`.
            location: Where the storage was saved, as torch tags it.
            nbytes: Its length, by the pickle's account.
        """
        try:
            return self._storage(key, location, nbytes)
        except Exception as error:
            self.failure = error
            raise

    def raise_failure(self) -> None:
        """Raises what went wrong with a storage, whatever it was wrapped in since."""
        if self.failure is not None:
            raise self.failure from None

    def check_sizes(self) -> None:
        """Makes sure that no tensor reaches beyond its storage's record.

        torch enlarges a storage for a tensor that does, with whatever the new
        memory holds.

        Raises:
            CorruptCheckpointError: One does.
        """
        for key, placed in self._placed.items():
            if placed.storage.nbytes() != placed.nbytes:
                path = self._records.file.path
                text = f"{path}: a tensor reaches beyond the record 'data/{key}'"
                raise CorruptCheckpointError(text, path=path)

    def _load(self, pid: object) -> object:
        match pid:
            case int() if 0 <= pid < len(self._substitutes):
                return self._substitutes[pid]
            case ("storage", kind, str(key), str(location), int(numel)):
                dtype = _dtype(kind)
                if dtype is not None and numel >= 0:
                    nbytes = numel * dtype.itemsize
                    return self._typed_storage(key, location, dtype, nbytes)
            case _:
                pass
        path = self._records.file.path
        text = f"{path}: the pickle refers to something else than a storage"
        raise CorruptCheckpointError(text, path=path)

    def _typed_storage(
        self, key: str, location: str, dtype: torch.dtype, nbytes: int
    ) -> torch.TypedStorage:
        storage = self._storage(key, location, nbytes)
        typed = self._typed.get((key, dtype))
        if typed is None:
            typed = torch.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=storage, dtype=dtype, _internal=True
            )
            self._typed[key, dtype] = typed
        return typed

    def _storage(self, key: str, location: str, nbytes: int) -> torch.UntypedStorage:
        placed = self._placed.get(key)
        if placed is None or placed.record_nbytes != nbytes:
            region = self._region(key, nbytes)
            if self._placement.is_meta(location):
                check_header(self._records.file, region)
                storage = _meta_storage(region)
            else:
                storage = self._fetch(region)
                if region.name not in self._landings:
                    storage = self._placement.place(storage, location)
            placed = _Placed(storage, storage.nbytes(), nbytes)
            self._placed[key] = placed
        return placed.storage

    def _region(self, key: str, nbytes: int) -> Region:
        try:
            return self._records.storage_region(key, nbytes)
        except CorruptCheckpointError:
            with self._records.keyed(storage_record(key)):
                raise


def _dtype(kind: object) -> torch.dtype | None:
    if kind is torch.UntypedStorage:
        return torch.uint8
    return kind.dtype if isinstance(kind, torch.serialization.StorageType) else None


def _meta_storage(region: Region) -> torch.UntypedStorage:
    memory = torch.empty(region.nbytes, dtype=torch.uint8, device="meta")
    storage = memory.untyped_storage()
    # As `torch.load` leaves it for readers that fetch the bytes themselves.
    vars(storage)["_checkpoint_offset"] = region.offset
    return storage
