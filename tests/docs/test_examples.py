"""Every example runs as it stands, and again from what it has left."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

# Interpreters that import torch, and more, one or two at a time.
pytestmark = pytest.mark.timeout(300)


def run(name: str, *arguments: object, status: int = 0) -> str:
    """What an example prints."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == status, ran.stderr
    return ran.stdout


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def tags(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()} - {".aiockpt"}


def test_every_example_is_run_here():
    here = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.stem}"' in here


def test_the_plain_loop_ends_alike_whether_it_died_or_not(root):
    whole = run("plain_loop", root / "whole").splitlines()

    run("plain_loop", root / "died", "--die-at", 25, status=-signal.SIGKILL)
    assert tags(root / "died") == {"step-10"}
    resumed = run("plain_loop", root / "died").splitlines()

    assert (whole[0], resumed[0]) == ("starts after step 0", "starts after step 10")
    assert resumed[-1] == whole[-1]
    assert tags(root / "whole") == tags(root / "died")


def test_the_asyncio_trainer_keeps_its_loop_and_goes_on(root):
    first = run("rl_trainer", root, "--updates", 30, "--width", 32)
    second = run("rl_trainer", root, "--updates", 60, "--width", 32)

    assert "loop gap: median" in first
    assert "update-10: " in first
    assert "greedy players" in first
    assert second.startswith("goes on from update-30\n")
    assert tags(root) == {"update-40", "update-50", "update-60"}


def test_the_lightning_run_goes_on(root):
    need("lightning")

    assert "step 32: loss" in run("lightning_run", root)
    assert "step 64: loss" in run("lightning_run", root, "--resume")
    names = sorted(path.name for path in root.iterdir())
    assert names == ["epoch=3-step=64.ckpt", "last.ckpt"]


def test_the_trainer_run_goes_on(root):
    need("transformers")

    assert "step 20: loss" in run("trainer_run", root)
    assert "step 40: loss" in run("trainer_run", root, "--steps", 40, "--resume")
    assert tags(root) == {"checkpoint-30", "checkpoint-40"}


@pytest.mark.dist
def test_the_deepspeed_run_goes_on(root):
    need("deepspeed")

    def lines(steps: int) -> list[str]:
        # DeepSpeed prints, too.
        printed = run("deepspeed_gpt", root, "--steps", steps).splitlines()
        return [line for line in printed if line.startswith("st")]

    first, second = lines(7), lines(12)
    assert (first[0], second[0]) == ("starts after step 0", "starts after step 5")
    assert second[1:3] == first[6:8]
    assert tags(root) == {"global_step5", "global_step10"}
