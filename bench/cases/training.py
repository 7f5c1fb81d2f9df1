"""Saves beside a trainer: what they cost its steps."""

__all__ = ["CASES"]

import statistics
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import nn

from bench.cases.base import Case, Cell
from bench.cases.saving import (
    DCP_PROCESS,
    DCP_STAGED,
    DCP_THREAD,
    MANY,
    META,
    RAW,
    RAW_AT_ONCE,
)
from bench.contenders.base import Options
from bench.sessions import Bench, ContenderError
from bench.workloads import GIB, Scale, Workload, flatten

_OURS = "aiockpt.sync"
_IN_THREAD = "torch.save + fsync in a thread"
_WIDTH = 512
_BATCH = 64
_P95 = 0.95


class _Trainer:
    """A small model under AdamW, and steps of a few milliseconds."""

    def __init__(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        torch.manual_seed(7)
        layers = [nn.Linear(_WIDTH, _WIDTH) for _ in range(3)]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._batch = torch.randn(_BATCH, _WIDTH)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments, by name; the tensors themselves."""
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        return found

    def step(self, before_update: Callable[[], None] | None = None) -> float:
        """Seconds of one step."""
        start = perf_counter()
        loss = (self.model(self._batch) - self._batch).square().mean()
        loss.backward()
        if before_update is not None:
            before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return perf_counter() - start


def _inflation(bench: Bench, tag: str) -> dict[str, float]:
    """Steps with a save in the background, against as many seconds without one."""
    bench.alter()
    trainer = _Trainer(bench.settings["num_threads"])
    for _ in range(10):
        trainer.step()
    plain = _steps_for(trainer, bench.settings["plain_s"])
    state: dict[str, Any] = {**bench.state, **trainer.state()}
    expected = {name: tensor.clone() for name, tensor in trainer.state().items()}
    bench.contender.open_tag(tag)
    start = perf_counter()
    saving = bench.contender.save(state, tag)
    save_s = perf_counter() - start
    waiting = _Waiting(saving.wait_durable)
    beside = [trainer.step(saving.wait_staged)]
    while waiting.is_alive():
        beside.append(trainer.step())
    waiting.end()
    durable_s = perf_counter() - start
    after = _steps_for(trainer, bench.settings["plain_s"] / 2)
    loaded = flatten(bench.contender.load(tag, state))
    for name, tensor in expected.items():
        if not torch.equal(loaded.pop(name), tensor):
            raise ContenderError(f"{name} is not what it was at the save")
    bench.check(loaded)
    bench.contender.delete(tag)
    plain += after
    return {
        "plain_step_s": statistics.median(plain),
        "p50": statistics.median(beside) / statistics.median(plain),
        "p95": _p95(beside) / _p95(plain),
        "max_step_s": max(beside),
        "num_steps": len(beside),
        "save_s": save_s,
        "durable_s": durable_s,
        # All that a checkpoint costs the trainer, in seconds of training.
        "lost_s": save_s + sum(beside) - len(beside) * statistics.median(plain),
    }


class _Waiting(threading.Thread):
    """Waits for the end of a save; keeps its failure."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        super().__init__()
        self._wait = wait
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._wait()
        except Exception as error:  # noqa: BLE001 - raised by `end`
            self._error = error

    def end(self) -> None:
        """Returns when the save has ended, well."""
        self.join()
        if self._error is not None:
            raise self._error


def _steps_for(trainer: _Trainer, seconds: float) -> list[float]:
    until = perf_counter() + seconds
    steps = [trainer.step()]
    while perf_counter() < until:
        steps.append(trainer.step())
    return steps


def _p95(values: list[float]) -> float:
    return sorted(values)[int(len(values) * _P95)]


def _beside_python(bench: Bench, tag: str) -> dict[str, float]:
    """A save while the main thread runs pure Python, and never waits."""
    bench.alter()
    plain_s = bench.settings["plain_s"]
    plain = _count_for(lambda until: perf_counter() >= until, plain_s)
    bench.contender.open_tag(tag)
    start = perf_counter()
    saving = bench.contender.save(bench.state, tag)
    save_s = perf_counter() - start
    waiting = _Waiting(saving.wait_durable)
    beside = _count_for(lambda _until: not waiting.is_alive(), plain_s)
    waiting.end()
    durable_s = perf_counter() - start
    after = _count_for(lambda until: perf_counter() >= until, plain_s / 2)
    bench.check(bench.contender.load(tag, bench.state))
    bench.contender.delete(tag)
    return {
        "durable_s": durable_s,
        "save_s": save_s,
        "trainer_speed": beside / ((plain + after) / 2),
    }


def _count_for(is_over: Callable[[float], bool], seconds: float) -> float:
    """Rounds of pure Python a second, until it is over."""
    start = perf_counter()
    until = start + seconds
    rounds = 0
    total = 0
    while not is_over(until):
        for number in range(2_000):
            total += number
        rounds += 1
    return rounds / (perf_counter() - start)


def _step_cells(scale: Scale) -> Sequence[Cell]:
    workload = Workload(scale.size(1 * GIB), scale.number(300))
    contenders = (_OURS, DCP_THREAD, DCP_PROCESS, DCP_STAGED, _IN_THREAD, META)
    return [
        Cell(
            name,
            workload,
            contenders
            if num_threads == 1
            else (_OURS, DCP_THREAD, DCP_STAGED, _IN_THREAD),
            scale.repeats(5),
            options=Options(ring_gib=workload.nbytes / GIB + 0.25),
            settings={"plain_s": scale.seconds(1.0), "num_threads": num_threads},
        )
        for name, num_threads in (
            ("1 GiB, trainer on 1 of 2 cores", 1),
            ("1 GiB, trainer on 2 of 2 cores", 2),
        )
    ]


def _python_cells(scale: Scale) -> Sequence[Cell]:
    few = Workload(scale.size(2 * GIB), scale.number(300))
    many = Workload(scale.size(1 * GIB), scale.number(20_000))
    return [
        Cell(
            name,
            workload,
            (RAW, RAW_AT_ONCE, _OURS, _IN_THREAD),
            scale.repeats(5),
            settings={"plain_s": scale.seconds(1.0)},
        )
        for name, workload in (("2 GiB", few), (MANY, many))
    ]


CASES = [
    Case("steps", "What does a save cost training steps?", _step_cells, _inflation),
    Case("gil", "And beside pure Python?", _python_cells, _beside_python),
]
