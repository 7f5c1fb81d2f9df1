"""The door for coroutines: `async with CheckpointEngine(root) as engine`."""

__all__ = ["CheckpointEngine", "SaveHandle"]

import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import torch

from aiockpt.access import CheckpointFile
from aiockpt.config import EngineConfig
from aiockpt.deadline import TimedSave
from aiockpt.errors import CheckpointError
from aiockpt.events import CommitReport, Observer, Progress
from aiockpt.file_save import FileSave
from aiockpt.formats.plain import PlainBytes
from aiockpt.loader import LoadOptions
from aiockpt.loop_thread import Call
from aiockpt.manifest import TagInfo
from aiockpt.opening import TagOptions
from aiockpt.preflight import PreflightReport
from aiockpt.ranks.base import Ranks
from aiockpt.runtime import Runtime, raise_untold
from aiockpt.sharding import MAX_SHARD_BYTES, sharded
from aiockpt.threads import outlast
from aiockpt.watching import TagWatch


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
        """Returns when every tensor of this file may be changed again.

        It has been copied, or else what the calling thread enqueues on its current
        CUDA streams from now on waits for the copies, on the device.

        Raises:
            CheckpointError: Why it never will be.

        If cancelled: only the waiting ends.
        """
        runtime = self._runtime
        await _follow(runtime, runtime.spawn(runtime.open_tags.save_staged(self._save)))

    async def written(self) -> None:
        """Returns when the file is complete and durable; not yet published.

        Raises:
            CheckpointError: Why it never will be.

        If cancelled: only the waiting ends.
        """
        work = self._runtime.open_tags.save_written(self._save)
        await self._runtime.spawn(work).wait()


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
            ranks: How this process agrees with others; by default, where
                `torch.distributed` is initialised by now, as one rank of that job.
            observers: Called with each event, on the engine's thread.

        Raises:
            InvalidArgumentError: The configuration is wrong.
        """
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

    async def __aenter__(self) -> Self:
        """Sweeps what dead processes left in the root."""
        try:
            await self._runtime.spawn(self._runtime.sweep_at_start()).wait()
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

    async def preflight(self, state: object = None) -> PreflightReport:
        """Does a tiny save, load and removal, so that what is wrong shows before step 1.

        Nothing of it is seen by readers, `latest` and observers.

        Args:
            state: What is going to be saved; whether it can be, and whether there is
                room for it, is told as well, and the ring takes the memory from the
                system that its save will need (pinned, where a device has the state),
                which may take seconds: its first save is then as quick as any other.
                None of its bytes is read. Where Python collects garbage by itself, it
                is collected here, once.

        Returns:
            What the first save will meet, with warnings.

        Raises:
            StorageError: What was refused, where, and what to do about it: no space,
                no rights, a read-only file system, a call that it does not have, too
                few file descriptors.
            InvalidArgumentError: The state cannot be saved.
            CorruptCheckpointError: What is read is not what was written.

        If cancelled: what was made is removed first.
        """
        return await self._runtime.preflight(state).wait()

    async def create(self, tag: str, *, overwrite: bool = False) -> None:
        """Opens a tag for saving; readers see nothing of it until `commit`.

        An open tag of which a call has told that it failed is dropped for it.

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
        options = TagOptions(is_overwrite=overwrite)
        await self._runtime.spawn(self._runtime.open_tags.create(tag, options)).wait()

    async def save(
        self,
        state_dict: object,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
        metadata: Mapping[str, str] | None = None,
        replicated: bool | Iterable[int] = False,
    ) -> SaveHandle:
        """Captures `state_dict` and enqueues it as a file of an open tag.

        Non-tensor values are copied now. Tensors are copied in the background and
        must not change until `staged` returns; torch optimizers see to that by
        themselves.

        Args:
            state_dict: Anything that `torch.save` takes; for a `.safetensors` path, a
                flat dict of dense tensors, or a module, which stands for its weights
                (tied ones are written once, under the name that readers expect).
            path: The file, relative to the tag. Its suffix picks the container.
            tag: An open tag; by default the one that was created last.
            metadata: Text for a `.safetensors` header.
            replicated: For state that is identical on several ranks: they write one
                file together, each a part of it. True for all ranks, or the ranks of a
                group; all of its members make the same call. Their tensors' bytes are
                not compared, everything else is. Needs a file system that they share.

        Raises:
            InvalidArgumentError: A bad path or group, a path saved before, or a value
                that cannot be pickled (its key path is named).
            EngineStateError: No such open tag, or it has failed; or a load is filling a
                tensor of the state (`into`).
            StagingError: A tensor is on a device that cannot be used.

        If cancelled: the call does not suspend, so it is done or was never made.
        """
        save = self._runtime.save(
            state_dict, path, tag=tag, metadata=metadata, replicated=replicated
        )
        return SaveHandle(self._runtime, save)

    async def save_sharded(
        self,
        state_dict: torch.nn.Module | Mapping[str, torch.Tensor],
        *,
        directory: str = "",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        tag: str | None = None,
    ) -> list[SaveHandle]:
        """Captures weights and enqueues them as Hugging Face's readers expect them.

        That is one `model.safetensors` where they fit; else several files
        `model-00001-of-00003.safetensors` and `model.safetensors.index.json`.

        Args:
            state_dict: A module, which stands for its weights, or a flat dict of dense
                tensors.
            directory: Where in the tag; by default the tag itself.
            max_shard_bytes: Most bytes of tensors in one file; a larger tensor has a
                file of its own.
            tag: As for `save`.

        Returns:
            A handle for each file, the index last.

        Raises:
            InvalidArgumentError: safetensors cannot hold this (the tensor is named),
                or a path was saved before: files before it are enqueued.
            EngineStateError: As `save`.

        If cancelled: the call does not suspend, so it is done or was never made.
        """
        files = sharded(
            state_dict, directory=directory, max_shard_bytes=max_shard_bytes
        )
        return [
            await self.save(file.state, file.path, tag=tag, metadata=file.metadata)
            for file in files
        ]

    async def save_bytes(
        self,
        data: str | bytes,
        path: str | os.PathLike[str],
        *,
        tag: str | None = None,
    ) -> SaveHandle:
        """Enqueues `data` as a file of an open tag, as it stands; text as UTF-8.

        Raises:
            InvalidArgumentError: A bad path, or a path saved before.
            EngineStateError: As `save`.

        If cancelled: the call does not suspend, so it is done or was never made.
        """
        return await self.save(PlainBytes.of(data), path, tag=tag)

    async def staged(self, tag: str | None = None) -> None:
        """Returns when all that was saved (in `tag`) may be changed again.

        It has been copied, or else what the calling thread enqueues on its current
        CUDA streams from now on waits for the copies, on the device.

        Raises:
            CheckpointError: What failed in the background.
            EngineStateError: The tag is not open.

        If cancelled: only the waiting ends; the tag stays open.
        """
        start = perf_counter()
        try:
            work = self._runtime.open_tags.staged(tag)
            await _follow(self._runtime, self._runtime.spawn(work))
        finally:
            self._runtime.open_tags.add_stall(tag, perf_counter() - start)

    def wait_staged(self) -> None:
        """Blocks the calling thread until all that is being staged may be changed.

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

    def preempt_on(self, *signals: int) -> None:
        """From now on, any of `signals` sets `is_preempted` and ends `preempted`.

        That is all that the handlers do, besides calling those that were there before.
        Closing the engine sets these back, at its end: a signal that comes while the
        last commits are being finished does what it would have done before. Who
        installs a handler later (as `loop.add_signal_handler` does) takes the signal
        away from this one. Called in the main thread.

        Each process is told by itself: several ranks agree on the step of the last save
        first, by an all-reduce of `is_preempted`, say.

        Raises:
            EngineStateError: Called in another thread, or the handler of a signal is
                none of Python's, and could not be set back.
            InvalidArgumentError: No signals, or one that cannot be handled.
        """
        self._runtime.preempt_on(signals)

    @property
    def is_preempted(self) -> bool:
        """Whether one of the signals of `preempt_on` has come."""
        return self._runtime.preemption.is_signalled

    async def preempted(self) -> None:
        """Returns when one of the signals of `preempt_on` has come.

        Raises:
            EngineStateError: `preempt_on` was not called, or the engine was closed.

        If cancelled: only the waiting ends.
        """
        await self._runtime.spawn_last(self._runtime.preemption.signalled()).wait()

    async def save_before(
        self,
        deadline_s: float,
        tag: str,
        files: Mapping[str, object],
        *,
        overwrite: bool = False,
    ) -> CommitReport:
        """Saves and publishes a whole tag within a time, or leaves nothing of it.

        For the time between a signal and the end. The states are captured before this
        first suspends; optimizers wait for their staging as with `save`.

        Args:
            deadline_s: Seconds from now. Publishing that has begun by then is finished.
                Where it has not, the tag's files are removed, which takes a moment more;
                should the process end in it, the next engine removes them.
            tag: The tag, as for `create`.
            files: What to `save`, by path.
            overwrite: As for `create`.

        Raises:
            DeadlineError: The time was over: in which phase, and with how many bytes
                unwritten.
            CheckpointError: Whatever `create`, `save` and `commit` raise; nothing of
                the tag is left either.

        If cancelled: the tag is dropped or, where that is too late, published first; the
        cancellation then carries a note that says so.
        """
        timed = TimedSave(tag, deadline_s)
        options = TagOptions(is_overwrite=overwrite)
        call = self._runtime.save_before(timed, files, options)
        try:
            return await call.wait()
        finally:
            self._runtime.let_go(timed)

    async def abort(self, tag: str) -> None:
        """Drops an open tag: nothing is published and nothing stays on the disk.

        Raises:
            EngineStateError: The tag is not open, or was published meanwhile.

        If cancelled: what was begun is finished first.
        """
        await self._runtime.spawn(self._runtime.open_tags.abort(tag)).wait()

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
                misfits. So it is where two share memory and would not be given the
                same, where a module's state dict has a copy of what the module keeps,
                and where named tuples or other containers hold tensors. As an optimizer
                does in `step`, the load waits until what is being staged has been;
                until it has ended, its targets cannot be saved. Contiguous host memory
                is filled by way of the ring; a target of another kind costs its size
                in memory for a moment. Where the file
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
        work = self._runtime.tag_loader.load(path, tag, options)
        return await self._runtime.spawn(work).wait()

    async def load_bytes(
        self, path: str | os.PathLike[str], *, tag: str | None = None
    ) -> bytes:
        """Returns the bytes of a file of a published tag (by default the latest).

        Raises:
            CheckpointNotFoundError: No such tag or file; the message lists what is.
            CorruptCheckpointError: The bytes are not those that were written.

        If cancelled: reading ends soon, and nothing is returned.
        """
        work = self._runtime.tag_loader.load_bytes(path, tag)
        return await self._runtime.spawn(work).wait()

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
        work = self._runtime.tag_loader.load_latest_valid(paths, options)
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

    def watch(self, after: str | TagInfo | None = None) -> AsyncIterator[TagInfo]:
        """Yields each newly published tag, oldest first, whoever publishes it.

        For readers, in this process or another: `async for info in engine.watch():`.
        A tag that is overwritten was published again, and is yielded again. One that
        is deleted, or replaced, before it could be yielded is left out. Iterate in one
        task; for several, call this for each.

        Nothing stays open between two steps, so a loop may be left at any time. The
        iteration ends when the engine is closed. What other machines publish in a
        network file system is looked for, about once a second.

        Args:
            after: Yields what was published after this tag, first what is there
                already. A `TagInfo` (that was yielded last, say) may be of a tag that
                has been deleted since. By default, what is published after the call,
                which begins to look at once and returns without waiting.

        Raises:
            InvalidArgumentError: Not a usable name.
            EngineStateError: The engine is closed.
            CheckpointNotFoundError: There is no tag `after`; from the first step.
            StorageError: The file system refused, from any step; the next tries again.
                Where it refused to say what is there at the call, every step raises it.

        If cancelled: only the waiting ends; the next step yields what this one did not.
        """
        return TagWatch(self._runtime, after)

    async def wait_for(
        self, tag: str | None = None, *, newer_than: str | TagInfo | None = None
    ) -> TagInfo:
        """The tag to read next, once it is published, whoever publishes it.

        Args:
            tag: Returns once a tag of this name is published; by default any, and
                returns the latest.
            newer_than: Returns only a tag that was published after this one, as for
                `watch`. Together with `tag`: once that has been overwritten.

        Raises:
            InvalidArgumentError: Not a usable name.
            CheckpointNotFoundError: There is no tag `newer_than`.
            EngineStateError: The engine is closed, or was before it happened.

        If cancelled: only the waiting ends.
        """
        return await self._runtime.spawn(self._runtime.wait_for(tag, newer_than)).wait()

    @asynccontextmanager
    async def reading(self, tag: str | None = None) -> AsyncGenerator[TagInfo]:
        """Keeps a published tag (by default the latest) while the block runs.

        `async with engine.reading() as info:`. Meanwhile retention skips the tag, and
        comes back to it after a later commit; `delete` refuses it. This holds for every
        process that uses the same root. The lease is a lock in the root's own
        directory: it ends with the block, the engine or the process, however that ends,
        and binds other machines where the file system's locks do. Should the process
        die while one that it forked inside the block lives, it ends with that one.

        A lease does not keep a tag from being overwritten: what is open then stays
        readable, and what is opened from there on is of the new one.

        Raises:
            CheckpointNotFoundError: No such tag, or nothing is published.
            StorageError: The root cannot be written.

        If cancelled: no lease is left.
        """
        reading = self._runtime.reading(tag)
        try:
            yield await self._runtime.spawn(reading.begin()).wait()
        finally:
            call = self._runtime.end_reading(reading)
            if call is not None:
                await outlast(call.wait())

    async def delete(self, tag: str) -> None:
        """Unpublishes a tag, durably, then removes its files.

        Raises:
            CheckpointNotFoundError: No such tag.
            EngineStateError: Somebody holds a lease on it (see `reading`).

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


async def _follow(runtime: Runtime, staged: Call[Sequence[FileSave]]) -> None:
    """Waits for what is being staged, on the caller's thread as far as need be."""
    rest = runtime.follow(await staged.wait())
    if rest is not None:
        await rest.wait()
