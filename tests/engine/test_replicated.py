"""`save(..., replicated=...)` in a job of one rank; `dist/` has jobs of several."""

from zlib import crc32

import pytest
import torch

from aiockpt import CheckpointEngine, sync
from aiockpt.errors import InvalidArgumentError
from gates import RING_8_MIB


@pytest.mark.parametrize("replicated", [True, [0], False])
async def test_a_job_of_one_rank_saves_as_ever(replicated, root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("t")
        state = {"a": torch.arange(1000)}
        await engine.save(state, "sub/a.pt", replicated=replicated)
        await engine.save(state, "b.pt")
        report = await engine.commit("t")
        (info,) = await engine.tags()
    data = (root / "t/sub/a.pt").read_bytes()
    assert data == (root / "t/b.pt").read_bytes()
    assert report.num_files == 2
    assert {entry.crc32 for entry in info.files} == {crc32(data)}


async def test_a_group_without_this_rank_is_refused_and_the_tag_stays_open(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("t")
        with pytest.raises(InvalidArgumentError, match="no group of rank 0 of 1"):
            await engine.save({"a": 1}, "a.pt", replicated=[0, 1])
        await engine.save({"a": 1}, "a.pt", replicated=True)
        await engine.commit("t")


def test_the_blocking_door_takes_groups_too(root):
    with sync.CheckpointEngine(root, RING_8_MIB) as engine:
        engine.create("t")
        engine.save({"a": torch.ones(3)}, "a.pt", replicated=True)
        with pytest.raises(InvalidArgumentError, match="no group of rank 0 of 1"):
            engine.save({"a": 1}, "b.pt", replicated=[1])
        engine.commit("t")
