"""The Trainer's checkpoints: its own files, published whole while training goes on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.processes import Helper, environment, names, run

pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

PROGRAM = str(Path(__file__).with_name("trainer_cases.py"))
STEPS = [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
]


@pytest.fixture(scope="module")
def cases() -> Iterator[Helper]:
    with Helper("integrations.trainer_cases") as helper:
        yield helper


def test_training_and_resuming_are_those_of_the_stock_trainer(cases, tmp_path):
    facts = cases.ask("resume", out=str(tmp_path))

    assert facts["losses"][0] == facts["losses"][1]
    assert facts["resumed"] == [facts["losses"][0]] * 2
    assert facts["names"] == [STEPS, STEPS]
    assert facts["files"] == [FILES, FILES]
    assert facts["is_equal"]
    assert facts["is_tied"]


def test_a_checkpoint_is_not_seen_before_it_is_whole(cases, tmp_path):
    facts = cases.ask("held", out=str(tmp_path))

    assert facts["seen"] == []
    assert facts["at_end"] == ["checkpoint-2", "checkpoint-4"]


def test_tensors_do_not_go_through_files_of_the_trainer(cases, tmp_path):
    facts = cases.ask("held", out=str(tmp_path))

    assert facts["scratch"] == ["config.json", "generation_config.json"]


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("rate", [1e-2, 30.0], ids=["last is best", "first is best"])
@pytest.mark.parametrize("best", [True, False], ids=["load best", "load none"])
def test_the_limit_keeps_what_the_stock_trainer_keeps(
    cases, tmp_path, limit, rate, best
):
    stock, ours = cases.ask(
        "rotated", out=str(tmp_path), limit=limit, rate=rate, best=best
    )

    assert ours == stock
    assert len(ours["names"]) <= 2


def test_a_published_checkpoint_is_never_removed_file_by_file(cases, tmp_path):
    facts = cases.ask("removed_by", out=str(tmp_path))

    assert facts == {"names": ["checkpoint-2"], "removed": 0}


def test_what_is_being_read_and_what_others_made_stays_at_the_end(cases, tmp_path):
    facts = cases.ask("spared", out=str(tmp_path))

    assert facts["names"] == ["checkpoint-100", "checkpoint-2", "checkpoint-4"]
    assert facts["limit"] == 1


def test_what_the_trainer_cannot_save_is_not_published_in_part(cases, tmp_path):
    facts = cases.ask("unsaved_part", out=str(tmp_path))

    assert facts == {"error": ["no scaler", []], "names": [], "work": []}


def test_the_best_checkpoint_of_an_earlier_run_stays(cases, tmp_path):
    stock, ours = cases.ask("resumed_limit", out=str(tmp_path))

    assert ours == stock == [STEPS[0], STEPS[3]]


@pytest.mark.parametrize("step", [4, 8])
def test_a_failure_ends_the_training_and_costs_no_other_checkpoint(
    cases, tmp_path, step
):
    facts = cases.ask("failed", out=str(tmp_path), step=step)

    assert facts["error"][0] == "StorageError"
    assert "optimizer.pt" in facts["error"][1]
    assert facts["step"] in {step, step + 2}
    assert facts["names"] == [f"checkpoint-{step - 2}"]


def test_a_killed_training_goes_on_from_the_last_whole_checkpoint(cases, tmp_path):
    assert cases.ask("killed", out=str(tmp_path)) == -9
    assert names(tmp_path) == ["checkpoint-2"]

    facts = cases.ask("resume_last", out=str(tmp_path))

    assert facts["last"] == "checkpoint-2"
    assert facts["losses"] == facts["whole"]
    assert facts["names"] == STEPS


def test_a_training_that_breaks_keeps_its_error_and_its_checkpoints(cases, tmp_path):
    facts = cases.ask("wrong_step", out=str(tmp_path))

    assert facts == {"error": "in a step", "names": ["checkpoint-2"]}


def test_a_checkpoint_just_in_time_is_whole(cases, tmp_path):
    stock, ours = cases.ask("just_in_time", out=str(tmp_path))

    assert ours == stock
    assert ours["names"] == ["checkpoint-3"]
    assert ours["files"] == FILES


def test_what_cannot_be_saved_is_refused_before_training(cases, tmp_path):
    facts = cases.ask("refused", out=str(tmp_path))

    each_node, hub, foreign = facts["errors"]
    assert each_node[0] == hub[0] == foreign[0] == "InvalidArgumentError"
    assert "save_on_each_node" in each_node[1]
    assert "hub_strategy" in hub[1]
    assert "checkpoint-2" in foreign[1]
    assert facts["names"] == ["checkpoint-2"]


@pytest.mark.dist
def test_two_processes_publish_one_checkpoint_with_the_files_of_both(tmp_path):
    out = tmp_path / "run"
    [facts] = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(PROGRAM, "two_processes", json.dumps({"out": str(out)})),
    )

    assert facts["names"] == STEPS
    assert facts["resumed"] == facts["losses"]
    states = ["rng_state_0.pth", "rng_state_1.pth"]
    assert facts["files"] == sorted({*FILES, *states} - {"rng_state.pth"})


def test_without_transformers_the_import_says_what_to_install():
    program = """
import sys
sys.modules["transformers"] = None
try:
    import aiockpt.integrations.huggingface
except ImportError as error:
    assert "pip install aiockpt[transformers]" in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
