"""Checkpoints of Lightning, written while training goes on.

    Trainer(plugins=[AiockptCheckpointIO()])

The files are those that Lightning writes itself: any version of it resumes from them.
"""

__all__ = ["AiockptCheckpointIO"]

import contextlib
import importlib
import logging
import os
import shutil
from collections.abc import Callable, Coroutine, Mapping
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from aiockpt.config import EngineConfig
from aiockpt.errors import CheckpointError, InvalidArgumentError
from aiockpt.integrations.forward_state import with_copies
from aiockpt.integrations.holding import hold
from aiockpt.loop_thread import Call
from aiockpt.machinery import Machinery
from aiockpt.onefile import load_blocking
from aiockpt.single_files import SingleFiles
from aiockpt.threads import outlast, run_blocking

_logger = logging.getLogger(__name__)

# Callbacks of Lightning's own that average weights, and what of theirs writes averages
# to the model, or the model to averages, behind a save.
_AVERAGING = {
    "WeightAveraging": (
        "_swap_models",
        "_copy_average_to_current",
        "on_train_epoch_end",
    ),
    "StochasticWeightAveraging": ("update_parameters", "transfer_weights"),
}


class AiockptCheckpointIO:
    """A `CheckpointIO` whose saves return once the state has been captured.

    A file appears at its path complete and on stable storage, or not at all. What is
    asked for happens in the order of the calls: a checkpoint is removed when those
    saved before that are published, and not at all if one of them failed. A failure
    is raised by the next call; `teardown`, at the end of `fit`, waits for everything.
    What is saved after that is finished before the interpreter exits.

    Torch optimizers wait in `step` until all has been copied, and so do Lightning's
    callbacks that average weights. Tensors that change without these, in the forward
    pass or in a hook of yours, are copied at once if they are small (64 KiB). Who
    changes a larger one calls `wait_staged` first, or the save fails with
    `TornSnapshotError`; not even that where it is changed through `.data`.

    With `save_last="link"` the link may point to a file that is not there yet.
    Strategies that save shards by themselves (FSDP sharded, DeepSpeed, XLA) never call
    a `CheckpointIO`.
    """

    def __init__(
        self, config: EngineConfig | Mapping[str, object] | None = None
    ) -> None:
        """Starts nothing yet; may be sent to another process until it saves.

        Args:
            config: An `EngineConfig` or a mapping of its fields; `retention` is
                Lightning's business.
        """
        self._config = EngineConfig.parse(config)
        self._machinery: Machinery | None = None
        self._last: Call[None] | None = None
        self._failure: Exception | None = None
        self._at_exit: Finalize[None] | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,
    ) -> None:
        """Captures `checkpoint` and begins to write it; `path` is replaced when done.

        Raises:
            InvalidArgumentError: A path that is no local file, storage options, or a
                state that cannot be captured.
            CheckpointError: An earlier call failed; nothing was saved by this one.
        """
        target = _local(path)
        if storage_options is not None:
            raise InvalidArgumentError("storage_options are not supported")
        self._raise_failure()
        machinery = self._started()
        if not target.parent.is_dir():
            # At once: Lightning makes links in it. Its entry is made durable, too.
            storage = machinery.storage(f"{target.parent}")
            machinery.run(_blocking(machinery, storage.make_dirs, ""))
        file = SingleFiles(machinery).save(with_copies(checkpoint), target)
        self._then(file.publish)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,  # noqa: FBT001 - Lightning's signature
    ) -> Any:
        """What a file holds, verified, once all that was asked for has been done.

        Args:
            path: A local file: aiockpt's, or of `torch.save`.
            map_location: As for `torch.load`; the CPU by default.
            weights_only: As for `torch.load`; None is True.

        Raises:
            CheckpointError: An earlier call failed.
            CheckpointNotFoundError: No such file.
            CorruptCheckpointError: It is no checkpoint, or damaged.
        """
        target = _local(path)
        self._drain()
        self._raise_failure()
        where = "cpu" if map_location is None else map_location
        return load_blocking(target, where, weights_only=weights_only is not False)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes a file once all that was asked for before has been done.

        Nothing is removed if that failed. Failing itself, it only warns.

        Raises:
            InvalidArgumentError: A path that is not local.
        """
        target = _local(path, is_file=False)
        machinery = self._started()
        self._then(lambda: self._remove(machinery, target))

    def wait_staged(self) -> None:
        """Blocks until what is being saved has been copied and may be changed."""
        if self._machinery is not None and not self._machinery.is_forked:
            self._machinery.gate.wait()

    def teardown(self) -> None:
        """Waits for everything and ends the threads; a later save starts them again.

        Raises:
            CheckpointError: A save failed that no call has told of.
        """
        self._drain()
        machinery, self._machinery = self._machinery, None
        if machinery is not None and not machinery.is_forked:
            machinery.stop()
            machinery.join()
        if self._at_exit is not None:
            self._at_exit.cancel()
            self._at_exit = None
        self._raise_failure()

    # --- in order -------------------------------------------------------------

    def _started(self) -> Machinery:
        if self._machinery is None or self._machinery.is_forked:
            # What a parent process had under way is finished there.
            self._last = self._failure = None
            self._machinery = Machinery(self._config)
            # Unlike what `atexit` calls, called in worker processes as well.
            self._at_exit = Finalize(None, _finish, args=(self,), exitpriority=0)
        return self._machinery

    def _then(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        # An interrupted wait leaves nothing half done.
        work_in_turn = outlast(self._after(self._last, work))
        self._last = self._started().spawn(work_in_turn)

    async def _after(
        self, before: Call[None] | None, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        if before is not None:
            await before.ended()
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - raised by the next call
            self._failure = self._failure or error

    async def _remove(self, machinery: Machinery, target: Path) -> None:
        if self._failure is not None:
            return
        try:
            await _blocking(machinery, _remove, target)
            storage = machinery.storage(f"{target.parent}")
            await _blocking(machinery, storage.sync_dir, "")
        except OSError as error:
            _logger.warning("checkpoint %s remains: %s", target, error)

    def _drain(self) -> None:
        if self._machinery is None or self._machinery.is_forked:
            return
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        # What was asked for before it is raised must still see it.
        self._drain()
        failure, self._failure = self._failure, None
        raise failure


async def _blocking(
    machinery: Machinery, work: Callable[..., object], *args: object
) -> None:
    await run_blocking(machinery.clerks, work, *args)


def _local(path: str | os.PathLike[str], *, is_file: bool = True) -> Path:
    text = os.fspath(path)
    if "://" in text:
        raise InvalidArgumentError(f"{text!r} is not a path of a local file system")
    target = Path(text).absolute()
    if is_file and target.is_dir():
        raise InvalidArgumentError(f"{text!r} is a directory, not one file")
    return target


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def _finish(io: AiockptCheckpointIO) -> None:
    """Finishes what is under way when the process ends, and says what was lost."""
    try:
        io.teardown()
    except CheckpointError:
        _logger.exception("a checkpoint was lost at exit")


def _register() -> None:
    """Lets each Lightning that is installed know the class: it has two names."""
    found = []
    for name in ("lightning.fabric.plugins", "lightning_fabric.plugins"):
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            continue
    if not found:
        text = "Lightning's checkpoints need it: pip install aiockpt[lightning]"
        raise ImportError(text)
    for module in found:
        module.CheckpointIO.register(AiockptCheckpointIO)
    for name in ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks"):
        # Fabric may be there without them.
        with contextlib.suppress(ImportError):
            callbacks = importlib.import_module(name)
            for kind, methods in _AVERAGING.items():
                hold(getattr(callbacks, kind, None), *methods)


_register()
