"""Result files, as they were written, and the figures in them."""

__all__ = ["CellResults", "Results", "Spread", "read", "read_newest"]

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.cases import CASES
from bench.cases.base import Cell
from bench.contenders.raw import Writing, WritingAtOnce
from bench.measuring import Cache
from bench.ranks import world_sizes
from bench.workloads import Scale, Workload

Measured = dict[str, float]

# Where these differ, results do not stand beside each other.
_MACHINE = (
    "cores",
    "memory_gib",
    "processor",
    "kernel",
    "huge_pages",
    "python",
    "torch",
)


@dataclass(frozen=True)
class Spread:
    """Repeats of one figure.

    Attributes:
        values: In the order of the repeats.
    """

    values: Sequence[float]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The greatest."""
        return max(self.values)

    def text(self, digits: int) -> str:
        """Median, and in brackets the least and the greatest."""
        if len(self.values) == 1:
            return f"{self.median:.{digits}f}"
        spread = f"{self.least:.{digits}f}–{self.most:.{digits}f}"
        return f"{self.median:.{digits}f} ({spread})"


@dataclass
class CellResults:
    """What was measured in one cell.

    Attributes:
        case: The case.
        name: The cell.
        workload: What was saved.
        options: What aiockpt was told.
        settings: What the case was told.
        measured: By contender and repeat.
        warm_ups: Those measured before, by contender and repeat.
        reasons: Why a contender does not run.
        failures: How one has failed.
    """

    case: str
    name: str
    workload: Workload
    options: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, dict[int, Measured]] = field(default_factory=dict)
    warm_ups: dict[str, dict[int, Measured]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 4 * sum(self.workload.numels())

    @property
    def is_unduly_warm(self) -> bool:
        """Whether loads that were to be cold were not: it takes root to drop caches."""
        is_cold = self.settings.get("cache") == Cache.EMPTY
        rows = [row for each in self.measured.values() for row in each.values()]
        return is_cold and not all(row["is_cold"] for row in rows)

    def spread(self, contender: str, key: str, *, scale: float = 1.0) -> Spread | None:
        """All repeats of a figure; None where there are none."""
        rows = self.measured.get(contender, {}).values()
        values = [scale * row[key] for row in rows if key in row]
        return Spread(values) if values else None

    def of(
        self, contender: str, figure: Callable[[Measured], float | None]
    ) -> Spread | None:
        """All repeats of what is computed from one measurement."""
        rows = self.measured.get(contender, {}).values()
        values = [value for row in rows if (value := figure(row)) is not None]
        return Spread(values) if values else None

    def ratio(self, above: str, below: str, key: str) -> Spread | None:
        """A figure of one contender over that of another, repeat by repeat."""
        rows, others = self.measured.get(above, {}), self.measured.get(below, {})
        values = [
            rows[n][key] / others[n][key]
            for n in rows
            if n in others and key in rows[n]
        ]
        return Spread(values) if values else None

    def raw(self, key: str) -> str:
        """The name of the raw disk: with as many writers as made it faster here."""
        times = {
            name: spread.median
            for name in (Writing.name, WritingAtOnce.name)
            if (spread := self.spread(name, key)) is not None
        }
        return min(times, key=lambda name: times[name], default=Writing.name)

    def worst(self, contender: str, key: str) -> float | None:
        """The greatest of a figure, warm-ups included."""
        rows = [
            *self.measured.get(contender, {}).values(),
            *self.warm_ups.get(contender, {}).values(),
        ]
        return max((row[key] for row in rows if key in row), default=None)

    def first(self, contender: str, key: str) -> float | None:
        """A figure of the first save of a process."""
        rows = self.warm_ups.get(contender, {})
        return rows[min(rows)].get(key) if rows else None


@dataclass
class Results:
    """One result file, or several of one machine.

    Attributes:
        path: The file, or the newest.
        machine: Where it was measured, and what.
        scale: How much was measured.
        asked: The cases that the last was to measure.
        cells: By case and cell.
        ranks: How long ranks take to agree, a line for each number of them.
        failures: Why a whole cell, or some ranks, were not measured, by its name.
        sources: By case and cell, the file and the commit; of ranks, which have no
            cells, by `("ranks", "")`.
    """

    path: Path
    machine: dict[str, Any]
    scale: str
    asked: Sequence[str] = ()
    cells: dict[tuple[str, str], CellResults] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[tuple[str, str], tuple[Path, str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Self:
        """What is in a file.

        Raises:
            ValueError: It is no result of this suite.
        """
        with path.open(encoding="utf-8") as lines:
            head = json.loads(next(lines))
            if "scale" not in head:
                raise ValueError(f"{path} is no result of `python -m bench`")
            results = cls(path, head["machine"], head["scale"], head["cases"])
            for line in lines:
                results._add(json.loads(line))
        commit = results.machine["commit"]
        measured = [key for key, cell in results.cells.items() if cell.measured]
        if results.ranks:
            measured.append(("ranks", ""))
        results.sources = dict.fromkeys(measured, (path, commit))
        return results

    @classmethod
    def merged(cls, parts: Sequence[Self]) -> Self:
        """The cells of all parts; each as the last that has measured it.

        A run that was stopped, or of one cell that failed, hides nothing of older ones.

        Raises:
            ValueError: They are of two machines, or of two scales.
        """
        last = parts[-1]
        merged = cls(last.path, last.machine, last.scale, last.asked)
        for part in parts:
            if not part.is_comparable(last):
                raise ValueError(f"{part.path} is not of the machine of {last.path}")
            merged.cells |= {
                key: cell
                for key, cell in part.cells.items()
                if key in part.sources or key not in merged.cells
            }
            merged.ranks = part.ranks or merged.ranks
            merged.sources |= part.sources
            merged.failures |= part.failures
        return merged

    @property
    def is_of_gpus(self) -> bool:
        """Whether only cases of GPUs were asked."""
        known = [CASES[name] for name in self.asked if name in CASES]
        return bool(known) and all(case.needs_gpu for case in known)

    @property
    def missing(self) -> list[str]:
        """What the cases ask, at this scale, and nobody has measured."""
        scale = Scale(self.scale)
        absent = [
            f"{case.name}: {cell.name}{told}"
            for case in CASES.values()
            for cell in case.cells(scale)
            if case.needs_gpu == self.is_of_gpus
            if (told := self._absent(case.name, cell)) is not None
        ]
        if self.is_of_gpus:
            return absent
        measured = {(line["kind"], line["ranks"]) for line in self.ranks}
        for kind, numbers in world_sizes(scale).items():
            if lost := [str(n) for n in numbers if (kind, n) not in measured]:
                reason = self.failures.get("ranks")
                absent.append(f"ranks: {kind} of {', '.join(lost)}{_because(reason)}")
        return absent

    def _absent(self, case: str, cell: Cell) -> str | None:
        """Who was not measured, or not as often as asked; None if all were."""
        reason = _because(self.failures.get(f"{case}: {cell.name}"))
        found = self.cells.get((case, cell.name))
        if found is None or not found.measured:
            return reason
        told = []
        for name in cell.contenders:
            number = len(found.measured.get(name, {}))
            if number < cell.repeats and name not in found.reasons:
                count = f" ({number} of {cell.repeats})" if number else ""
                told.append(f"{name}{count}{_because(found.failures.get(name))}")
        return f": {', '.join(told)}{reason}" if told else None

    def is_comparable(self, other: "Results") -> bool:
        """Whether both were measured on such a machine, at the same scale.

        An older file does not tell everything: what it leaves out is not compared.
        """
        shared = [
            key for key in _MACHINE if key in self.machine and key in other.machine
        ]
        return self.scale == other.scale and all(
            self.machine[key] == other.machine[key] for key in shared
        )

    def _add(self, line: dict[str, Any]) -> None:
        if "machine" in line:
            # A run that was continued.
            if line["machine"] != self.machine:
                raise ValueError(f"{self.path}: of two machines or commits")
            return
        if "failed" in line:
            self._add_failure(line)
            return
        if line["case"] == "ranks":
            self.ranks.append(line)
            return
        key = (line["case"], line["cell"])
        if "workload" in line:
            workload = Workload(**line["workload"])
            self.cells[key] = CellResults(
                *key, workload, line["options"], line["settings"]
            )
            return
        cell = self.cells[key]
        name = line["contender"]
        if "does_not_run" in line:
            cell.reasons[name] = line["does_not_run"]
            return
        rows = cell.warm_ups if line["is_warm_up"] else cell.measured
        rows.setdefault(name, {})[line["repeat"]] = line["measured"]

    def _add_failure(self, line: dict[str, Any]) -> None:
        if "contender" in line:
            cell = self.cells[line["case"], line["cell"]]
            cell.failures[line["contender"]] = line["failed"]
            return
        name = ": ".join(line[key] for key in ("case", "cell") if key in line)
        self.failures[name] = line["failed"]

    def case(self, name: str) -> list[CellResults]:
        """The cells of a case."""
        return [cell for (case, _), cell in self.cells.items() if case == name]

    def cell(self, case: str, name: str = "") -> CellResults | None:
        """The first cell of a case whose name begins like this."""
        cells = [cell for cell in self.case(case) if cell.name.startswith(name)]
        return cells[0] if cells else None


def read(paths: Sequence[Path], directory: Path) -> Results:
    """The files that are named, or those of a directory; of each cell the last.

    Raises:
        FileNotFoundError: There are none.
        ValueError: Those that are named are not of one machine. (Of a directory, only
            those are taken that are of the machine of the last.)
    """
    if paths:
        return Results.merged([Results.of(path) for path in paths])
    kept = [
        Results.of(path) for path in sorted(directory.glob("suite_*.jsonl"), key=_when)
    ]
    if not kept:
        raise FileNotFoundError(f"no suite_*.jsonl in {directory}")
    return Results.merged([each for each in kept if each.is_comparable(kept[-1])])


def read_newest(directory: Path, program: str) -> Results | None:
    """The newest file of a program in a directory; None where there is none."""
    paths = sorted(directory.glob(f"{program}_*.jsonl"), key=_when)
    return Results.of(paths[-1]) if paths else None


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""


def _when(path: Path) -> str:
    """The time in a name: `suite_2cores_20261128T1122_COMMIT.jsonl`."""
    return path.name.split("_")[2]
