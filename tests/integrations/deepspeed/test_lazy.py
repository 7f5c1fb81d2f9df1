"""Commits that nobody waits for, as a `DeepSpeedEngine` has them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aiockpt.catalog import Catalog
from aiockpt.errors import CheckpointError, InvalidArgumentError, StorageError
from aiockpt.integrations.deepspeed.lazy import LazyCheckpointEngine
from aiockpt.staging import host
from aiockpt.storage import local_write
from gates import RING_8_MIB, causes, failing, held, in_thread, num_held, run_script

NO_SPACE = StorageError(28, "no space left", "model.pt")


@dataclass
class CommitInfo:
    """As DeepSpeed's own."""

    tag: str
    save_dir: str
    save_latest: bool = True


@pytest.fixture
def engine() -> Iterator[LazyCheckpointEngine]:
    engine = LazyCheckpointEngine(RING_8_MIB)
    yield engine
    engine.close()


def hand_over(engine, root, tag, state, *, buffers=()) -> None:
    """What `save_checkpoint` does with the engine."""
    info = CommitInfo(tag, str(root))
    with engine.handing_over(buffers):
        engine.create(info)
        engine.makedirs(f"{root}/{tag}", exist_ok=True)
        engine.save(state, path=f"{root}/{tag}/model.pt")
        assert engine.commit(info)


def latest(root: Path) -> str | None:
    path = root / "latest"
    return path.read_text().strip() if path.exists() else None


def published(root: Path) -> set[str]:
    return {path.parts[-3] for path in root.glob("*/.aiockpt/manifest.json")}


def test_handing_over_waits_for_no_write(engine, root, monkeypatch):
    with held(monkeypatch, local_write.LocalWriteFile, "_write") as gate:
        hand_over(engine, root, "one", {"number": 1})
        gate.wait_reached()
        assert not published(root)
    engine.drain()
    assert latest(root) == "one"


def test_waiting_for_staging_waits_for_no_write(engine, root, monkeypatch):
    with held(monkeypatch, local_write.LocalWriteFile, "_write") as gate:
        hand_over(engine, root, "one", {"weight": torch.zeros(50_000)})
        engine.wait_staged()
        gate.wait_reached()
        assert not published(root)
    engine.drain()


def test_tensors_may_change_once_they_are_staged(engine, root, monkeypatch):
    weight = torch.zeros(50_000)
    with held(monkeypatch, host, "_fill") as gate:
        hand_over(engine, root, "one", {"weight": weight})
        gate.wait_reached()
        waiting = in_thread(engine.wait_staged)
        while not (waiting.done() or num_held(engine._roots.machinery.gate)):
            pass
        assert not waiting.done()
    waiting.result()
    weight.add_(1)
    engine.drain()
    assert not engine.load(f"{root}/one/model.pt")["weight"].any()


def test_without_the_guard_an_update_that_comes_too_early_fails_the_tag(
    root, monkeypatch
):
    engine = LazyCheckpointEngine(RING_8_MIB | {"guard": False})
    weight = torch.zeros(50_000)
    with held(monkeypatch, host, "_fill") as gate:
        hand_over(engine, root, "one", {"weight": weight})
        gate.wait_reached()
        engine.wait_staged()
        weight.add_(1)
    with pytest.raises(CheckpointError, match="weight"):
        engine.close()
    assert not published(root)


def test_buffers_may_change_at_once(engine, root, monkeypatch):
    buffer = torch.zeros(50_000)
    state = {"module": {"seen": buffer, "view": buffer[10:20]}}
    with held(monkeypatch, host, "_fill") as gate:
        hand_over(engine, root, "one", state, buffers=[buffer])
        gate.wait_reached()
        buffer.add_(1)
    engine.drain()
    loaded = engine.load(f"{root}/one/model.pt")["module"]
    assert not loaded["seen"].any()
    assert loaded["view"].untyped_storage().data_ptr() == (
        loaded["seen"].untyped_storage().data_ptr()
    )


