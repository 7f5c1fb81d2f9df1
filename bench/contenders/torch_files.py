"""`torch.save` and `torch.load`, and those who do it in a thread."""

__all__ = [
    "Awaited",
    "InThread",
    "Lightning",
    "Mmapped",
    "Plain",
    "Synced",
    "Unsummed",
]

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from bench.contenders.base import (
    Contender,
    Done,
    Options,
    Saving,
    State,
    copied_into,
    sync_tree,
)

_FILE = "model.pt"


class Synced(Contender):
    """`torch.save`, then fsync; a plain `torch.load`."""

    name = "torch.save + fsync"
    durability = "fsync of file and directory"
    is_mapped: ClassVar[bool] = False

    @override
    def save(self, state: State, tag: str) -> Saving:
        torch.save(state, self.directory / tag / _FILE)
        sync_tree(self.directory / tag)
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
        # Who wants a few tensors maps the file: a plain load reads it all.
        is_mapped = self.is_mapped or keys is not None
        state = torch.load(self.directory / tag / _FILE, mmap=is_mapped)
        if is_in_place:
            return copied_into(state, like)
        if keys is not None:
            return {key: state[key].clone() for key in keys}
        loaded: Mapping[str, Any] = state
        return loaded


class Plain(Synced):
    """`torch.save` as it is."""

    name = "torch.save"
    durability = "none: in the page cache, a power cut may take it"

    @override
    def save(self, state: State, tag: str) -> Saving:
        torch.save(state, self.directory / tag / _FILE)
        return Done()


class Mmapped(Synced):
    """Loads by mapping the file."""

    name = "torch.save + fsync, mmap"
    writer = Synced.name
    is_mapped = True
    is_lazy = True


class Unsummed(Synced):
    """`torch.save` without the CRC-32 that it writes for each record."""

    name = "torch.save without CRC-32 + fsync"

    @override
    def setup(self, directory: Path, options: Options) -> None:
        super().setup(directory, options)
        torch.serialization.set_crc32_options(compute_crc32=False)


class Awaited(Synced):
    """All of it in a thread that an asyncio program waits for; nothing is copied."""

    name = "torch.save + fsync, asyncio.to_thread"

    @override
    async def save_on_loop(self, state: State, tag: str) -> None:
        await asyncio.to_thread(self.save, state, tag)  # noqa: TID251 - what is measured


class InThread(Synced):
    """A copy of all tensors, which a thread then saves and syncs."""

    name = "torch.save + fsync in a thread"
    durability = "fsync of file and directory"

    @override
    def setup(self, directory: Path, options: Options) -> None:
        super().setup(directory, options)
        self._threads = ThreadPoolExecutor(1)

    @override
    def save(self, state: State, tag: str) -> Saving:
        copied = _cloned(state)
        return _Handed(self._threads.submit(super().save, copied, tag))

    @override
    def teardown(self) -> None:
        self._threads.shutdown()


@dataclass(frozen=True)
class _Handed(Saving):
    done: Future[Saving]

    @override
    def wait_staged(self) -> None:
        """The tensors were copied before."""

    @override
    def wait_durable(self) -> dict[str, float]:
        self.done.result()
        return {}


def _cloned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cloned(each) for key, each in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


class Lightning(Synced):
    """Lightning's `AsyncCheckpointIO` around its `TorchCheckpointIO`."""

    name = "Lightning AsyncCheckpointIO + fsync"
    durability = "fsync of file and directory, after its thread has ended"
    package = "lightning"
    modules = ("lightning.pytorch.plugins.io",)

    @override
    def setup(self, directory: Path, options: Options) -> None:
        from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        super().setup(directory, options)
        self._io = AsyncCheckpointIO(TorchCheckpointIO())

    @override
    def save(self, state: State, tag: str) -> Saving:
        self._io.save_checkpoint(dict(state), self.directory / tag / _FILE)
        return _InLightning(self._io, self.directory / tag)


@dataclass(frozen=True)
class _InLightning(Saving):
    io: Any
    path: Path

    @override
    def wait_staged(self) -> None:
        """The tensors were copied before."""

    @override
    def wait_durable(self) -> dict[str, float]:
        # There is no other way to wait for it; the next save begins a new thread.
        self.io.teardown()
        self.io._executor = None  # noqa: SLF001
        sync_tree(self.path)
        return {}
