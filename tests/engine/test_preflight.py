"""Before step 1 it is told whether a save will work, and if not, what to do about it."""

import asyncio
import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiockpt import (
    CheckpointEngine,
    CorruptCheckpointError,
    InvalidArgumentError,
    StorageError,
    preflight,
)
from aiockpt.catalog import Catalog
from aiockpt.preflight import Preflight
from aiockpt.ring import Ring
from aiockpt.storage import facts, local_write
from aiockpt.storage.facts import DiskFacts, Limits
from aiockpt.storage.local import LocalStorage
from aiockpt.sync import CheckpointEngine as BlockingEngine
from gates import RING_8_MIB, EngineSide, failing, held, run_script

STATE = {"w": torch.zeros(1 << 18), "step": 3}


@pytest.fixture
async def engine(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        yield engine


def files_below(root: Path) -> list[str]:
    """All that is there, but for what an engine needs as long as it lives."""
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if not path.is_dir() and path.suffix != ".lock" and path.name != "lock"
    )


async def test_a_good_place_is_described(engine, root, monkeypatch):
    found: dict[str, os.statvfs_result] = {}
    statvfs = os.statvfs
    # What others write there changes it from one moment to the next.
    monkeypatch.setattr(
        os, "statvfs", lambda path: found.setdefault(path, statvfs(path))
    )
    report = await engine.preflight(STATE)
    status = found[str(root)]
    assert report.free_bytes == status.f_bavail * status.f_frsize
    command = ["stat", "-f", "-c", "%T", str(root)]
    stat = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    name = (await stat.communicate())[0].decode().strip()
    assert report.filesystem in (name, name.removeprefix("ext2/"), "overlay", "ext4")
    assert report.can_overwrite
    assert report.save_s > 0
    await engine.create("a")
    handle = await engine.save(STATE, "model.pt")
    await engine.commit("a")
    assert report.planned_bytes == handle.progress.planned_bytes


async def test_nothing_of_it_is_ever_seen(root, monkeypatch):
    events: list[object] = []
    async with CheckpointEngine(root, RING_8_MIB, observers=[events.append]) as engine:
        await engine.create("old")
        await engine.save(STATE, "model.pt")
        await engine.commit("old")
        files = files_below(root)
        events.clear()
        with held(monkeypatch, Preflight, "_try_exchange") as gate:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(engine.preflight(STATE))
                await gate.reached()
                assert sorted(os.listdir(root)) == [".aiockpt", "latest", "old"]
                assert await engine.latest() == "old"
                assert [info.tag for info in await engine.tags()] == ["old"]
                gate.open()
        assert task.result().planned_bytes > 0
        assert events == []
        assert files_below(root) == files
        assert engine.ring_bytes[0] == 0
    assert files_below(root) == files


async def test_a_tag_can_be_saved_meanwhile(engine):
    async with asyncio.TaskGroup() as group:
        group.create_task(engine.preflight())
        await engine.create("a")
        await engine.save(STATE, "model.pt")
        await engine.commit("a")
    assert await engine.latest() == "a"


def test_the_blocking_door_has_it_too(root):
    with BlockingEngine(root, RING_8_MIB) as engine:
        report = engine.preflight()
        assert (report.planned_bytes, report.can_overwrite) == (0, True)
        assert engine.tags() == []


async def test_the_ring_has_the_memory_that_the_state_needs(root, monkeypatch):
    populated = set()
    monkeypatch.setattr(Ring, "populate", lambda _, index: populated.add(index))
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.preflight()
        assert not populated
        await engine.preflight({"w": torch.zeros(3 << 20, dtype=torch.uint8)})
        assert populated == {0, 1, 2, 3}
        await engine.preflight({"w": torch.zeros(20 << 20, dtype=torch.uint8)})
        assert populated == set(range(8))


FULL_COLLECTIONS = """
import gc, sys
import torch, aiockpt.sync

state = {str(number): torch.zeros(8) for number in range(300)}
full_collections = []

def count(phase, told):
    if phase == "start" and told["generation"] == 2:
        full_collections.append(told)

with aiockpt.sync.CheckpointEngine(sys.argv[1], {"host_cache_size": 8 / 1024}) as engine:
    if sys.argv[2] == "disabled":
        gc.disable()
    gc.callbacks.append(count)
    engine.preflight(state)
    print(len(full_collections))
    engine.create("a")
    engine.save(state, "model.pt")
    engine.commit("a")
    print(len(full_collections))
"""


