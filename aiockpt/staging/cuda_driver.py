"""CUDA, by its driver's own interface (`cuda.bindings.driver`).

Not by the runtime's: that refuses every call where the machine's driver is older than
the installed package. Work is done in a device's primary context, which torch uses as
well and which is made current around each call only: a worker never opens a context
on a device that is not its tensors', and leaves none behind.
"""

__all__ = ["CudaDriver", "current_device"]

import contextlib
import importlib
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
from typing_extensions import override

from aiockpt.staging.driver import DeviceCopy, DeviceError, Driver

# Fewer pieces cost less one by one: a batch is made of lists of objects.
_MIN_BATCH: Final = 4
_PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
_BUS_ID_BYTES: Final = 20

# `CU_STREAM_LEGACY`, before the bindings are there.
_LEGACY_STREAM: Final = 1

_SAME_ADDRESSES: Final = "CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM"

# A copy whose direction does not matter any more: to, from, bytes.
_Move: TypeAlias = tuple[int, int, int]


def current_device() -> int | None:
    """The calling thread's own device; None where it has used none yet."""
    return torch.cuda.current_device() if _is_cuda_used() else None


def _is_cuda_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class _Event:
    """An event of one context, destroyed with its last reference or with the driver."""

    __slots__ = ("__weakref__", "_end", "handle")

    def __init__(self, handle: object, end: Callable[[object], None]) -> None:
        self.handle = handle
        self._end = end

    def end(self) -> None:
        """Destroys it, if that was not done before."""
        handle, self.handle = self.handle, None
        # The context may be gone, or the interpreter on its way out.
        with contextlib.suppress(Exception):
            if handle is not None:
                self._end(handle)

    def __del__(self) -> None:
        self.end()


