"""What a loading thread reads a file with: it asks, the engine's loop has it done."""

__all__ = ["Landing", "Reader"]

import concurrent.futures
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from aiockpt.guard import look_again
from aiockpt.loading.bulk import BulkRead, Reads
from aiockpt.loading.filling import Target
from aiockpt.loop_thread import Call
from aiockpt.staging.devices import Devices, failed
from aiockpt.staging.driver import DeviceError
from aiockpt.storage.base import ReadFile


class Landing(NamedTuple):
    """Memory on a device that a region is read to.

    Attributes:
        storage: The memory.
        device: The device.
    """

    storage: torch.UntypedStorage
    device: int

    @property
    def target(self) -> Target:
        """What to fill."""
        return Target(self.storage.data_ptr(), self.device)


class Reader:
    """The bulk reads of one load, one after the other.

    Used by the thread that loads; `stop` may be called by any other.
    """

    def __init__(
        self,
        begin: Callable[[BulkRead], Call[None]],
        chunk_bytes: int,
        devices: Devices | None = None,
    ) -> None:
        """Begins nothing yet.

        Args:
            begin: Starts `BulkRead.run` on the engine's loop.
            chunk_bytes: Length of a chunk of the ring.
            devices: What copies from the ring to devices, where that is done.
        """
        self._begin = begin
        self._chunk_bytes = chunk_bytes
        self._devices = devices
        self._lock = threading.Lock()
        self._is_stopped = False
        self._current: BulkRead | None = None

    @contextmanager
    def reading(self, file: ReadFile, reads: Reads) -> Generator[BulkRead]:
        """Reads while the body runs; behind it nothing is read or written any more.

        Raises:
            concurrent.futures.CancelledError: `stop` was called.
            StagingError: A device that is to be copied to refuses.
        """
        read = BulkRead(file, reads, self._chunk_bytes, self._devices)
        self._settle(read.devices)
        with self._lock:
            if self._is_stopped:
                raise concurrent.futures.CancelledError
            self._current = read
        call = self._begin(read)
        try:
            yield read
        finally:
            read.stop()
            call.result()
            read.close()
            self._current = None

    @contextmanager
    def settling(self, tensors: Iterable[torch.Tensor]) -> Generator[None]:
        """The body has tensors to itself, wherever they are, and is done behind it.

        On a device, work that was enqueued before has ended, and the body's, too.

        Raises:
            StagingError: A device refuses.
        """
        devices = {self.device_of(tensor) for tensor in tensors}
        numbers = [device for device in devices if device is not None]
        self._settle(numbers)
        yield
        self._settle(numbers)

    def _settle(self, devices: Collection[int]) -> None:
        """Waits until nothing that was enqueued before uses the memory to be filled."""
        for device in devices:
            assert self._devices is not None
            try:
                self._devices.driver.settle(device)
            except DeviceError as error:
                raise failed(device, error) from error

    def device_of(self, tensor: torch.Tensor) -> int | None:
        """The device that has the tensor, where it can be copied to from the ring."""
        if self._devices is None:
            return None
        number = self._devices.driver.device_of(tensor)
        # Asked second: a load to the host does not go looking for a driver.
        return number if number is not None and self._is_copying else None

    @contextmanager
    def landing(
        self, devices: Mapping[str, str], nbytes: Mapping[str, int]
    ) -> Generator[dict[str, Landing]]:
        """New memory on devices for those regions that go to one; emptied afterwards.

        Args:
            devices: Where they go, as torch calls it, by the region's name.
            nbytes: Their length.

        Raises:
            torch.OutOfMemoryError: There is no such memory.
        """
        landings = self._landings(devices, nbytes)
        try:
            yield landings
        finally:
            # An error's traceback refers to them, and would keep the memory.
            landings.clear()

    def _landings(
        self, devices: Mapping[str, str], nbytes: Mapping[str, int]
    ) -> dict[str, Landing]:
        devices = {region: name for region, name in devices.items() if name != "cpu"}
        if not devices or not self._is_copying:
            return {}
        assert self._devices is not None
        driver = self._devices.driver
        numbers = {name: driver.named(name) for name in set(devices.values())}
        return {
            region: Landing(driver.allocate(number, nbytes[region]), number)
            for region, name in devices.items()
            if (number := numbers[name]) is not None
        }

    @property
    def _is_copying(self) -> bool:
        """Whether there is anything to copy to devices with; else torch does it."""
        if self._devices is None:
            return False
        try:
            self._devices.driver.check_usable()
        except DeviceError:
            return False
        return True

    def check(self) -> None:
        """Returns if the load goes on.

        Raises:
            concurrent.futures.CancelledError: `stop` was called.
        """
        if self._is_stopped:
            raise concurrent.futures.CancelledError

    def stop(self) -> None:
        """Ends the load: what waits for bytes raises, what is read is not used."""
        with self._lock:
            self._is_stopped = True
            if self._current is not None:
                self._current.stop()
        # It may be waiting for what is being staged.
        look_again()
