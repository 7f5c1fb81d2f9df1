"""Result files, as they were written, and the figures in them."""

__all__ = ["CellResults", "Results", "Spread", "read"]

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.workloads import Workload

Measured = dict[str, float]


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
        measured: By contender and repeat.
        warm_ups: Those measured before, by contender and repeat.
        reasons: Why a contender does not run.
    """

    case: str
    name: str
    workload: Workload
    options: dict[str, Any]
    measured: dict[str, dict[int, Measured]] = field(default_factory=dict)
    warm_ups: dict[str, dict[int, Measured]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return 4 * sum(self.workload.numels())

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
    """One result file.

    Attributes:
        path: The file.
        machine: Where it was measured, and what.
        scale: How much was measured.
        cells: By case and cell.
        ranks: How long ranks take to agree, a line for each number of them.
    """

    path: Path
    machine: dict[str, Any]
    scale: str
    cells: dict[tuple[str, str], CellResults] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)

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
            results = cls(path, head["machine"], head["scale"])
            for line in lines:
                results._add(json.loads(line))
        return results

    def _add(self, line: dict[str, Any]) -> None:
        if "machine" in line:
            # A run that was continued.
            if line["machine"] != self.machine:
                raise ValueError(f"{self.path}: of two machines or commits")
            return
        if line["case"] == "ranks":
            self.ranks.append(line)
            return
        key = (line["case"], line["cell"])
        if "workload" in line:
            workload = Workload(**line["workload"])
            self.cells[key] = CellResults(*key, workload, line["options"])
            return
        cell = self.cells[key]
        name = line["contender"]
        if "does_not_run" in line:
            cell.reasons[name] = line["does_not_run"]
            return
        rows = cell.warm_ups if line["is_warm_up"] else cell.measured
        rows.setdefault(name, {})[line["repeat"]] = line["measured"]

    def case(self, name: str) -> list[CellResults]:
        """The cells of a case."""
        return [cell for (case, _), cell in self.cells.items() if case == name]

    def cell(self, case: str, name: str = "") -> CellResults | None:
        """The first cell of a case whose name begins like this."""
        cells = [cell for cell in self.case(case) if cell.name.startswith(name)]
        return cells[0] if cells else None


def read(paths: Sequence[Path], directory: Path) -> Results:
    """The file that is named, or the newest of a directory."""
    if paths:
        return Results.of(paths[0])
    newest = sorted(directory.glob("suite_*.jsonl"), key=lambda p: p.name.split("_")[2])
    if not newest:
        raise FileNotFoundError(f"no suite_*.jsonl in {directory}")
    return Results.of(newest[-1])
