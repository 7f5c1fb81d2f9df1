"""What the engine has on devices, for copies of both directions.

A stream of its own on every device that it meets, threads that wait for its events,
and the ring, pinned. Nothing of it is made before the first tensor on a device.
"""

__all__ = ["Devices", "InFlight", "failed"]

import logging
import threading
from collections.abc import Callable, Sequence

from aiockpt.errors import StagingError
from aiockpt.staging.driver import DeviceCopy, DeviceError, Driver, Event, Stream
from aiockpt.staging.pace import Pace
from aiockpt.staging.pinning import PinnedMemory
from aiockpt.threads import WorkerPool, outlast, run_blocking

_logger = logging.getLogger(__name__)


class Devices:
    """Streams, waiting threads and pinned memory; closed once nothing is copied.

    Attributes:
        driver: What drives them.
        memory: The ring, as pinned memory.
        pace: How many chunks may be copied at once.
    """

    def __init__(
        self, driver: Driver, address: int, nbytes: int, chunk_bytes: int
    ) -> None:
        """Touches no device yet.

        Args:
            driver: What drives them.
            address: Where the ring begins.
            nbytes: Its length.
            chunk_bytes: That of a chunk of it.
        """
        self.driver = driver
        self._pinners = WorkerPool(1, "aiockpt-pin")
        self.memory = PinnedMemory(driver, self._pinners, address, nbytes, chunk_bytes)
        self.pace = Pace()
        self._lock = threading.Lock()
        self._streams: dict[tuple[int, str], Stream] = {}
        self._waiters: dict[int, WorkerPool] = {}

    def stream(self, device: int, purpose: str) -> Stream:
        """The device's stream for one purpose; from any thread."""
        with self._lock:
            stream = self._streams.get((device, purpose))
            if stream is None:
                stream = self.driver.new_stream(device)
                self._streams[device, purpose] = stream
            return stream

    def waiter(self, device: int) -> WorkerPool:
        """The thread that waits for events of the device."""
        with self._lock:
            waiter = self._waiters.get(device)
            if waiter is None:
                waiter = WorkerPool(1, f"aiockpt-device-{device}", is_background=False)
                self._waiters[device] = waiter
            return waiter

    def close(self) -> None:
        """Gives everything back. Nothing is being copied, and the loop has ended."""
        for pool in (self._pinners, *self._waiters.values()):
            pool.shutdown()
        self.memory.close()
        for (device, _), stream in self._streams.items():
            try:
                self.driver.end_stream(device, stream)
            except DeviceError as error:
                # As in `PinnedMemory.close`.
                _logger.debug("ending a stream of device %d: %s", device, error)
        self._streams.clear()
        self.driver.close()


class InFlight:
    """The copies of one chunk that devices are at, until `ended`.

    A copy is noted before it is enqueued: whatever goes wrong then, the chunk is not
    given away under it.
    """

    def __init__(
        self, devices: Devices, at_end: Callable[[], object] = lambda: None
    ) -> None:
        """Nothing has been enqueued yet; `at_end` is called once all has ended."""
        self._devices = devices
        self._at_end = at_end
        self._begun: dict[int, tuple[Stream, Event | None]] = {}

    def copy(
        self,
        device: int,
        stream: Stream,
        copies: Sequence[DeviceCopy],
        *,
        is_to_host: bool,
        is_pinned: bool,
    ) -> Event:
        """Enqueues copies on a stream of a device; the event behind them.

        Raises:
            DeviceError: It was refused; `ended` must be awaited even so.
        """
        driver = self._devices.driver
        self._begun[device] = stream, None
        enqueue = driver.to_host if is_to_host else driver.to_device
        enqueue(device, stream, copies, is_pinned=is_pinned)
        event = driver.record(device, stream)
        self._begun[device] = stream, event
        return event

    @property
    def is_any(self) -> bool:
        """Whether a device has been asked to copy anything."""
        return bool(self._begun)

    async def ended(self) -> None:
        """Returns when no device reads or writes the chunk any more.

        Raises:
            StagingError: A copy failed.

        If cancelled: the copies are waited for first.
        """
        await outlast(self._end())

    async def _end(self) -> None:
        failure: tuple[int, DeviceError] | None = None
        begun, self._begun = self._begun, {}
        for device, (stream, event) in begun.items():
            waiter = self._devices.waiter(device)
            driver = self._devices.driver
            try:
                if event is None:
                    await run_blocking(waiter, driver.drain, device, stream)
                else:
                    await run_blocking(waiter, driver.wait, device, event)
            except DeviceError as error:
                failure = failure or (device, error)
            except RuntimeError as error:
                # There is no thread to be had: the copies end all the same.
                failure = failure or (device, _drained(driver, device, stream, error))
        at_end, self._at_end = self._at_end, lambda: None
        at_end()
        if failure is not None:
            raise failed(*failure) from failure[1]


def _drained(
    driver: Driver, device: int, stream: Stream, cause: RuntimeError
) -> DeviceError:
    """What is raised, once nothing is being copied, where no thread could wait."""
    try:
        driver.drain(device, stream)
    except DeviceError as refused:
        return refused
    error = DeviceError(f"nobody could wait for it: {cause}")
    error.__cause__ = cause
    return error


def failed(device: int, error: DeviceError) -> StagingError:
    """The error for what a device refused."""
    return StagingError(f"copying from or to device {device} failed: {error}")