def test_python_objects_are_what_they_were_at_the_call(engine, root, monkeypatch):
    scaler = SimpleNamespace(scale=1.0)
    state = {"loss_scaler": scaler, "ds_config": {"lr": 1}}
    with held(monkeypatch, local_write.LocalWriteFile, "_write") as gate:
        hand_over(engine, root, "one", state)
        scaler.scale = state["ds_config"]["lr"] = 2
        gate.wait_reached()
    engine.drain()
    found = engine.load(f"{root}/one/model.pt")
    assert found == {"loss_scaler": SimpleNamespace(scale=1.0), "ds_config": {"lr": 1}}


def test_latest_ends_at_the_tag_that_was_handed_over_last(engine, root, monkeypatch):
    with held(monkeypatch, Catalog, "publish") as gate:
        hand_over(engine, root, "one", {"number": 1})
        gate.wait_reached()
        hand_over(engine, root, "two", {"number": 2})
    engine.drain()
    assert latest(root) == "two"
    assert published(root) == {"one", "two"}


def test_commits_end_in_the_order_in_which_they_began(engine, tmp_path, monkeypatch):
    publish, order = Catalog.publish, []

    def note(catalog, tag, *args, **kwargs):
        order.append(tag)
        return publish(catalog, tag, *args, **kwargs)

    monkeypatch.setattr(Catalog, "publish", note)
    # The first has much more to write.
    hand_over(engine, tmp_path / "a", "one", {"weight": torch.zeros(10_000_000)})
    hand_over(engine, tmp_path / "b", "two", {"number": 2})
    hand_over(engine, tmp_path / "a", "three", {"number": 3})
    engine.drain()
    assert order == ["one", "two", "three"]


def test_a_tag_that_is_handed_over_again_takes_the_place_of_the_first(engine, root):
    for number in range(3):
        hand_over(engine, root, "one", {"number": number})
    engine.drain()
    assert engine.load(f"{root}/one/model.pt") == {"number": 2}


def test_what_was_published_is_forgotten(engine, root):
    for number in range(5):
        hand_over(engine, root, f"tag-{number}", {"number": number})
        engine._wait(engine._commits)
    assert len(engine._commits) == 1


def fail_one_commit(engine, root, monkeypatch) -> None:
    hand_over(engine, root, "one", {"number": 1})
    engine.drain()
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "publish", failing(NO_SPACE))
        hand_over(engine, root, "two", {"number": 2})
        engine._wait(engine._commits)


