"""Single files, each saved beside its path and published at it by a rename.

So the path holds the old file or the new one, whole, whatever happens meanwhile.
"""

__all__ = ["SingleFile", "SingleFiles"]

import logging
import os
import secrets
from collections.abc import Mapping

from aiockpt.capture import capture
from aiockpt.errors import CheckpointError, InvalidArgumentError
from aiockpt.file_save import FileSave
from aiockpt.loop_thread import Call
from aiockpt.machinery import Machinery
from aiockpt.threads import outlast, run_blocking
from aiockpt.weights import or_weights

_logger = logging.getLogger(__name__)


class SingleFile:
    """One file on its way to its path.

    Made on any thread; its coroutines run on the engine's loop. `write` comes first,
    once; then `publish` or `discard`.

    Attributes:
        path: Where it is to be, absolute.
        progress: Bytes planned, staged and written.
    """

    def __init__(
        self,
        state: object,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Captures `state`; its tensors must not change until they are staged.

        Raises:
            InvalidArgumentError: No name for a file, or state that cannot be captured.
        """
        text = os.fspath(path)
        self._directory, name = os.path.split(os.path.abspath(text))  # noqa: PTH100
        if not name or not text or text.endswith("/"):
            raise InvalidArgumentError(f"{text!r} does not name a file")
        self.path = f"{self._directory}/{name}"
        state, metadata = or_weights(state, name, metadata)
        self._save = FileSave("", name, capture(state), metadata)
        self._temporary = f".{name}.{secrets.token_hex(8)}"
        self.progress = self._save.progress

    def start(self, machinery: Machinery) -> Call[None]:
        """Begins to stage and write; from any thread, without waiting."""
        self.enter(machinery)
        try:
            return machinery.spawn(self.write())
        except BaseException:
            machinery.gate.leave(self._save)
            raise

    def enter(self, machinery: Machinery) -> None:
        """From now on `machinery` keeps optimizers away until all is staged."""
        self._machinery = machinery
        self._storage = machinery.storage(self._directory)
        machinery.saver(self._storage).enter(self._save)

    async def write(self) -> None:
        """Makes the file complete and durable, under a temporary name.

        Raises:
            CheckpointError: What failed. Nothing is left of the file.

        If cancelled: as if it had failed.
        """
        saver = self._machinery.saver(self._storage)
        save = self._save
        try:
            try:
                await saver.run(save, self._temporary, 0)
            finally:
                await saver.release(save)
        except BaseException as error:
            save.error = (
                error
                if isinstance(error, CheckpointError)
                else CheckpointError(f"{self.path} was not finished: {error!r}")
            )
            await self._clean_up()
            raise
        finally:
            save.written.set()

    async def staged(self) -> None:
        """Returns when every tensor has been copied, or raises why none will be.

        If cancelled: only the waiting ends.
        """
        await self._save.staged.wait()
        self._raise_error()

    async def written(self) -> None:
        """Returns when `write` has ended; raises what it raised.

        If cancelled: only the waiting ends.
        """
        await self._save.written.wait()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._save.error is not None:
            raise self._save.error

    async def publish(self) -> None:
        """Puts the written file at its path, durably, in the place of any other.

        Raises:
            CheckpointError: What failed. What was at the path is still there, unless
                the last step failed: then it is the new file, which a power cut may
                take back.

        If cancelled: before the file is written, nothing is published; else it is
        finished first.
        """
        await self.written()
        try:
            await outlast(self._replace())
        except BaseException:
            await self._clean_up()
            raise

    async def _replace(self) -> None:
        clerks = self._machinery.clerks
        name = self._save.path
        await run_blocking(clerks, self._storage.replace, self._temporary, name)
        await run_blocking(clerks, self._storage.sync_dir, "")

    async def discard(self) -> None:
        """Removes the file, once it has been written, instead of publishing it.

        If cancelled: the temporary file may stay.
        """
        await self._save.written.wait()
        await self._remove()

    async def _clean_up(self) -> None:
        """Removes the file, whose failure is the one to tell of."""
        try:
            await outlast(self._remove())
        except CheckpointError as error:
            _logger.warning("%s: a part of it remains: %s", self.path, error)

    async def _remove(self) -> None:
        machinery = self._machinery
        await run_blocking(machinery.clerks, self._storage.remove, self._temporary)


class SingleFiles:
    """Saves single files in the background, with the parts that it is given."""

    def __init__(self, machinery: Machinery) -> None:
        """Owns nothing."""
        self._machinery = machinery

    def save(
        self,
        state: object,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
    ) -> SingleFile:
        """Captures `state` and begins to write it; from any thread.

        Somebody must `publish` or `discard` the result.

        Raises:
            InvalidArgumentError: As `SingleFile`.
            EngineStateError: The machinery has been stopped.
        """
        file = SingleFile(state, path, metadata)
        file.start(self._machinery)
        return file
