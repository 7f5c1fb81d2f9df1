"""The door for coroutines: `async with CheckpointEngine(root) as engine`."""

__all__ = ["CheckpointEngine", "SaveHandle"]

import os
from collections.abc import Mapping, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from aiockpt.access import CheckpointFile
from aiockpt.config import EngineConfig
from aiockpt.errors import CheckpointError
from aiockpt.events import CommitReport, Observer, Progress
from aiockpt.loader import LoadOptions
from aiockpt.manifest import TagInfo
from aiockpt.ranks.base import Ranks
from aiockpt.runtime import Runtime, raise_untold
from aiockpt.saver import FileSave
from aiockpt.threads import outlast


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

    async def staged(self) -> None:
        """Returns when every tensor of this file has been copied.

        Raises:
            CheckpointError: Why it never will be.

        If cancelled: only the waiting ends.
        """
        await self._runtime.spawn(self._runtime.save_staged(self._save)).wait()

    async def written(self) -> None:
        """Returns when the file is complete and durable; not yet published.

        Raises:
            CheckpointError: Why it never will be.

        If cancelled: only the waiting ends.
        """
        await self._runtime.spawn(self._runtime.save_written(self._save)).wait()


class CheckpointEngine:
    """Saves checkpoints while training goes on, and publishes them atomically.

    The engine's work runs on a thread of its own, so it goes on while a training
    step blocks the caller's event loop. It may be awaited from any event loop and
    any number of tasks. Close it with `aclose`, or use it as an async context
    manager.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        config: EngineConfig | Mapping[str, object] | None = None,
        *,
        ranks: Ranks | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Starts the engine's thread; touches no file.

        Args:
            root: Directory of the tags; made by the first `create`.
            config: An `EngineConfig`, a mapping of its fields, or a DeepSpeed-style
                mapping that holds them under "aiockpt" or "datastates_ckpt".
            ranks: How this process agrees with others; alone by default.
            observers: Called with each event, on the engine's thread.

        Raises:
            InvalidArgumentError: The configuration is wrong.
        """
        self._runtime = Runtime(root, EngineConfig.parse(config), ranks, observers)

    @property
    def root(self) -> str:
        """The directory of the tags, absolute."""
        return self._runtime.root

    @property
    def ring_bytes(self) -> tuple[int, int]:
        """Bytes of the ring that are leased now, and its size."""
        return self._runtime.ring_bytes

    async def __aenter__(self) -> Self:
        """Sweeps what dead processes left in the root."""
        try:
            await self._runtime.spawn(self._runtime.start()).wait()
        except BaseException as error:
            # The block is not entered, so nobody else would close the engine.
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the engine; an error from the body is never replaced."""
        if error is None:
            await self.aclose()
            return
        try:
            await self.aclose()
        except CheckpointError as lost:
            error.add_note(f"and on leaving the engine: {lost}")

    async def create(self, tag: str, *, overwrite: bool = False) -> None:
        """Opens a tag for saving; readers see nothing of it until `commit`.

        Args:
            tag: One directory name: no `/`, no leading dot.
            overwrite: Whether `commit` may replace a published tag of that name,
                which stays whole and loadable until then.

        Raises:
            InvalidArgumentError: Not a usable name.
            EngineStateError: The tag is open, or published without `overwrite`.
            StorageError: The root cannot be made or written.

        If cancelled: the tag is open or it is not; `abort` then tells.
        """
        await self._runtime.spawn(self._runtime.create(tag, overwrite=overwrite)).wait()

    async def save(
        self,
        state_dict: object,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> SaveHandle:
        """Captures `state_dict` and enqueues it as a file of an open tag.

        Non-tensor values are copied now. Tensors are copied in the background and
        must not change until `staged` returns; torch optimizers see to that by
        themselves.

        Args:
            state_dict: Anything that `torch.save` takes; for a `.safetensors` path, a
                flat dict of dense tensors.
            path: The file, relative to the tag. Its suffix picks the container.
            tag: An open tag; by default the one that was created last.
            metadata: Text for a `.safetensors` header.

        Raises:
            InvalidArgumentError: A bad path, a path saved before, or a value that
                cannot be pickled (its key path is named).
            EngineStateError: No such open tag, or it has failed.

        If cancelled: the call does not suspend, so it is done or was never made.
        """
        save = self._runtime.save(state_dict, path, tag=tag, metadata=metadata)
        return SaveHandle(self._runtime, save)

    async def staged(self, tag: str | None = None) -> None:
        """Returns when all that was saved (in `tag`) has been copied.

        Raises:
            CheckpointError: What failed in the background.
            EngineStateError: The tag is not open.

        If cancelled: only the waiting ends; the tag stays open.
        """
        start = perf_counter()
        try:
            await self._runtime.spawn(self._runtime.staged(tag)).wait()
        finally:
            self._runtime.add_stall(tag, perf_counter() - start)

    def wait_staged(self) -> None:
        """Blocks the calling thread until all that is being staged has been.

        For code that changes tensors by other means than a torch optimizer. Errors
        are left to `commit`.

        Raises:
            EngineStateError: Called on the engine's own thread.
        """
        self._runtime.wait_staged()

    async def commit(self, tag: str) -> CommitReport:
        """Makes a tag durable under its name, atomically, and moves `latest` to it.

        Raises:
            CheckpointError: What failed, in the background or now. Nothing is
                published, and the tag can be created again.
            EngineStateError: The tag is not open, or nothing was saved in it.

        If cancelled: before publishing has begun the tag stays open; after that, it is
        published first, and the cancellation carries a note that says so.
        """
        return await self._runtime.spawn(self._runtime.commit(tag)).wait()

    async def abort(self, tag: str) -> None:
        """Drops an open tag: nothing is published and nothing stays on the disk.

        Raises:
            EngineStateError: The tag is not open, or was published meanwhile.

        If cancelled: what was begun is finished first.
        """
        await self._runtime.spawn(self._runtime.abort(tag)).wait()

    async def load(  # noqa: PLR0913 - the contract's signature
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
        """Loads one file of a published tag, verified.

        The memory of loaded tensors is ordinary, except that their storages cannot be
        resized in place, as with `torch.load(mmap=True)`.

        Args:
            path: The file, relative to the tag (or absolute, inside a tag).
            map_location: Where tensors go, in every form that `torch.load` takes.
            tag: The tag; by default the latest published.
            weights_only: Whether code from the file is refused (it is by default).
            verify: Whether every checksum is checked before data is returned: each
                record's, and, where the whole file is read, the file's against the
                manifest. Without it, a flipped bit is loaded as it stands.
            into: Nested mappings, lists and tuples of tensors, or modules and
                optimizers (which stand for their state dicts), filled in place. Each
                tensor of the file must have one of the same key path, dtype and
                shape, and back; else nothing is changed, and the error lists all
                misfits. Contiguous host memory is filled by way of the ring; a target
                of another kind costs its size in memory for a moment. Where the file
                turns out to be corrupt, the targets' content is undefined. The result
                is what was saved, with the targets in it: an optimizer's numbers (its
                learning rate) are there, and not in the optimizer.
            keys: Key paths of tensors or globs over them (`model.layers.0.*`): only
                these are read, and the result is a dict of tensors by key path.
            mmap: Whether tensors are mapped from the file instead of read (and, since
                nothing is read, not verified).
            strict: False leaves out what has no counterpart in `into` or in the file,
                with a warning in the log, as `load_state_dict` does; dtypes and shapes
                must fit all the same. The result is the filled tensors by key path.

        Raises:
            CheckpointNotFoundError: No such tag or file; the message lists what is.
            CorruptCheckpointError: The bytes are not those that were written.
            InvalidArgumentError: `into` does not match, or arguments clash.

        If cancelled: reading ends soon, nothing is returned, and no target is written
        to any more.
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
        return await self._runtime.spawn(self._runtime.load(path, tag, options)).wait()

    async def load_latest_valid(
        self,
        *paths: str,
        map_location: Any = None,
        weights_only: bool = True,
        into: Any = None,
        keys: Sequence[str] | None = None,
        strict: bool = True,
    ) -> tuple[str, list[Any]]:
        """Loads files of the newest tag in which all of them are sound.

        `load` never takes another tag than the one that is asked for. This does: it
        begins with the latest, and goes back over tags of which a file is corrupt or
        missing, with a warning in the log that says why.

        Args:
            paths: The files, relative to the tag. All come from one tag.
            map_location: As for `load`; so are the others.
            weights_only: As for `load`.
            into: As for `load`; for one path only.
            keys: As for `load`; the same for all files.
            strict: As for `load`.

        Returns:
            The tag, and what was saved in each of the files.

        Raises:
            CheckpointNotFoundError: No tag is left, and why for each; or a key names
                nothing, for which no older tag is tried.
            StorageError: The file system refused. This says nothing about the tag, so
                no older one is taken.
            InvalidArgumentError: As `load`; no older tag is tried.
            UnsafePickleError: As `load`; no older tag is tried.

        If cancelled: as `load`.
        """
        options = LoadOptions(
            map_location=map_location,
            weights_only=weights_only,
            into=into,
            keys=keys,
            strict=strict,
        )
        work = self._runtime.load_latest_valid(paths, options)
        return await self._runtime.spawn(work).wait()

    def open(
        self,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
        map_location: Any = None,
        weights_only: bool = True,
        verify: bool = True,
    ) -> CheckpointFile:
        """A file of a published tag, to be read tensor by tensor.

        `async with engine.open("model.pt") as file:`; arguments as those of `load`.
        """
        options = LoadOptions(
            map_location=map_location, weights_only=weights_only, verify=verify
        )
        return CheckpointFile(self._runtime.access(path, tag, options))

    async def latest(self) -> str | None:
        """The tag to resume from; None where nothing is published.

        If cancelled: only the waiting ends.
        """
        return await self._runtime.spawn(self._runtime.latest()).wait()

    async def tags(self) -> list[TagInfo]:
        """The published tags, oldest first.

        If cancelled: only the waiting ends.
        """
        return await self._runtime.spawn(self._runtime.tags()).wait()

    async def delete(self, tag: str) -> None:
        """Unpublishes a tag, durably, then removes its files.

        Raises:
            CheckpointNotFoundError: No such tag.

        If cancelled: what was begun is finished first.
        """
        await self._runtime.spawn(self._runtime.delete(tag)).wait()

    async def sweep(self) -> list[str]:
        """Removes what dead engines left in the root; their names.

        If cancelled: what was begun is finished first.
        """
        return await self._runtime.spawn(self._runtime.sweep()).wait()

    async def aclose(self) -> None:
        """Ends the engine: commits under way finish, open tags are dropped.

        Idempotent.

        Raises:
            CheckpointError: A failure that no call has reported yet, or a tag that was
                never committed. The engine is closed all the same.

        If cancelled: it is closed first.
        """
        await outlast(self._close())

    async def _close(self) -> None:
        call = self._runtime.begin_close()
        if call is None:
            await self._runtime.ended()
            return
        try:
            untold = await call.wait()
        finally:
            self._runtime.stop()
            await self._runtime.ended()
        raise_untold(untold)
