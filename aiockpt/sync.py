"""The door for plain code: the engine's methods, blocking.

Works with no event loop, under a running one (whose thread it blocks), and in a
notebook. Ctrl-C cancels what is waited for, waits until it has ended, and goes on.
"""

__all__ = ["CheckpointEngine", "CheckpointFile", "SaveHandle", "load", "open", "save"]

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch

from aiockpt.access import BlockingCheckpointFile as CheckpointFile
from aiockpt.config import EngineConfig
from aiockpt.deadline import TimedSave
from aiockpt.errors import CheckpointError
from aiockpt.events import CommitReport, Observer, Progress
from aiockpt.file_save import FileSave
from aiockpt.formats.plain import PlainBytes
from aiockpt.loader import LoadOptions
from aiockpt.loop_thread import Call
from aiockpt.manifest import TagInfo
from aiockpt.onefile import load_blocking as load
from aiockpt.onefile import open_blocking as open  # noqa: A004 - as `aiockpt.open`
from aiockpt.onefile import save_blocking as save
from aiockpt.opening import TagOptions
from aiockpt.preflight import PreflightReport
from aiockpt.ranks.base import Ranks
from aiockpt.runtime import Runtime, raise_untold
from aiockpt.sharding import MAX_SHARD_BYTES, sharded
from aiockpt.watching import BlockingTagWatch


class SaveHandle:
    """One file on its way. Dropping it changes nothing.

    Attributes:
        tag: The tag that it belongs to.
        path: The file, relative to the tag.
    """

    def __init__(self, runtime: Runtime, save: FileSave) -> None:
        """Made by `CheckpointEngine.save`."""
        self._runtime = runtime
        self._save = save
        self.tag = save.tag
        self.path = save.path

    @property
    def progress(self) -> Progress:
        """Bytes planned, staged and written so far; live."""
        return self._save.progress

    def staged(self) -> None:
        """Returns when every tensor of this file may be changed again."""
        runtime = self._runtime
        _follow(runtime, runtime.spawn(runtime.open_tags.save_staged(self._save)))

    def written(self) -> None:
        """Returns when the file is complete and durable; not yet published."""
        self._runtime.run(self._runtime.open_tags.save_written(self._save))


