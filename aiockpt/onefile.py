"""One file in, one file out: no tags, the same promises.

A save goes to a temporary file beside the target, is synced, and takes the
target's place by a rename, so the target is the old file or the new one, whole.
"""

__all__ = [
    "load",
    "load_blocking",
    "open_blocking",
    "open_file",
    "save",
    "save_blocking",
]

import os
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from aiockpt.access import BlockingCheckpointFile, CheckpointFile, FileAccess
from aiockpt.config import MIB, EngineConfig
from aiockpt.loader import Loader, LoadOptions, Opened
from aiockpt.loop_thread import Call
from aiockpt.machinery import Machinery
from aiockpt.single_files import SingleFile
from aiockpt.storage.local import LocalStorage
from aiockpt.threads import WorkerPool

T = TypeVar("T")

# Enough to keep the workers busy; a save that is awaited gains nothing from more.
_CONFIG = EngineConfig(host_cache_size=128 * MIB / (1 << 30))


async def save(
    obj: object,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Saves `obj` as the file `path`; when it returns, the file is durable.

    Args:
        obj: Anything that `torch.save` takes; for a `.safetensors` path, a flat dict
            of dense tensors, or a module, which stands for its weights. It is captured
            before this first suspends; its tensors must not change until it returns.
        path: Where to; replaced atomically if it exists.
        metadata: Text for a `.safetensors` header.

    Raises:
        InvalidArgumentError: `obj` cannot be captured, or not be held by the container.
        TornSnapshotError: A tensor changed meanwhile.
        StorageError: The file system refused; the old file, if any, is untouched.

    If cancelled: nothing happened, or the file has been replaced.
    """
    machinery, work = _begin_save(SingleFile(obj, path, metadata))
    try:
        await machinery.spawn(work).wait()
    finally:
        machinery.stop()
        await machinery.ended()


def save_blocking(
    obj: object,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`save` for callers that block."""
    machinery, work = _begin_save(SingleFile(obj, path, metadata))
    try:
        machinery.run(work)
    finally:
        machinery.stop()
        machinery.join()


def _begin_save(file: SingleFile) -> tuple[Machinery, Coroutine[Any, Any, None]]:
    machinery = Machinery(_CONFIG)
    try:
        file.enter(machinery)
    except BaseException:
        machinery.stop()
        raise
    return machinery, _save(file)


async def _save(file: SingleFile) -> None:
    await file.write()
    await file.publish()


async def load(  # noqa: PLR0913 - the contract's signature
    path: str | os.PathLike[str],
    map_location: Any = None,
    *,
    weights_only: bool = True,
    verify: bool = True,
    into: Any = None,
    keys: Sequence[str] | None = None,
    mmap: bool = False,
    strict: bool = True,
) -> Any:
    """Loads one file: aiockpt's, `torch.save`'s (torch 2.0 or later), or safetensors.

    See `CheckpointEngine.load` for the arguments.

    Raises:
        CheckpointNotFoundError: No such file.
        CorruptCheckpointError: It is no checkpoint, or its checksums do not hold.
        InvalidArgumentError: `into` does not match, or arguments clash.

    If cancelled: reading ends soon, and nothing is returned.
    """
    options = LoadOptions(
        map_location=map_location,
        weights_only=weights_only,
        verify=verify,
        into=into,
        keys=keys,
        mmap=mmap,
        strict=strict,
    )
    machinery, work = _begin_load(path, options)
    try:
        return await machinery.spawn(work).wait()
    finally:
        machinery.stop()
        await machinery.ended()


def load_blocking(  # noqa: PLR0913 - the contract's signature
    path: str | os.PathLike[str],
    map_location: Any = None,
    *,
    weights_only: bool = True,
    verify: bool = True,
    into: Any = None,
    keys: Sequence[str] | None = None,
    mmap: bool = False,
    strict: bool = True,
) -> Any:
    """`load` for callers that block."""
    options = LoadOptions(
        map_location=map_location,
        weights_only=weights_only,
        verify=verify,
        into=into,
        keys=keys,
        mmap=mmap,
        strict=strict,
    )
    machinery, work = _begin_load(path, options)
    try:
        return machinery.run(work)
    finally:
        machinery.stop()
        machinery.join()


def open_file(
    path: str | os.PathLike[str],
    *,
    map_location: Any = None,
    weights_only: bool = True,
    verify: bool = True,
) -> CheckpointFile:
    """A file to be read tensor by tensor: `async with aiockpt.open(path) as file:`.

    Args:
        path: The file: aiockpt's, `torch.save`'s, or safetensors.
        map_location: As for `CheckpointEngine.load`; so are the others.
        weights_only: As for `CheckpointEngine.load`.
        verify: As for `CheckpointEngine.load`.
    """
    return CheckpointFile(_access(path, map_location, weights_only, verify))


def open_blocking(
    path: str | os.PathLike[str],
    *,
    map_location: Any = None,
    weights_only: bool = True,
    verify: bool = True,
) -> BlockingCheckpointFile:
    """`open` for callers that block: `with aiockpt.sync.open(path) as file:`."""
    return BlockingCheckpointFile(_access(path, map_location, weights_only, verify))


def _access(
    path: str | os.PathLike[str],
    map_location: Any,
    weights_only: bool,  # noqa: FBT001 - from one caller to the next
    verify: bool,  # noqa: FBT001
) -> FileAccess:
    options = LoadOptions(
        map_location=map_location, weights_only=weights_only, verify=verify
    )
    return FileAccess(_Alone(), partial(_open, path), options)


class _Alone:
    """Machinery for one file alone, started with the first use."""

    def __init__(self) -> None:
        self._started: Machinery | None = None

    @property
    def _machinery(self) -> Machinery:
        if self._started is None:
            self._started = Machinery(_CONFIG)
        return self._started

    @property
    def loader(self) -> Loader:
        return self._machinery.loader

    def spawn(self, work: Coroutine[Any, Any, T]) -> Call[T]:
        try:
            return self._machinery.spawn(work)
        except BaseException:
            work.close()
            raise

    def spawn_last(self, work: Coroutine[Any, Any, T]) -> Call[T]:
        return self._machinery.spawn(work)

    async def release(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            started.stop()
            await started.ended()

    def release_blocking(self) -> None:
        started, self._started = self._started, None
        if started is not None:
            started.stop()
            started.join()


def _begin_load(
    path: str | os.PathLike[str], options: LoadOptions
) -> tuple[Machinery, Any]:
    machinery = Machinery(_CONFIG)
    return machinery, machinery.loader.load(partial(_open, path), options)


def _open(path: str | os.PathLike[str]) -> Opened:
    # The path is the caller's word, not a file's: links in it are followed.
    directory, name = os.path.split(os.path.realpath(path))
    return LocalStorage(directory, _NO_WORKERS).open_read(name), None


# Opening a file for reading takes none.
_NO_WORKERS = WorkerPool(1, "aiockpt-unused")
