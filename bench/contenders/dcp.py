"""`torch.distributed.checkpoint`, with its own writer, in one process."""

__all__ = ["InProcess", "InThread", "Pinned", "Staged", "Synchronous"]

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from bench.contenders.base import (
    NO_GPU,
    Contender,
    Done,
    Options,
    Saving,
    State,
    process_group,
    sync_tree,
)


class Synchronous(Contender):
    """`dcp.save`."""

    name = "DCP save"
    durability = "its own fsync of data; fsync of metadata and directory added"
    modules = ("torch.distributed.checkpoint.staging",)
    is_grouped: ClassVar[bool] = False

    @override
    def setup(self, directory: Path, options: Options) -> None:
        super().setup(directory, options)
        self._group = ExitStack()
        if self.is_grouped:
            self._group.enter_context(process_group())

    @override
    def save(self, state: State, tag: str) -> Saving:
        from torch.distributed import checkpoint

        path = self.directory / tag
        checkpoint.save(dict(state), checkpoint_id=path)
        sync_tree(path)
        return Done()

    @override
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        from torch.distributed import checkpoint

        wanted = like if keys is None else {key: like[key] for key in keys}
        targets = wanted if is_in_place else _empty(wanted)
        checkpoint.load(dict(targets), checkpoint_id=self.directory / tag)
        return targets

    @override
    def teardown(self) -> None:
        self._group.close()


class InThread(Synchronous):
    """`dcp.async_save` as it is: staged at the call, written by a thread."""

    name = "DCP async_save, thread"
    is_grouped = True
    kind: ClassVar[str] = "thread"
    # None: one of its own for each call, which copies before the call returns.
    stager: Any = None

    @override
    def save(self, state: State, tag: str) -> Saving:
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        path = self.directory / tag
        saving = checkpoint.async_save(
            dict(state),
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType(f"{self.kind}"),
            async_stager=self.stager,
        )
        return _Uploading(saving, path)


class InProcess(InThread):
    """`dcp.async_save` that hands the state to a process of its own."""

    name = "DCP async_save, process"
    kind = "process"


class Staged(InThread):
    """`dcp.async_save` with a stager that is kept, and copies in a thread.

    The copies' memory is used again from save to save.
    """

    name = "DCP async_save, staged in a thread"
    is_pinned: ClassVar[bool] = False

    @override
    def setup(self, directory: Path, options: Options) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().setup(directory, options)
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=self.is_pinned,
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=self.is_pinned,
            )
        )

    @override
    def teardown(self) -> None:
        self.stager.close()
        super().teardown()


class Pinned(Staged):
    """The same, to pinned memory, which only a GPU has a use for."""

    name = "DCP async_save, pinned, staged in a thread"
    is_pinned = True

    @override
    @classmethod
    def missing(cls) -> str | None:
        return NO_GPU if not torch.cuda.is_available() else None


@dataclass(frozen=True)
class _Uploading(Saving):
    done: Any
    path: Path

    @override
    def wait_staged(self) -> None:
        if not isinstance(self.done, Future):
            self.done.staging_completion.result()

    @override
    def wait_durable(self) -> dict[str, float]:
        is_plain = isinstance(self.done, Future)
        (self.done if is_plain else self.done.upload_completion).result()
        sync_tree(self.path)
        return {}


def _empty(like: Mapping[str, Any]) -> dict[str, Any]:
    """As many tensors of the same shapes, and the other values, in the same structure."""
    return {key: _emptied(value) for key, value in like.items()}


def _emptied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _empty(value)
    return torch.empty_like(value) if isinstance(value, torch.Tensor) else value
