"""One process that publishes versions, and many that follow it.

Run as a program with a root, a number of versions and of readers, it forks the readers
before it has any thread, publishes, and prints what each of them has seen.
"""

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Callable

import torch

import aiockpt
import aiockpt.sync
from aiockpt import CheckpointEngine, CheckpointNotFoundError, KeepLast
from gates import RING_8_MIB

NUM_KEPT = 2
FILES = ("model.pt", "sub/model.safetensors")
# Every so many versions a reader stays until others have been published.
STAY_PERIOD = 5


def state(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((5000,), seed), "b": torch.arange(seed % 100 + 1)}


def publish(engine: aiockpt.sync.CheckpointEngine, seed: int) -> None:
    tag = f"version-{seed}"
    engine.create(tag)
    for path in FILES:
        engine.save(state(seed), path)
    engine.commit(tag)


class Reader:
    """One that follows; what it has seen."""

    def __init__(self, root: str, num_versions: int) -> None:
        self.seeds: list[int] = []
        self.num_missed = 0
        self.num_stays = 0
        self._root = root
        self._last = num_versions

    async def follow(self, tell: Callable[[], None]) -> None:
        """Reads each version that it can get until the last, having told of the first.

        Raises:
            AssertionError: One was not whole, or went while it was held.
        """
        async with CheckpointEngine(self._root, RING_8_MIB) as engine:
            start = await engine.wait_for("version-0")
            tell()
            async for info in engine.watch(start):
                await self._read(engine, info.tag)
                if self.seeds and self.seeds[-1] == self._last:
                    return

    async def _read(self, engine: CheckpointEngine, tag: str) -> None:
        seed = int(tag.removeprefix("version-"))
        is_held = False
        try:
            async with engine.reading(tag) as info:
                is_held = True
                await self._check(engine, tag, seed)
                if (seed + os.getpid()) % STAY_PERIOD == 0 and seed < self._last - 5:
                    newest = info
                    for _ in range(NUM_KEPT + 1):
                        newest = await engine.wait_for(newer_than=newest)
                    await self._check(engine, tag, seed)
                    self.num_stays += 1
        except CheckpointNotFoundError:
            assert not is_held, f"{tag} went while it was held"
            self.num_missed += 1
        else:
            self.seeds.append(seed)

    async def _check(self, engine: CheckpointEngine, tag: str, seed: int) -> None:
        for path in FILES:
            loaded = await engine.load(path, tag=tag)
            for key, tensor in state(seed).items():
                assert torch.equal(loaded[key], tensor), f"{tag}/{path}: {key}"


def start_reader(root: str, num_versions: int) -> tuple[int, int]:
    """Forks one; its pid, and what it tells: a line when it is ready, one at its end."""
    source, target = os.pipe()
    pid = os.fork()
    if pid:
        os.close(target)
        return pid, source
    status = 1
    try:
        reader = Reader(root, num_versions)
        asyncio.run(reader.follow(lambda: os.write(target, b"ready\n")))
        seen = [reader.seeds, reader.num_missed, reader.num_stays]
        os.write(target, json.dumps(seen).encode() + b"\n")
        status = 0
    except BaseException:  # noqa: BLE001 - nobody else would show it
        traceback.print_exc()
    finally:
        os._exit(status)


def main(root: str, num_versions: int, num_readers: int) -> None:
    """Publishes, and prints what the readers have seen."""
    torch.set_num_threads(1)
    readers = [start_reader(root, num_versions) for _ in range(num_readers)]
    pipes = [os.fdopen(source) for _, source in readers]
    keeping = {**RING_8_MIB, "retention": [KeepLast(NUM_KEPT)]}
    with aiockpt.sync.CheckpointEngine(root, keeping) as engine:
        publish(engine, 0)
        for pipe in pipes:
            assert pipe.readline() == "ready\n"
        for seed in range(1, num_versions + 1):
            publish(engine, seed)
        told = [json.loads(pipe.readline()) for pipe in pipes]
        statuses = [os.waitpid(pid, 0)[1] for pid, _ in readers]
        # What was held at the last commit goes after this one.
        publish(engine, num_versions + 1)
    json.dump({"told": told, "statuses": statuses}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
