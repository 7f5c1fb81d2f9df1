"""Loading a checkpoint file: torch zip or safetensors, whoever wrote it.

A loading thread reads the directory and runs the pickle; the engine's loop and its
workers read the tensors meanwhile. Nothing is handed out that was not checked
against the file's own checksums, and no code from the file runs, unless the caller
said so.
"""

__all__ = [
    "FileInfo",
    "LazyFile",
    "LoadOptions",
    "Loader",
    "RecordInfo",
    "TensorInfo",
    "inspect_file",
    "is_as_written",
    "open_lazily",
]

from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.loading.bulk import BulkRead
from aiockpt.loading.container import Container, container_of
from aiockpt.loading.inspecting import (
    FileInfo,
    RecordInfo,
    TensorInfo,
    inspect_file,
    inspect_safetensors,
    inspect_torch,
)
from aiockpt.loading.lazy import LazyFile
from aiockpt.loading.placing import MapLocation, Placement, resolved
from aiockpt.loading.plain_loading import is_as_written, load_plain
from aiockpt.loading.reader import Reader
from aiockpt.loading.reading import named
from aiockpt.loading.safetensors_loading import SafetensorsLoading, read_header
from aiockpt.loading.selecting import Targets
from aiockpt.loading.torch_file import TorchFile
from aiockpt.loading.torch_loading import TorchLoading
from aiockpt.loading.unpickling import Unpickling
from aiockpt.loading.verifying import verify_file
from aiockpt.loop_thread import Call
from aiockpt.ring import Ring
from aiockpt.staging.devices import Devices
from aiockpt.storage.base import ReadFile
from aiockpt.threads import run_interruptibly

T = TypeVar("T")

Opened = tuple[ReadFile, int | None]
"""A file open for reading, and the CRC-32 that a manifest gives it, if one does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The arguments of a load, which are those of `torch.load`, and what it lacks.

    Attributes:
        map_location: As for `torch.load`; for both containers.
        weights_only: Make only what torch counts as safe (its list, and what was
            added with `torch.serialization.add_safe_globals`). Otherwise the
            pickle runs whatever code it names.
        verify: Check every record that is read against its CRC-32 before anything
            of it is handed out, and a file that is read as a whole against its
            manifest, if it has one, before the load returns. A safetensors file, and
            a torch file with `set_crc32_options(False)`, has only the latter.
        mmap: Map the file instead of reading it. Tensors are read, unchecked, when
            they are looked at; changing them does not change the file.
        into: Nested mappings, lists and tuples of tensors (or modules and
            optimizers, which stand for their state dicts) to fill in place, once
            what engines of the process are staging has been staged (but for those whose
            guard is off). Until the load has ended they cannot be saved.
        keys: Key paths of tensors, or globs over them (`model.layers.0.*`): only
            these are read (or filled), and the result is a dictionary of tensors
            by key path.
        strict: Whether every tensor of the file must have a target in `into` and
            back. Otherwise what has no counterpart is left out, with a warning
            in the log, and the result is the filled tensors by key path.
    """

    map_location: MapLocation = None
    weights_only: bool = True
    verify: bool = True
    mmap: bool = False
    into: object = None
    keys: Sequence[str] | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        """Takes any iterable of keys, and goes over it once.

        What a name means to the caller is settled in the caller's thread.
        """
        object.__setattr__(self, "map_location", resolved(self.map_location))
        if self.keys is not None and not isinstance(self.keys, str):
            object.__setattr__(self, "keys", list(self.keys))

    def check(self) -> None:
        """Refuses what contradicts itself.

        Raises:
            InvalidArgumentError: Says what.
        """
        if self.mmap and self.into is not None:
            raise InvalidArgumentError("mmap maps the file, into reads it: choose one")
        if not self.strict and self.into is None:
            raise InvalidArgumentError("strict=False says how to fill: give `into`")


