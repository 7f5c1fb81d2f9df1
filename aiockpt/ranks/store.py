"""One value told through the store of `torch.distributed`, once."""

__all__ = ["StoreTalk"]

import threading
import time
from contextlib import suppress
from typing import Any

from torch.distributed import distributed_c10d as c10d

from aiockpt.errors import EngineStateError

_FIRST_PAUSE_S = 0.01
_LAST_PAUSE_S = 0.5


class StoreTalk:
    """Sets and awaits a key of the default store; from a worker thread.

    The store is asked through a connection of its own where it has one to give: a
    client's lock is held while it waits, and the training may need the default one.
    Its own wait is not used: it cannot be ended, and it complains when it times out.
    """

    def __init__(self) -> None:
        """Takes the default store as it is now.

        Raises:
            EngineStateError: There is no process group any more.
        """
        try:
            self._store: Any = c10d._get_default_store()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        except ValueError as error:
            text = "torch.distributed has been shut down before the ranks connected"
            raise EngineStateError(text) from error
        self._is_stopped = threading.Event()

    def stop(self) -> None:
        """Ends `get` early. From any thread."""
        self._is_stopped.set()

    @property
    def host(self) -> str | None:
        """The machine that the store is on, where it is a server."""
        store = self._store
        while isinstance(store, c10d.PrefixStore):
            store = store.underlying_store
        return getattr(store, "host", None)

    def set(self, key: str, value: bytes) -> None:
        """Tells the value to whoever gets the key.

        Raises:
            OSError: The store could not be reached.
        """
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise ConnectionError(f"the store refused: {error}") from error

    def get(self, key: str, timeout_s: float) -> bytes:
        """The value, once it is there.

        Raises:
            OSError: It did not come in time, `stop` was called, or the store could
                not be reached.
        """
        try:
            return self._polled(self._own(), key, time.monotonic() + timeout_s)
        except RuntimeError as error:
            raise ConnectionError(f"the store does not answer: {error}") from error

    def _own(self) -> Any:
        with suppress(AttributeError, NotImplementedError):  # torch before 2.7
            return self._store.clone()
        return self._store

    def _polled(self, store: Any, key: str, deadline_s: float) -> bytes:
        pause_s = _FIRST_PAUSE_S
        while not store.check([key]):
            if time.monotonic() > deadline_s:
                raise TimeoutError("it has not told its address in time")
            if self._is_stopped.wait(pause_s):
                raise TimeoutError("nobody waits any more")
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        return bytes(store.get(key))
