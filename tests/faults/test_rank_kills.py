"""Row 4: whichever rank is killed, and whenever, the others fail and all can go on."""

import itertools
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from aiockpt.testing.roots import assert_root_consistent
from faults.driver import CHANGING
from faults.matrix import Cases
from jobs import Jobs
from workloads import SMALL, Engine, save

WORLD_SIZE = 4
pytestmark = pytest.mark.dist


@pytest.fixture
def root(memory: Path) -> Path:
    """A place for a root, which is new for each case."""
    return memory / "job" / "runs"


def killed(jobs: Jobs, act: str, root: Path, at: int, **spoiled: object) -> list[Any]:
    """What the ranks tell of a job in which one is to be killed, by rank."""
    shutil.rmtree(root.parent, ignore_errors=True)
    return jobs.run(f"ranks.acts:{act}", WORLD_SIZE, root=str(root), at=at, **spoiled)


def check(results: list[Any], at: int, root: Path) -> None:
    """The others tell one and the same; the tag before is there, and all is whole."""
    assert results[at] == {"died": signal.SIGKILL}
    others = [result for rank, result in enumerate(results) if rank != at]
    assert all("told" in other for other in others), others
    told = [other["told"] for other in others]
    kinds = {(each.get("error"), each.get("rank")) for each in told}
    # Whoever dies after its commit has returned, or may have, is missed by nobody.
    assert kinds in ({("PeerError", at)}, {(None, None)}), told
    is_done = kinds == {(None, None)}
    acked = ["before", "a"] if is_done else ["before"]
    tags = assert_root_consistent(root, acked=acked)
    # Rank 0 may be lost when it has published and has told nobody.
    if at != 0:
        assert ("a" in tags) == is_done


def check_again(jobs: Jobs, root: Path, number: int) -> None:
    """A new job finds a sound tag, and saves the same tag again.

    Most have one rank: another process is what takes the time.
    """
    if number % 4:
        with Engine(root, SMALL) as engine:
            assert engine.load("rank0.pt")["rank"] == 0
            save(engine, "a", 1, overwrite=True)
        assert_root_consistent(root, acked=["before", "a"], is_swept=True)
        return
    results = jobs.run("ranks.acts:again", 2, root=str(root))
    tags = assert_root_consistent(root, acked=["before", "a"], is_swept=True)
    for latest, report in results:
        assert latest in tags
        assert report["files"] == 2


@pytest.mark.parametrize("at", range(WORLD_SIZE))
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rank_killed_at_any_call_fails_all_and_loses_nothing(
    jobs, cases, root, at, when
):
    """On rank 0, which publishes, these are every step of the commit."""
    calls = [] if cases.is_long else CHANGING
    for nth in itertools.count(1):
        spoiled = [when, list(calls)]
        results = killed(jobs, "die_at_call", root, at, nth=nth, spoiled=spoiled)
        if results[at] != {"died": signal.SIGKILL}:
            # It came to its end before that.
            assert all(result["told"].get("files") == WORLD_SIZE for result in results)
            break
        fault = f"rank {at}, {when} a call"
        with cases.case(4, fault, f"call {nth}: {results}"):
            check(results, at, root)
            check_again(jobs, root, nth)
    assert nth > (20 if at == 0 else 4)


# What a rank is at that is no call to the system, and which ranks are.
PHASES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "its file is durable": ("written", "after", (0, 1, 2, 3)),
    "it has not said so": ("commit", "before", (0, 1, 2, 3)),
    "all have": ("decide", "before", (0,)),
    "the tag is published": ("decide", "after", (0,)),
    "it has returned": ("commit", "after", (0, 1, 2, 3)),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_killed_between_two_words_fails_all_and_loses_nothing(
    cases: Cases, jobs, root, phase
):
    moment, when, ranks = PHASES[phase]
    for at, number in itertools.product(ranks, range(cases.pick(4, 20))):
        results = killed(jobs, "die", root, at, moment=moment, when=when)
        told = [
            result if rank == at else {"told": result[0], "lost": result[1]}
            for rank, result in enumerate(results)
        ]
        with cases.case(4, f"when {phase}", f"rank {at}, {number}: {results}"):
            check(told, at, root)
            check_again(jobs, root, number)
