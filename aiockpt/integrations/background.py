"""Directories that a framework fills, published in the background as tags.

What both the Trainer and accelerate need: their own code writes a checkpoint's files;
here the tensors are captured, the small files are taken along, and the whole is
published, atomically and durably, while training goes on. One at a time: the next
checkpoint waits for the one before it.
"""

__all__ = ["BackgroundTags"]

import contextlib
import copy
import tempfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aiockpt.config import EngineConfig
from aiockpt.errors import CheckpointError, CheckpointNotFoundError, EngineStateError
from aiockpt.formats.plain import PlainBytes
from aiockpt.integrations.forward_state import with_copies
from aiockpt.integrations.handing_over import handed_over
from aiockpt.opening import TagOptions
from aiockpt.runtime import Runtime, raise_untold
from aiockpt.threads import outlast

if TYPE_CHECKING:
    from aiockpt.events import CommitReport
    from aiockpt.loop_thread import Call


class BackgroundTags:
    """The checkpoints of one root. Used from the training thread, by all ranks alike.

    Attributes:
        root: The directory of the tags.
    """

    def __init__(self, root: Path, config: EngineConfig) -> None:
        """Starts an engine; touches no file."""
        self.root = root
        self._runtime = Runtime.start(root, config, None, ())
        self._publishing: Call[CommitReport] | None = None

    @contextlib.contextmanager
    def saving(self, tag: str, changing: Iterable[torch.Tensor] = ()) -> Generator[str]:
        """Within the block, the directory that it gives takes a checkpoint's files.

        On leaving, the tensors have been captured and publishing has begun; a tag of
        that name is replaced.

        Args:
            tag: The name to publish under.
            changing: Tensors that change before the next optimizer step, whatever
                their size (small ones are copied anyway).

        Raises:
            CheckpointError: The checkpoint before failed, or this one cannot be begun.
        """
        self.drain()
        options = TagOptions(is_overwrite=True)
        try:
            self._runtime.run(self._runtime.open_tags.create(tag, options))
            with tempfile.TemporaryDirectory(prefix="aiockpt-") as directory:
                with self._handed_over(directory, tag, list(changing)):
                    yield directory
                self._take_along(Path(directory), tag)
        except BaseException as error:
            self._abort(tag, error)
            failure = error.__cause__
            # A file that has failed makes the tag refuse the next ones.
            if isinstance(error, EngineStateError) and failure is not None:
                raise copy.copy(failure) from failure  # noqa: ASYNC104 - the cause of a refusal is told instead
            raise
        # An interrupted wait for it leaves nothing half done.
        self._publishing = self._runtime.spawn(outlast(self._runtime.commit(tag)))

    @contextlib.contextmanager
    def _handed_over(
        self, directory: str, tag: str, changing: Iterable[torch.Tensor]
    ) -> Generator[None]:
        def save(
            state: object, path: str, metadata: Mapping[str, str] | None
        ) -> object:
            copied = with_copies(state, changing)
            return self._runtime.save(copied, path, tag=tag, metadata=metadata)

        with handed_over(directory, save):
            yield

    def _take_along(self, directory: Path, tag: str) -> None:
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                data = PlainBytes.of(file.read_bytes())
                path = file.relative_to(directory)
                self._runtime.save(data, path, tag=tag, metadata=None)

    def _abort(self, tag: str, error: BaseException) -> None:
        try:
            self._runtime.run(self._runtime.open_tags.abort_if_open(tag))
        except CheckpointError as lost:
            error.add_note(f"and on dropping tag {tag!r}: {lost}")

    def drain(self) -> None:
        """Returns when the checkpoint under way, if any, is published.

        Raises:
            CheckpointError: It failed, on this rank or another.
        """
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.result()

    def tags(self) -> list[str]:
        """The published tags, oldest first."""
        infos = self._runtime.run(self._runtime.tags())
        return [info.tag for info in infos]

    def delete(self, tags: Iterable[str]) -> None:
        """Removes published tags, but for what is gone already or is being read."""
        for tag in tags:
            with contextlib.suppress(CheckpointNotFoundError, EngineStateError):
                self._runtime.run(self._runtime.delete(tag))

    def close(self) -> None:
        """Drains, and ends the engine.

        Raises:
            CheckpointError: What went wrong and was not told yet.
        """
        try:
            self.drain()
        finally:
            untold = self._end()
        raise_untold(untold)

    def _end(self) -> list[CheckpointError]:
        call = self._runtime.begin_close()
        assert call is not None
        try:
            return call.result()
        finally:
            self._runtime.stop()
            self._runtime.join()
