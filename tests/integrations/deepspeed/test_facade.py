"""DeepSpeed's interface without DeepSpeed: what any other code may build on."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aiockpt.catalog import Catalog
from aiockpt.config import EngineConfig
from aiockpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.integrations.deepspeed import CheckpointEngine
from aiockpt.integrations.deepspeed.facade import CheckpointEngine as Facade
from aiockpt.staging import host
from gates import LIMIT_S, RING_8_MIB, failing, held, in_thread, num_held, run_script

STATE = {"weight": torch.arange(50_000.0), "step": 7}


@dataclass
class CommitInfo:
    """As DeepSpeed's own."""

    tag: str
    save_dir: str
    save_latest: bool = True


@pytest.fixture
def engine() -> Iterator[Facade]:
    engine = CheckpointEngine(RING_8_MIB)
    yield engine
    engine.close()


def latest(root: Path) -> str | None:
    path = root / "latest"
    return path.read_text().strip() if path.exists() else None


def published(root: Path) -> set[str]:
    return {path.parts[-3] for path in root.glob("*/.aiockpt/manifest.json")}


def names(directory: Path) -> set[str]:
    return set(os.listdir(directory)) - {".aiockpt"}


def is_equal(state) -> bool:
    return state["step"] == 7 and torch.equal(state["weight"], STATE["weight"])


# --- saving ------------------------------------------------------------------


def test_the_root_is_found_from_the_paths_that_are_saved(engine, root):
    engine.create("step-1")
    engine.save(STATE, f"{root}/step-1/model.pt")
    engine.save({"deep": 1}, path=str(root / "step-1" / "sub" / "other.pt"))
    assert not published(root)
    assert engine.commit("step-1") is True
    assert latest(root) == "step-1"
    assert names(root / "step-1") == {"model.pt", "sub"}
    assert is_equal(torch.load(root / "step-1" / "model.pt"))
    assert engine.load(f"{root}/step-1/sub/other.pt") == {"deep": 1}


def test_the_last_directory_of_that_name_is_the_tag(engine, tmp_path):
    root = tmp_path / "a" / "a"
    engine.create("a")
    engine.save(STATE, f"{root}/a/model.pt")
    engine.commit("a")
    assert latest(root) == "a"
    assert latest(tmp_path) is None


