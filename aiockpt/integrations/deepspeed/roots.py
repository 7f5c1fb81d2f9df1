"""The directories that are being saved into, all with one machinery and one ring."""

__all__ = ["Roots"]

import logging
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiockpt.config import EngineConfig
from aiockpt.machinery import Machinery
from aiockpt.ranks.scoped import scoped
from aiockpt.ranks.torch_dist import detect
from aiockpt.runtime import Runtime
from aiockpt.single_files import SingleFiles

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class Roots:
    """A runtime for each directory in use, made and ended as tags come and go.

    A job may save every checkpoint into a directory of its own, so none is kept: each
    would hold a lock, and a descriptor.

    Attributes:
        machinery: What does the work.
        ranks: The job that this process is a part of.
        singles: Saves files that belong to no tag.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Starts the engine's thread; touches no file."""
        self.machinery = Machinery(config)
        self.ranks = detect("deepspeed", config.peer_timeout_s)
        self.singles = SingleFiles(self.machinery)
        self._config = config
        self._in_use: dict[str, tuple[Runtime, int]] = {}
        self._changing = threading.Lock()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns; it runs on the engine's loop, and blocks this thread.

        Raises:
            EngineStateError: This was closed, or belongs to the parent process.
        """
        return self.machinery.run(work)

    def enter(self, root: str) -> Runtime:
        """The runtime of a directory; it stays until `leave` has come as often."""
        with self._changing:
            runtime, num_users = self._in_use.get(root, (None, 0))
            if runtime is None:
                runtime = Runtime(
                    root,
                    self.machinery,
                    scoped(self.ranks, f"{root}: "),
                    retention=self._config.retention,
                    is_sharing=True,
                )
            self._in_use[root] = runtime, num_users + 1
            return runtime

    async def leave(self, root: str) -> None:
        """Ends the runtime of a directory with its last user; never raises.

        If cancelled: it is ended later on.
        """
        with self._changing:
            runtime, num_users = self._in_use.pop(root)
            if num_users > 1:
                self._in_use[root] = runtime, num_users - 1
                return
        call = runtime.begin_close()
        assert call is not None
        await call.ended()
        runtime.stop()
        for error in call.result():
            _logger.warning("on leaving %s: %s", root, error)

    async def close(self) -> None:
        """Drops the tags that are still open, and leaves the job."""
        try:
            for root in list(self._in_use):
                self._in_use[root] = self._in_use[root][0], 1
                await self.leave(root)
        finally:
            await self.ranks.close()

    def stop(self) -> None:
        """Ends the threads and frees the ring; returns when they have ended."""
        self.machinery.stop()
        self.machinery.join()