class CudaDriver(Driver):
    """The CUDA devices that torch sees. Bindings are looked for once, when needed."""

    def __init__(self) -> None:
        """Touches no device, and imports nothing."""
        # Reentrant: whatever is collected while it is held may be an event.
        self._lock = threading.RLock()
        self._api: Any = None
        self._reason: Exception | None = None
        self._contexts: dict[int, Any] = {}
        self._events = weakref.WeakSet[_Event]()
        self._has_batches: dict[int, bool] = {}

    # --- of tensors ---------------------------------------------------------------

    @override
    def device_of(self, data: torch.Tensor | torch.UntypedStorage) -> int | None:
        """See `Driver.device_of`."""
        device = data.device
        return device.index if device.type == "cuda" else None

    @override
    def devices_of(
        self, tensors: Iterable[torch.Tensor], storages: Iterable[torch.UntypedStorage]
    ) -> set[int]:
        """See `Driver.devices_of`."""
        # Where nothing of CUDA has been used, no tensor can be on a device.
        if not _is_cuda_used():
            return set()
        numbers = set(map(torch.Tensor.get_device, tensors)) - {-1}
        if numbers:
            # Other accelerators count in the same way.
            numbers = {
                tensor.device.index
                for tensor in tensors
                if tensor.device.type == "cuda"
            }
        return numbers.union(
            storage.device.index
            for storage in storages
            if storage.device.type == "cuda"
        )

    @override
    def check_usable(self) -> None:
        """See `Driver.check_usable`."""
        self._bindings()

    @override
    def named(self, location: str) -> int | None:
        """See `Driver.named`."""
        kind, _, number = location.partition(":")
        if kind != "cuda" or not torch.cuda.is_available():
            return None
        if not number:
            return torch.cuda.current_device()
        is_there = number.isdecimal() and int(number) < torch.cuda.device_count()
        # What is not there is refused by torch, in its own words.
        return int(number) if is_there else None

    # --- streams and events -------------------------------------------------------

    @override
    def current_stream(self, device: int) -> int:
        """See `Driver.current_stream`."""
        stream = int(torch.cuda.current_stream(device).cuda_stream)
        # Torch's default stream is the legacy one, also where the bindings have been
        # told to take none for the thread's own.
        return stream or _LEGACY_STREAM

    @override
    def new_stream(self, device: int) -> object:
        """See `Driver.new_stream`."""
        with self._on(device) as api:
            least, _ = self._done(api.cuCtxGetStreamPriorityRange())
            # Else it would wait for the default stream, and the default stream for it.
            flags = api.CUstream_flags.CU_STREAM_NON_BLOCKING
            return self._done(api.cuStreamCreateWithPriority(int(flags), least))

    @override
    def end_stream(self, device: int, stream: Any) -> None:
        """See `Driver.end_stream`."""
        with self._on(device) as api:
            self._done(api.cuStreamDestroy(stream))

    @override
    def record(self, device: int, stream: Any) -> _Event:
        """See `Driver.record`."""
        with self._on(device) as api:
            # Threads that wait for it sleep; nobody asks when it was.
            flags = int(api.CUevent_flags.CU_EVENT_BLOCKING_SYNC) | int(
                api.CUevent_flags.CU_EVENT_DISABLE_TIMING
            )
            handle = self._done(api.cuEventCreate(flags))
            event = _Event(handle, lambda event: self._end_event(device, event))
            with self._lock:
                self._events.add(event)
            self._done(api.cuEventRecord(handle, stream))
            return event

    def _end_event(self, device: int, handle: object) -> None:
        # Of a context that has been released, nothing is left to be destroyed.
        context = self._contexts.get(device)
        if context is not None:
            with self._current(self._api, context):
                self._api.cuEventDestroy(handle)

    @override
    def follow(self, device: int, stream: Any, event: _Event) -> None:
        """See `Driver.follow`."""
        # A trainer may come here while the engine is closed.
        with self._lock:
            if event.handle is None:
                raise DeviceError("the engine has been closed")
            with self._on(device) as api:
                self._done(api.cuStreamWaitEvent(stream, event.handle, 0))

    @override
    def wait(self, device: int, event: _Event) -> None:
        """See `Driver.wait`."""
        with self._on(device) as api:
            self._done(api.cuEventSynchronize(event.handle))

    @override
    def drain(self, device: int, stream: Any) -> None:
        """See `Driver.drain`."""
        with self._on(device) as api:
            self._done(api.cuStreamSynchronize(stream))

    @override
    def settle(self, device: int) -> None:
        """See `Driver.settle`."""
        with self._on(device) as api:
            self._done(api.cuCtxSynchronize())

    # --- memory -------------------------------------------------------------------

    @override
    def to_host(
        self,
        device: int,
        stream: Any,
        copies: Sequence[DeviceCopy],
        *,
        is_pinned: bool,
    ) -> None:
        """See `Driver.to_host`."""
        with self._on(device) as api:
            moves = [(host, source, nbytes) for host, source, nbytes in copies]
            if not (is_pinned and self._is_batched(api, device, stream, moves)):
                self._move(api.cuMemcpyDtoHAsync, stream, moves)

    @override
    def to_device(
        self,
        device: int,
        stream: Any,
        copies: Sequence[DeviceCopy],
        *,
        is_pinned: bool,
    ) -> None:
        """See `Driver.to_device`."""
        with self._on(device) as api:
            moves = [(target, host, nbytes) for host, target, nbytes in copies]
            if not (is_pinned and self._is_batched(api, device, stream, moves)):
                self._move(api.cuMemcpyHtoDAsync, stream, moves)

    def _move(
        self, copy: Callable[..., tuple[Any, ...]], stream: Any, moves: Sequence[_Move]
    ) -> None:
        for target, source, nbytes in moves:
            self._done(copy(target, source, nbytes, stream))

    def _is_batched(
        self, api: Any, device: int, stream: Any, moves: Sequence[_Move]
    ) -> bool:
        """Enqueues copies as one batch, where that pays and the driver has batches."""
        if len(moves) < _MIN_BATCH or not self._may_batch(api, device):
            return False
        targets, sources, lengths = zip(*moves, strict=True)
        try:
            attributes = api.CUmemcpyAttributes()
            order = api.CUmemcpySrcAccessOrder
            attributes.srcAccessOrder = order.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
            flags = api.CUmemcpyFlags
            attributes.flags = int(flags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
            self._done(
                api.cuMemcpyBatchAsync(
                    list(map(api.CUdeviceptr, targets)),
                    list(map(api.CUdeviceptr, sources)),
                    list(lengths),
                    len(moves),
                    [attributes],
                    [0],
                    1,
                    stream,
                )
            )
        except (AttributeError, DeviceError, RuntimeError):
            # Older than 12.8 on one of the two sides, or a device without: whatever was
            # enqueued is enqueued again, with the same bytes. A device that fails will
            # fail there as well.
            self._has_batches[device] = False
            return False
        return True

    def _may_batch(self, api: Any, device: int) -> bool:
        """Whether batches may name registered host memory by its own addresses.

        Elsewhere (on WSL, say) the device would fault on them, later and for good.
        """
        if device not in self._has_batches:
            asked = getattr(api.CUdevice_attribute, _SAME_ADDRESSES)
            with contextlib.suppress(DeviceError):
                number = self._done(api.cuDeviceGet(device))
                can = self._done(api.cuDeviceGetAttribute(asked, number))
                self._has_batches[device] = bool(can)
        return self._has_batches.get(device, False)

    @override
    def pin(self, device: int, address: int, nbytes: int) -> None:
        """See `Driver.pin`."""
        with self._on(device) as api, _next_to(self._bus_id(api, device)):
            flags = int(api.CU_MEMHOSTREGISTER_PORTABLE)
            self._done(api.cuMemHostRegister(address, nbytes, flags))

    @override
    def unpin(self, device: int, address: int) -> None:
        """See `Driver.unpin`."""
        with self._on(device) as api:
            self._done(api.cuMemHostUnregister(address))

    @override
    def allocate(self, device: int, nbytes: int) -> torch.UntypedStorage:
        """See `Driver.allocate`."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{device}")
        return memory.untyped_storage()

    @override
    def close(self) -> None:
        """See `Driver.close`."""
        with self._lock:
            # An error may refer to them, until garbage is collected.
            for event in [*self._events]:
                event.end()
            numbers = [*self._contexts]
            self._contexts.clear()
        for number in numbers:
            # At exit, torch and the driver may have gone first.
            with contextlib.suppress(Exception):
                self._api.cuDevicePrimaryCtxRelease(number)

    # --- the bindings -------------------------------------------------------------

    def _bindings(self) -> Any:
        with self._lock:
            if self._api is None and self._reason is None:
                try:
                    self._api = _probe()
                except Exception as error:  # noqa: BLE001 - no driver, or any bad one
                    self._reason = error
            if self._api is None:
                message = f"cuda-python cannot be used here: {self._reason}"
                raise DeviceError(message) from self._reason
            return self._api

    @contextlib.contextmanager
    def _on(self, device: int) -> Generator[Any]:
        """Makes the device's context the thread's own, while the body runs."""
        api = self._bindings()
        with self._current(api, self._context(api, device)):
            try:
                yield api
            except DeviceError:
                raise
            except Exception as error:
                # The bindings' own: a function that the driver has not, a result that
                # they do not know.
                message = f"{type(error).__name__}: {error}"
                raise DeviceError(message) from error

    @contextlib.contextmanager
    def _current(self, api: Any, context: Any) -> Generator[None]:
        self._done(api.cuCtxPushCurrent(context))
        # Another thread may be capturing a graph: what is done here is no part of it.
        relaxed = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        mode = self._done(api.cuThreadExchangeStreamCaptureMode(relaxed))
        try:
            yield
        finally:
            api.cuThreadExchangeStreamCaptureMode(mode)
            api.cuCtxPopCurrent()

    def _context(self, api: Any, device: int) -> Any:
        with self._lock:
            context = self._contexts.get(device)
            if context is None:
                number = self._done(api.cuDeviceGet(device))
                context = self._done(api.cuDevicePrimaryCtxRetain(number))
                self._contexts[device] = context
            return context

    def _done(self, answer: tuple[Any, ...]) -> Any:
        """What a call gave; every answer begins with how it went."""
        result, *values = answer
        if int(result):
            _, text = self._api.cuGetErrorString(result)
            words = cast("bytes", text or b"").decode()
            message = f"{getattr(result, 'name', result)} ({words})"
            raise DeviceError(message)
        return values[0] if len(values) == 1 else values

    def _bus_id(self, api: Any, device: int) -> str:
        with contextlib.suppress(DeviceError):
            name = self._done(api.cuDeviceGetPCIBusId(_BUS_ID_BYTES, device))
            return cast("bytes", name).split(b"\0", 1)[0].decode().lower()
        return ""


def _probe() -> Any:
    """The bindings, if they lead to a driver."""
    # By name: the package has no types.
    driver: Any = importlib.import_module("cuda.bindings.driver")
    (result, *_) = driver.cuInit(0)
    if int(result):
        raise DeviceError(f"cuInit: {getattr(result, 'name', result)}")
    return driver


@contextlib.contextmanager
def _next_to(bus_id: str, root: Path = _PCI_DEVICES) -> Generator[None]:
    """Runs the body on the processors that are next to a device, if that can be told.

    Memory is given by the node of the processor that first touches it.
    """
    cpus = _local_cpus(bus_id, root)
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cpus & before or before)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)


def _local_cpus(bus_id: str, root: Path) -> set[int]:
    try:
        text = (root / bus_id / "local_cpulist").read_text().strip() if bus_id else ""
        ranges = [part.partition("-") for part in text.split(",") if part]
        return {
            number
            for first, _, last in ranges
            for number in range(int(first), int(last or first) + 1)
        }
    except (OSError, ValueError):
        return set()
