"""A commit makes its calls to the system in the one order that loses nothing."""

import ast
import errno
import inspect
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import aiockpt.sync
from aiockpt.errors import StorageError
from aiockpt.storage import local, local_calls, local_write
from aiockpt.testing.system_calls import Moment
from gates import LIMIT_S
from tracing import (
    HARMLESS,
    STRACE,
    Call,
    Tap,
    check_commit_order,
    fail_on,
    parse_strace,
    swapped,
    tapped,
    tapped_names,
    without,
)

# Chunks of 1 MiB, so that the large file below takes several writes at a time.
SMALL = {"host_cache_size": 8 / 1024, "parser_threads": 3}
PATHS = ("model.pt", "sub/deep/opt.pt", "sub/flat.safetensors")


def state() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(1_000_000.0), "b": torch.arange(3)}


def save_all(engine: aiockpt.sync.CheckpointEngine, tag: str, **create: bool) -> None:
    engine.create(tag, **create)
    engine.save(state(), PATHS[0])
    engine.save({"lr": 0.1}, PATHS[1])
    engine.save({"x": torch.ones(7)}, PATHS[2])


def traced(root: Path, tag: str, **create: bool) -> tuple[list[Call], int]:
    with aiockpt.sync.CheckpointEngine(root, SMALL) as engine, tapped() as tap:
        save_all(engine, tag, **create)
        engine.commit(tag)
        return list(tap.calls), tap.now()


@pytest.fixture(scope="module")
def good_trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Call], str, int]:
    """The calls of a first commit, in a root two levels of which were missing."""
    root = tmp_path_factory.mktemp("trace") / "runs" / "gpt"
    calls, returned = traced(root, "step-1")
    return calls, str(root), returned


def check(calls: list[Call], root: str, returned: int) -> None:
    check_commit_order(calls, root, "step-1", PATHS, returned)


def test_the_first_commit_in_a_new_root_syncs_all_in_order(good_trace):
    check(*good_trace)


def test_a_later_commit_syncs_all_in_order(root):
    traced(root, "step-0")

    calls, returned = traced(root, "step-1")

    check(calls, str(root), returned)


def test_an_overwrite_syncs_all_in_order(root):
    traced(root, "step-1")

    calls, returned = traced(root, "step-1", overwrite=True)

    check(calls, str(root), returned)
    assert [call.target for call in calls if call.name == "exchange"] == [
        f"{root}/step-1"
    ]


def test_nothing_published_is_opened_for_writing_or_removed(root):
    traced(root, "step-0")
    before = {path: path.read_bytes() for path in files_of(root / "step-0")}

    calls, _ = traced(root, "step-1")

    changing = {"create", "write", "pwrite", "ftruncate", "unlink", "rmdir", "rename"}
    touched = [call for call in calls if call.name in changing]
    assert not [call for call in touched if call.path.startswith(f"{root}/step-0")]
    assert {path: path.read_bytes() for path in files_of(root / "step-0")} == before


