"""Rows 3 and 17: whoever is killed, and whenever, no acknowledged tag is lost."""

import errno
import itertools
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aiockpt.testing.faults import Fail, Fault
from catalogs import leftovers
from crashing import Server
from faults.driver import (
    ALL_WORKLOADS,
    CHANGING,
    NEWER,
    Outcome,
    assert_survived,
    go_on,
    link_root,
    published_seeds,
    spoil,
    take_note,
)
from faults.matrix import Cases
from workloads import START, WORKLOADS

WRITES = ("pwrite", "write")


@dataclass(frozen=True)
class Killing:
    """A workload, done again and again by a process that dies somewhere else.

    Attributes:
        cases: Counts.
        server: Forks these processes.
        template: The root before the workload.
        name: The workload's.
        when: How far the call has come.
        calls: The calls at which it may die; all where there are none.
    """

    cases: Cases
    server: Server
    template: Path
    name: str
    when: str
    calls: Sequence[str]

    def at_every_call(self) -> int:
        """Kills the process at call 1, 2, ... until it ends; how many were killed."""
        for index in itertools.count(1):
            root = link_root(self.template)
            told = self.server.ask(
                "crash",
                root=str(root),
                workload=self.name,
                at=index,
                when=self.when,
                calls=self.calls,
            )
            if told[-1] != -signal.SIGKILL:
                assert told == ["acknowledged", "ended", 0]
                return index - 1
            fault = f"{self.when} {'a change' if self.calls else 'any call'}"
            with self.cases.case(3, fault, f"{self.name}, call {index}: {told}"):
                outcome = Outcome(is_done="acknowledged" in told)
                check_killed(root, self.name, outcome)
        raise AssertionError


def check_killed(root: Path, name: str, outcome: Outcome) -> None:
    take_note(root, name)
    pointed = (root / "latest").read_text()
    found = published_seeds(root)
    # What the pointer said was a tag; only a deletion may have outrun it.
    assert pointed.endswith("\n")
    assert pointed.strip() in found or "delete" in name or name == "recover"
    assert_survived(root, name, outcome, may_stay=True)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", [*WORKLOADS, *NEWER])
def test_a_process_killed_at_any_change_loses_nothing(
    cases, server, template, name, when
):
    killing = Killing(cases, server, template, name, when, CHANGING)

    is_large = "save" in name or "overwrite" in name
    assert killing.at_every_call() > (30 if is_large else 4)


@pytest.mark.parametrize("name", ["save", "overwrite the latest", "overwrite an older"])
def test_a_process_killed_half_way_through_any_write_loses_nothing(
    cases, server, template, name
):
    killing = Killing(cases, server, template, name, "half-way", WRITES)

    assert killing.at_every_call() >= 5


@pytest.mark.parametrize("name", ["save and prune", "recover"])
def test_a_process_killed_while_it_tidies_up_loses_nothing(
    cases, server, template, name
):
    killing = Killing(cases, server, template, name, "before", CHANGING)

    assert killing.at_every_call() > 8


@pytest.mark.parametrize("name", ALL_WORKLOADS)
def test_a_process_killed_at_any_call_loses_nothing(cases, server, template, name):
    # Between two changes a killed process leaves the same: one workload shows it.
    if not cases.is_long and name != "save":
        pytest.skip("every workload, killed at any call: --faults")
    for when in ("before", "half-way", "after") if cases.is_long else ("before",):
        Killing(cases, server, template, name, when, []).at_every_call()


# --- row 17: faults while what a crash left is cleaned up -------------------------

# Where the first process dies, and what it was at.
WRECKS: dict[str, tuple[str, list[str]]] = {
    "a save, published and not pointed to": ("save", ["rename", "/latest."]),
    "a save, half written": ("save", ["fsync", "manifest.json"]),
    "an overwrite, exchanged": ("overwrite the latest", ["rename", "/latest."]),
    "a deletion, unpublished": ("delete an older", ["unlink", "model.pt"]),
}


@pytest.fixture
def wreck(server: Server, template: Path, crash: str) -> Path:
    """The root that a killed process left, and the tags that it may show."""
    name, at = WRECKS[crash]
    root = link_root(template, "wreck")
    told = server.ask("crash", root=str(root), workload=name, at=at)
    assert told[-1] == -signal.SIGKILL
    assert len(leftovers(root)) >= 3
    return root


crashes = pytest.mark.parametrize("crash", WRECKS)


def check_recovered(root: Path, start: dict[str, int], told: list[Any]) -> None:
    """The tags are those that the first process left, less one at most."""
    found = published_seeds(root)
    assert found in (start, {tag: start[tag] for tag in start if tag != "older"})
    if "acknowledged" in told:
        assert "older" not in found
    go_on(root, found, has_failed=True)
    assert leftovers(root) == []


@crashes
def test_a_process_killed_while_it_recovers_loses_nothing(cases, server, wreck, crash):
    start = published_seeds(wreck)
    for index in itertools.count(1):
        root = link_root(wreck)
        request = {"workload": "recover", "at": index, "calls": CHANGING}
        told = server.ask("crash", root=str(root), **request)
        if told[-1] == 0:
            break
        with cases.case(17, "SIGKILL", f"{crash}, call {index}: {told}"):
            check_recovered(root, start, told)
    assert index > 6


@crashes
@pytest.mark.parametrize("num_times", [1, math.inf], ids=["once", "for ever"])
def test_an_error_while_recovering_loses_nothing(cases, wreck, crash, num_times):
    start = published_seeds(wreck)
    kind = "errno once" if num_times == 1 else "errno for ever"
    for number in (errno.EIO, errno.ENOSPC, errno.ESTALE)[: cases.pick(1, 3)]:
        for index in itertools.count(1):
            root = link_root(wreck)
            fault = Fault((), Fail(number), nth=index, num_times=num_times)
            outcome, injection = spoil(root, "recover", fault)
            if not injection.spoiled:
                break
            told = ["acknowledged"] if outcome.is_done else []
            with cases.case(17, kind, f"{crash}, {injection.spoiled[0]}, {number}"):
                check_recovered(root, start, told)
        assert index > 10


def test_a_process_that_dies_again_and_again_in_its_recovery_loses_nothing(
    cases, server, template
):
    name, at = WRECKS["a save, published and not pointed to"]
    root = link_root(template)
    server.ask("crash", root=str(root), workload=name, at=at)
    for index in range(1, cases.pick(8, 40)):
        with cases.case(17, "SIGKILL, in one root", index):
            crash = {"workload": "overwrite the latest", "at": 3 * index}
            told = server.ask("crash", root=str(root), calls=CHANGING, **crash)
            assert told[-1] in {0, -signal.SIGKILL}
            found = published_seeds(root)
            assert found["older"] == START["older"]
            assert found["old"] in {2, 3}
            assert found["new"] == 3
    go_on(root, found, has_failed=True)


def test_a_kill_that_comes_too_late_kills_nobody(server, template):
    """The loops above end at the first call that is not made."""
    root = link_root(template)

    told = server.ask("crash", root=str(root), workload="save", at=10_000)

    assert told == ["acknowledged", "ended", 0]
