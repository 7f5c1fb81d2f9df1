"""accelerate's states: its own files, published whole while training goes on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.processes import Helper, environment, names, run

pytest.importorskip("accelerate", reason="the extra `transformers` is not installed")

PROGRAM = str(Path(__file__).with_name("accelerate_cases.py"))


@pytest.fixture(scope="module")
def cases() -> Iterator[Helper]:
    with Helper("integrations.accelerate_cases") as helper:
        yield helper


@pytest.mark.parametrize(
    ("safe", "weights"), [(True, "model.safetensors"), (False, "pytorch_model.bin")]
)
def test_a_state_is_that_of_stock_accelerate(cases, tmp_path, safe, weights):
    facts = cases.ask("resume", out=str(tmp_path), safe=safe)

    assert facts["resumed"] == [[facts["losses"], 6]] * 2
    assert facts["place"] == f"{tmp_path}/ours/3"
    assert facts["files"][0] == facts["files"][1]
    assert weights in facts["files"][0]


def test_a_state_is_not_seen_before_it_is_whole(cases, tmp_path):
    facts = cases.ask("held", out=str(tmp_path))

    assert facts["before"] == []
    assert facts["after"] == ["first"]
    # No tensor has gone through a file of accelerate's.
    assert facts["scratch"] == []


def test_what_a_forward_pass_changes_is_saved_as_it_was(cases, tmp_path):
    assert cases.ask("forward_meanwhile", out=str(tmp_path)) is True


def test_an_optimizer_that_changes_its_mode_waits_if_that_rewrites_weights(
    cases, tmp_path
):
    facts = cases.ask("modes", out=str(tmp_path))

    # Each was saved as it was; and where nothing was rewritten, nobody waited.
    assert facts == {
        "train-train": [True, True],
        "train-eval": [True, False],
        "eval-eval": [True, True],
        "eval-train": [True, False],
    }


def test_loading_waits_for_a_state_that_is_on_its_way(cases, tmp_path):
    assert cases.ask("load_pending", out=str(tmp_path)) == 0


def test_states_can_be_named_and_limited_by_accelerate(cases, tmp_path):
    facts = cases.ask("named", out=str(tmp_path))

    assert facts["places"] == [f"checkpoint_{number}" for number in range(4)]
    assert facts["names"] == ["checkpoint_2", "checkpoint_3"]
    assert facts["count"] == 4
    assert facts["again"][0] == "InvalidArgumentError"


def test_a_failure_is_raised_by_the_next_call_and_costs_no_other_state(cases, tmp_path):
    facts = cases.ask("failed", out=str(tmp_path))

    [failure] = [error for error in facts["errors"] if error]
    assert failure[0] == "StorageError"
    assert "random_states" in failure[1]
    assert facts["names"] in (["good", "last"], ["good", "last", "next"])


@pytest.mark.dist
def test_two_processes_publish_one_state_with_the_files_of_both(tmp_path):
    [facts] = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(PROGRAM, "two_processes", json.dumps({"out": str(tmp_path)})),
    )

    assert facts["resumed"] == facts["losses"]
    ours, last, stock = facts["files"]
    assert ours == last == stock
    assert "random_states_1.pkl" in ours


def test_a_state_that_nobody_waits_for_is_finished_before_the_process_ends(tmp_path):
    run(PROGRAM, "at_exit", json.dumps({"out": str(tmp_path)}))

    assert names(tmp_path) == ["state"]


def test_what_cannot_be_saved_or_loaded_is_refused(cases, tmp_path):
    facts = cases.ask("refused", out=str(tmp_path))

    kinds = [error and error[0] for error in facts["errors"]]
    assert kinds == ["InvalidArgumentError"] * 3 + ["CheckpointNotFoundError"]
    assert facts["names"] == ["mine"]


def test_without_accelerate_the_import_says_what_to_install():
    program = """
import sys
sys.modules["accelerate"] = None
try:
    import aiockpt.integrations.accelerate
except ImportError as error:
    assert "pip install aiockpt[transformers]" in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
