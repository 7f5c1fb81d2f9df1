"""Files that stay open for reading, and the two ways of waiting for what is read."""

__all__ = ["BlockingCheckpointFile", "CheckpointFile", "FileAccess"]

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch

from aiockpt.errors import EngineStateError
from aiockpt.loader import (
    LazyFile,
    Loader,
    LoadOptions,
    Opened,
    TensorInfo,
    open_lazily,
)
from aiockpt.loading.reader import Reader
from aiockpt.loading.selecting import only
from aiockpt.loop_thread import Call
from aiockpt.threads import outlast

T = TypeVar("T")


class Host(Protocol):
    """The running engine, or the machinery of one file alone."""

    @property
    def loader(self) -> Loader:
        """What loads."""
        ...

    def spawn(self, work: Coroutine[Any, Any, T]) -> Call[T]:
        """Runs a coroutine on the engine's loop; `EngineStateError` if closed."""
        ...

    def spawn_last(self, work: Coroutine[Any, Any, T]) -> Call[T]:
        """As `spawn`, also while the engine is being closed."""
        ...

    async def release(self) -> None:
        """Ends what was started for this file, on any event loop."""
        ...

    def release_blocking(self) -> None:
        """As `release`, with the calling thread blocked."""
        ...


class FileAccess:
    """One file that is open, or going to be; shared by both doors.

    Its methods may be called from any thread, and do not wait. What is done to one
    file is done one after the other.
    """

    def __init__(
        self,
        host: Host,
        open_file: Callable[[], Opened],
        options: LoadOptions,
    ) -> None:
        """Opens nothing yet."""
        self.host = host
        self._open_file = open_file
        self._options = options
        self._lazy: LazyFile | None = None
        self._turns: asyncio.Lock | None = None

    @property
    def file(self) -> LazyFile:
        """The open file.

        Raises:
            EngineStateError: It is not open.
        """
        if self._lazy is None:
            raise EngineStateError("the file is not open: use it in a `with` block")
        return self._lazy

    def begin_open(self) -> Call[None]:
        """Opens the file and reads what it says of itself.

        Raises:
            EngineStateError: It is open.
        """
        if self._turns is not None:
            raise EngineStateError("the file is open already")
        self._turns = asyncio.Lock()
        try:
            return self.host.spawn(self._open())
        except BaseException:
            self._turns = None
            raise

    async def _open(self) -> None:
        try:
            await self.host.loader.run(self._look)
        except BaseException:
            await outlast(self._close())
            raise

    def _look(self, reader: Reader) -> None:
        self._lazy = open_lazily(self._open_file, self._options, reader)

    def begin_load(self, keys: Sequence[str]) -> Call[dict[str, torch.Tensor]]:
        """Reads the tensors that the key paths or globs name."""
        file = self.file
        return self._begin(lambda reader: file.load(keys, reader))

    def begin_rows(self, key: str, start: int, stop: int | None) -> Call[torch.Tensor]:
        """Reads a slice of one tensor's first dimension."""
        file = self.file
        return self._begin(lambda reader: file.rows(key, start, stop, reader))

    def _begin(self, work: Callable[[Reader], T]) -> Call[T]:
        return self.host.spawn(self._run(work))

    async def _run(self, work: Callable[[Reader], T]) -> T:
        assert self._turns is not None
        # Waiting here, and not in a loading thread, can be cancelled.
        async with self._turns:
            return await self.host.loader.run(work)

    def begin_close(self) -> Call[None] | None:
        """Closes the file, once what is being read from it has been.

        None where that is done: the engine has ended, and nothing reads any more.
        """
        try:
            return self.host.spawn_last(self._close())
        except EngineStateError:
            self._turns = None
            lazy, self._lazy = self._lazy, None
            if lazy is not None:
                lazy.close()
            return None

    async def _close(self) -> None:
        lazy, self._lazy = self._lazy, None
        turns, self._turns = self._turns, None
        if lazy is not None and turns is not None:
            # To the end: nobody else knows of it any more.
            await outlast(self._close_in_turn(lazy, turns))

    async def _close_in_turn(self, lazy: LazyFile, turns: asyncio.Lock) -> None:
        async with turns:
            await self.host.loader.run(lambda _: lazy.close())


class CheckpointFile:
    """A file open for reading tensors one by one: `async with aiockpt.open(path)`.

    The directory and the pickle are read when it is entered; tensors only when they
    are asked for. May be used by several tasks at once.
    """

    def __init__(self, access: FileAccess) -> None:
        """Made by `aiockpt.open` and `CheckpointEngine.open`."""
        self._access = access

    async def __aenter__(self) -> Self:
        """Opens the file; errors as those of `CheckpointEngine.load`."""
        call = self._access.begin_open()
        try:
            await call.wait()
        except BaseException:
            await self._access.host.release()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file; what is being read is waited for."""
        try:
            call = self._access.begin_close()
            if call is not None:
                await outlast(call.wait())
        finally:
            await self._access.host.release()

    @property
    def keys(self) -> tuple[str, ...]:
        """Key paths of the tensors, in the file's order."""
        return self._access.file.keys

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Key, dtype, shape and bytes of every tensor; nothing of them is read."""
        return self._access.file.info.tensors

    async def tensor(self, key: str) -> torch.Tensor:
        """Reads one tensor, and checks it (one of a torch file; others have no checksum).

        Args:
            key: Its key path, or a glob that only it matches.

        Raises:
            CheckpointNotFoundError: There is none; the message lists near ones.
            CorruptCheckpointError: Its bytes are not those that were written.

        If cancelled: reading ends soon.
        """
        return only(key, await self.load([key]))[1]

    async def load(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Reads the tensors that key paths or globs name, by key path; as `tensor`."""
        return await self._access.begin_load(keys).wait()

    async def rows(
        self, key: str, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Reads the slice `[start:stop]` of a tensor's first dimension, and no more.

        The checksum is that of the whole tensor, so a part is not checked.

        Raises:
            CheckpointNotFoundError: There is no such tensor.
            InvalidArgumentError: It has no rows (0-dim), or is not kept as rows
                (sparse, quantized, a subclass).

        If cancelled: reading ends soon.
        """
        return await self._access.begin_rows(key, start, stop).wait()


class BlockingCheckpointFile:
    """`CheckpointFile` for callers that block: `with aiockpt.sync.open(path)`."""

    def __init__(self, access: FileAccess) -> None:
        """Made by `aiockpt.sync.open` and `aiockpt.sync.CheckpointEngine.open`."""
        self._access = access

    def __enter__(self) -> Self:
        """Opens the file; errors as those of `CheckpointEngine.load`."""
        call = self._access.begin_open()
        try:
            call.result()
        except BaseException:
            self._access.host.release_blocking()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file; what is being read is waited for."""
        try:
            call = self._access.begin_close()
            if call is not None:
                call.result()
        finally:
            self._access.host.release_blocking()

    @property
    def keys(self) -> tuple[str, ...]:
        """Key paths of the tensors, in the file's order."""
        return self._access.file.keys

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Key, dtype, shape and bytes of every tensor; nothing of them is read."""
        return self._access.file.info.tensors

    def tensor(self, key: str) -> torch.Tensor:
        """Reads one tensor, and checks it; as the awaitable one."""
        return only(key, self.load([key]))[1]

    def load(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Reads the tensors that key paths or globs name, by key path."""
        return self._access.begin_load(keys).result()

    def rows(self, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Reads the slice `[start:stop]` of a tensor's first dimension, unchecked."""
        return self._access.begin_rows(key, start, stop).result()