@pytest.mark.parametrize(("kept", "counts"), [("enabled", "1 1"), ("disabled", "0 0")])
def test_the_first_full_collection_of_garbage_is_over_before_the_first_save(
    root, kept, counts
):
    done = run_script(FULL_COLLECTIONS, root, kept)
    assert (done.stdout.split(), done.stderr) == (counts.split(), "")


async def test_a_state_that_cannot_be_saved_is_told(engine):
    with pytest.raises(InvalidArgumentError, match=r'state\["f"\]'):
        await engine.preflight({"f": lambda: None})


STEPS = {
    "make its work area": (Catalog, "new_directory"),
    "write a file": (local_write, "_reserve"),
    "publish a directory": (LocalStorage, "rename_dir"),
    "publish a directory ": (LocalStorage, "replace"),
    "publish a directory  ": (LocalStorage, "sync_dir"),
    "read a file": (LocalStorage, "open_read"),
    "exchange directories": (LocalStorage, "exchange"),
}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("step", STEPS)
async def test_what_is_refused_is_told_with_the_remedy(
    engine, root, step, code, monkeypatch
):
    await engine.preflight()
    files = files_below(root)
    error = StorageError(code, os.strerror(code), "the/file")
    monkeypatch.setattr(*STEPS[step], failing(error))
    with pytest.raises(StorageError) as caught:
        await engine.preflight()
    monkeypatch.undo()
    text = str(caught.value)
    assert caught.value.errno == code
    assert "the/file" in text
    assert f"could not {step.strip()}" in text
    assert preflight._REMEDIES[code] in text
    assert files_below(root) == files
    await engine.preflight()


async def test_a_removal_that_is_refused_is_told(engine, monkeypatch):
    error = StorageError(errno.EPERM, "no", "the/file")
    monkeypatch.setattr(Catalog, "discard", failing(error))
    with pytest.raises(StorageError, match="could not remove what it wrote"):
        await engine.preflight()


async def test_a_disk_that_gives_other_bytes_back_is_told(engine, monkeypatch):
    load = engine._runtime.loader.load

    async def load_other(*args: object) -> object:
        return {"probe": (await load(*args))["probe"] + 1}

    monkeypatch.setattr(
        type(engine._runtime.loader), "load", lambda _, *a: load_other(*a)
    )
    with pytest.raises(CorruptCheckpointError, match="not what was written"):
        await engine.preflight()


async def test_a_state_for_which_there_is_no_room_is_told(engine, root, monkeypatch):
    disk = DiskFacts("ext4", (1 << 20) - 1, is_writable=True)
    monkeypatch.setattr(preflight, "disk_facts", lambda _: disk)
    with pytest.raises(StorageError, match=r"bytes needed, 1048575 free.*free space"):
        await engine.preflight(STATE)
    await engine.preflight({"w": torch.zeros(1000)})
    unknown = DiskFacts("fuse", None, is_writable=True)
    monkeypatch.setattr(preflight, "disk_facts", lambda _: unknown)
    report = await engine.preflight(STATE)
    assert (report.filesystem, report.free_bytes) == ("fuse", None)


async def test_a_root_without_rights_is_told(engine, monkeypatch):
    disk = DiskFacts("ext4", 1 << 40, is_writable=False)
    monkeypatch.setattr(preflight, "disk_facts", lambda _: disk)
    with pytest.raises(StorageError, match=r"no entries can be made.*right to write"):
        await engine.preflight()


async def test_too_few_descriptors_are_told(engine, monkeypatch):
    monkeypatch.setattr(preflight, "limits", lambda: Limits(63, None))
    with pytest.raises(StorageError, match=r"63 files can be opened.*ulimit -n"):
        await engine.preflight()
    monkeypatch.setattr(preflight, "limits", lambda: Limits(64, None))
    await engine.preflight()


