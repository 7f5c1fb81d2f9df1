"""What a loading thread reads a file with: it asks, the engine's loop has it done."""

__all__ = ["Reader"]

import concurrent.futures
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

from aiockpt.loading.bulk import BulkRead, Reads
from aiockpt.loop_thread import Call
from aiockpt.storage.base import ReadFile


class Reader:
    """The bulk reads of one load, one after the other.

    Used by the thread that loads; `stop` may be called by any other.
    """

    def __init__(
        self, begin: Callable[[BulkRead], Call[None]], block_bytes: int
    ) -> None:
        """Begins nothing yet.

        Args:
            begin: Starts `BulkRead.run` on the engine's loop.
            block_bytes: Length of a chunk of the ring.
        """
        self._begin = begin
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._is_stopped = False
        self._current: BulkRead | None = None

    @contextmanager
    def reading(self, file: ReadFile, reads: Reads) -> Generator[BulkRead]:
        """Reads while the body runs; behind it nothing is read or written any more.

        Raises:
            concurrent.futures.CancelledError: `stop` was called.
        """
        read = BulkRead(file, reads, self._block_bytes)
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
