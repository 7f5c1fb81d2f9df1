"""The count of the fault matrix: cases by row, and how many of them were survived.

A test wraps each case in `cases.case(...)`. What a case is about stands in the note of
its error, and all counts end in the summary and, where asked for, in a report.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# The rows of the matrix, by number; what must hold stands in the tests.
ROWS = {
    1: "errno at the nth call",
    2: "short reads and writes",
    3: "SIGKILL at the nth call",
    4: "a rank killed in a commit",
    5: "power cut",
    6: "power cut at a flush point",
    7: "failed sync or close",
    8: "cancellation at the nth await",
    9: "corruption",
    10: "limits of the system",
    11: "out of memory",
    12: "slow or hung",
    13: "races",
    14: "a network that fails",
    16: "hostile files",
    17: "faults while recovering",
    18: "direct writes",
    20: "mutants",
    21: "load and soak",
}


@dataclass(frozen=True)
class Cases:
    """All cases so far.

    Attributes:
        is_long: Whether this is the long run.
        share: What part of the long counts it does, where that is more than the
            ordinary ones.
        num_run: Cases begun, by row and fault.
        num_survived: Of these, the ones in which everything held.
    """

    is_long: bool
    share: float = 1.0
    num_run: Counter[tuple[int, str]] = field(default_factory=Counter)
    num_survived: Counter[tuple[int, str]] = field(default_factory=Counter)

    @contextlib.contextmanager
    def case(self, row: int, fault: str, what: object) -> Iterator[None]:
        """Counts one case; `what` tells it from the others, in a failure's note."""
        assert row in ROWS
        self.num_run[row, fault] += 1
        try:
            yield
        except BaseException as error:
            error.add_note(f"row {row}, {fault}: {what}")
            raise
        self.num_survived[row, fault] += 1

    @property
    def run(self) -> str:
        """What a report calls this run."""
        if not self.is_long:
            return "ordinary"
        return "long" if self.share == 1 else f"{self.share:g} of long"

    def pick(self, ordinary: int, long: int) -> int:
        """How many of something this run does; or its step, which is then smaller."""
        if not self.is_long or (long < ordinary and self.share < 1):
            return ordinary
        return long if long < ordinary else max(ordinary, int(self.share * long))

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds the counts of another process, as `lines` tells them."""
        for line in lines:
            key = line["row"], line["fault"]
            self.num_run[key] += line["cases"]
            self.num_survived[key] += line["survived"]

    def lines(self) -> Iterator[dict[str, object]]:
        """One record for each kind of fault."""
        for (row, fault), num_run in sorted(self.num_run.items()):
            yield {
                "row": row,
                "name": ROWS[row],
                "fault": fault,
                "cases": num_run,
                "survived": self.num_survived[row, fault],
                "run": self.run,
            }


class Report:
    """Adds counts to a file of JSON lines after each test, and the tests that failed.

    So what was run stands there, whatever ends the rest. Of several processes that share
    the tests each adds its own.
    """

    def __init__(self, cases: Cases, path: Path) -> None:
        self._cases = cases
        self._path = path
        self._told: Counter[tuple[object, object, str]] = Counter()
        self._failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a test that failed, whether or not it was within a case."""
        if report.failed:
            self._failed = report.nodeid

    def pytest_runtest_logfinish(self) -> None:
        """Adds what was counted since the test before, and this one if it failed."""
        lines: list[dict[str, Any]] = [
            line
            for line in self._cases.lines()
            if any([self._take(line, "cases"), self._take(line, "survived")])
        ]
        if self._failed:
            topics = [[line["row"], line["fault"]] for line in lines]
            lines.append({"failed": self._failed, "topics": topics})
            self._failed = ""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _take(self, line: dict[str, Any], count: str) -> int:
        key = line["row"], line["fault"], count
        self._told[key], before = line[count], self._told[key]
        line[count] -= before
        return line[count]


_COUNT = pytest.StashKey[Cases]()


def cases_of(config: pytest.Config) -> Cases:
    """The one count of a test run."""
    # Read late: without a path on the command line conftest is loaded after that.
    is_long = config.getoption("--faults", default=False)
    share = config.getoption("--faults-share", default=1.0)
    return config.stash.setdefault(_COUNT, Cases(is_long, share))


def counted(item: pytest.Item) -> AbstractContextManager[object]:
    """A test that is marked as a case of the matrix is counted as one."""
    marker = item.get_closest_marker("case")
    if marker is None:
        return contextlib.nullcontext()
    return cases_of(item.config).case(*marker.args, item.name)
