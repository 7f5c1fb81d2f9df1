"""What staging asks of devices: streams, events, copies, pinned memory.

`cuda_driver` answers with CUDA; `aiockpt.testing.simulated_device` with a device that
is only pretended, and as unpleasant as a real one may be.
"""

__all__ = ["DeviceCopy", "DeviceError", "Driver", "Event", "Stream"]

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

Event: TypeAlias = Any
"""A point in the work of a stream. It ends with the last reference to it."""

Stream: TypeAlias = Any
"""Work of a device that runs in its order."""


class DeviceError(Exception):
    """A device, or what drives it, refused."""


class DeviceCopy(NamedTuple):
    """`nbytes` bytes between an address of the host and one of a device."""

    host: int
    device: int
    nbytes: int


class Driver(Protocol):
    """The devices of this process.

    May be used from any thread; none of its methods changes what the calling thread's
    current device is. All of them but those that say otherwise raise `DeviceError`.
    """

    # --- of tensors, without touching a device ------------------------------------

    def device_of(self, data: torch.Tensor | torch.UntypedStorage) -> int | None:
        """The number of the device that has the data; None for the host, or another."""
        ...

    def devices_of(
        self, tensors: Iterable[torch.Tensor], storages: Iterable[torch.UntypedStorage]
    ) -> set[int]:
        """The devices that have any of these; costs next to nothing without one."""
        ...

    def check_usable(self) -> None:
        """Returns if the other methods can work at all; `DeviceError` says why not."""
        ...

    def named(self, location: str) -> int | None:
        """The device that torch calls so ("cuda", "cuda:1"); None if none is."""
        ...

    # --- streams and events -------------------------------------------------------

    def current_stream(self, device: int) -> Stream:
        """The stream on which the calling thread enqueues work for the device."""
        ...

    def new_stream(self, device: int) -> Stream:
        """A stream of our own that waits for none, and whose work others go before."""
        ...

    def end_stream(self, device: int, stream: Stream) -> None:
        """Gives a stream back, which has nothing left to do."""
        ...

    def record(self, device: int, stream: Stream) -> Event:
        """The point behind all that has been enqueued on a stream."""
        ...

    def follow(self, device: int, stream: Stream, event: Event) -> None:
        """What is enqueued on the stream from now on runs after the event."""
        ...

    def wait(self, device: int, event: Event) -> None:
        """Blocks until the event has been reached; raises what went wrong before it."""
        ...

    def drain(self, device: int, stream: Stream) -> None:
        """Blocks until the stream has nothing left to do."""
        ...

    def settle(self, device: int) -> None:
        """Blocks until all that any stream of the device had to do has been done."""
        ...

    # --- memory -------------------------------------------------------------------

    def to_host(
        self,
        device: int,
        stream: Stream,
        copies: Sequence[DeviceCopy],
        *,
        is_pinned: bool,
    ) -> None:
        """Enqueues copies from the device; may block where memory is not pinned.

        Raising, it may have enqueued some of them.
        """
        ...

    def to_device(
        self,
        device: int,
        stream: Stream,
        copies: Sequence[DeviceCopy],
        *,
        is_pinned: bool,
    ) -> None:
        """Enqueues copies to the device; otherwise as `to_host`."""
        ...

    def pin(self, device: int, address: int, nbytes: int) -> None:
        """Locks host memory in place, so that all devices copy at their full speed.

        Where it can be told, the memory is given by the node that is next to `device`,
        if it has not been given yet.
        """
        ...

    def unpin(self, device: int, address: int) -> None:
        """Takes back a `pin` of the memory at `address`."""
        ...

    def allocate(self, device: int, nbytes: int) -> torch.UntypedStorage:
        """New memory on the device; `torch.OutOfMemoryError` where there is none."""
        ...

    def close(self) -> None:
        """Gives back what the driver itself holds; never raises."""
        ...
