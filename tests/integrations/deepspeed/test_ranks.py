"""DeepSpeed's interface in jobs of several processes, without DeepSpeed."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from aiockpt.testing.roots import assert_root_consistent
from jobs import Jobs

pytestmark = pytest.mark.dist

ACTS = "integrations.deepspeed.acts"


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs() as jobs:
        yield jobs


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path / "runs")


def same(results: list[Any]) -> Any:
    """What every rank told alike; causes are each rank's own."""
    told = [
        {key: each[key] for key in ("error", "text", "rank", "phase")}
        if isinstance(each, dict)
        else each
        for each in results
    ]
    assert all(each == told[0] for each in told), results
    return told[0]


@pytest.mark.parametrize(
    "saves",
    [[["x"], ["x"]], [["x"], []], [[], ["x"]], [["x"], ["y"]], [["y", "x"], ["x"], []]],
)
def test_ranks_that_save_nothing_learn_the_directories_from_the_others(
    jobs, tmp_path, saves
):
    full = [[f"{tmp_path}/{name}" for name in each] for each in saves]
    results = jobs.run(f"{ACTS}:plain", len(saves), saves=full)
    result, found = same(results)
    assert result is True
    for name in {name for each in saves for name in each}:
        ranks = [rank for rank, each in enumerate(saves) if name in each]
        assert found[name] == [[f"rank{rank}.pt" for rank in ranks], "a"]
        assert_root_consistent(f"{tmp_path}/{name}", acked=["a"], is_swept=True)


@pytest.mark.parametrize("at", [0, 1])
def test_a_file_outside_of_the_tag_is_there_on_return_on_all_ranks(jobs, tmp_path, at):
    root = tmp_path / "runs"
    root.mkdir()
    path = f"{root}/weights.bin"
    results = jobs.run(f"{ACTS}:single", 2, root=str(root), at=at, path=path)
    assert same(results) == [True, True, ["weights.bin"]]


@pytest.mark.parametrize("at", [0, 1])
def test_a_file_that_cannot_be_written_fails_all_ranks(jobs, tmp_path, at):
    root = tmp_path / "runs"
    root.mkdir()
    path = f"{tmp_path}/missing/weights.bin"
    results = jobs.run(f"{ACTS}:single", 2, root=str(root), at=at, path=path)
    told = same([each[0] for each in results])
    assert (told["error"], told["rank"]) == ("PeerError", at)
    assert "missing" in told["text"]
    assert {tuple(each[2]) for each in results} == {()}


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("step", ["make", "capture", "write", "publish", "pointer"])
def test_a_failure_on_one_rank_is_raised_by_the_next_call_on_all(jobs, root, at, step):
    if at != 0 and step in {"make", "publish", "pointer"}:
        pytest.skip("only rank 0 does that")
    results = jobs.run(f"{ACTS}:fail", 2, root=root, at=at, step=step)
    told = same([each[0] for each in results])
    assert (told["error"], told["rank"]) == ("PeerError", at)
    assert [each[1:] for each in results] == [["before", None, "a"]] * 2
    tags = ["before", "a"]
    assert assert_root_consistent(root, acked=tags, is_swept=True) == tags


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_fails_while_it_hands_over_fails_the_tag_on_all(jobs, root, at):
    results = jobs.run(f"{ACTS}:break_off", 3, root=root, at=at, drains=True)
    for rank, (first, drained, again, latest) in enumerate(results):
        told = first if rank == at else drained
        assert "the client's state cannot be had" in told["text"]
        assert (told["error"] == "PeerError") == (rank != at)
        assert told["rank"] == (None if rank == at else at)
        assert (again, latest) == (None, "a")
    assert_root_consistent(root, acked=["a"], is_swept=True)


@pytest.mark.parametrize("at", [0, 1])
def test_after_a_rank_has_failed_while_it_handed_over_no_rank_saves_without_the_others(
    jobs, root, at
):
    results = jobs.run(f"{ACTS}:break_off", 3, root=root, at=at, drains=False)
    # DeepSpeed would wait for the others, had the failed one gone on.
    for _, following, again, latest in results:
        assert following["error"] == "PeerError"
        assert (again, latest) == (None, "a")
    assert_root_consistent(root, acked=["a"], is_swept=True)


def test_a_lost_connection_fails_every_save_until_the_engine_is_closed(jobs, root):
    results = jobs.run(f"{ACTS}:lose_connection", 3, root=root, at=1)
    for lost, again, latest in results:
        assert [each["error"] for each in lost] == ["PeerError", "PeerError"]
        assert (again, latest) == (None, "a")
    assert_root_consistent(root, acked=["before", "a"], is_swept=True)


@pytest.mark.parametrize("at", [0, 1])
def test_a_directory_that_cannot_be_opened_fails_the_tag_once_on_all(
    jobs, tmp_path, at
):
    (tmp_path / "file").write_text("in the way")
    roots = ["", "", ""]
    roots[at] = f"{tmp_path}/file"
    good = f"{tmp_path}/good"
    results = jobs.run(f"{ACTS}:fail_to_open", 3, roots=roots, good=good)
    told = same([committed for _, committed, *_ in results])
    assert told["error"] == "PeerError"
    assert {each["text"] for each in results[at][0]} == {told["text"]}
    for _, _, again, found in results:
        assert (again, found) == (True, ["rank0.pt", "rank1.pt", "rank2.pt"])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("moment", "at"),
    [("create", 0), ("file", 3), ("written", 1), ("commit", 2), ("decide", 0),
     ("manifest", 0), ("rename", 0), ("pointer", 0)],
)  # fmt: skip
def test_a_killed_rank_is_told_to_all_others_and_latest_is_whole(
    jobs, root, moment, at, when
):
    results = jobs.run(f"{ACTS}:die", 4, root=root, at=at, moment=moment, when=when)
    assert results[at] == {"died": signal.SIGKILL}
    for rank, result in enumerate(results):
        if rank == at:
            continue
        errors = [each for each in result if each is not None]
        assert {each["error"] for each in errors} == {"PeerError"}, result
        # A late one may find that rank 0 has heard of it, given up and left.
        assert errors[0]["rank"] in ({at} if rank == 0 else {at, 0})
    assert_root_consistent(root, acked=["before"])


def test_nobody_waits_for_a_slow_rank_but_the_publication(jobs, root):
    results = jobs.run(f"{ACTS}:slow", 3, root=root, at=2)
    files = [f"rank{rank}.pt" for rank in range(3)]
    assert results[0] == [None, "b", files, files]
    assert [each[1:] for each in results] == [["b", files, files]] * 3
