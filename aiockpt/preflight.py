"""A tiny save, load and removal where nobody sees it: does all that training relies on.

What would fail hours later, at the first commit, fails here, and says what to do.
"""

__all__ = ["Preflight", "PreflightReport"]

import errno
import gc
from collections.abc import Callable, Generator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import ParamSpec, TypeVar

import torch

from aiockpt.capture import capture
from aiockpt.catalog import Catalog
from aiockpt.errors import CorruptCheckpointError, StorageError
from aiockpt.events import Event, Written
from aiockpt.file_save import FileSave
from aiockpt.loader import Loader, LoadOptions
from aiockpt.saver import Saver
from aiockpt.storage.base import Storage
from aiockpt.storage.facts import DiskFacts, Limits, disk_facts, limits
from aiockpt.threads import outlast, run_blocking

P = ParamSpec("P")
T = TypeVar("T")

# Files of a tag are written at the same time, and a loader's workers open some, too.
_MIN_DESCRIPTORS = 64

# More than one block, so that a direct write is really tried; no whole number of them.
_PROBE_ELEMENTS = 5000

_REMEDIES = {
    errno.ENOSPC: "free space there, or choose another root",
    errno.EDQUOT: "raise the quota, or choose another root",
    errno.EACCES: "give this user the right to write there, or choose another root",
    errno.EPERM: "give this user the right to write there, or choose another root",
    errno.EROFS: "mount the file system for writing, or choose another root",
    errno.ENOTDIR: "choose a root of which every part is a directory",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (sysctl fs.file-max)",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.ENOLCK: "mount the file system with locks (flock), or choose another root",
    errno.ENOSYS: "choose a file system that can do this",
    errno.EOPNOTSUPP: "choose a file system that can do this",
    errno.EINVAL: "choose a file system that can do this",
    errno.EIO: "the disk is failing: choose another root",
}


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """What the first save will meet.

    Attributes:
        filesystem: Type of the file system ("ext4"), or "unknown".
        free_bytes: Bytes that may still be written there; None where it does not say.
        planned_bytes: Exact length of the file that the given state makes, or 0.
        is_direct: Whether writes go around the page cache (O_DIRECT).
        can_overwrite: Whether a published tag can be replaced (`overwrite=True`).
        save_s: Seconds that the tiny save took until it was durable.
        warnings: What works, but not as well as it could; each with a remedy.
    """

    filesystem: str
    free_bytes: int | None
    planned_bytes: int
    is_direct: bool
    can_overwrite: bool
    save_s: float
    warnings: tuple[str, ...]


