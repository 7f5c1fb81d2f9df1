"""Meta's torch_checkpointing: staged by a thread, written by a process."""

__all__ = ["Managed"]

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from bench.contenders.base import Contender, Options, Saving, State, sync_tree

# Its process imports torch; on a busy machine that takes longer than its default.
_INIT_S = 120


class Managed(Contender):
    """`CheckpointManager`; without a GPU, set as its documentation says for that."""

    name = "torch_checkpointing + fsync"
    durability = (
        "fsync of files and directories added; it does none. Its direct writes, which "
        "are its default, fail on ext4 (EINVAL) and are turned off"
    )
    package = "torch_checkpointing"
    modules = (
        "torch_checkpointing",
        "torch_checkpointing.checkpoint_process",
        "torch_checkpointing.storage.filesystem",
    )

    @override
    def setup(self, directory: Path, options: Options) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().setup(directory, options)
        has_gpu = torch.cuda.is_available()
        staging = CheckpointStagerConfig(
            use_pinned_memory=has_gpu, use_non_blocking_copy=has_gpu
        )
        saver = AsyncCheckpointSaverConfig(
            staging_config=staging,
            process_config=CheckpointProcessConfig(
                subprocess_init_timeout_secs=_INIT_S
            ),
        )
        self._manager = CheckpointManager.Config(
            save=saver,
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()
        # It starts a process, which is still importing torch: not in a measured time.
        self._manager._saver._checkpoint_process.wait_for_init()  # noqa: SLF001
        self._is_warm = False

    @override
    def begin_training(self, state: State) -> None:
        if not self._is_warm:
            self._manager.prewarm_staging({"state": dict(state)})
            # The next save would wait for it.
            self._manager._prewarm_staging_future.result()  # noqa: SLF001
            self._is_warm = True

    @override
    def open_tag(self, tag: str) -> None:
        """It renames a directory to the tag's name, which must be free."""

    @override
    def save(self, state: State, tag: str) -> Saving:
        path = self.directory / tag
        done = self._manager.save(str(path), {"state": dict(state)})
        return _Writing(self._manager, done, path)

    @override
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        path = str(self.directory / tag)
        targets = like if is_in_place else {k: torch.empty_like(like[k]) for k in like}
        item = {"state": dict(targets)}
        loaded: Mapping[str, Any] = self._manager.load(path, item)["state"]
        return loaded

    @override
    def teardown(self) -> None:
        self._manager.close()


@dataclass(frozen=True)
class _Writing(Saving):
    manager: Any
    done: Any
    path: Path

    @override
    def wait_staged(self) -> None:
        with self.manager.lock():
            pass

    @override
    def wait_durable(self) -> dict[str, float]:
        self.done.result()
        sync_tree(self.path)
        return {}
