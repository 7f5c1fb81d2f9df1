"""What is saved and committed is what is loaded, by aiockpt and by plain torch."""

import asyncio
import collections
import json
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from aiockpt import CheckpointEngine, events
from aiockpt.staging import host
from aiockpt.storage.local_write import LocalWriteFile
from gates import RING_8_MIB, held

MIB = 1 << 20


def same(one: object, other: object) -> bool:
    """Whether two states are equal; fast, for large ones."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def python_values() -> object:
    return {
        "step": 7,
        "lr": 1e-3,
        "name": "gpt",
        "flags": [True, None],
        "pair": (1, "x"),
        "nested": OrderedDict(a={1: [2.5]}),
    }


STATES: dict[str, Callable[[], object]] = {
    "many tensors": lambda: {f"k{i}": torch.randn(50, 50) for i in range(300)},
    "a tensor larger than the ring": lambda: {"w": torch.randn(10 * MIB)},
    "tiny tensors": lambda: {f"k{i}": torch.tensor([i]) for i in range(20_000)},
    "empty dict": dict,
    "only Python values": python_values,
    "bare tensor": lambda: torch.arange(5.0),
    "model and optimizer": lambda: {
        "model": torch.nn.Linear(64, 64).state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
    },
}


@pytest.mark.parametrize("make_state", STATES.values(), ids=STATES)
async def test_every_loader_returns_what_was_saved(make_state, root):
    state = make_state()
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("step-1")
        await engine.save(state, "model.pt")
        report = await engine.commit("step-1")
        assert same(await engine.load("model.pt"), state)
        assert engine.ring_bytes == (0, 8 * MIB)
    path = root / "step-1" / "model.pt"
    assert same(torch.load(path), state)
    assert zipfile.ZipFile(path).testzip() is None
    assert (report.nbytes, report.num_files) == (path.stat().st_size, 1)
    assert report.peak_ring_bytes <= 8 * MIB


async def test_the_standard_librarys_zip_test_passes(root):
    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        await engine.save({"w": torch.ones(1000)}, "model.pt")
        await engine.commit("a")
    command = [sys.executable, "-m", "zipfile", "-t", str(root / "a" / "model.pt")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: ASYNC221
    assert done.stdout == "Done testing\n"


async def test_safetensors_files_are_read_by_the_official_library(root):
    state = {"w": torch.randn(3, 4), "half": torch.ones(5, dtype=torch.bfloat16)}
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save(state, "model.safetensors", metadata={"step": "7"})
        await engine.save({}, "empty.safetensors")
        await engine.commit("a")
        assert same(await engine.load("model.safetensors"), state)
    path = root / "a" / "model.safetensors"
    assert same(safetensors.torch.load_file(path), state)
    assert safetensors.torch.load_file(root / "a" / "empty.safetensors") == {}
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "7"}


async def test_a_tag_holds_many_files_at_nested_paths(root):
    paths = ["model.pt", "deep/er/optimizer.pt", "deep/rng.pt", "./plain.bin"]
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        for number, path in enumerate(paths):
            await engine.save({"n": torch.tensor(number)}, path)
        absolute = root / "a" / "absolute.pt"
        await engine.save({"n": torch.tensor(4)}, absolute)
        report = await engine.commit("a")
        assert report.num_files == 5
        for number, path in enumerate([*paths, "absolute.pt"]):
            assert (await engine.load(path))["n"] == number
            assert torch.load(root / "a" / path)["n"] == number
        assert (await engine.load(absolute))["n"] == 4


async def test_save_goes_to_the_tag_created_last_unless_told(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.create("b")
        to_last = await engine.save({"n": 1}, "f.pt")
        to_first = await engine.save({"n": 2}, "f.pt", tag="a")
        assert (to_last.tag, to_first.tag) == ("b", "a")
        await engine.commit("b")
        await engine.commit("a")
        assert await engine.load("f.pt", tag="b") == {"n": 1}
        assert await engine.load("f.pt") == {"n": 2}


async def test_tags_that_share_a_small_ring_do_not_mix(root):
    states = {
        f"step-{n}": {
            "w": torch.full((3 * MIB,), float(n)),
            "b": torch.full((MIB,), n, dtype=torch.int64),
        }
        for n in range(4)
    }
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        for tag, state in states.items():
            await engine.create(tag)
            await engine.save(state, "one.pt", tag=tag)
            await engine.save(state["w"], "two.pt", tag=tag)
        async with asyncio.TaskGroup() as group:
            for tag in reversed(states):
                group.create_task(engine.commit(tag))
        for tag, state in states.items():
            assert same(await engine.load("one.pt", tag=tag), state)
            assert same(await engine.load("two.pt", tag=tag), state["w"])
        assert engine.ring_bytes == (0, 8 * MIB)


async def test_a_tag_is_created_while_earlier_ones_are_written_within_the_ring(
    root, monkeypatch
):
    state = {"w": torch.randn(6 * MIB)}
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with held(monkeypatch, LocalWriteFile, "_write") as gate:
            first = await engine.save(state, "model.pt")
            await gate.reached()
            await engine.create("b")
            second = await engine.save(state, "model.pt")
            planned = first.progress.planned_bytes
            assert first.progress.written_bytes == 0
            assert first.progress.staged_bytes <= 8 * MIB < planned
            assert engine.ring_bytes[0] <= 8 * MIB
        for tag in "ab":
            await engine.commit(tag)
            assert same(await engine.load("model.pt", tag=tag), state)
        for progress in (first.progress, second.progress):
            assert progress == events.Progress(planned, planned, planned)


async def test_chunks_may_be_filled_in_any_order(root, monkeypatch):
    original = host.HostStager.fill
    filled: dict[int, asyncio.Event] = collections.defaultdict(asyncio.Event)

    async def fill(stager: Any, lease: Any, chunk: Any, sources: Any) -> None:
        await original(stager, lease, chunk, sources)
        if chunk.index in (0, 2, 4):
            await filled[chunk.index + 1].wait()
        filled[chunk.index].set()

    # Checksums stand in every chunk, so each needs those of the chunks before it.
    state = {f"k{i}": torch.randn(10_000) for i in range(200)}
    one_worker = RING_8_MIB | {"parser_threads": 1}
    async with CheckpointEngine(root, one_worker) as engine:
        await engine.create("a")
        monkeypatch.setattr(host.HostStager, "fill", fill)
        await engine.save(state, "model.pt")
        await engine.commit("a")
        assert same(await engine.load("model.pt"), state)
    assert zipfile.ZipFile(root / "a" / "model.pt").testzip() is None
    assert len(filled) > 6


async def test_nothing_is_seen_before_commit_and_everything_after(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        handle = await engine.save({"n": 1}, "model.pt")
        await handle.staged()
        await handle.written()
        assert await engine.latest() is None
        assert await engine.tags() == []
        assert not (root / "a").exists()
        await engine.commit("a")
        assert await engine.latest() == "a"
        assert [info.tag for info in await engine.tags()] == ["a"]
        await handle.written()
    assert (root / "latest").read_text() == "a\n"
    manifest = json.loads((root / "a" / ".aiockpt" / "manifest.json").read_text())
    assert [entry["path"] for entry in manifest["files"]] == ["model.pt"]


async def test_the_root_is_made_by_the_first_create_with_its_parents(tmp_path):
    root = tmp_path / "not" / "yet" / "there"
    async with CheckpointEngine(root) as engine:
        assert engine.root == str(root)
        assert await engine.latest() is None
        assert not root.exists()
        await engine.create("a")
        await engine.save({}, "f.pt")
        await engine.commit("a")
    assert sorted(path.name for path in root.iterdir()) == [".aiockpt", "a", "latest"]


async def test_later_changes_of_python_values_are_not_seen(root):
    state = {"step": 1, "history": [1, 2], "nested": {"lr": 0.1}, "w": torch.ones(2)}
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save(state, "model.pt")
        state["step"] = 2
        state["history"].append(3)
        state["nested"]["lr"] = 0.2
        state["w"] = torch.zeros(2)
        del state["nested"]
        await engine.commit("a")
        loaded = await engine.load("model.pt")
    expected = {"step": 1, "history": [1, 2], "nested": {"lr": 0.1}}
    assert same(loaded, expected | {"w": torch.ones(2)})


async def test_observers_are_told_of_each_step_in_order(root):
    seen: list[events.Event] = []
    async with CheckpointEngine(root, RING_8_MIB, observers=[seen.append]) as engine:
        await engine.create("a")
        await engine.save({"w": torch.ones(5 * MIB)}, "model.pt")
        report = await engine.commit("a")
    assert [type(event).__name__ for event in seen] == [
        "Planned",
        "Staged",
        "Written",
        "Synced",
        "Published",
    ]
    assert all(event.nbytes == report.nbytes for event in seen[:4])
    assert all(event.elapsed_s >= 0 for event in seen[:4])
    assert seen[0].num_records == 2
    assert seen[4].report == report


async def test_a_failing_observer_is_logged_and_harms_nothing(root, caplog):
    def observer(event: events.Event) -> None:
        raise ValueError("observer")

    async with CheckpointEngine(root, observers=[observer]) as engine:
        await engine.create("a")
        await engine.save({"n": 1}, "model.pt")
        await engine.commit("a")
        assert await engine.load("model.pt") == {"n": 1}
    assert "an observer failed on Published" in caplog.text


async def test_a_report_counts_the_time_that_callers_were_held(root, monkeypatch):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        await engine.save({"w": torch.ones(MIB)}, "model.pt")
        await engine.staged()
        report = await engine.commit("a")
    assert 0 < report.stall_s < report.total_s
    assert report.publish_s + report.sync_s < report.total_s
    assert report.throughput_bytes_per_s == report.nbytes / report.total_s
