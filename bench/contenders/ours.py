"""aiockpt, through its two doors."""

__all__ = ["OurEngine", "OurSyncEngine", "Prepared", "Unsummed", "Unverified"]

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from typing_extensions import override

import aiockpt
import aiockpt.sync
from aiockpt import CommitReport
from bench.contenders.base import Contender, Options, Saving, State

_FILE = "model.pt"

T = TypeVar("T")


def _told(report: CommitReport) -> dict[str, float]:
    return {
        "plan_s": report.plan_s,
        "stage_s": report.stage_s,
        "write_s": report.write_s,
        "sync_s": report.sync_s,
        "publish_s": report.publish_s,
        "peak_ring_bytes": report.peak_ring_bytes,
    }


class OurEngine(Contender):
    """The engine, awaited."""

    name = "aiockpt"
    durability = "fsync of data, manifest and directories; CRC-32 of all bytes"
    package = "aiockpt"
    is_verifying: ClassVar[bool] = True

    @override
    def setup(self, directory: Path, options: Options) -> None:
        super().setup(directory, options)
        self._runner = asyncio.Runner()
        self.engine = self._runner.run(self._open(options))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, on a loop of the caller's side."""
        return self._runner.run(work)

    async def _open(self, options: Options) -> aiockpt.CheckpointEngine:
        config = {
            "host_cache_size": options.ring_gib,
            "parser_threads": options.threads,
        }
        return aiockpt.CheckpointEngine(self.directory, config)

    @override
    def open_tag(self, tag: str) -> None:
        self._runner.run(self.engine.create(tag))

    @override
    def save(self, state: State, tag: str) -> Saving:
        handle = self._runner.run(self.engine.save(state, _FILE, tag=tag))
        return _Awaited(self.engine, handle, self._runner, tag)

    @override
    async def save_on_loop(self, state: State, tag: str) -> None:
        await self.engine.save(state, _FILE, tag=tag)
        await self.engine.commit(tag)

    @override
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        into = like if is_in_place else None
        verify = self.is_verifying
        loading = self.engine.load(_FILE, tag=tag, into=into, keys=keys, verify=verify)
        loaded: Mapping[str, Any] = self._runner.run(loading)
        return like if is_in_place else loaded

    @override
    def delete(self, tag: str) -> None:
        self._runner.run(self.engine.delete(tag))

    @override
    def teardown(self) -> None:
        self._runner.run(self.engine.aclose())
        self._runner.close()


@dataclass(frozen=True)
class _Awaited(Saving):
    engine: aiockpt.CheckpointEngine
    handle: aiockpt.SaveHandle
    runner: asyncio.Runner
    tag: str

    @override
    def wait_staged(self) -> None:
        self.runner.run(self.handle.staged())

    @override
    def wait_durable(self) -> dict[str, float]:
        return _told(self.runner.run(self.engine.commit(self.tag)))


class Prepared(OurEngine):
    """Asks for a preflight before the first step, which takes the ring's memory."""

    name = "aiockpt, after preflight"
    _is_prepared = False

    @override
    def begin_training(self, state: State) -> None:
        if not self._is_prepared:
            self.run(self.engine.preflight(state))
            self._is_prepared = True


class Unverified(OurEngine):
    """Loads without checksums."""

    name = "aiockpt, unverified"
    writer = OurEngine.name
    is_verifying = False


class Unsummed(OurEngine):
    """Saves without checksums, which is no option: to see what they cost.

    The sums in the file are wrong; torch does not look at them.
    """

    name = "aiockpt, checksums cut out"
    durability = "as aiockpt, but no checksums: not an option of the engine"

    @override
    def setup(self, directory: Path, options: Options) -> None:
        import aiockpt.checksums

        aiockpt.checksums.crc32 = lambda _data, _start=0: 0
        super().setup(directory, options)

    @override
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        loaded: Mapping[str, Any] = torch.load(self.directory / tag / _FILE, mmap=True)
        return loaded


class OurSyncEngine(Contender):
    """The engine behind its blocking door."""

    name = "aiockpt.sync"
    durability = OurEngine.durability
    package = "aiockpt"

    @override
    def setup(self, directory: Path, options: Options) -> None:
        super().setup(directory, options)
        config = {
            "host_cache_size": options.ring_gib,
            "parser_threads": options.threads,
        }
        self._engine = aiockpt.sync.CheckpointEngine(directory, config)

    @override
    def open_tag(self, tag: str) -> None:
        self._engine.create(tag)

    @override
    def save(self, state: State, tag: str) -> Saving:
        handle = self._engine.save(state, _FILE, tag=tag)
        return _Blocking(self._engine, handle, tag)

    @override
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        into = like if is_in_place else None
        loaded: Mapping[str, Any] = self._engine.load(
            _FILE, tag=tag, into=into, keys=keys
        )
        return like if is_in_place else loaded

    @override
    def delete(self, tag: str) -> None:
        self._engine.delete(tag)

    @override
    def teardown(self) -> None:
        self._engine.close()


@dataclass(frozen=True)
class _Blocking(Saving):
    engine: aiockpt.sync.CheckpointEngine
    handle: aiockpt.sync.SaveHandle
    tag: str

    @override
    def wait_staged(self) -> None:
        self.handle.staged()

    @override
    def wait_durable(self) -> dict[str, float]:
        return _told(self.engine.commit(self.tag))
