"""A file that stays open, of which tensors are read one by one."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import safetensors.torch
import torch

import aiockpt
import states
from aiockpt import sync
from aiockpt.loading import selecting
from aiockpt.outline import Leaf, leaves
from equality import assert_same_state
from gates import LIMIT_S, happened

STATE = {
    "model": {"w": torch.arange(12_000.0).view(300, 40), "b": torch.ones(7)},
    "step": 3,
}
FLAT = {"model.w": STATE["model"]["w"], "model.b": STATE["model"]["b"]}


@pytest.fixture(params=["pt", "safetensors"])
def path(request, tmp_path):
    path = tmp_path / f"file.{request.param}"
    if request.param == "pt":
        torch.save(STATE, path)
    else:
        safetensors.torch.save_file(FLAT, path)
    return path


async def test_what_is_in_a_file_is_told_without_reading_tensors(path):
    async with aiockpt.open(path) as file:
        assert set(file.keys) == set(FLAT)
        told = {
            info.key: (info.dtype, info.shape, info.nbytes) for info in file.tensors
        }
    assert told == {
        key: (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        for key, tensor in FLAT.items()
    }


async def test_tensors_are_read_one_by_one_and_by_globs(path):
    async with aiockpt.open(path) as file:
        assert torch.equal(await file.tensor("model.b"), FLAT["model.b"])
        found = await file.load(["model.*"])
        assert_same_state(dict(sorted(found.items())), dict(sorted(FLAT.items())))
        with pytest.raises(aiockpt.CheckpointNotFoundError, match=r"model\.w"):
            await file.tensor("model.ww")
        with pytest.raises(aiockpt.InvalidArgumentError, match="several"):
            await file.tensor("model.*")


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 1), (17, 60), (299, 300), (-3, None), (5, 5)]
)
async def test_rows_are_those_of_the_tensor(path, start, stop):
    async with aiockpt.open(path) as file:
        rows = await file.rows("model.w", start, stop)
    assert torch.equal(rows, FLAT["model.w"][start:stop])


def test_rows_of_views_of_any_stride_are_those_of_the_tensor(tmp_path):
    base = torch.arange(6000.0).view(20, 30, 10)
    state = {"t": base.permute(2, 0, 1), "part": base[3:9, 2:], "row": base[0, 0]}
    torch.save(state, tmp_path / "views.pt")
    with sync.open(tmp_path / "views.pt") as file:
        for key, tensor in state.items():
            assert torch.equal(file.rows(key, 2, 5), tensor[2:5])
            assert torch.equal(file.rows(key), tensor)


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("name", ["sparse_coo", "quantized", "zero_dim"])
def test_rows_of_what_has_none_are_refused(tmp_path, name):
    state = {
        "sparse_coo": lambda: torch.eye(4).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(
            torch.ones(4), 0.5, 0, torch.qint8
        ),
        "zero_dim": lambda: torch.tensor(1.0),
    }[name]()
    torch.save({"x": state}, tmp_path / "x.pt")
    with (
        sync.open(tmp_path / "x.pt") as file,
        pytest.raises(aiockpt.InvalidArgumentError),
    ):
        file.rows("x")


def test_a_few_rows_cost_a_few_blocks(tmp_path):
    torch.save({"w": torch.zeros(1 << 16, 64)}, tmp_path / "large.pt")

    def num_read() -> int:
        with open("/proc/self/io") as counters:
            return int(counters.readline().split()[1])

    with sync.open(tmp_path / "large.pt") as file:
        before = num_read()
        file.rows("w", 1000, 1100)
        assert num_read() - before < 100 * 64 * 4 + 3 * 4096


@pytest.mark.parametrize(
    "name", sorted(states.ALL_STATES.keys() - states.UNSAFE_STATES)
)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_tensor_is_read_alone_as_in_a_full_load(name, tmp_path):
    path = tmp_path / "file.pt"
    state = states.ALL_STATES[name]()
    torch.save({"state": state}, path)
    with sync.open(path) as file:
        for key in file.keys:
            assert_same_state(sync.load(path, keys=[key]), file.load([key]))


def test_the_tensors_of_a_file_are_looked_for_once(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    torch.save(STATE, path)
    looks: list[object] = []

    def look(root: object) -> Iterator[Leaf]:
        looks.append(root)
        return leaves(root)

    monkeypatch.setattr(selecting, "leaves", look)
    with sync.open(path) as file:
        for key in file.keys:
            file.tensor(key)
    assert len(looks) == 1


async def test_a_corrupt_tensor_is_refused_and_the_others_are_read(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(FLAT, path)
    data = bytearray(path.read_bytes())
    at = data.index(FLAT["model.w"].numpy().tobytes()[4000:4040])
    data[at] ^= 1
    path.write_bytes(data)
    async with aiockpt.open(path) as file:
        assert torch.equal(await file.tensor("model.b"), FLAT["model.b"])
        with pytest.raises(aiockpt.CorruptCheckpointError) as caught:
            await file.tensor("model.w")
    assert caught.value.key == "model.w"
    async with aiockpt.open(path, verify=False) as file:
        assert not torch.equal(await file.tensor("model.w"), FLAT["model.w"])


async def test_many_tasks_read_from_one_file(path):
    async with aiockpt.open(path) as file:
        found = await asyncio.gather(
            *(file.rows("model.w", i, i + 3) for i in range(50))
        )
    assert all(
        torch.equal(rows, FLAT["model.w"][i : i + 3]) for i, rows in enumerate(found)
    )


async def test_a_file_can_be_opened_again_and_is_of_no_use_when_closed(path):
    opened = aiockpt.open(path)
    for _ in range(2):
        async with opened as file:
            assert torch.equal(await file.tensor("model.b"), FLAT["model.b"])
    with pytest.raises(aiockpt.EngineStateError):
        await opened.tensor("model.b")
    with pytest.raises(aiockpt.EngineStateError):
        _ = opened.keys


async def test_what_cannot_be_opened_leaves_nothing_open(tmp_path):
    (tmp_path / "no.pt").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(aiockpt.CorruptCheckpointError):
        async with aiockpt.open(tmp_path / "no.pt"):
            pass
    with pytest.raises(aiockpt.CheckpointNotFoundError):
        async with aiockpt.open(tmp_path / "none"):
            pass


def test_what_cannot_be_opened_by_the_blocking_door_leaves_nothing_open(tmp_path):
    with pytest.raises(aiockpt.CheckpointNotFoundError), sync.open(tmp_path / "none"):
        pass


@pytest.fixture
async def engine(root):
    async with aiockpt.CheckpointEngine(root, {"host_cache_size": 0.0625}) as engine:
        for number in (1, 2, 3):
            await engine.create(f"step-{number}")
            for name in ("model.pt", "optimizer.pt"):
                state = {"w": torch.full((5000,), float(number)), "step": number}
                await engine.save(state, name)
            await engine.commit(f"step-{number}")
        yield engine


async def test_a_file_of_a_tag_stays_readable_while_the_tag_is_deleted(engine):
    async with engine.open("model.pt", tag="step-1") as file:
        await engine.delete("step-1")
        assert (await file.tensor("w"))[0] == 1
    async with engine.open("model.pt") as file:
        assert (await file.tensor("w"))[0] == 3


async def test_a_file_outlives_its_engine_only_to_be_closed(engine):
    with contextlib.suppress(aiockpt.EngineStateError):
        async with engine.open("model.pt") as file:
            await engine.aclose()
            await file.tensor("w")
        pytest.fail("the engine was closed")


def damage(root, tag, name):
    path = root / tag / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


async def test_the_newest_sound_tag_is_the_latest_where_that_is_sound(engine):
    tag, (state,) = await engine.load_latest_valid("model.pt")
    assert (tag, state["step"]) == ("step-3", 3)


async def test_a_tag_with_one_corrupt_file_is_skipped_for_all_and_the_log_says_why(
    engine, root, caplog
):
    damage(root, "step-3", "optimizer.pt")
    (root / "step-2" / "model.pt").unlink()
    tag, states_ = await engine.load_latest_valid("model.pt", "optimizer.pt")
    assert tag == "step-1"
    assert [state["step"] for state in states_] == [1, 1]
    assert "step-3 is skipped" in caplog.text
    assert "step-2 is skipped" in caplog.text
    # What nobody asked for is not looked at.
    assert (await engine.load_latest_valid("model.pt"))[0] == "step-3"


async def test_no_tag_left_says_why_for_each(engine, root):
    for number in (1, 2, 3):
        damage(root, f"step-{number}", "model.pt")
    with pytest.raises(aiockpt.CheckpointNotFoundError) as caught:
        await engine.load_latest_valid("model.pt")
    assert all(f"step-{number}: " in str(caught.value) for number in (1, 2, 3))


async def test_tags_after_the_one_to_resume_from_are_not_taken(engine, root):
    (root / "latest").write_text("step-2\n")
    assert (await engine.load_latest_valid("model.pt"))[0] == "step-2"
    damage(root, "step-2", "model.pt")
    assert (await engine.load_latest_valid("model.pt"))[0] == "step-1"


async def test_what_is_no_fault_of_the_tag_is_raised_at_once(engine):
    with pytest.raises(aiockpt.InvalidArgumentError):
        await engine.load_latest_valid("model.pt", into={"other": torch.zeros(3)})


async def test_a_fallback_fills_targets_with_the_older_tag(engine, root):
    damage(root, "step-3", "model.pt")
    into = {"w": torch.zeros(5000)}
    tag, (state,) = await engine.load_latest_valid("model.pt", into=into)
    assert tag == "step-2"
    assert state["w"] is into["w"]
    assert into["w"].eq(2).all()


def test_the_blocking_door_falls_back_too(root):
    with sync.CheckpointEngine(root, {"host_cache_size": 0.0625}) as engine:
        for number in (1, 2):
            engine.create(f"step-{number}")
            engine.save({"w": torch.full((5000,), float(number))}, "model.pt")
            engine.commit(f"step-{number}")
        damage(root, "step-2", "model.pt")
        assert engine.load_latest_valid("model.pt")[0] == "step-1"
        with engine.open("model.pt", tag="step-1") as file:
            assert file.rows("w", 1, 3).tolist() == [1, 1]
    assert os.listdir(root)


async def test_a_missing_key_is_no_fault_of_the_tag(engine):
    with pytest.raises(aiockpt.CheckpointNotFoundError, match="near"):
        await engine.load_latest_valid("model.pt", keys=["ww"])


async def test_all_files_come_from_one_commit_of_a_tag(engine, monkeypatch):
    opened = type(engine._runtime._catalog._storage).open_read
    is_first = True

    async def overwrite():
        await engine.create("step-3", overwrite=True)
        for name in ("model.pt", "optimizer.pt"):
            await engine.save({"w": torch.zeros(10), "step": 30}, name)
        await engine.commit("step-3")

    def open_and_overwrite(storage, path):
        nonlocal is_first
        if path == "step-3/optimizer.pt" and is_first:
            is_first = False
            gate.set_result(None)
            done.result(LIMIT_S)
        return opened(storage, path)

    gate, done = Future(), Future()
    storage_class = type(engine._runtime._catalog._storage)
    monkeypatch.setattr(storage_class, "open_read", open_and_overwrite)
    load = asyncio.create_task(engine.load_latest_valid("model.pt", "optimizer.pt"))
    await happened(gate)
    await overwrite()
    done.set_result(None)
    tag, found = await load
    assert tag == "step-3"
    assert [state["step"] for state in found] == [30, 30]


async def test_what_makes_no_sense_of_several_files_is_refused(engine):
    with pytest.raises(aiockpt.InvalidArgumentError, match="one path"):
        await engine.load_latest_valid()
    with pytest.raises(aiockpt.InvalidArgumentError, match="one path"):
        await engine.load_latest_valid("model.pt", "optimizer.pt", into={})


async def test_an_open_file_cannot_be_entered_again_and_stays_open(path):
    opened = aiockpt.open(path)
    async with opened as file:
        with pytest.raises(aiockpt.EngineStateError, match="already"):
            await opened.__aenter__()
        assert torch.equal(await file.tensor("model.b"), FLAT["model.b"])


async def test_rows_of_several_tensors_are_refused(path):
    async with aiockpt.open(path) as file:
        with pytest.raises(aiockpt.InvalidArgumentError, match="several"):
            await file.rows("model.*")


def test_rows_of_nothing_are_empty_wherever_they_stand(tmp_path):
    torch.save({"w": torch.zeros(4096, 4), "e": torch.zeros(5, 0)}, tmp_path / "f.pt")
    with sync.open(tmp_path / "f.pt") as file:
        for row in range(0, 4097, 64):
            assert file.rows("w", row, row).shape == (0, 4)
        assert file.rows("e", 1, 3).shape == (2, 0)


FORKED = """
import os, sys, warnings
import aiockpt
from aiockpt import sync
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads
with sync.open(sys.argv[1]) as file:
    child = os.fork()
    if child == 0:
        try:
            file.tensor("model.b")
        except aiockpt.EngineStateError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert file.tensor("model.b").shape == (7,)
"""


def test_an_open_file_is_of_no_use_in_a_forked_child(path):
    subprocess.run(
        [sys.executable, "-c", FORKED, str(path)], check=True, timeout=LIMIT_S
    )
