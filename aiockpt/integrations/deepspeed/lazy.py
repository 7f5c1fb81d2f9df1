"""The checkpoint engine of a `DeepSpeedEngine`: what it saves is committed later on.

DeepSpeed hands all files of a tag over in one call of `save_checkpoint`. From then on
the commit runs in the background, over as many steps as it needs. Nobody waits for it,
so whatever fails is kept, and raised by the next call, on all ranks alike.
"""

__all__ = ["LazyCheckpointEngine"]

import contextlib
import logging
import traceback
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from typing_extensions import override

from aiockpt.errors import CheckpointError, EngineStateError, PeerError
from aiockpt.integrations.deepspeed.facade import CheckpointEngine, CommitInfo
from aiockpt.integrations.deepspeed.open_tags import OpenTag, refuse
from aiockpt.integrations.forward_state import with_copies
from aiockpt.loop_thread import Call
from aiockpt.runtime import raise_untold

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _HandingOver:
    """One call of `save_checkpoint`.

    Attributes:
        buffers: Tensors that a forward pass may change.
        tag: What was opened.
        refusal: Why it could not be opened; the same on all ranks.
    """

    buffers: Sequence[torch.Tensor]
    tag: OpenTag | None = None
    refusal: CheckpointError | None = None

    def fail(self, error: Exception) -> None:
        """Has the commit tell all ranks what failed on this one.

        Raised here, it would leave the others waiting at DeepSpeed's next barrier.
        """
        tag = self.tag
        # Without a tag there is a refusal, or there will be one.
        if tag is not None:
            # Frames that hold the state would hold it until somebody is told.
            traceback.clear_frames(error.__traceback__)
            tag.failure = tag.failure or _as_checkpoint_error(error, tag.tag)


@dataclass(slots=True)
class _Commit:
    """A commit in the background.

    Attributes:
        tag: What is committed.
        is_published: Whether it has ended well.
        error: Why it failed, once it has.
        call: Ends with it; never raises.
    """

    tag: OpenTag
    is_published: bool = False
    error: CheckpointError | None = None
    call: Call[None] | None = None


