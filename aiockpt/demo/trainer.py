"""An asyncio training loop that checkpoints, dies and resumes.

The loop is the usual one: `create`, `save` and a `commit` that runs as a task
while training goes on. Nothing waits before `optimizer.step()`: the engine's
guard makes the step wait for exactly as long as the tensors are being copied.
"""

__all__ = [
    "CONFIG",
    "FILE",
    "Event",
    "Saved",
    "Settings",
    "Started",
    "Stepped",
    "Training",
    "tag_of",
    "train",
]

import asyncio
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from torch.optim.lr_scheduler import LambdaLR

import aiockpt
from aiockpt import events
from aiockpt.config import GIB, MIB, EngineConfig
from aiockpt.demo.model import Shape, Transformer
from aiockpt.demo.text import CORPUS_BYTES, Batches, standard_library

# A ring smaller than the checkpoint, so that the show has back-pressure in it.
CONFIG = EngineConfig(host_cache_size=16 * MIB / GIB, parser_threads=2)
FILE = "training.pt"

_WARMUP_STEPS = 10


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the trainer.

    Attributes:
        root: Directory of the checkpoints.
        steps: Optimizer steps after which training is done.
        every: Steps between checkpoints; the last step always makes one.
        seed: Of the weights, the dropout and the order of the text.
        resume: Whether to go on from the latest checkpoint, where there is one.
        kill: Whether to die by SIGKILL in the middle of this run's second save
            (of its first, if there is only one).
        shape: The model.
        batch_size: Windows of text per step.
        corpus_bytes: Text to train on.
    """

    root: str
    steps: int = 120
    every: int = 30
    seed: int = 0
    resume: bool = True
    kill: bool = False
    shape: Shape = Shape()
    batch_size: int = 8
    corpus_bytes: int = CORPUS_BYTES

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is made after `step`."""
        return step % self.every == 0 or step == self.steps

    def fatal_tag(self, first_step: int) -> str | None:
        """The tag in whose save a run that starts at `first_step` is killed."""
        if not self.kill:
            return None
        due = [step for step in range(first_step, self.steps + 1) if self.is_due(step)]
        return tag_of(due[:2][-1]) if due else None


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Training is about to do step `step + 1`.

    Attributes:
        step: Steps done so far, in earlier runs.
        steps: Steps after which training is done.
        num_parameters: Of the model.
        resumed_from: The tag that was loaded, or None for a fresh start.
        fatal_tag: The tag in whose save the process will be killed, if any.
    """

    step: int
    steps: int
    num_parameters: int
    resumed_from: str | None
    fatal_tag: str | None


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One optimizer step is done.

    Attributes:
        step: Its number, from 1.
        loss: Before the step, in nats per byte; survives JSON bit for bit.
        elapsed_s: Seconds that the step took, waiting for the engine included.
    """

    step: int
    loss: float
    elapsed_s: float


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A checkpoint is durable and published.

    Attributes:
        published: The tag.
        nbytes: Its bytes.
        stall_s: Seconds that training was held for it.
        total_s: Seconds from `save` to durable, while training went on.
        peak_ring_bytes: Most of the ring that was in use at once.
        ring_bytes: The ring's size.
    """

    published: str
    nbytes: int
    stall_s: float
    total_s: float
    peak_ring_bytes: int
    ring_bytes: int


Event = Started | Stepped | Saved


class Training:
    """All that a run consists of, and therefore all that a checkpoint holds."""

    def __init__(self, settings: Settings) -> None:
        """Stands before the first step."""
        # Measured with torch 2.13 on CPU: where two threads share the first square
        # root of a process, one of them sometimes does its half less exactly. That
        # would be the optimizer's, and equal runs would differ. One thread does this.
        torch.ones(1).sqrt()
        torch.manual_seed(settings.seed)
        self.step = 0
        self.model = Transformer(settings.shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.schedule = LambdaLR(self.optimizer, _learning_rate)
        self.batches = Batches(
            standard_library(settings.corpus_bytes),
            context=settings.shape.context,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )

    def advance(self) -> Stepped:
        """Does one step."""
        began = time.perf_counter()
        loss = self.model.loss(self.batches.next())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        elapsed_s = time.perf_counter() - began
        return Stepped(step=self.step, loss=loss.item(), elapsed_s=elapsed_s)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, by reference where it is tensors."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stands where `state` was taken: the next step is the same, bit for bit."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["rng"])


async def train(settings: Settings, emit: Callable[[Event], None]) -> None:
    """Trains to `settings.steps`, checkpointing on the way.

    Args:
        settings: The run.
        emit: Told what happens, on the caller's event loop; must return soon.

    Raises:
        CheckpointError: A checkpoint could not be made or loaded.

    If cancelled: training stops; checkpoints being committed are abandoned or
    finished, as `CheckpointEngine.commit` says.
    """
    killer = _Killer()
    engine = aiockpt.CheckpointEngine(settings.root, CONFIG, observers=[killer])
    async with engine:
        training = Training(settings)
        resumed_from = await engine.latest() if settings.resume else None
        if resumed_from is not None:
            training.load_state_dict(await engine.load(FILE, tag=resumed_from))
        killer.fatal_tag = settings.fatal_tag(training.step + 1)
        emit(
            Started(
                step=training.step,
                steps=settings.steps,
                num_parameters=sum(p.numel() for p in training.model.parameters()),
                resumed_from=resumed_from,
                fatal_tag=killer.fatal_tag,
            )
        )
        try:
            async with asyncio.TaskGroup() as commits:
                await _loop(engine, training, settings, commits, emit)
        except ExceptionGroup as group:
            raise group.exceptions[0] from group  # noqa: ASYNC123 - the group is the cause


async def _loop(
    engine: aiockpt.CheckpointEngine,
    training: Training,
    settings: Settings,
    commits: asyncio.TaskGroup,
    emit: Callable[[Event], None],
) -> None:
    commit: asyncio.Task[None] | None = None
    while training.step < settings.steps:
        emit(training.advance())
        if settings.is_due(training.step):
            if commit is not None:
                # A disk that is slower than the schedule makes saves rarer, not more.
                await commit
            tag = tag_of(training.step)
            await engine.create(tag, overwrite=not settings.resume)
            await engine.save(training.state_dict(), FILE, tag=tag)
            commit = commits.create_task(_commit(engine, tag, emit))
        await asyncio.sleep(0)  # Lets commits that are done report.


async def _commit(
    engine: aiockpt.CheckpointEngine, tag: str, emit: Callable[[Event], None]
) -> None:
    report = await engine.commit(tag)
    emit(
        Saved(
            published=report.tag,
            nbytes=report.nbytes,
            stall_s=report.stall_s,
            total_s=report.total_s,
            peak_ring_bytes=report.peak_ring_bytes,
            ring_bytes=CONFIG.ring_bytes,
        )
    )


class _Killer:
    """Ends the process, as an out-of-memory killer would, in one tag's save.

    It strikes once the file is written: it is there, it need not be durable, and
    nothing is published.
    """

    fatal_tag: str | None = None

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Written) and event.tag == self.fatal_tag:
            os.kill(os.getpid(), signal.SIGKILL)


def tag_of(step: int) -> str:
    """The tag of the checkpoint made after `step`."""
    return f"step-{step:04d}"


def _learning_rate(step: int) -> float:
    # Does not depend on where the run ends: resuming with more steps is the same run.
    return min((step + 1) / _WARMUP_STEPS, math.sqrt(_WARMUP_STEPS / (step + 1)))
