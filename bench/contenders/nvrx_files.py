"""nvidia-resiliency-ext: `torch.save` by a process, of copies that were pinned."""

__all__ = ["Queued"]

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from bench.contenders.base import (
    NO_GPU,
    Options,
    Saving,
    State,
    process_group,
    sync_tree,
)
from bench.contenders.torch_files import Synced

_FILE = "model.pt"


class Queued(Synced):
    """`TorchAsyncCheckpoint`: copies at the call, then a process that it keeps."""

    name = "nvidia-resiliency-ext + fsync"
    durability = (
        "fsync of file and directory added, after its process has ended; it does none"
    )
    package = "nvidia_resiliency_ext"
    modules = ("nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt",)

    @override
    @classmethod
    def missing(cls) -> str | None:
        return super().missing() if torch.cuda.is_available() else NO_GPU

    @override
    def setup(self, directory: Path, options: Options) -> None:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt import (
            TorchAsyncCheckpoint,
        )

        super().setup(directory, options)
        # It asks for its rank.
        self._group = ExitStack()
        self._group.enter_context(process_group())
        self._queue = TorchAsyncCheckpoint()

    @override
    def save(self, state: State, tag: str) -> Saving:
        path = self.directory / tag
        self._queue.async_save(dict(state), path / _FILE)
        return _Queueing(self._queue, path)

    @override
    def teardown(self) -> None:
        self._queue.finalize_async_save(blocking=True, terminate=True)
        self._group.close()


@dataclass(frozen=True)
class _Queueing(Saving):
    queue: Any
    path: Path

    @override
    def wait_staged(self) -> None:
        """The tensors were copied before."""

    @override
    def wait_durable(self) -> dict[str, float]:
        self.queue.finalize_async_save(blocking=True)
        sync_tree(self.path)
        return {}
