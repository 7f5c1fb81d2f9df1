"""Lightning's checkpoints: written behind its back, in order, each whole or not there."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.processes import Helper, environment, names, run

pytest.importorskip("lightning", reason="the extra `lightning` is not installed")

PROGRAM = str(Path(__file__).with_name("lightning_cases.py"))


@pytest.fixture(scope="module")
def cases() -> Iterator[Helper]:
    with Helper("integrations.lightning_cases") as helper:
        yield helper


def run_program(case: str, out: Path):
    return run(PROGRAM, case, json.dumps({"out": str(out)}))


def assert_resumes_as_stock(facts):
    assert facts["losses"][0] == facts["losses"][1]
    from_stock, *others = facts["resumed"]
    assert len(from_stock) == 4
    assert others == [from_stock, from_stock]
    assert (
        facts["names"][0]
        == facts["names"][1]
        == [f"step={n}.ckpt" for n in (2, 4, 6, 8)]
    )
    assert facts["equal"]
    assert facts["keys"][0] == facts["keys"][1]


def test_training_and_resuming_are_those_of_stock_lightning(cases, tmp_path):
    assert_resumes_as_stock(cases.ask("resume", out=str(tmp_path)))


@pytest.mark.dist
def test_on_two_devices_training_and_resuming_are_those_of_stock_lightning(tmp_path):
    [facts] = run_program("two_devices", tmp_path)

    assert_resumes_as_stock(facts)
    assert facts["one"] == ["step=8.ckpt"]


def test_training_goes_on_while_a_file_is_not_yet_at_its_path(cases, tmp_path):
    facts = cases.ask("held", out=str(tmp_path))

    # What was saved after it waits for its turn.
    assert facts["seen"] == []
    assert facts["names"] == [f"step={n}.ckpt" for n in (2, 4, 6, 8)]


def test_save_top_k_of_one_leaves_one_file(cases, tmp_path):
    facts = cases.ask("kept", out=str(tmp_path), save_top_k=1)

    assert facts["steps"] == {"step=8.ckpt": 8}


@pytest.mark.parametrize("kind", [True, "link"])
def test_the_last_checkpoint_has_its_second_name(cases, tmp_path, kind):
    facts = cases.ask("kept", out=str(tmp_path), save_top_k=1, save_last=kind)

    assert facts["steps"] == {"last.ckpt": 8, "step=8.ckpt": 8}
    assert facts["links"] == (["last.ckpt"] if kind == "link" else [])


@pytest.mark.parametrize("kind", ["ema", "ema of epochs", "swa"])
@pytest.mark.parametrize("saving", ["every_n_train_steps", "every_n_epochs"])
def test_averages_are_not_written_over_what_is_being_saved(
    cases, tmp_path, kind, saving
):
    facts = cases.ask("averages", out=str(tmp_path), kind=kind, **{saving: 2})

    assert facts["names"][0] == facts["names"][1] != []
    assert facts["differing"] == []


def test_a_failed_save_is_raised_by_the_next_and_removes_no_other(cases, tmp_path):
    facts = cases.ask("failed", out=str(tmp_path), step=4)

    assert facts["error"][0] == "StorageError"
    assert "step=4" in facts["error"][1]
    assert facts["last"] in (5, 6)
    assert facts["left"] == ["step=2.ckpt"]
    assert facts["again"] == ["step=8.ckpt"]


def test_a_failure_of_the_last_save_is_raised_at_the_end_of_fit(cases, tmp_path):
    facts = cases.ask("failed", out=str(tmp_path), step=8)

    assert facts["error"][0] == "StorageError"
    assert facts["last"] == 8
    assert facts["left"] == ["step=6.ckpt"]


def test_a_training_that_breaks_keeps_its_error_and_its_checkpoints(cases, tmp_path):
    facts = cases.ask("wrong_step", out=str(tmp_path))

    assert facts == {"error": "in a step", "names": ["step=2.ckpt"]}


def test_a_file_that_is_removed_before_it_is_there_does_not_come(cases, tmp_path):
    assert cases.ask("remove_early", out=str(tmp_path)) == []


def test_loading_waits_for_a_file_that_is_on_its_way(cases, tmp_path):
    assert cases.ask("load_pending", out=str(tmp_path)) == [0, 1, 2]


def test_what_a_forward_pass_changes_is_saved_as_it_was(cases, tmp_path):
    facts = cases.ask(
        "forward_meanwhile", out=str(tmp_path), kind="norm", width=16384, wait=False
    )

    assert facts == {"error": None, "is_before": True}


def test_a_large_tensor_that_a_forward_pass_changes_fails_the_save_by_name(
    cases, tmp_path
):
    facts = cases.ask(
        "forward_meanwhile", out=str(tmp_path), kind="mean", width=65536, wait=False
    )

    assert facts["error"][0] == "TornSnapshotError"
    assert "seen" in facts["error"][1]


def test_a_large_tensor_may_change_after_wait_staged(cases, tmp_path):
    facts = cases.ask(
        "forward_meanwhile", out=str(tmp_path), kind="mean", width=65536, wait=True
    )

    assert facts == {"error": None, "is_before": True}


def test_what_cannot_be_saved_or_loaded_is_refused(cases, tmp_path):
    facts = cases.ask("bad_calls", out=str(tmp_path))

    kinds = [error and error[0] for error in facts["errors"]]
    assert kinds == ["InvalidArgumentError"] * 5 + ["CheckpointNotFoundError"]
    assert facts["names"] == ["directory"]


def test_a_save_after_fit_is_finished_before_the_process_ends(tmp_path):
    [before] = run_program("after_fit", tmp_path)

    assert "after.ckpt" not in before
    assert names(tmp_path) == ["after.ckpt", "fit"]


def test_without_lightning_the_import_says_what_to_install():
    program = """
import sys
sys.modules.update({"lightning": None, "lightning_fabric": None})
try:
    import aiockpt.integrations.lightning
except ImportError as error:
    assert "pip install aiockpt[lightning]" in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
