"""A process for each contender, and the words that go to and from it."""

__all__ = ["Bench", "ContenderError", "Session"]

import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.contenders import CONTENDERS
from bench.contenders.base import Contender, Options
from bench.contenders.raw import RawBytes
from bench.measuring import Memory
from bench.workloads import Workload, flatten, mapped

_TIMEOUT_S = 300
_CLOSING_S = 60

_context = multiprocessing.get_context("forkserver")
# Imported once; the processes are then forked from one that has no threads.
_context.set_forkserver_preload(
    ["torch.distributed.checkpoint", "bench.contenders", "bench.cases"]
)


class ContenderError(Exception):
    """A contender failed, or what it has saved is not what was to be saved."""


@dataclass(frozen=True)
class Bench:
    """What a case works with, in the process of a contender.

    Attributes:
        contender: Ready to save.
        workload: What the state is.
        state: It, in memory that is there already.
        memory: Counts from before the contender was made ready.
        settings: What the case has been told.
        steps: Numbers of steps.
    """

    contender: Contender
    workload: Workload
    state: dict[str, Any]
    memory: Memory
    settings: Mapping[str, Any]
    steps: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def next_state(self) -> dict[str, Any]:
        """What is to be saved; a nested state has the number of its step in it.

        Flat ones are tensors only: not everybody can save a number.
        """
        if not self.workload.is_nested:
            return self.state
        return {**self.state, "step": next(self.steps)}

    def alter(self) -> None:
        """Changes each tensor, so that an earlier save is not taken for this one."""
        for tensor in flatten(self.state).values():
            tensor[:1].add_(1)
        self.settle()

    def settle(self) -> None:
        """Waits until the device, if there is one, has done all it was asked to."""
        if self.workload.is_on_gpu:
            torch.cuda.synchronize()

    def check(
        self,
        loaded: Mapping[str, Any],
        keys: list[str] | None = None,
        *,
        must_be_placed: bool = False,
    ) -> None:
        """Returns if what was loaded is what was saved, bit for bit.

        Args:
            loaded: It.
            keys: Which tensors it should be; by default all.
            must_be_placed: Whether on the device that it was saved from.
        """
        raw = loaded.get("raw")
        if isinstance(raw, RawBytes):
            if not raw.are_as_written():
                raise ContenderError("not the bytes that were written")
            return
        expected, found = flatten(self.state), flatten(loaded)
        if keys is not None:
            expected = {key: expected[key] for key in keys}
        if expected.keys() != found.keys():
            raise ContenderError("not the tensors that were saved")
        for name, tensor in expected.items():
            if must_be_placed and found[name].device != tensor.device:
                raise ContenderError(f"{name} is not on {tensor.device}")
            if not torch.equal(tensor, found[name].to(tensor.device)):
                raise ContenderError(f"{name} is not what was saved")


Measure = Callable[[Bench, str], dict[str, float]]
"""Measures once, with the tag to be used; runs in the process of a contender."""


@dataclass(frozen=True)
class Task:
    """What a process is started with; goes through a pipe."""

    contender: str
    measure: Measure
    workload: Workload
    memory: Path
    directory: Path
    options: Options
    settings: Mapping[str, Any]


class Session:
    """One contender at work on one workload, in a process of its own."""

    def __init__(self, task: Task) -> None:
        """Starts the process; it makes itself ready."""
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, task))
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except ContenderError:
            self.close()
            raise

    def ask(self, tag: str) -> dict[str, float]:
        """What was measured.

        Raises:
            ContenderError: With what the process said, or that it said nothing.
        """
        try:
            self._pipe.send(tag)
        except OSError:
            raise ContenderError("its process has died") from None
        return self._answer()

    def _answer(self) -> dict[str, float]:
        try:
            if not self._pipe.poll(_TIMEOUT_S):
                raise ContenderError(f"no answer in {_TIMEOUT_S} s")
            answer: dict[str, float] | str = self._pipe.recv()
        except (EOFError, OSError):
            raise ContenderError("its process has died") from None
        if isinstance(answer, str):
            raise ContenderError(answer)
        return answer

    def close(self) -> None:
        """Ends the process; by force where it does not end."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(_CLOSING_S)
        if self._process.exitcode != 0:
            self._kill()
        self._pipe.close()

    def _kill(self) -> None:
        """Ends it and the processes it has started, which would go on writing."""
        assert self._process.pid is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # It has not come as far as a group of its own.
            self._process.kill()
        self._process.join()


def _serve(pipe: Connection, task: Task) -> None:
    """The process: measures whenever it is asked to."""
    os.setpgid(0, 0)
    _be_quiet(task.directory)
    try:
        contender = CONTENDERS[task.contender]()
        state = task.workload.state(mapped(task.memory))
        for name in contender.modules:
            importlib.import_module(name)
        memory = Memory()
        contender.setup(task.directory, task.options)
        bench = Bench(contender, task.workload, state, memory, task.settings)
        pipe.send({})
        while (tag := pipe.recv()) is not None:
            pipe.send(task.measure(bench, tag))
        contender.teardown()
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells it
        traceback.print_exc()
        first, *_ = [*str(error).splitlines(), ""]
        pipe.send(f"{type(error).__name__}: {first}")


def _be_quiet(directory: Path) -> None:
    """What contenders print goes to a file beside their saves."""
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
