"""Commits across processes: one outcome on every rank, whatever happens to one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aiockpt.cli import app
from aiockpt.testing.roots import assert_root_consistent
from jobs import Jobs

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs() as jobs:
        yield jobs


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def same(results: list[Any]) -> Any:
    """What every rank told alike; causes are each rank's own."""
    told = [
        {key: value for key, value in result.items() if key not in ("causes", "notes")}
        if isinstance(result, dict)
        else result
        for result in results
    ]
    assert all(each == told[0] for each in told), results
    return told[0]


@pytest.mark.parametrize("counts", [[1, 1], [2, 0, 1, 3], [0, 2]])
def test_all_ranks_return_one_report_of_all_files(jobs, root, counts):
    report = same(jobs.run("ranks.acts:commit", len(counts), root=root, counts=counts))
    assert f"num_files={sum(counts)}" in report
    assert assert_root_consistent(root, acked=["a"], is_swept=True) == ["a"]
    loaded = torch.load(f"{root}/a/dir{len(counts) - 1 or 1}/0.pt")
    assert loaded["rank"] == len(counts) - 1


def test_a_tag_in_which_no_rank_saved_anything_is_refused_by_all(jobs, root):
    told = same(jobs.run("ranks.acts:commit", 2, root=root, counts=[0, 0]))
    assert told["error"] == "EngineStateError"
    assert not os.path.exists(f"{root}/a")


def test_two_ranks_that_save_the_same_file_fail_on_all_and_can_try_again(jobs, root):
    results = jobs.run("ranks.acts:commit_alike", 3, root=root)
    first = same([result[0] for result in results])
    assert first["error"] == "PeerError"
    assert "'model.pt' has been saved in tag 'a' by another rank" in first["text"]
    assert same([result[1] for result in results])["files"] == 3
    assert_root_consistent(root, acked=["a"], is_swept=True)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("step", "phase"),
    [
        ("make", "commit"),
        ("write", "write"),
        ("publish", "commit"),
        ("pointer", "commit"),
    ],
)
def test_a_failure_on_one_rank_is_one_error_on_all_and_the_tag_can_be_tried_again(
    jobs, root, at, step, phase
):
    if at != 0 and step != "write":
        pytest.skip("only rank 0 does that")
    results = jobs.run("ranks.acts:fail", 3, root=root, at=at, step=step)
    first = same([result[0] for result in results])
    assert (first["error"], first["rank"], first["phase"]) == ("PeerError", at, phase)
    assert "StorageError" in first["text"]
    assert "no space" in first["text"]
    assert "StorageError" in results[at][0]["causes"]
    assert {result[1] for result in results} == {"before"}
    assert same([result[2] for result in results])["files"] == 3
    assert_root_consistent(root, acked=["before", "a"], is_swept=True)


MOMENTS = [
    ("create", 0), ("create", 0), ("file", 0), ("file", 3), ("written", 1),
    ("commit", 2), ("commit", 0), ("decide", 0), ("manifest", 0), ("rename", 0),
    ("pointer", 0),
]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("moment", "at"), sorted(set(MOMENTS)))
def test_a_killed_rank_fails_the_commit_on_all_others(jobs, root, moment, at, when):
    results = jobs.run("ranks.acts:die", 4, root=root, at=at, moment=moment, when=when)
    assert results[at] == {"died": signal.SIGKILL}
    others = [result for rank, result in enumerate(results) if rank != at]
    for result, lost in others:
        if moment == "commit" and when == "after":
            # It had returned from its commit: so must the others.
            assert "files" in result
            continue
        assert (result["error"], result["rank"]) == ("PeerError", at)
        assert lost is None or lost["error"] == "PeerError"
    tags = assert_root_consistent(root, acked=["before"])
    is_shown = any(
        "had published" in note
        for result, _ in others
        for note in result.get("notes", [])
    )
    if is_shown:
        assert "a" in tags
    (latest, report), *_ = jobs.run("ranks.acts:again", 2, root=root)
    assert latest in tags
    assert report["files"] == 2
    assert_root_consistent(root, acked=["before", "a"], is_swept=True)


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_does_not_come_in_time_is_named_on_all(jobs, root, at):
    results = jobs.run("ranks.acts:be_late", 3, root=root, at=at)
    told = same(results)
    assert (told["error"], told["rank"]) == ("PeerError", at)


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_aborts_fails_the_commit_of_the_others(jobs, root, at):
    results = jobs.run("ranks.acts:abort", 3, root=root, at=at)
    others = [result[0] for rank, result in enumerate(results) if rank != at]
    told = same(others)
    assert (told["error"], told["rank"], told["phase"]) == ("PeerError", at, "abort")
    assert results[at][0] is None
    assert same([result[1] for result in results])["files"] == 3
    assert_root_consistent(root, acked=["a"], is_swept=True)


