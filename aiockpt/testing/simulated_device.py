"""Devices that are only pretended: they do late what they may do late.

Their memory is host memory, so tensors on them are CPU tensors to torch; what makes
them "on a device" is that a `SimulatedDevices` made them. Work is enqueued on streams
and runs when its stream gets to it: *eager* streams as soon as what they wait for has
happened, *lazy* ones not before somebody waits for what they do, *held* ones not at
all. So a wait that was forgotten shows in the bytes, whichever side it protects.

    devices = SimulatedDevices()
    with devices.installed():
        async with aiockpt.CheckpointEngine("runs") as engine:
            weight = devices.tensor(torch.randn(8))
"""

__all__ = ["SimulatedDevices", "SimulatedEvent", "SimulatedStream"]

import bisect
import collections
import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from typing_extensions import override

from aiockpt import machinery
from aiockpt.staging.driver import DeviceCopy, DeviceError, Driver


@dataclass(eq=False)
class SimulatedStream:
    """Work that runs in its order.

    Attributes:
        device: Whose it is.
        is_own: Whether the engine made it.
        is_lazy: Whether it runs only when somebody waits for what it does.
        is_held: Whether it does not run at all.
        error: What went wrong on it; it then goes on, and says so to all who wait.
    """

    device: int
    is_own: bool
    is_lazy: bool = False
    is_held: bool = False
    error: str | None = None
    work: "collections.deque[SimulatedEvent | Callable[[], object]]" = field(
        default_factory=collections.deque["SimulatedEvent | Callable[[], object]"]
    )


@dataclass(eq=False)
class SimulatedEvent:
    """A point in the work of a stream."""

    stream: SimulatedStream
    is_done: bool = False
    error: str | None = None


@dataclass(eq=False)
class _Wait:
    """In the work of a stream: it goes no further before the event."""

    event: SimulatedEvent

    def __call__(self) -> None:
        """Nothing is left to be done once the event has been reached."""


@dataclass(eq=False)
class _Block:
    """A piece of device memory."""

    address: int
    nbytes: int
    device: int
    is_alive: bool = True