class LazyCheckpointEngine(CheckpointEngine):
    """As `CheckpointEngine`, with commits in the background within `handing_over`.

    Every method is called by all ranks of a job, in the same order; `load` need not be.
    """

    def __init__(self, config_params: object = None) -> None:
        """Starts nothing yet; see `CheckpointEngine`."""
        super().__init__(config_params)
        self._handing_over: _HandingOver | None = None
        # By a number that is the same on all ranks: those that may not have ended, or
        # whose failure nobody was told of.
        self._commits: dict[int, _Commit] = {}
        self._num_commits = 0

    # --- saving ---------------------------------------------------------------

    @contextlib.contextmanager
    def handing_over(self, buffers: Iterable[torch.Tensor]) -> Generator[None]:
        """What is saved within is committed in the background after it.

        Args:
            buffers: Tensors that change before the next optimizer step: of those, what
                is saved is copied at once.

        Raises:
            CheckpointError: An earlier commit failed, and nobody was told so far; or
                the tag could not be opened. The same on all ranks; except where a
                rank does not reach the others, or cannot have its ring.
        """
        self._raise_failures()
        handing_over = self._handing_over = _HandingOver(list(buffers))
        try:
            yield
        except BaseException as error:
            if handing_over.tag is not None:
                # The other ranks may have handed it over.
                self._num_commits += 1
                self._roots.run(self._drop_alone(handing_over.tag, error))
            raise
        finally:
            self._handing_over = None
            if handing_over.tag is not None:
                self._tags.remove(handing_over.tag)
        # Only now: what DeepSpeed calls in between is collective.
        if handing_over.refusal is not None:
            raise handing_over.refusal
        if handing_over.tag is not None:
            self._begin_commit(handing_over.tag)

    @contextlib.contextmanager
    def or_told(self) -> Generator[None]:
        """What is opened within and not committed, since this rank fails, fails on all.

        The others may wait in `commit` already.
        """
        known = list(self._tags)
        try:
            yield
        except BaseException as error:
            for tag in [each for each in self._tags if each not in known]:
                self._tags.remove(tag)
                self._roots.run(self._drop_alone(tag, error))
            raise

    @override
    def create(self, info: str | CommitInfo) -> None:
        """As `CheckpointEngine.create`; what failed since the last call is raised."""
        handing_over = self._handing_over
        if handing_over is None:
            self._raise_failures()
            self._wait(self._commits)
            super().create(info)
            return
        name = info if isinstance(info, str) else info.tag
        self._wait([n for n, each in self._commits.items() if each.tag.tag == name])
        try:
            super().create(info)
        except CheckpointError as error:
            handing_over.refusal = error
        else:
            handing_over.tag = self._tags[-1]

    @override
    def save(self, state_dict: object, path: str) -> None:
        """As `CheckpointEngine.save`; within `handing_over` the commit tells failures."""
        handing_over = self._handing_over
        if handing_over is None:
            super().save(state_dict, path)
        elif handing_over.tag is not None:
            try:
                super().save(with_copies(state_dict, handing_over.buffers), path)
            except EngineStateError as error:
                # Refused for what failed before, it is not what failed.
                if not isinstance(error.__cause__, CheckpointError):
                    handing_over.fail(error)
            except Exception as error:  # noqa: BLE001 - told by the commit
                handing_over.fail(error)

    @override
    def commit(self, info: str | CommitInfo) -> bool:
        """As `CheckpointEngine.commit`; within `handing_over`, when that is left."""
        return self._handing_over is not None or super().commit(info)

    @override
    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As `CheckpointEngine.makedirs`.

        Within `handing_over` a directory is DeepSpeed's own wish: `create` makes, or
        refuses on all ranks, those that a checkpoint needs.
        """
        try:
            super().makedirs(path, exist_ok)
        except OSError as error:
            if self._handing_over is None:
                raise
            _logger.warning("%s could not be made: %s", path, error)

    @contextlib.contextmanager
    def alone(self) -> Generator[None]:
        """Within `handing_over`: what one rank does while others wait for it.

        What the file system refuses is told by the commit.
        """
        try:
            yield
        except OSError as error:
            if self._handing_over is None:
                raise
            self._handing_over.fail(error)

    def _begin_commit(self, tag: OpenTag) -> None:
        for number, commit in list(self._commits.items()):
            if commit.is_published:
                del self._commits[number]
        commits = self._commits.values()
        running = [each.call for each in commits if each.call is not None]
        commit = _Commit(tag)
        commit.call = self._roots.machinery.spawn(self._run(commit, running[-1:]))
        self._commits[self._num_commits] = commit
        self._num_commits += 1

    async def _run(self, commit: _Commit, previous: Sequence[Call[None]]) -> None:
        # One after the other: `latest` must end at the last one.
        await _ended(previous)
        tag = commit.tag
        try:
            await self._commit(tag)
            commit.is_published = True
        except Exception as error:  # noqa: BLE001 - raised by the next call
            # That may be far away, or never come.
            _logger.warning("the commit of tag %s failed: %s", tag.tag, error)
            commit.error = _as_checkpoint_error(error, tag.tag)

    async def _drop_alone(self, tag: OpenTag, error: BaseException) -> None:
        """Drops a tag that this rank will not commit, and tells those who will."""
        told = error if isinstance(error, Exception) else RuntimeError("interrupted")
        await refuse(self._roots.ranks, tag.tag, told)
        await self._drop(tag)
        for root in tag.runtimes:
            await self._roots.leave(root)

    # --- waiting --------------------------------------------------------------

    @property
    def is_staging(self) -> bool:
        """Whether tensors are being copied that must not change, nor be freed."""
        return self._started is not None and self._started.machinery.gate.is_staging

    def wait_staged(self, *, is_freeing: bool = False) -> None:
        """Blocks until all that is being staged has been: tensors may change again.

        Args:
            is_freeing: Whether memory is to be given back, for which it waits also
                where the user has turned the guard off.
        """
        if self._started is not None and (self.config.guard or is_freeing):
            self._started.machinery.gate.wait()

    def drain(self) -> None:
        """Blocks until every commit has ended.

        Raises:
            CheckpointError: The first that failed, the others as notes.
        """
        numbers = list(self._commits)
        self._wait(numbers)
        self._raise_those(numbers)

    def _wait(self, numbers: Iterable[int]) -> None:
        commits = [
            self._commits[number] for number in numbers if number in self._commits
        ]
        calls = [each.call for each in commits if each.call is not None]
        if calls:
            # Not `result` of each: interrupted, that would break the commit off.
            self._roots.run(_ended(calls))

    def _raise_failures(self) -> None:
        """Raises what any rank knows to have failed: others may not have heard of it.

        The first time, it shows that all ranks can be reached, before any of them is in
        one of DeepSpeed's collectives.
        """
        numbers = self._roots.run(self._failed_anywhere())
        self._wait(numbers)
        self._raise_those(numbers)
        if numbers:
            raise PeerError("an earlier commit failed on another rank")

    async def _failed_anywhere(self) -> list[int]:
        failed = [n for n, each in self._commits.items() if each.error is not None]
        word = msgspec.json.encode(failed)
        verdict = await self._roots.ranks.consult("failures", word, _unite)
        return msgspec.json.decode(verdict, type=list[int])

    def _raise_those(self, numbers: Sequence[int]) -> None:
        ended = [self._commits.pop(n) for n in numbers if n in self._commits]
        raise_untold([each.error for each in ended if each.error is not None])

    @override
    def is_decoupled(self) -> bool:
        """Whether DeepSpeed must not commit by itself: `handing_over` has seen to it."""
        return True

    @override
    def cleanup(self) -> None:
        """Drains, as a `DeepSpeedEngine` that is destroyed must.

        Raises:
            CheckpointError: As `drain`.
        """
        self.drain()

    @override
    def close(self) -> None:
        """Drains, then ends the engine.

        Raises:
            CheckpointError: As `drain`.
        """
        try:
            if self._started is not None and not self._started.machinery.is_forked:
                self.drain()
        finally:
            super().close()


async def _ended(calls: Sequence[Call[None]]) -> None:
    for call in calls:
        await call.ended()


async def _unite(words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
    told = [msgspec.json.decode(word, type=list[int]) for word in words]
    return msgspec.json.encode(sorted({number for each in told for number in each}))


def _as_checkpoint_error(error: Exception, tag: str) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    wrapped = CheckpointError(f"tag {tag}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
