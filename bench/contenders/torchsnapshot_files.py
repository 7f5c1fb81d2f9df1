"""torchsnapshot, the nightly build, which is the one that is left."""

__all__ = ["InBackground", "Synchronous"]

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from bench.contenders.base import (
    Contender,
    Done,
    Options,
    Saving,
    State,
    process_group,
    sync_tree,
)


class Synchronous(Contender):
    """`Snapshot.take`."""

    name = "torchsnapshot take + fsync"
    durability = "fsync of files and directories added; it does none"
    package = "torchsnapshot"
    modules = ("torchsnapshot",)

    @override
    def save(self, state: State, tag: str) -> Saving:
        from torchsnapshot import Snapshot

        path = self.directory / tag
        Snapshot.take(str(path), {"state": _stateful(state)})
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
        from torchsnapshot import Snapshot

        snapshot = Snapshot(str(self.directory / tag))
        if keys is not None:
            return {key: snapshot.read_object(f"0/state/{key}") for key in keys}
        targets = like if is_in_place else {k: torch.empty_like(like[k]) for k in like}
        holder = _stateful(targets)
        snapshot.restore({"state": holder})
        return dict(holder)


class InBackground(Synchronous):
    """`Snapshot.async_take`."""

    name = "torchsnapshot async_take + fsync"

    @override
    def setup(self, directory: Path, options: Options) -> None:
        super().setup(directory, options)
        # It needs a store, and makes one of its own only where there is IPv6.
        self._group = ExitStack()
        self._group.enter_context(process_group())

    @override
    def teardown(self) -> None:
        self._group.close()

    @override
    def save(self, state: State, tag: str) -> Saving:
        from torchsnapshot import Snapshot

        path = self.directory / tag
        return _Pending(
            Snapshot.async_take(str(path), {"state": _stateful(state)}), path
        )


@dataclass(frozen=True)
class _Pending(Saving):
    snapshot: Any
    path: Path

    @override
    def wait_staged(self) -> None:
        """It was staged when `async_take` returned."""

    @override
    def wait_durable(self) -> dict[str, float]:
        self.snapshot.wait()
        sync_tree(self.path)
        return {}


def _stateful(state: Mapping[str, Any]) -> Any:
    from torchsnapshot import StateDict

    holder = StateDict()
    holder.update(state)
    return holder
