"""Row 4: whichever rank is killed, and whenever, the others fail and all can go on.

A rank dies at the nth of its calls to the system, from `create` to the end of `close`.
On rank 0, which publishes, these are every step of the commit; on any other they are
those of its own file.
"""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from aiockpt.testing.roots import assert_root_consistent
from faults.driver import CHANGING
from faults.matrix import ROWS, Cases
from jobs import Jobs

ROWS |= {4: "a rank killed in a commit"}

WORLD_SIZE = 4
pytestmark = [pytest.mark.dist, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs() as jobs:
        yield jobs


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest) -> Cases:
    from faults.conftest import _cases

    return _cases(request.config)


def check(results: list[Any], at: int, root: str) -> None:
    """The others tell one and the same; the tag before is there, and all is whole."""
    others = [result for rank, result in enumerate(results) if rank != at]
    assert all("told" in other for other in others), others
    told = [other["told"] for other in others]
    kinds = {(each.get("error"), each.get("rank")) for each in told}
    # Whoever dies after its commit has returned, or may have, is missed by nobody.
    assert kinds in ({("PeerError", at)}, {(None, None)}), told
    is_done = kinds == {(None, None)}
    tags = assert_root_consistent(
        root, acked=["before", "a"] if is_done else ["before"]
    )
    if at != 0:
        assert ("a" in tags) == is_done


def check_again(jobs: Jobs, root: str) -> None:
    """A new job finds a sound tag, and saves the same tag again."""
    results = jobs.run("ranks.acts:again", 2, root=root)
    tags = assert_root_consistent(root, acked=["before", "a"], is_swept=True)
    for latest, report in results:
        assert latest in tags
        assert report["files"] == 2


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rank_killed_at_any_call_fails_all_and_loses_nothing(
    jobs, cases, tmp_path, at, when
):
    calls = [] if cases.is_long else CHANGING
    fault = f"rank {'0' if at == 0 else 'k'}, {when} a call"
    nth = 0
    while True:
        nth += 1
        root = str(tmp_path / f"{nth}" / "runs")
        results = jobs.run(
            "ranks.acts:die_at_call", WORLD_SIZE,
            root=root, at=at, nth=nth, spoiled=[when, list(calls)],
        )  # fmt: skip
        if results[at] != {"died": signal.SIGKILL}:
            # It came to its end before that.
            assert all(result["told"].get("files") == WORLD_SIZE for result in results)
            break
        with cases.case(4, fault, f"call {nth}: {results}"):
            check(results, at, root)
            check_again(jobs, root)
    assert nth > (20 if at == 0 else 4)