class CheckpointEngine:
    """`aiockpt.CheckpointEngine` for callers that block; see there for each method.

    `save` still returns at once, and staging and writing still happen in the
    background. An engine that is not closed is drained when the interpreter exits.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        config: EngineConfig | Mapping[str, object] | None = None,
        *,
        ranks: Ranks | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Starts the engine's thread; touches no file."""
        settings = EngineConfig.parse(config)
        self._runtime = Runtime.start(root, settings, ranks, observers)

    @property
    def root(self) -> str:
        """The directory of the tags, absolute."""
        return self._runtime.root

    @property
    def ring_bytes(self) -> tuple[int, int]:
        """Bytes of the ring that are leased now, and its size."""
        return self._runtime.ring_bytes

    def __enter__(self) -> Self:
        """Sweeps what dead processes left in the root."""
        try:
            self._runtime.run(self._runtime.sweep_at_start())
        except BaseException as error:
            # The block is not entered, so nobody else would close the engine.
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the engine; an error from the body is never replaced."""
        if error is None:
            self.close()
            return
        try:
            self.close()
        except CheckpointError as lost:
            error.add_note(f"and on leaving the engine: {lost}")

    def preflight(self, state: object = None) -> PreflightReport:
        """Does a tiny save, load and removal, so that what is wrong shows before step 1."""
        return self._runtime.preflight(state).result()

    def create(self, tag: str, *, overwrite: bool = False) -> None:
        """Opens a tag for saving; readers see nothing of it until `commit`."""
        options = TagOptions(is_overwrite=overwrite)
        self._runtime.run(self._runtime.open_tags.create(tag, options))

    def save(
        self,
        state_dict: object,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
        metadata: Mapping[str, str] | None = None,
        replicated: bool | Iterable[int] = False,
    ) -> SaveHandle:
        """Captures `state_dict` and enqueues it as a file of an open tag."""
        save = self._runtime.save(
            state_dict, path, tag=tag, metadata=metadata, replicated=replicated
        )
        return SaveHandle(self._runtime, save)

    def save_sharded(
        self,
        state_dict: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        directory: str = "",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        tag: str | None = None,
    ) -> list[SaveHandle]:
        """Captures weights and enqueues them as Hugging Face's readers expect them."""
        files = sharded(
            state_dict, directory=directory, max_shard_bytes=max_shard_bytes
        )
        return [
            self.save(file.state, file.path, tag=tag, metadata=file.metadata)
            for file in files
        ]

    def save_bytes(
        self,
        data: str | bytes,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
    ) -> SaveHandle:
        """Enqueues `data` as a file of an open tag, as it stands; text as UTF-8."""
        return self.save(PlainBytes.of(data), path, tag=tag)

    def staged(self, tag: str | None = None) -> None:
        """Returns when all that was saved (in `tag`) may be changed again."""
        start = perf_counter()
        try:
            work = self._runtime.open_tags.staged(tag)
            _follow(self._runtime, self._runtime.spawn(work))
        finally:
            self._runtime.open_tags.add_stall(tag, perf_counter() - start)

    def wait_staged(self) -> None:
        """Blocks until all that is being staged has been; leaves errors to `commit`."""
        self._runtime.wait_staged()

    def commit(self, tag: str) -> CommitReport:
        """Makes a tag durable under its name, atomically, and moves `latest` to it."""
        return self._runtime.run(self._runtime.commit(tag))

    def preempt_on(self, *signals: int) -> None:
        """From now on, any of `signals` sets `is_preempted` and ends `preempted`."""
        self._runtime.preempt_on(signals)

    @property
    def is_preempted(self) -> bool:
        """Whether one of the signals of `preempt_on` has come."""
        return self._runtime.preemption.is_signalled

    def preempted(self) -> None:
        """Returns when one of the signals of `preempt_on` has come."""
        Call(self._runtime.preemption.signalled()).run(self._runtime.spawn_last)

    def save_before(
        self,
        deadline_s: float,
        tag: str,
        files: Mapping[str, object],
        *,
        overwrite: bool = False,
    ) -> CommitReport:
        """Saves and publishes a whole tag within a time, or leaves nothing of it."""
        timed = TimedSave(tag, deadline_s)
        options = TagOptions(is_overwrite=overwrite)
        call = self._runtime.save_before(timed, files, options)
        try:
            return call.result()
        finally:
            self._runtime.let_go(timed)

    def abort(self, tag: str) -> None:
        """Drops an open tag: nothing is published and nothing stays on the disk."""
        self._runtime.run(self._runtime.open_tags.abort(tag))

    def load(  # noqa: PLR0913 - the contract's signature
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        *,
        tag: str | None = None,
        weights_only: bool = True,
        verify: bool = True,
        into: Any = None,
        keys: Sequence[str] | None = None,
        mmap: bool = False,
        strict: bool = True,
    ) -> Any:
        """Loads one file of a published tag, verified."""
        options = LoadOptions(
            map_location=map_location,
            weights_only=weights_only,
            verify=verify,
            into=into,
            keys=keys,
            mmap=mmap,
            strict=strict,
        )
        work = self._runtime.tag_loader.load(path, tag, options)
        return self._runtime.run(work)

    def load_bytes(
        self, path: str | os.PathLike[str], *, tag: str | None = None
    ) -> bytes:
        """Returns the bytes of a file of a published tag (by default the latest)."""
        work = self._runtime.tag_loader.load_bytes(path, tag)
        return self._runtime.run(work)

    def load_latest_valid(
        self,
        *paths: str,
        map_location: Any = None,
        weights_only: bool = True,
        into: Any = None,
        keys: Sequence[str] | None = None,
        strict: bool = True,
    ) -> tuple[str, list[Any]]:
        """Loads files of the newest tag in which all of them are sound."""
        options = LoadOptions(
            map_location=map_location,
            weights_only=weights_only,
            into=into,
            keys=keys,
            strict=strict,
        )
        work = self._runtime.tag_loader.load_latest_valid(paths, options)
        return self._runtime.run(work)

    def open(
        self,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
        map_location: Any = None,
        weights_only: bool = True,
        verify: bool = True,
    ) -> CheckpointFile:
        """A file of a published tag, to be read tensor by tensor in a `with` block."""
        options = LoadOptions(
            map_location=map_location, weights_only=weights_only, verify=verify
        )
        return CheckpointFile(self._runtime.access(path, tag, options))

    def latest(self) -> str | None:
        """The tag to resume from; None where nothing is published."""
        return self._runtime.run(self._runtime.latest())

    def tags(self) -> list[TagInfo]:
        """The published tags, oldest first."""
        return self._runtime.run(self._runtime.tags())

    def watch(self, after: str | TagInfo | None = None) -> Iterator[TagInfo]:
        """Yields each newly published tag, oldest first, whoever publishes it."""
        return BlockingTagWatch(self._runtime, after)

    def wait_for(
        self, tag: str | None = None, *, newer_than: str | TagInfo | None = None
    ) -> TagInfo:
        """The tag to read next, once it is published, whoever publishes it."""
        return self._runtime.run(self._runtime.wait_for(tag, newer_than))

    @contextmanager
    def reading(self, tag: str | None = None) -> Generator[TagInfo]:
        """Keeps a published tag (by default the latest) while the block runs."""
        reading = self._runtime.reading(tag)
        try:
            yield self._runtime.run(reading.begin())
        finally:
            call = self._runtime.end_reading(reading)
            if call is not None:
                call.result()

    def delete(self, tag: str) -> None:
        """Unpublishes a tag, durably, then removes its files."""
        self._runtime.run(self._runtime.delete(tag))

    def sweep(self) -> list[str]:
        """Removes what dead engines left in the root; their names."""
        return self._runtime.run(self._runtime.sweep())

    def close(self) -> None:
        """Ends the engine: commits under way finish, open tags are dropped.

        Idempotent.

        Raises:
            CheckpointError: A failure that no call has reported yet, or a tag that was
                never committed. The engine is closed all the same.
        """
        call = self._runtime.begin_close()
        if call is None:
            self._runtime.join()
            return
        try:
            untold = call.result()
        finally:
            self._runtime.stop()
            self._runtime.join()
        raise_untold(untold)


def _follow(runtime: Runtime, staged: Call[Sequence[FileSave]]) -> None:
    """Waits for what is being staged, on the caller's thread as far as need be."""
    rest = runtime.follow(staged.result())
    if rest is not None:
        rest.result()