class Loader:
    """Loads files with the workers and the ring of an engine."""

    def __init__(  # noqa: PLR0913 - the parts of an engine
        self,
        *,
        ring: Ring,
        workers: Executor,
        num_workers: int,
        loaders: Executor,
        fillers: Executor,
        spawn: Callable[[Coroutine[Any, Any, None]], Call[None]],
        devices: Devices | None = None,
    ) -> None:
        """Starts nothing.

        Args:
            ring: Memory for what is copied on.
            workers: Threads that read and checksum.
            num_workers: How many of these one load keeps busy.
            loaders: Threads that unpickle, and wait for the workers.
            fillers: Likewise, for loads into tensors, which may wait for saves as well.
            spawn: Starts a coroutine on the engine's loop, from any thread.
            devices: What copies from the ring to devices, where that is done.
        """
        self._ring = ring
        self._workers = workers
        self._num_workers = num_workers
        self._loaders = loaders
        self._fillers = fillers
        self._spawn = spawn
        self._devices = devices

    async def load(self, open_file: Callable[[], Opened], options: LoadOptions) -> Any:
        """Returns what was saved in the file that `open_file` opens.

        If cancelled: returns when no memory of the caller is written to any more.

        Raises:
            CheckpointNotFoundError: A key names no tensor; the message lists near ones.
            CorruptCheckpointError: The file is cut off, malformed or has other bytes
                than were written; names the tensor where it can.
            InvalidArgumentError: The arguments contradict each other, `into` does not
                fit (all misfits are listed), there is no such device, or the file is
                of a kind that only another reader loads.
            StorageError: The file system refused.
            UnsafePickleError: The file needs a class that `weights_only` does not
                allow.
        """
        options.check()
        threads = self._loaders if options.into is None else self._fillers
        return await self._run(partial(_load, open_file, options), threads)

    async def load_bytes(self, open_file: Callable[[], Opened]) -> bytes:
        """Returns the bytes of the file that `open_file` opens, checked.

        If cancelled: reading ends soon, and nothing is returned.

        Raises:
            CorruptCheckpointError: They are not those that were written.
            StorageError: The file system refused.
        """
        return await self.run(partial(_load_bytes, open_file))

    async def verify(
        self,
        open_file: Callable[[], Opened],
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Reads a whole file, checks it, and returns its CRC-32.

        Raises:
            CorruptCheckpointError: The file is cut off or malformed, or a record does
                not have its checksum; names the tensor and the offset where it can.
            StorageError: The file system refused.
        """
        return await self.run(partial(_verify, open_file, progress))

    async def run(self, work: Callable[[Reader], T]) -> T:
        """Does `work` in a loading thread, with a reader of its own.

        If cancelled: reading ends soon; returns when the thread is done with it.
        """
        return await self._run(work, self._loaders)

    async def _run(self, work: Callable[[Reader], T], threads: Executor) -> T:
        reader = Reader(self._begin, self._ring.chunk_bytes, self._devices)
        return await run_interruptibly(threads, reader.stop, partial(work, reader))

    def _begin(self, read: BulkRead) -> Call[None]:
        return self._spawn(read.run(self._ring, self._workers, self._num_workers))


def _load(
    open_file: Callable[[], Opened], options: LoadOptions, reader: Reader
) -> object:
    placement = Placement(options.map_location)
    file, crc32 = open_file()
    with closing(file), named(file):
        loading = _begin(file, placement, options).loading(reader)
        state, found = _state(loading, options)
        if found not in (None, crc32) and crc32 is not None:
            del state  # The error's traceback would keep it.
            text = (
                f"{file.path}: not the file that the manifest describes: its CRC-32 is "
                f"{found:08x} instead of {crc32:08x}"
            )
            raise CorruptCheckpointError(text, path=file.path)
        return state


def _load_bytes(open_file: Callable[[], Opened], reader: Reader) -> bytes:
    file, crc32 = open_file()
    with closing(file):
        return load_plain(file, crc32, reader)


def _state(
    loading: TorchLoading | SafetensorsLoading, options: LoadOptions
) -> tuple[object, int | None]:
    if options.into is not None:
        targets = Targets(options.into, is_strict=options.strict)
        return loading.load_into(targets, options.keys)
    if options.keys is not None:
        return loading.load_keys(options.keys), None
    return loading.load()


class _Begun(NamedTuple):
    """A file whose directory or header has been read.

    Attributes:
        loading: How a reader loads from it.
        inspect: Tells what is in it.
    """

    loading: Callable[[Reader], TorchLoading | SafetensorsLoading]
    inspect: Callable[[], FileInfo]


def _begin(file: ReadFile, placement: Placement, options: LoadOptions) -> _Begun:
    if container_of(file) is Container.SAFETENSORS:
        header = read_header(file)
        loading = partial(
            SafetensorsLoading,
            file,
            header,
            placement,
            is_mapped=options.mmap,
            is_whole=options.verify,
        )
        return _Begun(loading, partial(inspect_safetensors, file, header))
    unpickling = Unpickling(
        file.path,
        weights_only=options.weights_only,
        map_location=options.map_location,
    )
    records = TorchFile(file, verify=options.verify)
    return _Begun(
        partial(
            TorchLoading,
            records,
            placement,
            unpickling,
            is_mapped=options.mmap,
            is_whole=options.verify,
        ),
        partial(inspect_torch, records),
    )


def open_lazily(
    open_file: Callable[[], Opened], options: LoadOptions, reader: Reader
) -> LazyFile:
    """Opens a file for reading tensors one by one; errors as those of `Loader.load`."""
    placement = Placement(options.map_location)
    file, _ = open_file()
    with ExitStack() as stack:
        stack.callback(file.close)
        with named(file):
            begun = _begin(file, placement, options)
            info = begun.inspect()
            lazy = LazyFile(file, placement, begun.loading, info, reader)
        stack.pop_all()
        return lazy


def _verify(
    open_file: Callable[[], Opened],
    progress: Callable[[int], None] | None,
    reader: Reader,
) -> int:
    file, _ = open_file()
    with closing(file):
        return verify_file(file, reader, progress)
