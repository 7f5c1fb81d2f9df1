"""The parts of an engine that must be started and ended together.

One loop thread, its workers and the ring. They begin when the machinery is made and
end, in the reverse order, when it is stopped. Any number of roots can be served by one.
"""

__all__ = ["Machinery"]

import contextlib
import logging
import os
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from aiockpt.config import EngineConfig
from aiockpt.errors import EngineStateError
from aiockpt.events import Event, Observer
from aiockpt.guard import StagingGate
from aiockpt.loader import Loader
from aiockpt.loop_thread import Call, LoopThread, Work
from aiockpt.ring import Ring
from aiockpt.saver import Saver
from aiockpt.staging.cuda_driver import CudaDriver, current_device
from aiockpt.staging.devices import Devices
from aiockpt.staging.host import HostStager
from aiockpt.storage.base import Storage
from aiockpt.storage.local import LocalStorage
from aiockpt.threads import WorkerPool

T = TypeVar("T")

_logger = logging.getLogger(__name__)

# One long removal, or a long plan, must not hold up what is short.
_NUM_CLERKS = 2
_NUM_PLANNERS = 2
# Looking for new tags, and locks of other processes: both may wait, and nothing that a
# save needs may wait for them.
_NUM_LOOKERS = 2
# Readers wait, for the disk and for the system to give the memory that they read into,
# and sum in between: more of them than processors keep both busy.
_READERS_PER_WORKER = 2
# Loads at once; they share the workers, so more would not be faster.
_NUM_LOADERS = 2
# One: chunks are then filled in the order in which they were asked for, and one
# core copies faster than most disks take the bytes.
_NUM_COPIERS = 1


class Machinery:
    """The running parts of one engine.

    Attributes:
        ring: Host memory for staging.
        gate: What is being staged, and who waits for it.
        clerks: Threads for names: they open, rename, remove and list files.
        lookers: Threads for those who follow others: their looks, locks and leases.
        workers: `parser_threads` threads that checksum and write.
        loader: Loads files with all of these.
    """

    def __init__(
        self, config: EngineConfig, observers: Sequence[Observer] = ()
    ) -> None:
        """Starts the loop's thread; workers and memory come as they are needed."""
        self._observers = observers
        self._pid = os.getpid()
        self.ring = Ring(config.ring_bytes)
        self._devices = Devices(
            CudaDriver(),
            self.ring.address,
            self.ring.capacity_bytes,
            self.ring.chunk_bytes,
        )
        # Before the gate, whose hook would stay if the thread could not be had.
        self._thread = LoopThread("aiockpt-engine", self._end)
        self.gate = StagingGate(is_holding=config.guard)
        self.clerks = WorkerPool(_NUM_CLERKS, "aiockpt-files")
        self._planners = WorkerPool(_NUM_PLANNERS, "aiockpt-plan")
        self.lookers = WorkerPool(_NUM_LOOKERS, "aiockpt-look")
        self._copiers = WorkerPool(_NUM_COPIERS, "aiockpt-copy")
        self.workers = WorkerPool(config.parser_threads, "aiockpt-worker")
        # Not in the background: who loads a checkpoint has nothing else to do.
        self._loaders = WorkerPool(_NUM_LOADERS, "aiockpt-load", is_background=False)
        # Apart: what fills tensors may wait for staging, and nobody waits behind it.
        self._fillers = WorkerPool(_NUM_LOADERS, "aiockpt-fill", is_background=False)
        num_readers = _READERS_PER_WORKER * config.parser_threads
        self._readers = WorkerPool(num_readers, "aiockpt-read", is_background=False)
        self.loader = Loader(
            ring=self.ring,
            workers=self._readers,
            num_workers=num_readers,
            loaders=self._loaders,
            fillers=self._fillers,
            spawn=self.spawn,
            devices=self._devices,
        )
        self._stager = HostStager(self._copiers)
        if current_device() is not None:
            # The first save would wait for the bindings, and raises what is wrong.
            self.lookers.submit(self._devices.driver.check_usable)

    def storage(self, root: str) -> LocalStorage:
        """The files below one directory, worked on by these threads."""
        return LocalStorage(root, self.workers, self.clerks)

    def saver(self, storage: Storage) -> Saver:
        """What saves files in one place."""
        return Saver(
            ring=self.ring,
            stager=self._stager,
            storage=storage,
            gate=self.gate,
            planners=self._planners,
            clerks=self.clerks,
            copiers=self._copiers,
            emit=self.emit,
            devices=self._devices,
        )

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in a forked child, where no thread runs."""
        return os.getpid() != self._pid

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs on the engine's own thread."""
        return self._thread.is_current

    def spawn(self, work: Work[T]) -> Call[T]:
        """Runs a coroutine on the engine's loop; from any thread, without waiting.

        Raises:
            EngineStateError: The machinery has been stopped, or this is a forked
                child, where no thread runs.
        """
        if self.is_forked:
            work.close()
            text = "this belongs to the parent process: open it after the fork"
            raise EngineStateError(text)
        try:
            return self._thread.spawn(work)
        except RuntimeError as error:
            raise EngineStateError("the engine has been closed") from error

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to on the engine's loop; blocks the calling thread.

        If interrupted (Ctrl-C): the work is cancelled and waited for.
        """
        return Call(work).run(self.spawn)

    def emit(self, event: Event) -> None:
        """Tells every observer; what one raises is logged and goes no further."""
        for observer in self._observers:
            try:
                observer(event)
            except Exception:
                _logger.exception("an observer failed on %s", type(event).__name__)

    def stop(self) -> None:
        """Ends everything once the tasks have ended; returns at once. Idempotent."""
        self._thread.stop()

    async def ended(self) -> None:
        """Returns when everything has ended, on any event loop."""
        await self._thread.ended()

    def join(self) -> None:
        """Blocks until everything has ended."""
        self._thread.join()

    def _end(self) -> None:
        pools = (
            self.clerks,
            self._planners,
            self.lookers,
            self._copiers,
            self.workers,
            self._loaders,
            self._fillers,
            self._readers,
        )
        for pool in pools:
            pool.shutdown()
        self.gate.close()
        # Before its memory goes.
        self._devices.close()
        # A traceback that is still referred to may hold a view of the ring; its
        # memory then goes with the traceback.
        with contextlib.suppress(BufferError):
            self.ring.close()
