"""Rows 1, 2 and 7: a call that fails, falls short or will not sync costs no tag."""

import errno
import math
from fractions import Fraction
from pathlib import Path

import pytest

from aiockpt.testing.faults import Action, Fail, Fault, Injection, Short
from faults.driver import (
    ALL_WORKLOADS,
    NEWER,
    Outcome,
    assert_survived,
    link_root,
    make_template,
    spoil,
)
from faults.sweeps import Sweep

ERRNOS = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EMFILE,
    errno.ESTALE,
)


# --- row 1: an errno at every call ------------------------------------------------


@pytest.mark.parametrize("name", ALL_WORKLOADS)
@pytest.mark.parametrize("num_times", [1, math.inf], ids=["once", "for ever"])
def test_an_error_at_any_call_fails_by_name_and_loses_nothing(
    cases, template, name, num_times
):
    kind = "once" if num_times == 1 else "for ever"
    sweep = Sweep(cases, 1, kind, template, name)
    # Each call meets one or two errors in the ordinary run, and all six in the long one.
    for start in range(0, len(ERRNOS), cases.pick(6 if name in NEWER else 3, 1)):
        numbers = ERRNOS[start:] + ERRNOS[:start]

        num_calls = sweep.errors(
            lambda index, numbers=numbers: numbers[index % len(numbers)],
            num_times=num_times,
        )

        is_large = "save" in name or "overwrite" in name
        assert num_calls > (40 if is_large else 10)


# --- row 2: reads and writes that move less than was asked ------------------------

# Each a little, and the long run more of the same.
PARTS: dict[str, list[Action]] = {
    "nothing": [Short(0)],
    "a few bytes": [Short(0, 1), Short(0, 4095)],
    "half": [Short(Fraction(1, 2)), Short(Fraction(1, 4)), Short(Fraction(3, 4))],
    "all but a few bytes": [Short(1, -1), Short(1, -4097)],
    "off a boundary": [Short(Fraction(1, 2), 513), Short(Fraction(1, 3), 1)],
    "interrupted": [Fail(errno.EINTR)],
}


@pytest.mark.parametrize("name", ["save", "overwrite the latest", "load"])
@pytest.mark.parametrize("part", PARTS)
def test_a_short_read_or_write_is_completed_or_fails_and_never_torn(
    cases, template, part, name
):
    for action in PARTS[part][: cases.pick(1, 3)]:
        assert Sweep(cases, 2, part, template, name).short(action) >= 5


@pytest.mark.parametrize("part", PARTS)
def test_a_short_direct_write_is_completed_or_fails_and_never_torn(
    cases, tmp_path, part
):
    # On a disk, where a direct write cannot go on off a boundary.
    disk = make_template(tmp_path / "template")

    for action in PARTS[part][: cases.pick(1, 3)]:
        sweep = Sweep(cases, 2, f"{part}, on a disk", disk, "save")
        assert sweep.short(action) >= 5


def test_writes_that_never_move_more_than_a_part_are_completed(cases, template):
    with cases.case(2, "always half", "save"):
        root = link_root(template)
        always = Fault("pwrite", Short(Fraction(1, 2), 1), num_times=math.inf)

        outcome, injection = spoil(root, "save", always)

        assert len(injection.spoiled) > 20
        assert outcome.is_done
        assert_survived(root, "save", outcome, may_stay=False)


# --- row 7: a file that could not be synced or closed is never trusted again ------


@pytest.mark.parametrize("call", ["fsync", "close"])
@pytest.mark.parametrize("name", ["save", "overwrite the latest", "save and prune"])
def test_a_file_that_cannot_be_synced_or_closed_fails_and_is_given_up(
    cases, template, name, call
):
    assert Sweep(cases, 7, call, template, name).failed(call) > 8


def test_every_sync_that_the_root_rests_on_fails_the_commit(cases, template):
    """Nothing is written to a directory: it is judged by what is published."""
    num_failed = 0

    def check(root: Path, outcome: Outcome, injection: Injection) -> None:
        nonlocal num_failed
        num_failed += not outcome.is_done
        is_scratch = "/.aiockpt" in injection.spoiled[0].path
        assert not outcome.is_done or is_scratch
        assert_survived(root, "save", outcome, may_stay=False)

    def fault(index: int) -> Fault:
        return Fault("fsync", Fail(errno.ENOSPC), nth=index)

    sweep = Sweep(cases, 7, "fsync, ENOSPC", template, "save")
    sweep.at_every_call(fault, check)
    # Two files, two directories, manifest, its directory, pointer, the root twice.
    assert num_failed >= 9
