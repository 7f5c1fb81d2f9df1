"""Running a checkpoint's pickle with torch's own restricted unpickler, or without."""

__all__ = ["Unpickling"]

import io
import pickle
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch._utils import _sparse_tensors_to_validate as sparse_tensors  # pyright: ignore[reportPrivateUsage]
from torch._utils import _validate_loaded_sparse_tensors as validate_sparse  # pyright: ignore[reportPrivateUsage]
from torch._weights_only_unpickler import Unpickler
from torch.serialization import _serialization_tls as torch_local  # pyright: ignore[reportPrivateUsage]
from typing_extensions import override

from aiockpt.errors import (
    CorruptCheckpointError,
    InvalidArgumentError,
    UnsafePickleError,
)
from aiockpt.loading.placing import MapLocation
from aiockpt.loading.plain_unpickling import unpickle_plain
from aiockpt.loading.storages import StorageLoader
from aiockpt.outline import screen

_NO_MEMORY: Final = (MemoryError, torch.OutOfMemoryError)
_MAX_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class Unpickling:
    """How a file's pickle is run.

    Attributes:
        path: The file, for messages.
        weights_only: Whether only what torch counts as safe may be made; else
            the pickle runs whatever code it names.
        map_location: For the few rebuild functions that place tensors themselves.
    """

    path: str
    weights_only: bool
    map_location: MapLocation

    def run(self, data: bytes, storages: StorageLoader) -> object:
        """Returns what the pickle makes, every tensor filled.

        Raises:
            UnsafePickleError: It needs a class that `weights_only` does not allow.
            CorruptCheckpointError: It is malformed, or does not fit the file.
            InvalidArgumentError: torch has no such tensor on the device asked for.
        """
        try:
            with _locations_mapped(self.map_location):
                if self.weights_only:
                    made = self._run_safely(data, storages)
                else:
                    made = self._run_trusted(data, storages)
            validate_sparse()  # type: ignore[no-untyped-call]
        finally:
            # A failed load must not leave its tensors to the next one's validation.
            sparse_tensors.clear()
            # It refers, by its traceback, to who refers to it.
            storages.failure = None
        return made

    def _run_safely(self, data: bytes, storages: StorageLoader) -> object:
        try:
            return unpickle_plain(data, storages)
        except Exception as error:
            storages.raise_failure()
            if isinstance(error, _NO_MEMORY):
                raise
            # Whatever it was, torch's unpickler has the last word.
        # It runs no code, but it can be made to hang or to fill memory.
        screen(data)
        unpickler = _RestrictedUnpickler(io.BytesIO(data), encoding="utf-8")
        unpickler.storages = storages
        try:
            made: object = unpickler.load()  # type: ignore[no-untyped-call]
        except pickle.UnpicklingError as error:
            raise self._refused(error) from error
        except Exception as error:
            storages.raise_failure()
            if isinstance(error, _NO_MEMORY):
                raise
            if isinstance(error, NotImplementedError):
                text = f"{self.path}: torch cannot do this: {_first_words(error)}"
                raise InvalidArgumentError(text) from error
            # Whatever the pickle made torch's rebuild functions stumble over.
            raise self._malformed(error) from error
        storages.check_sizes()
        return made

    def _run_trusted(self, data: bytes, storages: StorageLoader) -> object:
        unpickler = _TrustingUnpickler(io.BytesIO(data), encoding="utf-8")
        unpickler.storages = storages
        try:
            made = unpickler.load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise self._malformed(error) from error
        storages.check_sizes()
        return made

    def _refused(self, error: pickle.UnpicklingError) -> UnsafePickleError:
        found = re.search(r"GLOBAL (\S+)", str(error))
        name = None if found is None else found[1]
        if name is not None and "not an allowed global" in str(error):
            text = (
                f"{self.path}: weights_only=True does not allow {name}; if you trust "
                f"it, call torch.serialization.add_safe_globals([{name}]) first, "
                "or pass weights_only=False"
            )
        else:
            text = (
                f"{self.path}: weights_only=True cannot load this file "
                f"({_first_words(error)}); pass weights_only=False if you trust it"
            )
        return UnsafePickleError(text, name=name)

    def _malformed(self, error: Exception) -> CorruptCheckpointError:
        text = (
            f"{self.path}: the pickle cannot be loaded: "
            f"{type(error).__name__}: {_first_words(error)}"
        )
        return CorruptCheckpointError(text, path=self.path)


def _first_words(error: Exception) -> str:
    """What the error says, less the tables that torch appends."""
    return str(error).partition("\n")[0][:_MAX_SHOWN]


class _RestrictedUnpickler(Unpickler):
    """torch's own, with storages from our hands."""

    storages: StorageLoader

    @override
    def persistent_load(self, pid: object) -> Any:
        return self.storages.load(pid)


class _TrustingUnpickler(pickle.Unpickler):
    """What `torch.load(weights_only=False)` uses, with storages from our hands."""

    storages: StorageLoader

    @override
    def find_class(self, module: str, name: str) -> object:
        if "Storage" in name:
            try:
                return torch.serialization.StorageType(name)  # type: ignore[no-untyped-call]
            except KeyError:
                pass  # A class of another library, or one without an element type.
        # Tensor's module before torch 1.8, in pickles of tensor subclasses.
        module = "torch._tensor" if module == "torch.tensor" else module
        return super().find_class(module, name)

    @override
    def persistent_load(self, pid: object) -> object:
        return self.storages.load(pid)


@contextmanager
def _locations_mapped(map_location: MapLocation) -> Generator[None]:
    before = torch_local.map_location
    torch_local.map_location = cast("Any", map_location)
    try:
        yield
    finally:
        torch_local.map_location = before