async def test_direct_writes_that_are_refused_are_only_told(engine, monkeypatch):
    monkeypatch.setattr(local_write, "_O_DIRECT", 0)
    report = await engine.preflight()
    assert not report.is_direct
    assert any("O_DIRECT" in warning for warning in report.warnings)


async def test_a_disk_that_cannot_exchange_is_only_told(engine, monkeypatch):
    error = StorageError(errno.EINVAL, "no", "the/file")
    monkeypatch.setattr(LocalStorage, "exchange", failing(error))
    report = await engine.preflight()
    assert not report.can_overwrite
    assert any("overwrite=True" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("locked", "has_gpu", "is_told"),
    [
        ((8 << 20) - 1, True, True),
        (8 << 20, True, False),
        (None, True, False),
        (0, False, False),
    ],
)
async def test_memory_that_cannot_be_pinned_is_only_told(
    engine, monkeypatch, locked, has_gpu, is_told
):
    monkeypatch.setattr(preflight, "limits", lambda: Limits(None, locked))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    report = await engine.preflight()
    assert any("ulimit -l" in warning for warning in report.warnings) == is_told


async def test_cancelled_anywhere_it_leaves_nothing(root, monkeypatch):
    side = EngineSide(monkeypatch)
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.preflight()
        for at in range(1, 100):
            with side.cancelling_at(at), contextlib.suppress(asyncio.CancelledError):
                await engine.preflight(STATE)
            assert files_below(root) == []
            assert engine.ring_bytes[0] == 0
            if side.num_suspensions < at:
                break
        await engine.preflight()
    assert at > 5


# --- real places -------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounts a file system of its own: needs root")
    point = tmp_path / "mounted"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "aiockpt-test", str(point)]
    subprocess.run(command, check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk_is_told(small_disk):
    with BlockingEngine(small_disk / "root", RING_8_MIB) as engine:
        assert engine.preflight(STATE).filesystem == "tmpfs"
        with pytest.raises(StorageError, match=r"bytes needed, \d+ free.*free space"):
            engine.preflight({"w": torch.zeros(9 << 18)})
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        with pytest.raises(StorageError, match="free space there") as caught:
            engine.preflight()
        assert caught.value.errno == errno.ENOSPC
        filler.unlink()
        engine.preflight(STATE)
        assert engine.tags() == []


def test_a_read_only_disk_is_told(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with BlockingEngine(small_disk / "root", RING_8_MIB) as engine:
        with pytest.raises(StorageError, match="mount the file system for") as caught:
            engine.preflight()
    assert caught.value.errno == errno.EROFS


def test_a_root_of_somebody_else_is_told(root):
    if os.geteuid() != 0:
        pytest.skip("becomes another user: needs root")
    root.mkdir(exist_ok=True)
    root.chmod(0o755)
    script = """
import os, sys, tempfile, aiockpt, aiockpt.sync
# What is imported late is imported as long as it can be read.
with tempfile.TemporaryDirectory() as warm:
    with aiockpt.sync.CheckpointEngine(warm) as engine:
        engine.preflight()
engine = aiockpt.sync.CheckpointEngine(".")
os.setresuid(65534, 65534, 65534)
try:
    engine.preflight()
except aiockpt.StorageError as error:
    print(error.errno, "give this user the right" in str(error))
engine.close()
"""
    done = run_script(f"import os, sys; os.chdir(sys.argv[1])\n{script}", root)
    assert (done.stdout.split(), done.stderr) == ([str(errno.EACCES), "True"], "")


def test_a_low_limit_of_open_files_is_told(root):
    script = """
import resource, sys, aiockpt, aiockpt.sync
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
with aiockpt.sync.CheckpointEngine(sys.argv[1]) as engine:
    try:
        engine.preflight()
    except aiockpt.StorageError as error:
        print(error.errno, "ulimit -n" in str(error))
"""
    done = run_script(script, root)
    assert (done.stdout.split(), done.stderr) == ([str(errno.EMFILE), "True"], "")


def test_limits_are_those_of_the_process():
    before = facts.limits().num_free_descriptors
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(open(os.devnull))
        assert before is not None
        assert facts.limits().num_free_descriptors == before - 3
