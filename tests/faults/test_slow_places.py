"""Row 12, by real means: a disk that stands still or is slow, a rank that is stopped."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiockpt import CheckpointEngine
from aiockpt.testing.faults import Fault, inject
from aiockpt.testing.roots import assert_root_consistent
from aiockpt.testing.system_calls import Moment
from faults.matrix import Cases
from faults.places import (
    MIB,
    cgroup,
    has_cgroups,
    mkfs,
    mounted,
    new_image,
    run_command,
)
from gates import LIMIT_S, RING_8_MIB, happened, in_thread, turns
from workloads import SMALL, Engine, content, save, state

WORLD_SIZE = 3


@pytest.fixture
def disk(as_root: None, cases: Cases, tmp_path: Path) -> Iterator[Path]:
    """An ext4 of its own."""
    image = new_image(tmp_path / "image", mkfs("ext4", cases), num_mib=64)
    with mounted(tmp_path / "mounted", "-o", "loop", image) as point:
        yield point


# The call that meets a disk that stands still, and a part of its path.
FREEZES = {"create": "model.pt", "fallocate": "model.pt", "write": "manifest.json"}


@pytest.mark.parametrize("call", FREEZES)
async def test_a_frozen_disk_holds_up_no_loop_and_no_training(cases, disk, call):
    root, is_frozen = disk / "root", threading.Event()

    def freeze(moment: Moment) -> object:
        run_command("fsfreeze", "--freeze", disk)
        is_frozen.set()
        return moment.make()

    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("old")
        await engine.save(state(2), "model.pt")
        await engine.commit("old")
        with inject(Fault(call, freeze, path=FREEZES[call])):
            with cases.case(12, "a frozen disk", call):
                await engine.create("new")
                await engine.save(state(3), "model.pt")
                committing = asyncio.ensure_future(engine.commit("new"))
                await happened(in_thread(lambda: is_frozen.wait(LIMIT_S)))
                try:
                    await check_alive(engine, committing)
                finally:
                    thaw = ("fsfreeze", "--unfreeze", disk)
                    await happened(in_thread(lambda: run_command(*thaw)))
                await committing
                loaded = await engine.load("model.pt", tag="new")
                assert content(loaded) == content(state(3))
    acked = ["old", "new"]
    await happened(in_thread(lambda: assert_root_consistent(root, acked=acked)))


async def check_alive(
    engine: CheckpointEngine, committing: "asyncio.Future[object]"
) -> None:
    """The engine's loop turns, and what is published is read."""
    for _ in range(20):
        await engine._runtime.spawn(turns()).wait()
        await asyncio.sleep(0)
    loaded = await engine.load("model.pt", tag="old")
    assert content(loaded) == content(state(2))
    assert not committing.done()


async def test_a_slow_disk_holds_up_no_loop_and_no_training(cases, disk):
    has_cgroups("blkio", cases)
    root = disk / "root"
    number = os.stat(disk).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    limit = "blkio.throttle.write_bps_device"
    # Only when it has been looked at does the disk become as fast as it is to be.
    slow = {limit: f"{device} {MIB}"}
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("old")
        await engine.save(state(2), "model.pt")
        await engine.commit("old")
        with cgroup("blkio", slow) as group:
            (group / "cgroup.procs").write_text(f"{os.getpid()}")
            try:
                with cases.case(12, "5 MiB a second", "four files"):
                    await engine.create("new")
                    for index in range(4):
                        await engine.save(state(3), f"{index}.pt")
                    committing = asyncio.ensure_future(engine.commit("new"))
                    # What fits the ring is staged, long before it is written.
                    await engine.staged("new")
                    await check_alive(engine, committing)
                    (group / limit).write_text(f"{device} {5 * MIB}")
                    await committing
                    for index in range(4):
                        loaded = await engine.load(f"{index}.pt", tag="new")
                        assert content(loaded) == content(state(3))
            finally:
                (group.parent / "cgroup.procs").write_text(f"{os.getpid()}")
    acked = ["old", "new"]
    await happened(in_thread(lambda: assert_root_consistent(root, acked=acked)))


@pytest.mark.dist
@pytest.mark.parametrize("at", range(WORLD_SIZE))
def test_a_stopped_rank_is_given_up_by_name_and_all_go_on(cases, jobs, memory, at):
    for number in range(cases.pick(1, 5)):
        root = memory / f"stopped-{at}" / f"{number}" / "runs"
        with Engine(root, SMALL) as engine:
            save(engine, "before", 1)
        act = "faults.acts:be_stopped"
        results = jobs.run(act, WORLD_SIZE, root=str(root), at=at)
        with cases.case(12, "a stopped rank", f"rank {at}: {results}"):
            for rank, result in enumerate(results):
                told = result["told"]
                assert told["error"] == "PeerError"
                # Rank 0 finds, when it goes on, that the others are gone.
                assert told["rank"] == at or rank == at
                assert result["latest"] == (None if rank == at else "before")
            assert_root_consistent(root, acked=["before"], absent=["a"])
            with Engine(root, SMALL) as engine:
                save(engine, "a", 1)
            assert_root_consistent(root, acked=["before", "a"], is_swept=True)
