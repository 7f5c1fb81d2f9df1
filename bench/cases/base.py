"""What a case is: a question, the cells that answer it, and how one is measured."""

__all__ = ["Case", "Cell"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.contenders.base import Options
from bench.sessions import Measure
from bench.workloads import Scale, Workload


@dataclass(frozen=True)
class Cell:
    """One comparison: contenders that take turns on one workload.

    Attributes:
        name: What it is about, within its case.
        workload: What is saved.
        contenders: Who takes part.
        repeats: How often each is measured.
        num_warm_ups: How often before that, in the same process; kept, and marked.
        options: What aiockpt is told.
        settings: What `measure` is told.
    """

    name: str
    workload: Workload
    contenders: Sequence[str]
    repeats: int
    num_warm_ups: int = 1
    options: Options = field(default_factory=Options)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A question.

    Attributes:
        name: What it is called on the command line.
        question: In words, for the report.
        cells: The comparisons that answer it, at a scale.
        measure: Measures once, in a contender's process.
        prepare: Makes files, in a process that ends before measuring begins.
            Processes then live for one measurement, as on a restart.
        needs_gpu: Whether it is asked only where there is a GPU, and by name.
    """

    name: str
    question: str
    cells: Callable[[Scale], Sequence[Cell]]
    measure: Measure
    prepare: Measure | None = None
    needs_gpu: bool = False