CALLS = {
    "handing over": lambda engine, root: hand_over(engine, root, "three", {}),
    "create": lambda engine, root: engine.create("three"),
    "drain": lambda engine, _: engine.drain(),
    "cleanup": lambda engine, _: engine.cleanup(),
    "close": lambda engine, _: engine.close(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_failure_is_raised_by_the_next_call_and_only_there(
    engine, root, monkeypatch, call
):
    fail_one_commit(engine, root, monkeypatch)
    with pytest.raises(StorageError, match="no space left"):
        CALLS[call](engine, root)
    assert latest(root) == "one"
    hand_over(engine, root, "two", {"number": 3})
    engine.drain()
    assert latest(root) == "two"
    assert engine.load(f"{root}/two/model.pt") == {"number": 3}


def test_several_failures_are_raised_as_one(engine, root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "publish", failing(NO_SPACE))
        with held(patch, local_write.LocalWriteFile, "_write"):
            for tag in ("one", "two"):
                hand_over(engine, root, tag, {"number": 1})
        with pytest.raises(StorageError) as raised:
            engine.drain()
    assert len(raised.value.__notes__) == 1
    engine.drain()


def test_what_cannot_be_captured_is_told_by_the_commit(engine, root):
    hand_over(engine, root, "one", {"call": lambda: None})
    with pytest.raises(InvalidArgumentError, match="lambda") as raised:
        engine.drain()
    assert raised.value not in causes(raised.value.__cause__)
    assert not published(root)


def test_a_tag_that_cannot_be_opened_is_told_when_all_was_handed_over(engine, tmp_path):
    (tmp_path / "file").write_text("in the way")
    reached = []
    with pytest.raises(StorageError), engine.handing_over([]):
        engine.create(CommitInfo("one", f"{tmp_path}/file"))
        engine.save({}, f"{tmp_path}/file/one/model.pt")
        reached.append(True)
    assert reached
    hand_over(engine, tmp_path / "root", "one", {"number": 1})
    engine.drain()


def test_handing_over_that_is_broken_off_drops_the_tag(engine, root):
    with pytest.raises(KeyError), engine.handing_over([]):
        engine.create(CommitInfo("one", str(root)))
        engine.save({}, f"{root}/one/model.pt")
        raise KeyError
    assert not list(root.glob(".aiockpt/work/*"))
    hand_over(engine, root, "one", {"number": 1})
    engine.drain()
    assert latest(root) == "one"


def test_a_file_that_is_refused_for_a_failure_does_not_hide_it(
    engine, root, monkeypatch
):
    failure = StorageError(5, "the disk is broken", "f")
    monkeypatch.setattr(local_write.LocalWriteFile, "_write", failing(failure))
    with engine.handing_over([]):
        engine.create(CommitInfo("one", str(root), save_latest=True))
        engine.save({"a": torch.zeros(50_000)}, f"{root}/one/a.pt")
        attempt = engine._tags[-1].runtimes[str(root)].open_tags.get("one")
        while attempt.failure is None:
            pass
        engine.save({"b": torch.zeros(50_000)}, f"{root}/one/b.pt")
    with pytest.raises(StorageError, match="the disk is broken"):
        engine.drain()


def test_a_plain_commit_comes_after_those_that_were_handed_over(
    engine, root, monkeypatch
):
    waits: list[Sequence[int]] = []
    wait = LazyCheckpointEngine._wait

    def noted(self: LazyCheckpointEngine, numbers: Iterable[int]) -> None:
        waits.append(list(numbers))
        wait(self, numbers)

    monkeypatch.setattr(LazyCheckpointEngine, "_wait", noted)
    with held(monkeypatch, Catalog, "publish") as gate:
        hand_over(engine, root, "one", {"number": 1})
        gate.wait_reached()
        info = CommitInfo("one", str(root), save_latest=False)
        created = in_thread(lambda: engine.create(info))
        while not (created.done() or [0] in waits):
            pass
        assert not created.done()
    created.result()
    engine.save({"weights": 1}, f"{root}/weights.bin")
    engine.commit(info)
    assert engine.load(f"{root}/one/model.pt") == {"number": 1}
    assert engine.load(f"{root}/weights.bin") == {"weights": 1}
    assert latest(root) == "one"


def test_deepspeed_is_told_not_to_commit(engine):
    assert engine.is_decoupled()
    assert engine.get_commit_info() is None


SCRIPT = """
import sys, torch
from types import SimpleNamespace
from aiockpt.integrations.deepspeed.lazy import LazyCheckpointEngine
engine = LazyCheckpointEngine({"host_cache_size": 0.01})
for tag in ("one", "two"):
    info = SimpleNamespace(tag=tag, save_dir=sys.argv[1], save_latest=True)
    with engine.handing_over([]):
        engine.create(info)
        engine.save({"a": torch.ones(5_000_000)}, f"{sys.argv[1]}/{tag}/m.pt")
"""


def test_what_was_handed_over_is_committed_at_exit(root):
    ran = run_script(SCRIPT, root)
    assert ran.returncode == 0, ran.stderr
    assert latest(root) == "two"
    assert published(root) == {"one", "two"}


def test_what_fails_at_exit_is_told(root):
    broken = """
from aiockpt.catalog import Catalog
def publish(*_, **__): raise OSError(28, "no space left")
Catalog.publish = publish
"""
    ran = run_script(broken + SCRIPT, root)
    assert "no space left" in ran.stderr
    assert not published(root)
