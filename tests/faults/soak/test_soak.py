"""Load and soak: whatever an engine has done, it holds no more than at first."""

import asyncio
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiockpt
from aiockpt.errors import CheckpointNotFoundError, EngineStateError
from aiockpt.retention import KeepLast
from aiockpt.testing.roots import assert_root_consistent
from faults.power.contenders import is_state, state
from gates import LIMIT_S, happened, in_thread
from workloads import SMALL

PATH = "sub/model.pt"
NUM_KEPT = 5
# Allocators keep what they once had. A state has a megabyte: of 500, a leak of one in
# twenty would be more than this, and of the long run's 5000 one in two hundred.
MAX_GROWTH_BYTES = 24 << 20
NUM_READERS = 64


@dataclass(frozen=True)
class Holding:
    """What a process holds, and what stands in its root.

    Attributes:
        num_fds: Open descriptors.
        num_threads: Threads, those that Python does not know of included.
        leased_bytes: Of the ring.
        num_entries: Files and directories in the root, those of tags included.
        resident_bytes: Memory.
    """

    num_fds: int
    num_threads: int
    leased_bytes: int
    num_entries: int
    resident_bytes: int

    @classmethod
    def now(cls, engine: aiockpt.CheckpointEngine) -> Self:
        """As it is at this moment."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            num_fds=len(os.listdir("/proc/self/fd")),
            num_threads=len(os.listdir("/proc/self/task")),
            leased_bytes=engine.ring_bytes[0],
            num_entries=sum(1 for _ in Path(engine.root).rglob("*")),
            resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
        )

    def assert_not_above(self, first: Self) -> None:
        """Everything is as it was, but for a little memory."""
        self.assert_not_more(first)
        growth_bytes = self.resident_bytes - first.resident_bytes
        assert growth_bytes < MAX_GROWTH_BYTES, f"{growth_bytes} bytes more"

    def assert_not_more(self, first: Self) -> None:
        """All that can be counted is as it was."""
        assert self.leased_bytes == 0
        assert self.num_fds <= first.num_fds, self
        assert self.num_threads <= first.num_threads, self
        assert self.num_entries <= first.num_entries, self


async def settled(engine: aiockpt.CheckpointEngine, num_tags: int) -> Holding:
    """What is held when all that is superfluous is removed, up to so many tags.

    Old tags and what was overwritten are removed in the background.
    """
    async with asyncio.timeout(LIMIT_S):
        while len(await engine.tags()) > num_tags or is_at_work(engine):
            pass  # asking is a turn of the engine's loop
    return Holding.now(engine)


def is_at_work(engine: aiockpt.CheckpointEngine) -> bool:
    """Whether an attempt, or a part of one, is still there."""
    return any(Path(engine.root, ".aiockpt", "work").glob("*/*"))


async def save(engine: aiockpt.CheckpointEngine, tag: str, seed: int) -> None:
    await engine.create(tag)
    await engine.save(state(seed), PATH, tag=tag)
    await engine.commit(tag)


async def consistent(root: Path, **expected: object) -> list[str]:
    """The tags of a root, which is consistent; off the loop, since it blocks."""
    checking = in_thread(lambda: assert_root_consistent(root, **expected))
    await happened(checking)
    return checking.result()


async def test_an_engine_that_has_saved_for_long_holds_no_more(cases, memory):
    num_tags = cases.pick(500, 5000)
    config: dict[str, object] = {**SMALL, "retention": [KeepLast(NUM_KEPT)]}
    root = memory / "soak"
    async with aiockpt.CheckpointEngine(root, config) as engine:
        for number in range(100):
            await save(engine, f"warm-up-{number}", number % 60)
        first = await settled(engine, NUM_KEPT)
        for number in range(num_tags):
            with cases.case(21, "tags in a row, with retention", number):
                await save(engine, f"step-{number}", number % 60)
                if number % 50 == 0:
                    (await settled(engine, NUM_KEPT)).assert_not_above(first)
        (await settled(engine, NUM_KEPT)).assert_not_above(first)
        assert is_state(await engine.load(PATH), (num_tags - 1) % 60)
    kept = [f"step-{number}" for number in range(num_tags - NUM_KEPT, num_tags)]
    assert await consistent(root, acked=kept, is_swept=True) == kept


async def test_tags_that_are_saved_at_once_are_all_whole(cases, memory):
    root = memory / "at-once"
    first = None
    async with aiockpt.CheckpointEngine(root, SMALL) as engine:
        for number in range(cases.pick(20, 300)):
            with cases.case(21, "8 tags at once, more than the ring holds", number):
                tags = {f"tag-{index}": (number + 4 * index) % 20 for index in range(8)}
                async with asyncio.TaskGroup() as group:
                    for tag, seed in tags.items():
                        group.create_task(save(engine, tag, seed))
                for tag, seed in tags.items():
                    assert is_state(await engine.load(PATH, tag=tag), seed)
                await consistent(root)
                for tag in tags:
                    await engine.delete(tag)
                # The first rounds start threads and fill caches.
                if number == 5:
                    first = await settled(engine, 0)
                elif first is not None:
                    (await settled(engine, 0)).assert_not_above(first)
    assert first is not None
    assert await consistent(root, is_swept=True) == []


class Reading:
    """Readers of tags that come and go under them.

    Attributes:
        seeds: Every tag that ever was, and what it holds.
        is_over: Whether the readers are to end.
        num_loaded: Tags that were loaded, before they were deleted.
    """

    def __init__(self, engine: aiockpt.CheckpointEngine) -> None:
        self.seeds: dict[str, int] = {}
        self.is_over = False
        self.num_loaded = 0
        self._engine = engine

    async def write(self, num_tags: int) -> None:
        """Commits tags, and deletes all but the last few of them."""
        for number in range(num_tags):
            tag = f"step-{number}"
            self.seeds[tag] = number % 60
            await save(self._engine, tag, number % 60)
            if number >= NUM_KEPT:
                await self._delete(f"step-{number - NUM_KEPT}")
        self.is_over = True

    async def _delete(self, tag: str) -> None:
        """Deletes a tag as soon as nobody holds a lease on it."""
        while True:
            try:
                return await self._engine.delete(tag)
            except EngineStateError:
                await asyncio.sleep(0)

    async def read(self, cases, index: int) -> None:
        """Loads tags that were there a moment ago."""
        choices = random.Random(index)
        while not self.is_over:
            tags = [info.tag for info in await self._engine.tags()]
            assert tags == sorted(tags, key=lambda tag: int(tag.split("-")[1]))
            if not tags:
                continue
            tag = choices.choice(tags)
            with cases.case(21, f"reads by {NUM_READERS} during commits", tag):
                try:
                    loaded = await self._load(tag, is_leased=index % 16 == 0)
                except CheckpointNotFoundError:
                    continue
                assert is_state(loaded, self.seeds[tag])
                self.num_loaded += 1

    async def _load(self, tag: str, *, is_leased: bool) -> Mapping[str, Any]:
        if not is_leased:
            return await self._engine.load(PATH, tag=tag)
        async with self._engine.reading(tag):
            # Whatever comes meanwhile, it is there.
            return await self._engine.load(PATH, tag=tag)


async def test_readers_get_all_of_a_tag_or_nothing_while_tags_come_and_go(
    cases, memory
):
    root = memory / "readers"
    async with aiockpt.CheckpointEngine(root, SMALL) as engine:
        await save(engine, "step-0", 0)
        await engine.load(PATH)
        await engine.delete("step-0")
        held: list[Holding] = []
        for _ in range(4):
            reading = Reading(engine)
            async with asyncio.TaskGroup() as group:
                group.create_task(reading.write(cases.pick(20, 100)))
                for index in range(NUM_READERS):
                    group.create_task(reading.read(cases, index))
            assert reading.num_loaded > NUM_READERS
            for info in await engine.tags():
                await engine.delete(info.tag)
            held.append(await settled(engine, 0))
            # The second round finds what the first had to start.
            held[-1].assert_not_more(held[0])
    # How many states are in memory at once is chance, and the allocator keeps some of
    # that; what is lost is lost in every round.
    resident_bytes = [each.resident_bytes for each in held]
    growth_bytes = min(resident_bytes[2:]) - max(resident_bytes[:2])
    assert growth_bytes < MAX_GROWTH_BYTES, resident_bytes
    assert await consistent(root, is_swept=True) == []
