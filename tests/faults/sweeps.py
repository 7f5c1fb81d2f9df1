"""A workload, done again and again, each time with another call spoiled: rows 1, 2, 7.

The checks stand here, and not in the tests, because the mutants of row 20 must not
pass them.
"""

import errno
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiockpt.errors import CorruptCheckpointError, EngineStateError, StorageError
from aiockpt.testing.faults import Action, Fail, Fault, Injection
from catalogs import leftovers
from faults.driver import (
    CLEANING,
    Outcome,
    assert_errors_name,
    assert_survived,
    is_tidying,
    link_root,
    spoil,
)
from faults.matrix import Cases
from tracing import SAVING

Check = Callable[[Path, Outcome, Injection], None]
MOVING = ("pwrite", "write", "pread")
LOCKS = re.compile(r".*\.lock|reading\..*")


@dataclass(frozen=True)
class Sweep:
    """One workload, and where its cases are counted.

    Attributes:
        cases: Counts.
        row: Of the matrix.
        fault: What the row calls the fault.
        template: The root before the workload.
        name: The workload's.
    """

    cases: Cases
    row: int
    fault: str
    template: Path
    name: str

    def at_every_call(self, faults: Callable[[int], Fault], check: Check) -> int:
        """Spoils call 1, call 2, ... until none is; how many were."""
        for index in itertools.count(1):
            root = link_root(self.template)
            outcome, injection = spoil(root, self.name, faults(index))
            if not injection.spoiled:
                assert outcome.is_done
                assert not outcome.errors
                return index - 1
            what = f"{self.name}, {injection.spoiled[0]} by {faults(index).action}"
            with self.cases.case(self.row, self.fault, what):
                check(root, outcome, injection)
        raise AssertionError

    def errors(self, numbers: Callable[[int], int], *, num_times: float) -> int:
        """An errno at every call, once or more often; `numbers` has that of each."""
        is_once = num_times == 1
        number = 0

        def fault(index: int) -> Fault:
            # Threads may pass each other: that of the call's own index is another.
            nonlocal number
            number = numbers(index)
            return Fault((), Fail(number), nth=index, num_times=num_times)

        def check(root: Path, outcome: Outcome, injection: Injection) -> None:
            spoiled = injection.spoiled[0]
            assert_errors_name(outcome, number, root)
            is_deletion = "delete" in self.name or self.name == "recover"
            if is_once and spoiled.name not in CLEANING and self.name != "recover":
                # Lock files are empty, and the next engine's to remove.
                left = [path for path in leftovers(root) if not LOCKS.fullmatch(path)]
                assert left == [] or is_tidying(self.name)
            # What goes on failing cannot be taken back; a deletion never is.
            may_stay = not is_once or is_deletion
            assert_survived(root, self.name, outcome, may_stay=may_stay)

        return self.at_every_call(fault, check)

    def short(self, part: Action) -> int:
        """Every read and every write, one after the other, moves only a part."""

        def fault(index: int) -> Fault:
            return Fault(MOVING, part, nth=index)

        def check(root: Path, outcome: Outcome, injection: Injection) -> None:
            allowed = StorageError, CorruptCheckpointError, EngineStateError
            for error in outcome.errors:
                assert isinstance(error, allowed), repr(error)
            assert_survived(root, self.name, outcome, may_stay=False)

        return self.at_every_call(fault, check)

    def failed(self, call: str) -> int:
        """Every call of a name fails once; the file is then of no use any more."""

        def fault(index: int) -> Fault:
            return Fault(call, Fail(errno.EIO), nth=index)

        def check(root: Path, outcome: Outcome, injection: Injection) -> None:
            assert_errors_name(outcome, errno.EIO, root)
            if _was_written(injection):
                spoiled = injection.spoiled[0]
                assert not outcome.is_done, f"acknowledged after a failed {spoiled}"
                _assert_untouched_since(injection)
            assert_survived(root, self.name, outcome, may_stay=False)

        return self.at_every_call(fault, check)


def _was_written(injection: Injection) -> bool:
    path = injection.spoiled[0].path
    return any(
        call.path == path and call.name in {"write", "pwrite"}
        for call in injection.calls
    )


def _assert_untouched_since(injection: Injection) -> None:
    """What could not be synced is neither synced again nor used in any other way."""
    path = injection.spoiled[0].path
    failed = next(call for call in injection.calls if call.error == errno.EIO)
    for call in injection.calls:
        if call.path == path and call.begin > failed.end:
            assert call.name not in SAVING, f"{call} after {failed}"
