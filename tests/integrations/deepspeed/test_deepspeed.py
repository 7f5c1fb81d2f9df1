"""DeepSpeed itself, in real jobs: beside its own engine, and where that fails."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Not imported here: it takes seconds, and changes the process that imports it.
pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed"),
]

HERE = Path(__file__).parent
TESTS = HERE.parents[1]


def launch(
    program: str, num_ranks: int, cases: list[Any], *arguments: object
) -> tuple[int, list[Any], str]:
    """Runs the cases in one job: its status, what rank 0 told of each, and its log."""
    package = Path(sys.modules["aiockpt"].__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": f"{package}:{TESTS}",
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(num_ranks), str(HERE / program)),
        *(json.dumps(cases), *map(str, arguments)),
    ]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            out, log = job.communicate()
        except BaseException:
            # The launcher does not take its ranks with it when it is killed.
            os.killpg(job.pid, signal.SIGKILL)
            raise
    told = [json.loads(line) for line in out.splitlines() if line.startswith('{"case')]
    return job.returncode, told, log


def check(program: str, num_ranks: int, cases: list[Any], *arguments: object) -> None:
    """Runs the cases in one job; what any of them finds wrong fails the test."""
    status, told, log = launch(program, num_ranks, cases, *arguments)
    assert status == 0, log[-5000:]
    assert [each["case"] for each in told] == cases
    wrong = [each for each in told if each["problems"]]
    assert not wrong, json.dumps(wrong, indent=1).replace("\\n", "\n")


# Cells of pipelines come last: they leave groups behind that others cannot have.
CELLS = {
    1: [
        {"stage": 2, "dtype": "bf16", "extras": ["weights", "fp32"]},
        {"stage": 3, "offload": "parameters"},
    ],
    2: [
        {"stage": 0},
        {"stage": 1, "extras": ["universal"]},
        {"stage": 2, "dtype": "bf16", "extras": ["weights", "fp32"]},
        {"stage": 2, "offload": "optimizer"},
        {"stage": 3, "dtype": "bf16", "extras": ["weights", "fp32", "universal"]},
        {"kind": "experts", "stage": 1},
        {"kind": "pipeline"},
    ],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_checkpoints_are_those_of_the_stock_engine_and_training_is_not_disturbed(
    num_ranks, tmp_path
):
    check("cells.py", num_ranks, CELLS[num_ranks], tmp_path)


ALL_CELLS = [
    *(
        {"stage": stage, "dtype": dtype, "extras": ["weights", "fp32", "universal"]}
        for stage in range(1, 4)
        for dtype in ("fp32", "bf16")
    ),
    *(
        {"stage": 0, "dtype": dtype, "extras": ["weights"]}
        for dtype in ("fp32", "bf16")
    ),
    *({"stage": stage, "offload": "optimizer"} for stage in range(1, 4)),
    *(
        {"stage": 3, "dtype": dtype, "offload": "parameters"}
        for dtype in ("fp32", "bf16")
    ),
    *(
        {"kind": "experts", "stage": stage, "dtype": dtype}
        for stage in range(3)
        for dtype in ("fp32", "bf16")
    ),
    # In stage 0 DeepSpeed cannot load a bf16 pipeline, whichever engine saved it.
    {"kind": "pipeline", "stage": 1, "dtype": "bf16"},
    {"kind": "pipeline"},
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_configuration_is_as_with_the_stock_engine(num_ranks, tmp_path):
    check("cells.py", num_ranks, ALL_CELLS, tmp_path)


CASES = [
    "before_install_nothing_is_changed",
    "last_save_without_a_step",
    "two_saves_without_a_step",
    "latest_stays_where_it_is",
    "directories_in_turn",
    "a_load_sees_what_was_just_saved",
    "engines_of_one_configuration_share",
    "extra_files_stay",
    "no_step_waits_for_the_disk",
    "nothing_is_moved_or_freed_while_it_is_being_staged",
    "what_was_gathered_is_not_written_back_while_it_is_being_staged",
    "what_changes_at_times_of_its_own_is_staged_at_once",
    "an_engine_that_is_collected_waits_for_nothing",
    "an_engine_that_is_only_assigned_commits_at_once",
    "a_full_disk_on_one_rank",
    "what_cannot_be_saved_on_one_rank",
    "where_no_directory_can_be",
    "under_a_file",
    "no_room_for_what_rank_0_copies",
    "a_16_bit_model_that_rank_0_cannot_save",
    "no_memory_for_copies_on_one_rank",
    "the_documented_block",
    "nobody_destroys_it",
]


@pytest.mark.timeout(600)
def test_saves_end_well_whatever_comes_after_them(tmp_path):
    check("scenarios.py", 2, CASES, tmp_path)
    # The last case leaves it to the end of the interpreter.
    assert (tmp_path / "at-exit" / "latest").read_text() == "global_step1\n"


@pytest.mark.timeout(600)
def test_a_killed_rank_leaves_latest_as_it_was_and_the_next_job_goes_on(tmp_path):
    status, told, _ = launch(
        "scenarios.py", 2, ["a_rank_is_killed"], tmp_path, "--install"
    )
    assert status != 0
    assert told == []
    check("scenarios.py", 2, ["it_goes_on_after_the_kill"], tmp_path, "--install")
