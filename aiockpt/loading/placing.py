"""Where loaded storages go: `map_location` in every form that `torch.load` takes."""

__all__ = ["MapLocation", "Placement", "resolved"]

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch.serialization import default_restore_location

from aiockpt.errors import InvalidArgumentError
from aiockpt.staging.cuda_driver import current_device

MapLocation = (
    str
    | torch.device
    | Mapping[str, str]
    | Callable[[torch.UntypedStorage, str], torch.UntypedStorage | None]
    | None
)


def resolved(map_location: MapLocation) -> MapLocation:
    """The same place, whichever thread is told: "cuda" is the caller's own device."""
    if isinstance(map_location, str | torch.device) and str(map_location) == "cuda":
        number = current_device()
        return map_location if number is None else f"cuda:{number}"
    if isinstance(map_location, Mapping):
        return {key: str(resolved(value)) for key, value in map_location.items()}
    return map_location


class Placement:
    """Moves storages from host memory to where `map_location` wants them.

    Attributes:
        map_location: As given to `torch.load`: None for where each storage was
            saved, a device, a mapping of devices, or a function of a storage in
            host memory and the device where it was saved.
    """

    def __init__(self, map_location: MapLocation) -> None:
        """Checks the type and nothing else.

        Raises:
            InvalidArgumentError: `torch.load` takes no such thing.
        """
        given: object = map_location
        is_device = given is None or isinstance(given, str | torch.device | Mapping)
        if not is_device and not callable(given):
            text = f"map_location cannot be a {type(given).__name__}"
            raise InvalidArgumentError(text)
        self.map_location = map_location

    @property
    def may_be_meta(self) -> bool:
        """Whether some storages may go where there is no data, and need no reading."""
        match self.map_location:
            case str() | torch.device():
                return self._target("") == "meta"
            case Mapping():
                return "meta" in map(str, self.map_location.values())
            case _:
                # As callables get to see data, only a tag in the file could ask for it.
                return False

    def target(self, location: str) -> str | None:
        """Where a storage saved at `location` goes; None where a function decides."""
        return None if callable(self.map_location) else self._target(location)

    def is_meta(self, location: str) -> bool:
        """Whether a storage saved at `location` goes where there is no data."""
        return not callable(self.map_location) and self._target(location) == "meta"

    def place(
        self, storage: torch.UntypedStorage, location: str
    ) -> torch.UntypedStorage:
        """Returns the storage where it belongs; the same one if it is there.

        Args:
            storage: The data in host memory.
            location: Where it was saved, as torch tags it.

        Raises:
            InvalidArgumentError: There is no such device here.
        """
        target = self._target(location)
        if callable(self.map_location):
            placed = self.map_location(storage, location)
            if placed is not None:
                return placed
        elif target == "cpu":
            return storage
        try:
            moved = default_restore_location(storage, target)  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = f"a tensor cannot be loaded to {target!r} here: {error}"
            raise InvalidArgumentError(text) from error
        return cast("torch.UntypedStorage", moved)

    def _target(self, location: str) -> str:
        match self.map_location:
            case str() | torch.device():
                return str(self.map_location)
            case Mapping():
                return str(self.map_location.get(location, location))
            case _:
                return location