def test_a_relative_path_means_the_working_directory(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine.create("one")
    engine.save(STATE, "runs/one/model.pt")
    engine.commit("one")
    assert latest(tmp_path / "runs") == "one"
    assert is_equal(engine.load("runs/one/model.pt"))


def test_one_tag_may_lie_in_two_directories(engine, tmp_path):
    engine.create("one")
    engine.save(STATE, f"{tmp_path}/first/one/model.pt")
    engine.save(STATE, f"{tmp_path}/second/one/model.pt")
    engine.commit("one")
    assert latest(tmp_path / "first") == latest(tmp_path / "second") == "one"


def test_tags_of_two_directories_may_be_saved_side_by_side(engine, tmp_path):
    infos = [CommitInfo("one", f"{tmp_path}/{name}") for name in ("first", "second")]
    for info in infos:
        engine.create(info)
    for number, info in enumerate(infos):
        engine.save({"number": number}, f"{info.save_dir}/one/model.pt")
    engine.commit(infos[1])
    assert not published(tmp_path / "first")
    engine.commit(infos[0])
    for number, info in enumerate(infos):
        assert engine.load(f"{info.save_dir}/one/model.pt") == {"number": number}


def test_a_tag_that_deepspeed_described_may_be_committed_by_its_name(engine, root):
    engine.create(CommitInfo("one", str(root)))
    engine.save(STATE, f"{root}/one/model.pt")
    engine.commit("one")
    assert latest(root) == "one"


def test_latest_stays_where_deepspeed_says_so(engine, root):
    for tag, save_latest in (("one", True), ("two", False)):
        info = CommitInfo(tag, str(root), save_latest)
        engine.create(info)
        engine.save(STATE, f"{root}/{tag}/model.pt")
        engine.commit(info)
    assert latest(root) == "one"
    assert published(root) == {"one", "two"}


def test_a_file_outside_of_the_tag_appears_whole_at_the_commit(engine, root):
    root.mkdir()
    engine.create("one")
    engine.save(STATE, f"{root}/weights.bin")
    assert not (root / "weights.bin").exists()
    engine.commit("one")
    assert is_equal(torch.load(root / "weights.bin"))
    assert names(root) == {"weights.bin"}


def test_a_described_tag_without_files_leaves_nothing_behind(engine, root):
    root.mkdir()
    info = CommitInfo("one", str(root), save_latest=False)
    engine.create(info)
    engine.save(STATE, f"{root}/weights.bin")
    engine.commit(info)
    assert names(root) == {"weights.bin"}
    assert not list(root.glob(".aiockpt/work/*"))


def test_what_is_saved_without_a_tag_is_there_at_once(engine, tmp_path):
    engine.save(STATE, f"{tmp_path}/alone.pt")
    assert is_equal(torch.load(tmp_path / "alone.pt"))


def test_files_of_others_stay_in_the_tag(engine, root):
    for number in range(2):
        engine.create("one")
        engine.save({"number": number}, f"{root}/one/model.pt")
        # As DeepSpeed copies what it has offloaded to NVMe.
        (root / "one" / "offloaded" / "rank0").mkdir(parents=True, exist_ok=True)
        (root / "one" / "offloaded" / "rank0" / "0.swp").write_text("theirs")
        (root / "one" / f"extra-{number}").write_text("theirs")
        engine.commit("one")
    assert names(root / "one") == {"model.pt", "offloaded", "extra-0", "extra-1"}
    assert (root / "one" / "extra-0").read_text() == "theirs"
    assert (root / "one" / "offloaded" / "rank0" / "0.swp").read_text() == "theirs"
    assert engine.load(f"{root}/one/model.pt") == {"number": 1}


def test_views_of_a_flat_buffer_cost_their_own_size(engine, root):
    flat = torch.zeros(1_000_000)
    engine.create("one")
    engine.save({"a": flat[:1000], "b": flat[1000:2000]}, f"{root}/one/model.pt")
    engine.commit("one")
    assert (root / "one" / "model.pt").stat().st_size < 20_000


# --- what goes wrong ---------------------------------------------------------


def test_a_failed_commit_publishes_nothing_and_ends_the_tag(engine, root, monkeypatch):
    engine.create("one")
    engine.save(STATE, f"{root}/one/model.pt")
    engine.commit("one")
    engine.create("two")
    engine.save(STATE, f"{root}/two/model.pt")
    with monkeypatch.context() as patch:
        boom = StorageError(28, "no space left", "model.pt")
        patch.setattr(Catalog, "publish", failing(boom))
        with pytest.raises(StorageError, match="no space left"):
            engine.commit("two")
    assert latest(root) == "one"
    assert published(root) == {"one"}
    with pytest.raises(EngineStateError, match="'two' is not open"):
        engine.commit("two")
    engine.create("two")
    engine.save(STATE, f"{root}/two/model.pt")
    engine.commit("two")
    assert latest(root) == "two"


def test_a_failed_commit_leaves_the_old_file_outside_of_the_tag(
    engine, root, monkeypatch
):
    engine.save({"old": 1}, f"{root.parent}/weights.bin")
    engine.create("one")
    engine.save(STATE, f"{root}/one/model.pt")
    engine.save(STATE, f"{root.parent}/weights.bin")
    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "publish", failing(StorageError(5, "broken", "x")))
        with pytest.raises(StorageError):
            engine.commit("one")
    assert engine.load(f"{root.parent}/weights.bin") == {"old": 1}
    assert names(root.parent) == {"weights.bin", "root"}