def files_of(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


# --- the checker catches what it is there to catch --------------------------------


@pytest.fixture
def trace(good_trace) -> tuple[list[Call], str, int]:
    """A trace that the checker has nothing to say against, as it is."""
    check(*good_trace)
    return good_trace


def needed_syncs(calls: list[Call], root: str) -> Iterator[int]:
    """The syncs without which the commit would be at risk.

    Not needed are those of the work area, which nobody reads after a crash.
    """
    work = f"{root}/.aiockpt"
    for index, call in enumerate(calls):
        scratch = call.path == work or os.path.dirname(call.path) == f"{work}/work"
        if call.name == "fsync" and not scratch:
            yield index


def test_a_program_that_forgets_any_one_sync_is_caught(trace):
    calls, root, returned = trace
    syncs = list(needed_syncs(calls, root))
    # Files, manifest and pointer; their directories; the root's parents; the root.
    assert len(syncs) >= 3 + 2 + 4 + 2 + 2

    missed = []
    for index in syncs:
        try:
            check(without(calls, index), root, returned)
        except AssertionError:
            continue
        missed.append(str(calls[index]))

    # The root is also synced when the work area is made in it.
    assert len(missed) <= 1, missed


@pytest.mark.parametrize(
    ("late", "early"),
    [
        (("rename", "step-1"), ("fsync", "model.pt")),
        (("rename", "step-1"), ("fsync", "manifest.json")),
        (("rename", "latest"), ("rename", "step-1")),
        (("fsync", "model.pt"), ("pwrite", "model.pt")),
        (("fsync", "manifest.json"), ("write", "manifest.json")),
    ],
    ids=" ".join,
)
def test_a_program_that_swaps_two_calls_is_caught(trace, late, early):
    calls, root, returned = trace

    def place(name: str, end: str) -> int:
        return next(
            index
            for index, call in enumerate(calls)
            if call.name == name and (call.target or call.path).endswith(end)
        )

    with pytest.raises(AssertionError):
        check(swapped(calls, place(*late), place(*early)), root, returned)


def test_a_program_that_answers_before_the_last_sync_is_caught(trace):
    calls, root, _ = trace
    last = max(call.begin for call in calls if call.name == "fsync")

    with pytest.raises(AssertionError):
        check(calls, root, last)


@pytest.mark.parametrize("part", [local, local_calls, local_write])
def test_the_recorder_sees_every_call_of_local_storage(part):
    unseen = set()
    for node in ast.walk(ast.parse(inspect.getsource(part))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = node.value.id, node.attr
            if module in {"os", "fcntl", "shutil", "aiofiles", "_libc"}:
                is_constant = not name.islower()
                if not is_constant and name not in {*tapped_names(module), *HARMLESS}:
                    unseen.add(f"{module}.{name}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "open", "a file opened past the recorder"
    assert not unseen


def test_nothing_else_on_the_way_of_a_save_reaches_the_file_system():
    for name in (
        "saver",
        "file_save",
        "attempt",
        "catalog",
        "tag_reader",
        "runtime",
        "machinery",
        "onefile",
        *("single_files", "replicas", "opening", "agreement", "adopting"),
        *("work_area", "leases"),
        *("watching", "tag_loader", "deadline", "preflight"),
    ):
        module = sys.modules[f"aiockpt.{name}"]
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert node.value.id not in {"shutil", "aiofiles", "fcntl"}, called
                if node.value.id == "os":
                    looks = {"path", "PathLike", "fspath", "getpid", "uname"}
                    assert node.attr in looks, called


# --- syncs that fail --------------------------------------------------------------


@pytest.mark.parametrize("path", [*PATHS, "manifest.json"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_sync_fails_the_commit_and_is_never_tried_again(root, path, number):
    traced(root, "step-0")
    failing, is_saved = fail_on("fsync", path, number), threading.Event()

    def fail_late(moment: Moment) -> None:
        if moment.name == "fsync" and moment.path.endswith(path):
            # Else the next `save` may be refused for it.
            assert is_saved.wait(LIMIT_S)
        failing(moment)

    with aiockpt.sync.CheckpointEngine(root, SMALL) as engine:
        with tapped(fail_late) as tap:
            save_all(engine, "step-1")
            is_saved.set()
            with pytest.raises(StorageError) as caught:
                engine.commit("step-1")
        assert engine.latest() == "step-0"
        assert [info.tag for info in engine.tags()] == ["step-0"]

    assert caught.value.errno == number
    assert str(caught.value.filename).endswith(path)
    assert len(syncs_of(tap, path)) == 1
    # What could not be synced is not used again in any other way either.
    changes = {"write", "pwrite", "ftruncate", "rename"}
    later = [c for c in tap.calls if c.begin > syncs_of(tap, path)[0].end]
    assert not [c for c in later if c.name in changes and c.path.endswith(path)]


def syncs_of(tap: Tap, path: str) -> list[Call]:
    return [
        call for call in tap.calls if call.name == "fsync" and call.path.endswith(path)
    ]


# --- the same, seen by the kernel -------------------------------------------------

TRACED_PROGRAM = """
import os, sys
import torch
import aiockpt.sync

root = sys.argv[1]
with aiockpt.sync.CheckpointEngine(root, {"host_cache_size": 8 / 1024}) as engine:
    engine.create("step-1")
    engine.save({"w": torch.arange(1_000_000.0), "b": torch.arange(3)}, "model.pt")
    engine.save({"lr": 0.1}, "sub/deep/opt.pt")
    engine.save({"x": torch.ones(7)}, "sub/flat.safetensors")
    engine.commit("step-1")
    os.mkdir(f"{root}.returned")
"""


@pytest.mark.slow
def test_the_kernel_sees_the_calls_of_a_commit_in_order(tmp_path):
    assert shutil.which("strace"), "strace is missing: apt-get install strace"
    root, output = tmp_path / "runs" / "gpt", tmp_path / "strace"

    program = [sys.executable, "-c", TRACED_PROGRAM, str(root)]
    subprocess.run([*STRACE, "-o", output, *program], check=True, timeout=50)

    calls = parse_strace(output.read_text())
    returned = next(call for call in calls if call.path == f"{root}.returned").begin
    ours = [call for call in calls if str(tmp_path) in call.path]
    check([call for call in ours if call.begin < returned], str(root), returned)
    assert len([call for call in ours if call.name == "pwrite"]) >= 6