class Preflight:
    """One preflight of an engine; its coroutine runs on the engine's loop."""

    def __init__(
        self, saver: Saver, catalog: Catalog, loader: Loader, state: object
    ) -> None:
        """Captures `state`; touches no file yet.

        Raises:
            InvalidArgumentError: It cannot be captured, and so not be saved.
            StagingError: It is on a device that cannot be used.
        """
        self._events: list[Event] = []
        # Observers are told of what is saved, and this is not.
        self._saver = replace(saver, emit=self._events.append)
        self._catalog = catalog
        self._loader = loader
        self._save: FileSave | None = None
        self._num_chunks = 0
        if state is not None:
            self._save = FileSave("", "model.pt", capture(state))
            self._saver.mark(self._save)
        self._stager = None if self._save is None else self._save.stager

    async def run(self) -> PreflightReport:
        """Does once what saves, loads and commits do, and leaves nothing of it.

        Raises:
            InvalidArgumentError: The state cannot be saved.
            StorageError: What was refused, where, and what to do about it.
            CorruptCheckpointError: What is read is not what was written.

        If cancelled: what was made is removed first.
        """
        found = await self._blocking(limits)
        _check_descriptors(found)
        planned_bytes = await self._plan()
        with _told("make its work area"):
            await self._blocking(self._catalog.open_work)
            directory, _ = await self._blocking(self._catalog.new_directory)
        try:
            disk = await self._blocking(self._look, planned_bytes)
            save_s = await self._try_save(directory)
            with _told("exchange directories"):
                can_overwrite = await self._blocking(self._try_exchange, directory)
        finally:
            with _told("remove what it wrote"):
                await outlast(self._blocking(self._catalog.discard, directory))
        # Last: it may take seconds, and what is refused is told at once.
        await self._prepare_ring()
        if gc.isenabled():
            # The first full collection after all the imports holds every thread for a
            # quarter of a second. The first save would set it off.
            await self._blocking(gc.collect)
        is_direct = any(
            event.is_direct for event in self._events if isinstance(event, Written)
        )
        ring_bytes = self._saver.ring.capacity_bytes
        warnings = await self._blocking(
            _warnings, found, is_direct, can_overwrite, ring_bytes
        )
        return PreflightReport(
            filesystem=disk.filesystem,
            free_bytes=disk.free_bytes,
            planned_bytes=planned_bytes,
            is_direct=is_direct,
            can_overwrite=can_overwrite,
            save_s=save_s,
            warnings=warnings,
        )

    @property
    def _storage(self) -> Storage:
        return self._saver.storage

    @property
    def _clerks(self) -> Executor:
        return self._saver.clerks

    async def _blocking(
        self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await run_blocking(self._clerks, work, *args, **kwargs)

    async def _plan(self) -> int:
        """The length of the state's file, if it can be saved."""
        if self._save is None:
            return 0
        plan = await self._saver.plan(self._save, self._saver.ring.chunk_bytes)
        # The caller may want the memory back long before the report is dropped.
        plan.sources.clear()
        self._save = None
        self._num_chunks = len(plan.chunks)
        return plan.nbytes

    async def _prepare_ring(self) -> None:
        """Takes from the system now what the first save would wait for."""
        ring = self._saver.ring
        num_chunks = min(self._num_chunks, ring.capacity_bytes // ring.chunk_bytes)
        # Pinning touches memory, too, and next to the device.
        if self._stager is not None and num_chunks > 0:
            await self._stager.prepare(num_chunks * ring.chunk_bytes)
        for index in range(num_chunks):
            await self._blocking(ring.populate, index)

    def _look(self, planned_bytes: int) -> DiskFacts:
        """What there is, if tags can be made in the root, of the size that is wanted."""
        root = self._storage.root
        with _told("look at the root"):
            try:
                disk = disk_facts(root)
            except OSError as error:
                text = error.strerror or str(error)
                raise StorageError(error.errno, text, root) from error
            if not disk.is_writable:
                raise StorageError(errno.EACCES, "no entries can be made", root)
        free = disk.free_bytes
        if free is not None and free < planned_bytes:
            with _told("make room for the state"):
                text = f"{planned_bytes} bytes needed, {free} free"
                raise StorageError(errno.ENOSPC, text, root)
        return disk

    async def _try_save(self, directory: str) -> float:
        state = {"probe": torch.arange(_PROBE_ELEMENTS)}
        save = FileSave("", "tag/probe.pt", capture(state))
        with _told("write a file"):
            try:
                await self._saver.run(save, f"{directory}/{save.path}", 0)
            finally:
                await self._saver.release(save)
        with _told("publish a directory"):
            await self._blocking(self._try_publish, directory)
        save_s = perf_counter() - save.started_s
        entry = save.entry
        assert entry is not None
        path = f"{directory}/published/probe.pt"
        with _told("read a file"):
            loaded = await self._loader.load(
                lambda: (self._storage.open_read(path), entry.crc32), LoadOptions()
            )
        if not torch.equal(loaded["probe"], state["probe"]):
            full = f"{self._storage.root}/{path}"
            message = f"{full}: what is read is not what was written; use another disk"
            raise CorruptCheckpointError(message, path=full)
        return save_s

    def _try_publish(self, directory: str) -> None:
        """The steps of a commit, within the directory."""
        storage = self._storage
        storage.sync_dir(f"{directory}/tag")
        storage.rename_dir(f"{directory}/tag", f"{directory}/published")
        storage.write_durable(f"{directory}/latest.next", b"published\n")
        storage.replace(f"{directory}/latest.next", f"{directory}/latest")
        storage.sync_dir(directory)

    def _try_exchange(self, directory: str) -> bool:
        self._storage.make_dirs(f"{directory}/other")
        try:
            self._storage.exchange(f"{directory}/other", f"{directory}/published")
        except StorageError as error:
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise
        return True


@contextmanager
def _told(what: str) -> Generator[None]:
    """Says what could not be done, and what to do about it."""
    try:
        yield
    except StorageError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        advice = f": {remedy}" if remedy else ""
        text = f"{error.strerror} (preflight could not {what}){advice}"
        raise StorageError(error.errno, text, error.filename) from error


def _check_descriptors(found: Limits) -> None:
    free = found.num_free_descriptors
    if free is not None and free < _MIN_DESCRIPTORS:
        with _told("count on enough open files"):
            text = f"{free} files can be opened, fewer than {_MIN_DESCRIPTORS}"
            raise StorageError(errno.EMFILE, text)


def _warnings(
    found: Limits,
    is_direct: bool,  # noqa: FBT001 - from one caller, by position
    can_overwrite: bool,  # noqa: FBT001
    ring_bytes: int,
) -> tuple[str, ...]:
    warnings: list[str] = []
    if not is_direct:
        warnings.append(
            "the file system refuses direct writes (O_DIRECT): saves go through the "
            "page cache, and compete with training for memory"
        )
    if not can_overwrite:
        warnings.append(
            "the file system cannot exchange directories: `overwrite=True` will fail; "
            "delete a tag before it is saved again"
        )
    locked = found.locked_bytes
    if locked is not None and locked < ring_bytes and torch.cuda.is_available():
        warnings.append(
            f"{locked} bytes may be locked in memory, and the ring has {ring_bytes}: "
            "pinning it may be refused; raise the limit (ulimit -l), or lower "
            "host_cache_size"
        )
    return tuple(warnings)