def test_a_failed_file_outside_of_the_tag_fails_the_commit(engine, root, monkeypatch):
    engine.create("one")
    engine.save(STATE, f"{root}/one/model.pt")
    engine.save(STATE, f"{root.parent}/missing/weights.bin")
    with pytest.raises(StorageError, match="missing"):
        engine.commit("one")
    assert not published(root)


@pytest.mark.parametrize("tag", ["", "a/b", ".hidden", "latest"])
def test_a_tag_that_cannot_be_a_directory_is_refused(engine, tag):
    with pytest.raises(InvalidArgumentError):
        engine.create(tag)


def test_a_tag_is_open_once(engine, root):
    engine.create("one")
    with pytest.raises(EngineStateError, match="open already"):
        engine.create("one")


def test_an_unknown_tag_is_not_committed(engine):
    engine.create("one")
    with pytest.raises(EngineStateError, match=r"'two' is not open \(open: 'one'\)"):
        engine.commit("two")


def test_what_cannot_be_pickled_is_refused_by_save(engine, root):
    engine.create("one")
    with pytest.raises(InvalidArgumentError, match="lambda"):
        engine.save({"call": lambda: None}, f"{root}/one/model.pt")


# --- loading -----------------------------------------------------------------


def test_files_of_torch_load_as_ever(engine, tmp_path):
    torch.save(STATE, tmp_path / "model.pt")
    assert is_equal(engine.load(f"{tmp_path}/model.pt", "cpu"))
    placed = engine.load(
        f"{tmp_path}/model.pt", map_location=lambda storage, _: storage
    )
    assert is_equal(placed)


def test_a_file_that_others_put_into_a_tag_loads(engine, root):
    engine.create("one")
    engine.save(STATE, f"{root}/one/model.pt")
    engine.commit("one")
    torch.save({"theirs": 1}, root / "one" / "extra.pt")
    assert engine.load(f"{root}/one/extra.pt") == {"theirs": 1}


def test_objects_of_any_class_load(engine, root):
    engine.create("one")
    engine.save({"object": SimpleNamespace(a=1)}, f"{root}/one/model.pt")
    engine.commit("one")
    assert engine.load(f"{root}/one/model.pt")["object"].a == 1


def test_a_changed_byte_is_found(engine, root):
    engine.create("one")
    engine.save(STATE, f"{root}/one/model.pt")
    engine.commit("one")
    path = root / "one" / "model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="weight"):
        engine.load(str(path))


def test_another_file_in_the_place_of_a_saved_one_is_found(engine, root):
    for tag, number in (("one", 1), ("two", 2)):
        engine.create(tag)
        engine.save({"number": number}, f"{root}/{tag}/model.pt")
        engine.commit(tag)
    shutil.copy(root / "two" / "model.pt", root / "one" / "model.pt")
    with pytest.raises(CorruptCheckpointError, match="manifest"):
        engine.load(f"{root}/one/model.pt")


def test_a_file_that_is_not_there_is_not_found(engine, root):
    with pytest.raises(CheckpointNotFoundError):
        engine.load(f"{root}/one/model.pt")


# --- settings, and the end ---------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"aiockpt": {"host_cache_size": 1, "parser_threads": 8}, "other": 1},
        {"datastates_ckpt": {"host_cache_size": 1, "parser_threads": 8}},
        {"host_cache_size": 1, "parser_threads": 8},
        EngineConfig(host_cache_size=1, parser_threads=8),
        SimpleNamespace(
            _param_dict={"aiockpt": {"host_cache_size": 1, "parser_threads": 8}}
        ),
    ],
)
def test_settings_are_taken_from_where_they_are(params):
    config = CheckpointEngine(params).config
    assert (config.host_cache_size, config.parser_threads) == (1, 8)


