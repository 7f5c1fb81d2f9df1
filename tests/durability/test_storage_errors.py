"""An error of the file system at any call fails the save by name, and loses nothing."""

import errno
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from aiockpt.errors import CheckpointError, StorageError
from catalogs import leftovers
from tracing import FailAt, tapped
from workloads import (
    SMALL,
    WORKLOADS,
    Engine,
    assert_whole,
    copy_root,
    make_start,
    save,
    seeds,
)

ERRNOS = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EMFILE,
    errno.ESTALE,
)
FOR_EVER = float("inf")
# Calls that only clean up: where they fail, the next engine does it.
CLEANING = {"unlink", "rmdir"}


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A root in memory, where a copy costs little and syncs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield make_start(Path(path) / "template")


@dataclass
class Outcome:
    """What came of a workload.

    Attributes:
        is_done: Whether it was acknowledged.
        errors: What its calls raised, `close` included.
    """

    is_done: bool = False
    errors: list[CheckpointError] = field(default_factory=list)


def run(root: Path, work: Callable[[Engine], object]) -> Outcome:
    outcome = Outcome()
    engine = Engine(root, SMALL)
    try:
        work(engine)
        outcome.is_done = True
    except CheckpointError as error:
        outcome.errors.append(error)
    finally:
        try:
            engine.close()
        except CheckpointError as error:
            outcome.errors.append(error)
    return outcome


def check_errors(outcome: Outcome, number: int, root: Path) -> None:
    for error in outcome.errors:
        reported: BaseException | None = error
        if not isinstance(error, StorageError):
            # A later call on a tag that has failed: the failure is its cause.
            reported = error.__cause__
        assert isinstance(reported, StorageError), repr(error)
        assert reported.errno == number
        assert str(reported.filename).startswith(str(root))
        assert reported.strerror


def check_root(root: Path, name: str, outcome: Outcome, *, may_stay: bool) -> None:
    """The tags are those before or after; with `may_stay` either, if it failed."""
    before, after = dict(WORKLOADS[name].before), dict(WORKLOADS[name].after)
    with Engine(root, SMALL) as engine:
        assert leftovers(root) == []
        found = seeds(engine)
        either = [before, after] if may_stay else [before]
        assert found in ([after] if outcome.is_done else either)
        assert engine.latest() == [*found][-1]
        if name == "save" and not outcome.is_done:
            save(engine, "new", 4, overwrite="new" in found)
            assert_whole(engine, "new", 4)
            assert engine.latest() == "new"
    assert leftovers(root) == []


def check_every_call(
    template: Path, name: str, numbers: Sequence[int], num_times: float
) -> int:
    """Fails call 1, call 2, ... of a workload, until it meets no failure."""
    for index, number in enumerate(itertools.cycle(numbers), 1):
        root = copy_root(template)
        fault = FailAt(index, number, num_times=num_times)
        with tapped(fault):
            outcome = run(root, WORKLOADS[name].work)
        try:
            check_errors(outcome, number, root)
            failed = fault.failed
            if num_times == 1 and failed and failed.name not in CLEANING:
                # A lock file is empty, and the next engine's to remove.
                assert [n for n in leftovers(root) if not n.endswith(".lock")] == []
            # What goes on failing cannot be taken back; a deletion never is.
            may_stay = num_times > 1 or name.startswith("delete")
            check_root(root, name, outcome, may_stay=may_stay)
        except BaseException as error:
            error.add_note(f"call {index} failed: {fault.failed}")
            raise
        if failed is None:
            assert outcome.is_done
            assert not outcome.errors
            return index
    raise AssertionError


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("num_times", [1, FOR_EVER], ids=["once", "for ever"])
def test_an_error_at_any_call_fails_by_name_and_loses_nothing(
    template, name, num_times
):
    num_calls = check_every_call(template, name, ERRNOS, num_times)

    assert num_calls > (20 if name.startswith("delete") else 60)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("num_times", [1, FOR_EVER], ids=["once", "for ever"])
def test_every_error_at_any_call_fails_by_name_and_loses_nothing(
    template, name, num_times
):
    for number in ERRNOS:
        check_every_call(template, name, [number], num_times)
