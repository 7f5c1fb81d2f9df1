"""What the ranks of a job do in the tests of DeepSpeed's interface."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from aiockpt.errors import CheckpointError
from aiockpt.integrations.deepspeed.facade import CheckpointEngine
from aiockpt.integrations.deepspeed.lazy import LazyCheckpointEngine
from aiockpt.storage import local_write
from ranks.acts import MOMENTS, RING, _break, _kill, attempt


def hand_over(
    engine: LazyCheckpointEngine, root: str, tag: str, rank: int, **more: Any
) -> None:
    """What `save_checkpoint` does with the engine."""
    info = SimpleNamespace(tag=tag, save_dir=root, save_latest=True)
    with engine.handing_over([]):
        engine.create(info)
        engine.makedirs(f"{root}/{tag}", exist_ok=True)
        state = {"weight": torch.arange(50_000.0) + rank, **more}
        engine.save(state, path=f"{root}/{tag}/rank{rank}.pt")


def latest(root: str) -> str | None:
    path = Path(root, "latest")
    return path.read_text().strip() if path.exists() else None


def names(directory: str) -> list[str]:
    path = Path(directory)
    return sorted(set(os.listdir(path)) - {".aiockpt"}) if path.exists() else []


# --- acts -------------------------------------------------------------------------


def plain(rank: int, world_size: int, saves: list[list[str]]) -> Any:
    """Every rank saves into the directories that it is given, by names of tags only."""
    engine = CheckpointEngine(RING)
    engine.create("a")
    for root in saves[rank]:
        engine.save({"rank": rank}, f"{root}/a/rank{rank}.pt")
    result = attempt(lambda: engine.commit("a"))
    roots = sorted({root for each in saves for root in each})
    found = {Path(root).name: (names(f"{root}/a"), latest(root)) for root in roots}
    engine.close()
    return result, found


def single(rank: int, world_size: int, root: str, at: int, path: str) -> Any:
    """As `save_16bit_model`: all open the tag, one rank saves one file elsewhere."""
    engine = CheckpointEngine(RING)
    info = SimpleNamespace(tag="a", save_dir=root, save_latest=False)
    engine.create(info)
    if rank == at:
        engine.save({"rank": rank}, path)
    result = attempt(lambda: engine.commit(info))
    is_there = os.path.exists(path)
    engine.close()
    return result, is_there, names(root)


def fail(rank: int, world_size: int, root: str, at: int, step: str) -> Any:
    """Rank `at` fails in the background; all go on, and hear of it with the next call."""
    engine = LazyCheckpointEngine(RING)
    hand_over(engine, root, "before", rank)
    engine.drain()
    more = {"call": lambda: None} if step == "capture" and rank == at else {}
    undo = _break(step) if rank == at and step != "capture" else None
    handed_over = attempt(lambda: hand_over(engine, root, "a", rank, **more))
    engine.wait_staged()
    if step != "make":
        # No rank but the failing one need have heard of it.
        if rank == at:
            engine._wait(engine._commits)
        raised = attempt(lambda: hand_over(engine, root, "b", rank))
    else:
        raised = handed_over
    if undo is not None:
        undo()
    between = latest(root)
    again = attempt(lambda: hand_over(engine, root, "a", rank))
    engine.close()
    return raised, between, again, latest(root)


def break_off(rank: int, world_size: int, root: str, at: int, *, drains: bool) -> Any:
    """Rank `at` fails in the middle of handing over, where the others do not."""
    engine = LazyCheckpointEngine(RING)

    def hand_over_or_fail() -> None:
        with engine.handing_over([]):
            engine.create(SimpleNamespace(tag="a", save_dir=root, save_latest=True))
            engine.save({"rank": rank}, f"{root}/a/rank{rank}.pt")
            if rank == at:
                raise CheckpointError("the client's state cannot be had")

    first = attempt(hand_over_or_fail)
    engine._wait(engine._commits)
    following = engine.drain if drains else lambda: hand_over(engine, root, "b", rank)
    second = attempt(following)
    again = attempt(lambda: hand_over(engine, root, "a", rank))
    engine.close()
    return first, second, again, latest(root)


def lose_connection(rank: int, world_size: int, root: str, at: int) -> Any:
    """Rank `at` loses its connection; all close the engine, and go on with it."""
    engine = LazyCheckpointEngine(RING)
    hand_over(engine, root, "before", rank)
    engine.drain()

    async def lose() -> None:
        engine._roots.ranks._link.abort()

    if rank == at:
        engine._roots.run(lose())
    lost = [attempt(lambda: hand_over(engine, root, "a", rank)) for _ in range(2)]
    engine.close()
    again = attempt(lambda: hand_over(engine, root, "a", rank))
    engine.close()
    return lost, again, latest(root)


def fail_to_open(rank: int, world_size: int, roots: list[str], good: str) -> Any:
    """A rank saves where no tag can be; the others, that save nothing, hear of it."""
    engine = CheckpointEngine(RING)
    engine.create("a")
    saved = [
        attempt(lambda: engine.save({"rank": rank}, f"{roots[rank]}/a/model.pt"))
        for _ in range(2 if roots[rank] else 0)
    ]
    committed = attempt(lambda: engine.commit("a"))
    engine.create("a")
    engine.save({"rank": rank}, f"{good}/a/rank{rank}.pt")
    again = attempt(lambda: engine.commit("a"))
    engine.close()
    return saved, committed, again, names(f"{good}/a")


def die(rank: int, world_size: int, root: str, at: int, moment: str, when: str) -> Any:
    """Rank `at` is killed on its way; the others tell what they saw."""
    engine = LazyCheckpointEngine(RING)
    hand_over(engine, root, "before", rank)
    engine.drain()
    if rank == at:
        _kill(*MOMENTS[moment], when)
    handed_over = attempt(lambda: hand_over(engine, root, "a", rank))
    drained = attempt(engine.drain)
    following = attempt(lambda: hand_over(engine, root, "b", rank))
    attempt(engine.close)
    return handed_over, drained, following


def slow(rank: int, world_size: int, root: str, at: int) -> Any:
    """Rank `at` cannot write before rank 0 has gone three steps further."""
    engine = LazyCheckpointEngine(RING)
    go = Path(root, "go")
    if rank == at:
        write = local_write.LocalWriteFile._write

        def late_write(*args: Any) -> Any:
            while not go.exists():
                time.sleep(0.01)
            return write(*args)

        local_write.LocalWriteFile._write = late_write
    hand_over(engine, root, "a", rank)
    for _ in range(3):
        engine.wait_staged()
    before = latest(root)
    hand_over(engine, root, "b", rank)
    engine.wait_staged()
    if rank == 0:
        before = before or latest(root)
        go.touch()
    engine.close()
    return before, latest(root), names(f"{root}/a"), names(f"{root}/b")
