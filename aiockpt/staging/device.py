"""Staging of tensors on devices, and of those on the host that are saved with them.

Copies run on a stream of our own, which first waits for what the caller had enqueued
when it called `save`. Once all of them are enqueued, the caller may go on: what it
enqueues then is made to wait for them on the device (`follow`), not the caller.
"""

__all__ = ["DeviceStager", "mark"]

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from typing import Final

import torch

from aiockpt.capture import Capture
from aiockpt.errors import StagingError
from aiockpt.image import Chunk, Copy
from aiockpt.ring import Lease
from aiockpt.staging.base import Source
from aiockpt.staging.devices import Devices, InFlight, failed
from aiockpt.staging.driver import DeviceCopy, DeviceError, Event, Stream
from aiockpt.staging.host import copy_host_piece, copy_literals
from aiockpt.threads import run_blocking

_PURPOSE: Final = "save"


def mark(
    devices: Devices, copiers: Executor, capture: Capture
) -> "DeviceStager | None":
    """What stages a state as it is behind all that the calling thread has enqueued.

    Args:
        devices: What it copies with.
        copiers: One thread, in which copies are enqueued.
        capture: The state.

    Returns:
        None where all of it is in host memory.

    Raises:
        StagingError: It is on a device that cannot be used, or refuses.
    """
    driver = devices.driver
    numbers = driver.devices_of(capture.tensors, capture.storages)
    if not numbers:
        return None
    try:
        driver.check_usable()
    except DeviceError as error:
        names = ", ".join(map(str, sorted(numbers)))
        message = f"tensors on device {names} cannot be staged: {error}"
        raise StagingError(message) from error
    starts: dict[int, list[Event]] = {}
    for number in numbers:
        try:
            event = driver.record(number, driver.current_stream(number))
        except DeviceError as error:
            raise failed(number, error) from error
        starts[number] = [event]
    return DeviceStager(devices, copiers, starts, capture)


class DeviceStager:
    """Stages one save; see `Stager`.

    Attributes:
        is_urgent: Whether somebody waits until all of its copies have been begun.
    """

    def __init__(
        self,
        devices: Devices,
        copiers: Executor,
        starts: Mapping[int, list[Event]],
        capture: Capture,
    ) -> None:
        """Made by `mark`.

        Args:
            devices: What it copies with.
            copiers: One thread, in which copies are enqueued.
            starts: The points behind which copying may begin, by device.
            capture: The state; it is let go of by `check`.
        """
        self.is_urgent = False
        self._devices = devices
        self._copiers = copiers
        self._starts = starts
        self._capture: Capture | None = capture
        # Behind the copies that were begun last, by device; written by the copier.
        self._ends: dict[int, Event] = {}

    def check(self, sources: Sequence[Source]) -> None:
        """See `Stager.check`; called in the thread that pickled the state, once."""
        capture, self._capture = self._capture, None
        assert capture is not None
        driver = self._devices.driver
        known = capture.storage_ptrs()
        made: set[int] = set()
        for source in sources:
            if isinstance(source, bytes):
                continue
            storage, device = source.storage, driver.device_of(source.storage)
            is_here = (
                device in self._starts if device is not None else _is_host(storage)
            )
            if not is_here:
                message = f"tensors on {storage.device} cannot be staged by this engine"
                raise StagingError(message)
            if device is not None and storage.data_ptr() not in known:
                made.add(device)
        for device in made:
            # A tensor's class made it for its pickle, with work that it enqueued here.
            try:
                event = driver.record(device, driver.current_stream(device))
            except DeviceError as error:
                raise failed(device, error) from error
            self._starts[device].append(event)

    async def prepare(self, nbytes: int) -> None:
        """Pins the first `nbytes` bytes of the ring, as far as that is allowed.

        If cancelled: what is being pinned is pinned on.
        """
        await self._devices.memory.prepare(nbytes, next(iter(self._starts)))

    async def fill(
        self, lease: Lease, chunk: Chunk, sources: Sequence[Source]
    ) -> InFlight:
        """See `Stager.fill`."""
        devices = self._devices
        await devices.pace.enter(self)
        in_flight = InFlight(devices, at_end=devices.pace.leave)
        try:
            is_pinned = await devices.memory.ready(
                lease.address, chunk.nbytes, next(iter(self._starts))
            )
            begin = partial(self._begin, lease, chunk, sources, in_flight)
            await run_blocking(self._copiers, begin, is_pinned=is_pinned)
        except BaseException:
            # A piece may be under way, and the lease will not be kept for it.
            with suppress(StagingError):
                await in_flight.ended()
            raise
        return in_flight

    def _begin(
        self,
        lease: Lease,
        chunk: Chunk,
        sources: Sequence[Source],
        in_flight: InFlight,
        *,
        is_pinned: bool,
    ) -> None:
        try:
            self._enqueue(lease, chunk, sources, in_flight, is_pinned=is_pinned)
        except DeviceError as error:
            raise StagingError(f"copying to the ring failed: {error}") from error

    def _enqueue(
        self,
        lease: Lease,
        chunk: Chunk,
        sources: Sequence[Source],
        in_flight: InFlight,
        *,
        is_pinned: bool,
    ) -> None:
        on_host: list[Copy] = []
        on_devices: dict[int, list[DeviceCopy]] = {}
        for copy in chunk.copies:
            source = sources[copy.record]
            device = None
            if not isinstance(source, bytes):
                device = self._devices.driver.device_of(source.storage)
            if device is None or isinstance(source, bytes):
                on_host.append(copy)
                continue
            address = source.storage.data_ptr() + source.start + copy.start
            piece = DeviceCopy(lease.address + copy.at, address, copy.nbytes)
            on_devices.setdefault(device, []).append(piece)
        # First, so that devices copy while this thread does.
        for device, copies in on_devices.items():
            stream = self._stream(device)
            self._ends[device] = in_flight.copy(
                device, stream, copies, is_to_host=True, is_pinned=is_pinned
            )
        copy_literals(lease, chunk)
        for copy in on_host:
            copy_host_piece(lease, copy, sources[copy.record])

    def _stream(self, device: int) -> Stream:
        """The stream to copy on, told to wait until the state is as it was captured."""
        stream = self._devices.stream(device, _PURPOSE)
        for start in self._starts[device]:
            self._devices.driver.follow(device, stream, start)
        # Whatever is enqueued on it from here on comes later by itself.
        self._starts[device].clear()
        return stream

    def hurry(self) -> None:
        """All further copies are begun as soon as there is room; from any thread."""
        if not self.is_urgent:
            self.is_urgent = True
            self._devices.pace.hurry()

    def follow(self) -> bool:
        """What the calling thread enqueues from now on runs behind all the copies.

        All of them must have been begun.

        Returns:
            False where a device refuses: the caller must wait itself.
        """
        driver = self._devices.driver
        try:
            for device, event in self._ends.items():
                driver.follow(device, driver.current_stream(device), event)
        except DeviceError:
            return False
        return True


def _is_host(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu"