class SimulatedDevices(Driver):
    """Some devices, and what went wrong on them.

    Attributes:
        faults: What no program may do and this one did: memory used after it was
            freed, copies into memory that is not pinned and was said to be, or that is
            pinned in part or by two pins.
        pin_limit_bytes: Host memory that may be pinned at once.
        unusable: Why there is no driver, if so.
        copied: The bytes of each copy that has been done, in order.
        num_queued: Copies that have been enqueued and not been done.
        peak_queued: The most that were queued at once.
        allocated_bytes: Device memory that is allocated now.
        peak_allocated_bytes: The most that was.
        pinned: Lengths of pinned host memory, by address.
    """

    def __init__(
        self, num_devices: int = 1, *, is_lazy: bool = True, is_eager: bool = True
    ) -> None:
        """Makes devices without memory.

        Args:
            num_devices: How many.
            is_lazy: Whether the streams of the engine run only when waited for.
            is_eager: Whether those of the caller run at once.
        """
        self.faults: list[str] = []
        self.pin_limit_bytes: float = float("inf")
        self.unusable: str | None = None
        self.copied: list[int] = []
        self.num_queued = self.peak_queued = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.pinned: dict[int, int] = {}
        self.num_devices = num_devices
        self._is_lazy = is_lazy
        self._changed = threading.Condition(threading.RLock())
        self._blocks: dict[int, _Block] = {}
        self._addresses: list[int] = []
        self._own: list[SimulatedStream] = []
        self._defaults = [
            SimulatedStream(number, is_own=False, is_lazy=not is_eager)
            for number in range(num_devices)
        ]
        self._theirs = list(self._defaults)
        self._here = threading.local()
        self._failing: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def installed(self) -> Generator[None]:
        """Engines that are made in the body take these for the machine's devices."""
        with mock.patch.object(machinery, "CudaDriver", return_value=self):
            yield

    # --- what a test does ---------------------------------------------------------

    def tensor(self, source: torch.Tensor, device: int = 0) -> torch.Tensor:
        """A tensor on a device, with the bytes and the strides of `source`'s storage.

        As a view: so that views of one storage stay views, give `source`'s base and
        make them from the result.
        """
        storage = source.untyped_storage()
        copy = self.allocate(device, storage.nbytes())
        copy.copy_(storage, non_blocking=False)
        empty = torch.empty(0, dtype=source.dtype)
        return empty.set_(copy, source.storage_offset(), source.shape, source.stride())

    def launch(
        self, tensor: torch.Tensor, change: Callable[[torch.Tensor], object]
    ) -> None:
        """Enqueues a kernel on the current stream, as an in-place operation does."""
        device = self.device_of(tensor)
        assert device is not None
        # Another version counter, and the same memory.
        data = tensor.data
        torch.autograd.graph.increment_version(tensor)
        self._enqueue(self._stream_here(device), lambda: change(data))

    def stream(self, device: int = 0, *, is_lazy: bool = False) -> SimulatedStream:
        """Another stream of the caller's."""
        stream = SimulatedStream(device, is_own=False, is_lazy=is_lazy)
        self._theirs.append(stream)
        return stream

    @contextlib.contextmanager
    def on(self, stream: SimulatedStream) -> Generator[None]:
        """Makes a stream the calling thread's current one of its device."""
        current = self._current()
        before = current.get(stream.device)
        current[stream.device] = stream
        try:
            yield
        finally:
            if before is None:
                del current[stream.device]
            else:
                current[stream.device] = before

    def hold(self, *, is_own: bool = True) -> None:
        """The engine's streams (or the caller's) do nothing until `release`."""
        with self._changed:
            self._is_holding_own = self._is_holding_own or is_own
            for stream in self._own if is_own else self._theirs:
                stream.is_held = True

    def release(self) -> None:
        """All streams go on."""
        with self._changed:
            self._is_holding_own = False
            for stream in self._own + self._theirs:
                stream.is_held = False
            self._run_eager()
            self._changed.notify_all()

    _is_holding_own = False

    def fail(self, method: str, *, after: int = 0) -> None:
        """A call of a method of the driver is refused, after some that are not.

        "run" is no call: the copy is enqueued, and fails when it is due.
        """
        self._failing.setdefault(method, []).append(after)

    def finish(self) -> None:
        """Everything that was enqueued is done."""
        for device in range(self.num_devices):
            self.settle(device)

    @property
    def num_own_streams(self) -> int:
        """Streams of the engine that have not been ended."""
        return len(self._own)

    # --- of tensors ---------------------------------------------------------------

    @override
    def device_of(self, data: torch.Tensor | torch.UntypedStorage) -> int | None:
        """See `Driver.device_of`."""
        try:
            address = (
                data.untyped_storage() if isinstance(data, torch.Tensor) else data
            ).data_ptr()
        except (RuntimeError, ValueError, NotImplementedError):
            return None
        block = self._block_at(address)
        return block.device if block is not None else None

    def _block_at(self, address: int) -> _Block | None:
        with self._changed:
            index = bisect.bisect_right(self._addresses, address) - 1
            if index < 0:
                return None
            block = self._blocks[self._addresses[index]]
            return block if address < block.address + block.nbytes else None

    @override
    def devices_of(
        self, tensors: Iterable[torch.Tensor], storages: Iterable[torch.UntypedStorage]
    ) -> set[int]:
        """See `Driver.devices_of`."""
        found = {self.device_of(tensor) for tensor in tensors}
        found |= {self.device_of(storage) for storage in storages}
        return {device for device in found if device is not None}

    @override
    def check_usable(self) -> None:
        """See `Driver.check_usable`."""
        if self.unusable is not None:
            raise DeviceError(self.unusable)

    @override
    def named(self, location: str) -> int | None:
        """See `Driver.named`."""
        kind, _, number = location.partition(":")
        if kind != "cuda":
            return None
        index = int(number or 0)
        return index if index < self.num_devices else None

    # --- streams and events -------------------------------------------------------

    def _current(self) -> dict[int, SimulatedStream]:
        if not hasattr(self._here, "streams"):
            self._here.streams = dict[int, SimulatedStream]()
        streams: dict[int, SimulatedStream] = self._here.streams
        return streams

    @override
    def current_stream(self, device: int) -> SimulatedStream:
        """See `Driver.current_stream`."""
        return self._stream_here(device)

    def _stream_here(self, device: int) -> SimulatedStream:
        return self._current().get(device, self._defaults[device])

    @override
    def new_stream(self, device: int) -> SimulatedStream:
        """See `Driver.new_stream`."""
        self._may_fail("new_stream")
        stream = SimulatedStream(
            device, is_own=True, is_lazy=self._is_lazy, is_held=self._is_holding_own
        )
        with self._changed:
            self._own.append(stream)
        return stream

    @override
    def end_stream(self, device: int, stream: SimulatedStream) -> None:
        """See `Driver.end_stream`."""
        with self._changed:
            if stream.work:
                self.faults.append("a stream was ended before its work was done")
            self._own.remove(stream)

    @override
    def record(self, device: int, stream: SimulatedStream) -> SimulatedEvent:
        """See `Driver.record`."""
        self._may_fail("record")
        event = SimulatedEvent(stream)
        self._enqueue(stream, event)
        return event

    @override
    def follow(
        self, device: int, stream: SimulatedStream, event: SimulatedEvent
    ) -> None:
        """See `Driver.follow`."""
        self._may_fail("follow")
        self._enqueue(stream, _Wait(event))

    @override
    def wait(self, device: int, event: SimulatedEvent) -> None:
        """See `Driver.wait`."""
        with self._changed:
            while not self._reach(event):
                self._changed.wait()
            if event.error is not None:
                raise DeviceError(event.error)

    @override
    def drain(self, device: int, stream: SimulatedStream) -> None:
        """See `Driver.drain`."""
        event = SimulatedEvent(stream)
        self._enqueue(stream, event)
        self.wait(device, event)

    @override
    def settle(self, device: int) -> None:
        """See `Driver.settle`."""
        self._may_fail("settle")
        for stream in [*self._own, *self._theirs]:
            if stream.device == device:
                self.drain(device, stream)

    # --- memory -------------------------------------------------------------------

    @override
    def to_host(
        self,
        device: int,
        stream: SimulatedStream,
        copies: Sequence[DeviceCopy],
        *,
        is_pinned: bool,
    ) -> None:
        """See `Driver.to_host`."""
        self._copy(stream, copies, is_to_host=True, is_pinned=is_pinned)

    @override
    def to_device(
        self,
        device: int,
        stream: SimulatedStream,
        copies: Sequence[DeviceCopy],
        *,
        is_pinned: bool,
    ) -> None:
        """See `Driver.to_device`."""
        self._copy(stream, copies, is_to_host=False, is_pinned=is_pinned)

    def _copy(
        self,
        stream: SimulatedStream,
        copies: Sequence[DeviceCopy],
        *,
        is_to_host: bool,
        is_pinned: bool,
    ) -> None:
        for copy in copies:
            self._may_fail("copy")
            block = self._block_at(copy.device)
            if block is None or block.device != stream.device:
                self.faults.append("a copy of memory that is not the device's")
                continue
            pinned_as = self._pinned_as(copy)
            if pinned_as < 0:
                self.faults.append("a copy of memory that is pinned in part")
            elif is_pinned and not pinned_as:
                self.faults.append("a copy to memory that is said to be pinned")
            with self._changed:
                self.num_queued += 1
                self.peak_queued = max(self.peak_queued, self.num_queued)
            work = _CopyWork(self, stream, block, copy, is_to_host)
            self._enqueue(stream, work)
        if not is_pinned:
            self.drain(stream.device, stream)

    def done(
        self,
        stream: SimulatedStream,
        block: _Block,
        copy: DeviceCopy,
        to_host: bool,  # noqa: FBT001
    ) -> None:
        """Does what is due; called by the stream."""
        self.num_queued -= 1
        try:
            self._may_fail("run")
        except DeviceError as error:
            stream.error = str(error)
            return
        if not block.is_alive:
            self.faults.append("device memory was used after it had been freed")
            return
        target, source = (
            (copy.host, copy.device) if to_host else (copy.device, copy.host)
        )
        ctypes.memmove(target, source, copy.nbytes)
        self.copied.append(copy.nbytes)

    def _pinned_as(self, copy: DeviceCopy) -> int:
        """Whether the host's memory lies in a pin (1), or not (0), or in part (-1)."""
        first, stop = copy.host, copy.host + copy.nbytes
        with self._changed:
            pins = [(start, start + nbytes) for start, nbytes in self.pinned.items()]
        if any(start <= first and stop <= end for start, end in pins):
            return 1
        return -1 if any(start < stop and first < end for start, end in pins) else 0

    @override
    def pin(self, device: int, address: int, nbytes: int) -> None:
        """See `Driver.pin`."""
        self._may_fail("pin")
        with self._changed:
            if sum(self.pinned.values()) + nbytes > self.pin_limit_bytes:
                raise DeviceError("no more memory may be locked")
            for start, length in self.pinned.items():
                if address < start + length and start < address + nbytes:
                    raise DeviceError("pinned already")
            self.pinned[address] = nbytes

    @override
    def unpin(self, device: int, address: int) -> None:
        """See `Driver.unpin`."""
        with self._changed:
            if self.num_queued:
                self.faults.append("memory was unpinned under a copy")
            if self.pinned.pop(address, None) is None:
                raise DeviceError("not pinned")

    @override
    def allocate(self, device: int, nbytes: int) -> torch.UntypedStorage:
        """See `Driver.allocate`."""
        if not nbytes:
            return torch.empty(0).untyped_storage()
        memory = (ctypes.c_ubyte * nbytes)()
        block = _Block(ctypes.addressof(memory), nbytes, device)
        with self._changed:
            bisect.insort(self._addresses, block.address)
            self._blocks[block.address] = block
            self.allocated_bytes += nbytes
            self.peak_allocated_bytes = max(
                self.peak_allocated_bytes, self.allocated_bytes
            )
        weakref.finalize(memory, self._free, block).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()

    def _free(self, block: _Block) -> None:
        with self._changed:
            block.is_alive = False
            self.allocated_bytes -= block.nbytes
            del self._blocks[block.address]
            self._addresses.remove(block.address)

    @override
    def close(self) -> None:
        """See `Driver.close`."""

    # --- getting on ---------------------------------------------------------------

    def _may_fail(self, method: str) -> None:
        with self._changed:
            due = self._failing.get(method, [])
            for index, after in enumerate(due):
                due[index] = after - 1
            if -1 in due:
                due.remove(-1)
                raise DeviceError(f"simulated failure of {method}")

    def _enqueue(
        self, stream: SimulatedStream, work: "SimulatedEvent | Callable[[], object]"
    ) -> None:
        with self._changed:
            stream.work.append(work)
            self._run_eager()

    def _run_eager(self) -> None:
        """Runs eager streams until none of them gets any further."""
        eager = [stream for stream in self._own + self._theirs if not stream.is_lazy]
        while any(self._step(stream) for stream in eager):
            pass

    def _step(self, stream: SimulatedStream) -> bool:
        """Runs what is first on a stream; False where nothing is or can be run."""
        if stream.is_held or not stream.work:
            return False
        work = stream.work[0]
        if isinstance(work, _Wait) and not work.event.is_done:
            return False
        stream.work.popleft()
        if isinstance(work, SimulatedEvent):
            work.error, work.is_done = stream.error, True
            self._changed.notify_all()
        else:
            work()
        return True

    def _reach(self, event: SimulatedEvent) -> bool:
        """Runs what has to be for an event, and no more; False if something is held."""
        stream = event.stream
        while not event.is_done:
            if self._step(stream):
                continue
            first = stream.work[0] if stream.work else None
            if not isinstance(first, _Wait) or stream.is_held:
                return False
            if not self._reach(first.event):
                return False
        self._run_eager()
        return True


@dataclass(eq=False)
class _CopyWork:
    """A copy in the work of a stream."""

    devices: SimulatedDevices
    stream: SimulatedStream
    block: _Block
    copy: DeviceCopy
    is_to_host: bool

    def __call__(self) -> None:
        """Does it."""
        self.devices.done(self.stream, self.block, self.copy, self.is_to_host)
