"""Notices of what appears in a local directory: from the kernel, and by looking.

The kernel (inotify) tells of what this machine's processes do. It says nothing of what
other machines do in a network file system, and it may refuse (each user has a limited
number of instances and watches), so there is always a slow look beside it.
"""

__all__ = ["LocalNotices"]

import asyncio
import contextlib
import ctypes
import errno
import functools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from time import perf_counter
from typing import TypeVar

from aiockpt.errors import EngineStateError
from aiockpt.threads import outlast, run_blocking

T = TypeVar("T")

_logger = logging.getLogger(__name__)

# Between looks: where the kernel tells of changes, and where it does not.
_TOLD_INTERVAL_S = 1.0
_UNTOLD_INTERVAL_S = 0.2
# And at least so many times as long as the look itself took, up to a limit.
_PAUSE_FACTOR = 20
_MAX_PAUSE_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_ONLYDIR = 0x01000000
# More than the notices of a thousand names: what is left over is read next.
_MAX_READ_BYTES = 1 << 16


class LocalNotices:
    """See `Notices`. Everybody who waits shares one descriptor."""

    def __init__(self, full: str, lookers: Executor) -> None:
        """Opens nothing yet.

        Args:
            full: The directory; it may be missing, and may be made later.
            lookers: Threads for looks, and for calls that may wait for the disk.
        """
        self._full = full
        self._lookers = lookers
        self._changed = asyncio.Event()
        self._interval_s = _UNTOLD_INTERVAL_S
        self._descriptor: int | None = None
        self._is_used = False
        self._is_listening = False
        self._is_closed = False
        self._has_complained = False
        self._opening = threading.Lock()

    async def until(self, look: Callable[[], T | None]) -> T:
        """See `Notices.until`."""
        while not self._is_closed:
            # Before the look: what appears during it is told by this event.
            changed = self._changed
            self._is_used = True
            work: Callable[[], tuple[T | None, float]]
            work = functools.partial(self._look, look)
            found, took_s = await run_blocking(self._lookers, work)
            if found is not None:
                return found
            self._listen()
            # Looking must not become this process's main work.
            pause_s = min(_PAUSE_FACTOR * took_s, _MAX_PAUSE_S)
            pause_s = max(self._interval_s, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await changed.wait()
        raise EngineStateError(f"nobody waits for {self._full!r} any more")

    def _look(self, look: Callable[[], T | None]) -> tuple[T | None, float]:
        """What was found, and how long looking took: waiting for a thread is no work."""
        start_s = perf_counter()
        self._watch()
        return look(), perf_counter() - start_s

    def _watch(self) -> None:
        """Has the kernel tell of changes from now on, where it will."""
        with self._opening:
            if self._is_closed:
                return
            try:
                if self._descriptor is None:
                    self._descriptor = _open()
                # Each time: the directory may be new, or another than it was.
                _add_watch(self._descriptor, self._full)
            except OSError as error:
                self._interval_s = _UNTOLD_INTERVAL_S
                self._complain(error)
            else:
                self._interval_s = _TOLD_INTERVAL_S

    def _complain(self, error: OSError) -> None:
        # A directory that is still to be made is no trouble.
        if error.errno != errno.ENOENT and not self._has_complained:
            self._has_complained = True
            _logger.warning("changes of %s are looked for: %s", self._full, error)

    def _listen(self) -> None:
        """Has the loop take what the kernel tells."""
        if self._descriptor is None or self._is_listening or self._is_closed:
            return
        asyncio.get_running_loop().add_reader(self._descriptor, self._hear)
        self._is_listening = True

    def _hear(self) -> None:
        assert self._descriptor is not None
        # What was told does not matter: whoever waits looks for itself.
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, _MAX_READ_BYTES)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def close(self) -> None:
        """See `Notices.close`."""
        self._is_closed = True
        self._wake()
        if self._is_listening:
            assert self._descriptor is not None
            self._is_listening = False
            asyncio.get_running_loop().remove_reader(self._descriptor)
        if not self._is_used:
            return
        # In a worker: the kernel may take milliseconds to forget its watches.
        await outlast(run_blocking(self._lookers, self._release))

    def _release(self) -> None:
        with self._opening:
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _open() -> int:
    # Other systems have other ways to tell, which are not used.
    if not hasattr(_libc, "inotify_init1"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    # Its flags are those of `open`.
    return _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def _add_watch(descriptor: int, full: str) -> None:
    mask = _IN_MOVED_TO | _IN_CREATE | _IN_ONLYDIR
    _checked(_libc.inotify_add_watch(descriptor, os.fsencode(full), mask))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