@pytest.mark.parametrize("params", [None, SimpleNamespace(_param_dict={"bf16": {}})])
def test_settings_need_not_be_given(params):
    assert CheckpointEngine(params).config == EngineConfig()


def test_an_unknown_setting_names_the_nearest(engine):
    with pytest.raises(InvalidArgumentError, match="'host_cache_size'"):
        CheckpointEngine({"datastates_ckpt": {"host_cache_sise": 1}})


def test_deepspeed_is_told_that_commits_are_its_own_business(engine, tmp_path):
    assert not engine.is_decoupled()
    assert not engine.preserves_storage_sharing()
    assert engine.get_commit_info() is None
    assert engine.is_data_parallel_writer(0)
    assert not engine.is_data_parallel_writer(1)
    engine.makedirs(f"{tmp_path}/a/b", exist_ok=True)
    engine.makedirs(f"{tmp_path}/a/b", exist_ok=True)
    assert (tmp_path / "a" / "b").is_dir()


def test_closing_drops_what_was_not_committed(engine, root):
    (root / "one").mkdir(parents=True)
    engine.create("one")
    engine.save(STATE, f"{root}/one/model.pt")
    engine.save(STATE, f"{root}/weights.bin")
    engine.close()
    engine.close()
    assert names(root) == {"one"}
    assert not list(root.glob(".aiockpt/work/*"))


def test_an_engine_that_was_closed_starts_again(engine, root):
    for tag in ("one", "two"):
        engine.create(tag)
        engine.save(STATE, f"{root}/{tag}/model.pt")
        engine.commit(tag)
        engine.close()
    assert latest(root) == "two"


def test_directories_that_are_done_with_hold_no_descriptor(engine, tmp_path):
    def save(number: int) -> int:
        engine.create("one")
        engine.save({"number": number}, f"{tmp_path}/{number}/one/model.pt")
        engine.commit("one")
        return len(os.listdir("/proc/self/fd"))

    first = save(0)
    assert [save(number) for number in range(1, 6)] == [first] * 5


def test_an_update_waits_for_what_is_being_staged(engine, root, monkeypatch):
    weight = torch.nn.Parameter(torch.ones(50_000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones_like(weight)
    engine.create("one")
    guard_gate = engine._roots.machinery.gate
    with held(monkeypatch, host, "_fill") as gate:
        engine.save({"weight": weight}, f"{root}/one/model.pt")
        gate.wait_reached()
        stepping = in_thread(optimizer.step)
        while not (stepping.done() or num_held(guard_gate)):
            pass
    stepping.result(LIMIT_S)
    engine.commit("one")
    assert torch.equal(
        engine.load(f"{root}/one/model.pt")["weight"].detach(), torch.ones(50_000)
    )


def test_importing_it_imports_no_deepspeed_and_changes_nothing():
    script = (
        "import sys, aiockpt.integrations.deepspeed; print('deepspeed' in sys.modules)"
    )
    ran = run_script(script)
    assert ran.stdout.strip() == "False", ran.stderr


def test_without_deepspeed_install_names_the_extra(monkeypatch):
    from aiockpt.integrations.deepspeed import install

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    # Other packages may have imported this much of it.
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", None)
    with pytest.raises(ImportError, match=r"aiockpt\[deepspeed\]"):
        install()


def test_a_script_that_never_closes_it_ends(tmp_path):
    script = """
import sys, torch
from aiockpt.integrations.deepspeed import CheckpointEngine
engine = CheckpointEngine({"host_cache_size": 0.01})
engine.create("one"); engine.save({"a": torch.ones(10)}, sys.argv[1] + "/one/m.pt")
engine.commit("one")
engine.create("two"); engine.save({"a": torch.ones(10)}, sys.argv[1] + "/two/m.pt")
engine.save({"a": torch.ones(10)}, sys.argv[1] + "/weights.pt")
"""
    ran = run_script(script, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "two" in ran.stderr
    assert names(tmp_path) == {"latest", "one"}
