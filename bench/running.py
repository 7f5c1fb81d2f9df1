"""Who is measured when: contenders take turns, results are written as they come."""

__all__ = ["Run"]

import json
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bench.cases.base import Case, Cell
from bench.contenders import CONTENDERS
from bench.ranks import agreements
from bench.scratch import SHARED_MEMORY, room_for, scratch
from bench.sessions import ContenderError, Measure, Session, Task
from bench.workloads import SEED, Scale, shared

_LOG_LINES = 20
_LOG_BYTES = 8192


@dataclass
class Run:
    """One run of some cases.

    Attributes:
        scale: How much is measured.
        directory: Where files are written; its disk is what is measured.
        lines: Where results go, one JSON object a line.
        contenders: Only these; empty for all.
        failures: What was to be measured and was not.
    """

    scale: Scale
    directory: Path
    lines: TextIO
    contenders: Iterable[str] = ()
    failures: list[str] = field(default_factory=list)

    def case(self, case: Case) -> None:
        """Measures all cells of a case; one that fails does not keep the others."""
        for cell in case.cells(self.scale):
            try:
                self._cell(case, cell)
            except Exception as error:  # noqa: BLE001 - hours of measurements go on
                self.fail(error, case=case.name, cell=cell.name)

    def _cell(self, case: Case, cell: Cell) -> None:
        room_for(_disk_bytes(case, cell), self.directory)
        room_for(cell.workload.memory_bytes, SHARED_MEMORY)
        with scratch(self.directory) as at, shared(cell.workload) as memory:
            _Turns(self, case, cell, at, memory).take()

    def ranks(self) -> None:
        """Measures how long ranks take to agree."""
        try:
            for line in agreements(self.scale, self.directory):
                self.tell(case="ranks", **line)
        except Exception as error:  # noqa: BLE001 - as above
            self.fail(error, case="ranks")

    def fail(self, error: Exception, **about: Any) -> None:
        """Tells of what could not be measured, as a line among the results."""
        failed = str(error)
        if not isinstance(error, ContenderError):
            failed = f"{type(error).__name__}: {failed}"
        self.tell(**about, failed=failed)
        where = [about[key] for key in ("case", "cell", "contender") if key in about]
        self.failures.append(f"{': '.join(where)}: {failed}")
        print(self.failures[-1], file=sys.stderr, flush=True)

    def tell(self, **line: Any) -> None:
        """Writes one line."""
        print(json.dumps(line, default=str), file=self.lines, flush=True)


def _disk_bytes(case: Case, cell: Cell) -> int:
    """What lies on the disk at a time: all that is read, or the save of one."""
    num_saves = 1
    if case.prepare is not None:
        num_saves = len({CONTENDERS[name].reads() for name in cell.contenders})
    return num_saves * cell.workload.nbytes


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
        try:
            if self._case.prepare is not None:
                self._prepare(CONTENDERS[name].reads(), self._case.prepare)
            else:
                self._place(name).mkdir()
                self._sessions[name] = Session(self._task(name, self._case.measure))
        except ContenderError as error:
            self._give_up(name, error)
            return False
        return True

    def _prepare(self, writer: str, prepare: Measure) -> None:
        """Makes the files that all who read such files will share."""
        if not self._place(writer).exists():
            self._place(writer).mkdir()
            self._once(writer, "prepare", prepare)

    def _place(self, name: str) -> Path:
        """The directory of a contender: with files to read, or for its own."""
        is_reading = self._case.prepare is not None
        return self._directory / (CONTENDERS[name].reads() if is_reading else name)

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

    def _once(self, name: str, tag: str, measure: Measure) -> dict[str, float]:
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
            self._place(name),
            cell.options,
            cell.settings,
        )

    def _give_up(self, name: str, error: ContenderError) -> None:
        session = self._sessions.pop(name, None)
        if session is not None:
            session.close()
        log = _last_lines(self._place(name) / "log")
        self._run.fail(error, **self._about, contender=name, log=log)


def _last_lines(log: Path) -> list[str]:
    """The end of what a contender has printed: its directory goes with the cell."""
    if not log.exists():
        return []
    text = log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
    return text.splitlines()[-_LOG_LINES:]
