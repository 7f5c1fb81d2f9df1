"""The show's verdict: exact when everything is, and never otherwise."""

import signal
from pathlib import Path

import pytest
import torch

from aiockpt.demo import show
from aiockpt.demo.display import Silence
from aiockpt.demo.trainer import FILE, Saved, Settings, Started, Stepped, tag_of
from aiockpt.errors import CheckpointError


class Trainer:
    """Plays the three runs of a training of four steps, saved every two."""

    def __init__(self):
        self.last_loss = 1 / 3
        self.weight = torch.tensor([0.1])
        self.killed_status = -signal.SIGKILL

    def __call__(self, settings, emit):
        act = show.Act()
        first, last = 1, 4
        if settings.kill:
            act.returncode = self.killed_status
            last = 2
        elif settings.root.endswith("interrupted"):
            first = 3
        act.take(
            Started(
                step=first - 1,
                steps=4,
                num_parameters=1,
                resumed_from=None if first == 1 else "step-0002",
                fatal_tag="step-0004" if settings.kill else None,
            )
        )
        is_straight = settings.root.endswith("straight")
        for step in range(first, last + 1):
            is_last = step == 4 and not is_straight
            loss = self.last_loss if is_last else 1 / (step - 1 or 2)
            act.take(Stepped(step=step, loss=loss, elapsed_s=0.1))
        weight = torch.tensor([0.1]) if is_straight else self.weight
        self.save(act, settings.root, last, weight)
        for event in (act.started, *act.steps, *act.saves):
            emit(event)
        return act

    def save(self, act, root, step, weight):
        path = Path(root, tag_of(step), FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": {"weight": weight}, "step": step}, path)
        act.take(
            Saved(
                published=tag_of(step),
                nbytes=100,
                stall_s=0.001,
                total_s=0.1,
                peak_ring_bytes=1,
                ring_bytes=2,
            )
        )


@pytest.fixture
def trainer(monkeypatch):
    trainer = Trainer()
    monkeypatch.setattr(show, "run", trainer)
    return trainer


@pytest.fixture
def verdict_of(tmp_path):
    def perform():
        settings = Settings(root=str(tmp_path), steps=4, every=2)
        return show.perform(settings, lambda _title: Silence(), said.append)

    said = []
    return perform


@pytest.mark.usefixtures("trainer")
def test_equal_losses_and_tensors_are_exact(verdict_of):
    verdict = verdict_of()
    assert verdict.is_exact
    assert (verdict.num_steps, verdict.num_tensors) == (4, 1)
    assert (verdict.killed_in, verdict.resumed_from) == ("step-0004", "step-0002")


def test_one_loss_that_differs_in_its_last_bit_is_not_exact(trainer, verdict_of):
    trainer.last_loss = torch.tensor(1 / 3, dtype=torch.float64).nextafter(
        torch.tensor(1.0, dtype=torch.float64)
    )
    trainer.last_loss = trainer.last_loss.item()
    verdict = verdict_of()
    assert not verdict.is_exact
    assert verdict.different_steps == [4]


def test_one_tensor_that_differs_is_not_exact(trainer, verdict_of):
    trainer.weight = torch.tensor([0.2])
    verdict = verdict_of()
    assert not verdict.is_exact
    assert verdict.different_tensors == ["model.weight"]


def test_a_run_that_was_not_killed_ends_the_show(trainer, verdict_of):
    trainer.killed_status = 0
    with pytest.raises(CheckpointError, match="status 0"):
        verdict_of()