def test_a_file_of_all_ranks_is_tried_again_and_is_that_of_one_rank(jobs, root):
    assert jobs.run("ranks.acts:replicate_again", 3, root=root) == [1, 1, 1]
    files = [Path(root, tag, "model.pt").read_bytes() for tag in ("a", "alone")]
    assert files[0] == files[1]
    assert_root_consistent(root, acked=["a", "alone"], is_swept=True)


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_cannot_save_a_file_of_all_is_not_waited_for(jobs, root, at):
    results = jobs.run("ranks.acts:replicate_refused", 2, root=root, at=at)
    assert results[at][0]["error"] == "InvalidArgumentError"
    assert results[1 - at][0] == "begun"
    told = same([result[1] for result in results])
    assert (told["error"], told["rank"]) == ("PeerError", at)
    assert told["phase"] == "plan"
    assert_root_consistent(root, absent=["a"], is_swept=True)


def test_a_rank_that_fails_and_skips_the_tag_is_not_waited_for(jobs, root):
    results = jobs.run("ranks.acts:skip", 2, root=root)
    told = results[1][0]
    assert (told["error"], told["rank"], told["phase"]) == ("PeerError", 0, "write")
    assert [result[1] for result in results] == [1, 1]
    assert_root_consistent(root, acked=["b"], absent=["a"], is_swept=True)


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_that_leaves_fails_the_commit_of_the_others(jobs, root, at):
    results = jobs.run("ranks.acts:leave", 2, root=root, at=at)
    told = results[1 - at]
    assert (told["error"], told["rank"]) == ("PeerError", at)
    assert results[at]["error"] == "EngineStateError"
    assert_root_consistent(root, absent=["a"], is_swept=True)


def test_each_node_publishes_what_lies_on_its_own_disk(jobs, tmp_path):
    roots = [str(tmp_path / name) for name in ("one", "one", "two", "two")]
    for directory in set(roots):
        os.mkdir(directory)
    results = jobs.run("ranks.acts:commit_in_places", 4, roots=roots)
    assert same([result[1] for result in results])["files"] == 4
    for directory, ranks in ((roots[0], {0, 1}), (roots[2], {2, 3})):
        assert_root_consistent(
            f"{directory}/runs", acked=["before", "a"], is_swept=True
        )
        verified = CliRunner().invoke(app, ["verify", f"{directory}/runs"])
        assert verified.exit_code == 0, verified.output
        files = {name for name in os.listdir(f"{directory}/runs/a") if name[0] != "."}
        assert files == {f"rank{rank}.pt" for rank in ranks}
    for rank, (_, _, tags, latest, _, own, other) in enumerate(results):
        assert (tags, latest, own) == (["before", "a"], "a", rank)
        # Ranks 1 and 3 look for a file of the other disk.
        if rank % 2:
            assert other["error"] == "CheckpointNotFoundError"
            assert "lies on another disk" in other["text"]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_node_that_cannot_publish_keeps_all_others_from_it(jobs, tmp_path, broken):
    roots = [str(tmp_path / name) for name in ("one", "two", "three")]
    for directory in roots:
        os.mkdir(directory)
    results = jobs.run("ranks.acts:commit_in_places", 3, roots=roots, broken=broken)
    told = same([result[1] for result in results])
    assert (told["error"], told["rank"]) == ("PeerError", broken)
    for _, _, tags, latest, *_ in results:
        assert (tags, latest) == (["before"], "before")
    assert same([result[4] for result in results])["files"] == 3
    for directory in roots:
        assert_root_consistent(
            f"{directory}/runs", acked=["before", "a"], is_swept=True
        )


def test_a_job_of_another_size_opens_lists_verifies_and_loads(jobs, root):
    for world_size, tag in ((4, "a"), (1, "b"), (3, "c")):
        files = jobs.run("ranks.acts:save_as_job", world_size, root=root, tag=tag)
        assert files == [world_size] * world_size
        expected = ["c", 0, [4, 1, 3], tag_files(a=4, b=1, c=3)]
    for world_size in (1, 2):
        found = jobs.run("ranks.acts:look_around", world_size, root=root)
        assert found == [expected] * world_size
    assert_root_consistent(root, acked=["a", "b", "c"], is_swept=True)
    for tag in "abc":
        assert CliRunner().invoke(app, ["verify", f"{root}/{tag}"]).exit_code == 0
    with open(f"{root}/a/rank3.pt", "r+b") as file:
        file.seek(600)
        file.write(b"\xff" * 8)
    verified = CliRunner().invoke(app, ["verify", f"{root}/a"])
    assert verified.exit_code != 0
    assert "rank3.pt" in verified.output


def tag_files(**counts: int) -> dict[str, dict[str, int]]:
    """The files of each tag, and which rank saved them."""
    return {
        tag: {f"rank{rank}.pt": rank for rank in range(count)}
        for tag, count in counts.items()
    }


def test_all_ranks_load_from_the_tag_that_is_the_latest_for_rank_0(jobs, root):
    assert jobs.run("ranks.acts:load_common", 3, root=root) == [0, 1, 2]


def test_all_ranks_fall_back_to_a_tag_that_is_sound_for_every_one(jobs, root):
    results = jobs.run("ranks.acts:load_valid", 3, root=root)
    assert results == [["a", 0], ["a", 1], ["a", 2]]
