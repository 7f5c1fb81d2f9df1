"""The demonstration: killed for real in the middle of a save, and resumed exactly."""

import asyncio
import errno
import signal
import subprocess
import sys

import msgspec
import pytest

import aiockpt
from aiockpt import sync
from aiockpt.demo.model import Shape
from aiockpt.demo.show import run
from aiockpt.demo.trainer import FILE, Settings, Started, Stepped, train
from aiockpt.errors import StorageError

TINY = Settings(
    root="",
    steps=9,
    every=3,
    shape=Shape(num_layers=1, num_heads=1, dim=8, context=8),
    batch_size=2,
    corpus_bytes=10_000,
)


def settings(root, **changes):
    return msgspec.structs.replace(TINY, root=str(root), **changes)


def ignore(_event):
    """Nobody watches."""


def completed(root):
    act = run(settings(root), ignore)
    assert act.returncode == 0, act.complaint
    return act


def trained(root, **changes):
    """The tag that a run in this process went on from, and its losses."""
    events = []
    asyncio.run(train(settings(root, **changes), events.append))
    assert isinstance(events[0], Started)
    steps = [event for event in events if isinstance(event, Stepped)]
    return events[0].resumed_from, {step.step: step.loss for step in steps}


def exactly(losses):
    return {step: loss.hex() for step, loss in losses.items()}


def test_losses_after_a_kill_in_a_save_equal_those_without_one_bit_for_bit(tmp_path):
    killed = run(settings(tmp_path / "killed", kill=True), ignore)
    assert killed.returncode == -signal.SIGKILL
    assert killed.started.fatal_tag == "step-0006"
    # What it was saving is on the disk, and is no tag.
    (attempt,) = (tmp_path / "killed/.aiockpt/work").glob(f"*/*/{FILE}")
    assert attempt.stat().st_size > 0
    assert [path.name for path in (tmp_path / "killed").glob("step-*")] == ["step-0003"]

    resumed = completed(tmp_path / "killed")
    assert resumed.started.resumed_from == "step-0003"
    assert not attempt.exists()

    straight = completed(tmp_path / "straight")
    assert sorted(straight.losses) == list(range(1, 10))
    assert sorted(resumed.losses) == list(range(4, 10))
    assert exactly(killed.losses | resumed.losses) == exactly(straight.losses)
    for step, loss in killed.losses.items():
        assert loss.hex() == straight.losses[step].hex()


def test_a_run_that_has_ended_can_be_prolonged_and_is_the_longer_run(tmp_path):
    trained(tmp_path / "prolonged", steps=4)
    resumed_from, losses = trained(tmp_path / "prolonged")
    assert resumed_from == "step-0004"
    _, straight = trained(tmp_path / "straight")
    assert exactly(losses) == exactly({step: straight[step] for step in range(5, 10)})
    assert trained(tmp_path / "prolonged") == ("step-0009", {})


def test_a_run_that_does_not_resume_starts_afresh_and_replaces_tags(tmp_path):
    _, first = trained(tmp_path, steps=3)
    resumed_from, again = trained(tmp_path, steps=3, resume=False, seed=1)
    assert resumed_from is None
    assert sorted(again) == [1, 2, 3]
    assert first != again
    with sync.CheckpointEngine(tmp_path) as engine:
        assert [info.tag for info in engine.tags()] == ["step-0003"]


def test_a_failed_commit_ends_the_training_with_its_own_error(tmp_path, monkeypatch):
    async def fail(*_):
        raise StorageError(errno.ENOSPC, "full", "disk")

    monkeypatch.setattr(aiockpt.CheckpointEngine, "commit", fail)
    with pytest.raises(StorageError, match="full"):
        trained(tmp_path)


def test_the_trainers_own_failure_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    act = run(settings(tmp_path / "file" / "root"), ignore)
    assert act.returncode == 1
    assert "StorageError" in act.complaint


def demo(*args):
    return subprocess.run(
        [sys.executable, "-m", "aiockpt", "demo", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_trains_in_the_root_that_it_is_given(tmp_path):
    done = demo("--root", tmp_path, "--steps", 2, "--every", 2)
    assert done.returncode == 0, done.stderr
    assert "step-0002 published" in done.stdout
    assert "\x1b" not in done.stdout
    done = demo("--root", tmp_path, "--steps", 3, "--every", 2, "--json")
    kinds = [msgspec.json.decode(line)["type"] for line in done.stdout.splitlines()]
    assert kinds == ["Started", "Stepped", "Saved"]


def test_the_command_can_kill_itself_in_a_save(tmp_path):
    done = demo("--root", tmp_path, "--steps", 2, "--every", 1, "--kill")
    assert done.returncode == -signal.SIGKILL
    assert "will be killed by SIGKILL in the save of step-0002" in done.stdout
    assert not (tmp_path / "step-0002").exists()


@pytest.mark.parametrize("option", ["--kill", "--no-resume"])
def test_what_needs_a_root_asks_for_it(option):
    done = demo(option)
    assert done.returncode == 2
    assert "--root" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_show_ends_with_an_exact_verdict():
    done = demo("--steps", 6, "--every", 2)
    assert done.returncode == 0, done.stderr
    assert "Killed by SIGKILL" in done.stdout
    assert "EXACT" in done.stdout
