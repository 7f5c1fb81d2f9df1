"""Who is measured when: contenders take turns, results are written as they come."""

__all__ = ["Run"]

import json
import os
import random
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bench.cases.base import Case, Cell
from bench.contenders import CONTENDERS
from bench.sessions import ContenderError, Session, Task
from bench.workloads import SEED, Scale, shared


@dataclass
class Run:
    """One run of some cases.

    Attributes:
        scale: How much is measured.
        directory: Where files are written; its disk is what is measured.
        lines: Where results go, one JSON object a line.
        contenders: Only these; empty for all.
        failures: What a contender that is installed could not do.
    """

    scale: Scale
    directory: Path
    lines: TextIO
    contenders: Iterable[str] = ()
    failures: list[str] = field(default_factory=list)

    def case(self, case: Case) -> None:
        """Measures all cells of a case."""
        for cell in case.cells(self.scale):
            with (
                tempfile.TemporaryDirectory(prefix="bench-", dir=self.directory) as at,
                shared(cell.workload) as memory,
            ):
                turns = _Turns(self, case, cell, Path(at).resolve(), memory)
                turns.take()

    def tell(self, **line: Any) -> None:
        """Writes one line."""
        print(json.dumps(line, default=str), file=self.lines, flush=True)


class _Turns:
    """The contenders of one cell."""

    def __init__(
        self, run: Run, case: Case, cell: Cell, directory: Path, memory: Path
    ) -> None:
        self._run = run
        self._case = case
        self._cell = cell
        self._directory = directory
        self._memory = memory
        self._about = {"case": case.name, "cell": cell.name}
        self._sessions: dict[str, Session] = {}

    def take(self) -> None:
        """Measures each contender in turn, in an order that changes."""
        self._tell_cell()
        names = [name for name in self._cell.contenders if self._takes_part(name)]
        try:
            names = [name for name in names if self._is_ready(name)]
            num_warm_ups = 0 if self._case.prepare else self._cell.num_warm_ups
            for number in range(num_warm_ups + self._cell.repeats):
                # Shuffled, so that nobody always follows the same neighbour.
                rng = random.Random(SEED + number)  # noqa: S311
                for name in rng.sample(names, len(names)):
                    is_warm_up = number < num_warm_ups
                    if not self._measure(name, number, is_warm_up=is_warm_up):
                        names.remove(name)
        finally:
            for session in self._sessions.values():
                session.close()

    def _takes_part(self, name: str) -> bool:
        if self._run.contenders and name not in self._run.contenders:
            return False
        reason = CONTENDERS[name].missing()
        if reason is not None:
            self._run.tell(**self._about, contender=name, does_not_run=reason)
        return reason is None

    def _tell_cell(self) -> None:
        cell = self._cell
        self._run.tell(
            **self._about,
            workload=asdict(cell.workload),
            options=asdict(cell.options),
            settings=dict(cell.settings),
            repeats=cell.repeats,
            seed=SEED,
        )

    def _is_ready(self, name: str) -> bool:
        """Whether a contender could be made ready, and its files made."""
        (self._directory / name).mkdir()
        try:
            if self._case.prepare is not None:
                self._once(name, "prepare", self._case.prepare)
            else:
                self._sessions[name] = Session(self._task(name, self._case.measure))
        except ContenderError as error:
            self._give_up(name, error)
            return False
        return True

    def _measure(self, name: str, number: int, *, is_warm_up: bool) -> bool:
        """Whether a contender was measured once."""
        tag = f"step-{number}"
        # What the one before has written or removed is not this one's to wait for.
        os.sync()
        try:
            if self._case.prepare is None:
                measured = self._sessions[name].ask(tag)
            else:
                measured = self._once(name, tag, self._case.measure)
        except ContenderError as error:
            self._give_up(name, error)
            return False
        self._run.tell(
            **self._about,
            contender=name,
            repeat=number,
            is_warm_up=is_warm_up,
            measured=measured,
        )
        return True

    def _once(self, name: str, tag: str, measure: Any) -> dict[str, float]:
        session = Session(self._task(name, measure))
        try:
            return session.ask(tag)
        finally:
            session.close()

    def _task(self, name: str, measure: Any) -> Task:
        cell = self._cell
        return Task(
            name,
            measure,
            cell.workload,
            self._memory,
            self._directory / name,
            cell.options,
            cell.settings,
        )

    def _give_up(self, name: str, error: ContenderError) -> None:
        session = self._sessions.pop(name, None)
        if session is not None:
            session.close()
        self._run.tell(**self._about, contender=name, does_not_run=str(error))
        self._run.failures.append(f"{self._case.name}: {name}: {error}")
