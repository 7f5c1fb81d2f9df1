"""A process that is killed at any call loses nothing that was acknowledged."""

import itertools
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from catalogs import catalog_at, leftovers
from crashing import Server
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

# What a killed process leaves differs only by these; the kernel keeps the rest.
CHANGING = [
    "create", "exchange", "fallocate", "flock", "ftruncate", "mkdir", "pwrite",
    "rename", "rmdir", "unlink", "write",
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """A root in memory, where a copy costs little and syncs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield make_start(Path(path) / "template")


def check_root(root: Path, workload: str, *, is_acknowledged: bool) -> None:
    """All is whole; what was not acknowledged is there or not; all goes on."""
    before, after = WORKLOADS[workload].before, WORKLOADS[workload].after
    pointed = (root / "latest").read_text()
    with catalog_at(root) as reader:
        # As a program sees it that only reads, before anything is repaired.
        assert reader.latest() in {[*before][-1], [*after][-1]}
    with Engine(root, SMALL) as engine:
        assert leftovers(root) == []
        found = seeds(engine)
        assert list(found.items()) in [
            [*after.items()],
            *([] if is_acknowledged else [[*before.items()]]),
        ]
        assert engine.latest() == [*found][-1]
        # What the pointer said was a tag; only a deletion may have outrun it.
        assert pointed.endswith("\n")
        assert pointed.strip() in found or workload.startswith("delete")
        tag = "new" if workload == "save" else "old"
        save(engine, tag, 4, overwrite=tag in found)
        assert_whole(engine, tag, 4)
        assert engine.latest() == tag
    assert leftovers(root) == []


def check_every_kill(
    server: Server, template: Path, workload: str, calls: Sequence[str]
) -> int:
    """Kills a process at call 1, 2, ... until it ends; how many were killed."""
    for index in itertools.count(1):
        for is_torn in (False, True):
            request = {"workload": workload, "at": index, "calls": calls}
            root = copy_root(template)
            told = server.ask("crash", root=str(root), is_torn=is_torn, **request)
            is_killed = told[-1] == -signal.SIGKILL
            assert is_killed or told == ["acknowledged", "ended", 0]
            try:
                check_root(root, workload, is_acknowledged="acknowledged" in told)
            except BaseException as error:
                error.add_note(f"killed at call {index} (torn: {is_torn}): {told}")
                raise
            if not is_killed:
                return index - 1
            # It may have told of its success in the same moment.
            last = next(what for what in told if isinstance(what, dict))
            if last["call"] not in {"write", "pwrite"}:
                break
    raise AssertionError


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_process_killed_at_any_change_loses_nothing(server, template, workload):
    num_killed = check_every_kill(server, template, workload, CHANGING)

    assert num_killed > (8 if workload.startswith("delete") else 30)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_process_killed_at_any_call_loses_nothing(server, template, workload):
    num_killed = check_every_kill(server, template, workload, [])

    assert num_killed > (20 if workload.startswith("delete") else 60)


def test_a_process_killed_while_it_cleans_up_after_another_loses_nothing(
    server, template
):
    wreck = copy_root(template).rename(template.with_name("wreck"))
    # The first process dies between its rename and the pointer.
    between = ["rename", "/latest."]
    server.ask("crash", root=str(wreck), workload="save", at=between)
    assert len(leftovers(wreck)) >= 3

    for index in itertools.count(1):
        root = copy_root(wreck)
        request = {"workload": "delete an older", "at": index, "calls": CHANGING}
        told = server.ask("crash", root=str(root), **request)
        with Engine(root, SMALL) as engine:
            assert leftovers(root) == []
            found = seeds(engine)
            assert found in ({"older": 1, "old": 2, "new": 3}, {"old": 2, "new": 3})
            assert engine.latest() == "new"
        if told[-1] == 0:
            assert "older" not in found
            break
    assert index > 12
