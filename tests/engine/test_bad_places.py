"""Roots and disks that will not do: a clear error, and nothing that was there is lost."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aiockpt import (
    CheckpointEngine,
    CheckpointNotFoundError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.storage.local_write import LocalWriteFile
from gates import held
from goes_on import KEPT, engine_that_goes_on


async def test_foreign_files_in_the_root_are_left_alone_and_not_listed(root):
    (root / "foreign").mkdir(parents=True)
    (root / "foreign" / "data").write_bytes(b"precious")
    (root / "torn" / ".aiockpt").mkdir(parents=True)
    (root / "torn" / ".aiockpt" / "manifest.json").write_bytes(b"")
    (root / "notes.txt").write_bytes(b"")
    (root / "link").symlink_to(root / "foreign")
    async with engine_that_goes_on(root) as engine:
        assert [info.tag for info in await engine.tags()] == ["kept"]
        for tag in ("foreign", "notes.txt", "link"):
            for overwrite in (False, True):
                with pytest.raises(
                    InvalidArgumentError, match="exists and is not a tag"
                ):
                    await engine.create(tag, overwrite=overwrite)
            with pytest.raises((CheckpointNotFoundError, StorageError), match=tag):
                await engine.delete(tag)
    assert (root / "foreign" / "data").read_bytes() == b"precious"


async def test_a_foreign_file_that_comes_later_is_not_replaced(root):
    async with engine_that_goes_on(root) as engine:
        await engine.create("late")
        await engine.save(KEPT, "model.pt")
        (root / "late").write_bytes(b"precious")
        with pytest.raises(InvalidArgumentError, match="exists and is not a tag"):
            await engine.commit("late")
        assert (root / "late").read_bytes() == b"precious"
        (root / "late").unlink()


@pytest.mark.parametrize("place", ["a file", "below a file", "the kernel's"])
async def test_a_root_that_cannot_be_written_says_so(place, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"precious")
    kernels = Path("/sys/aiockpt")  # not even root may
    root = {"a file": file, "below a file": file / "root"}.get(place, kernels)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(StorageError) as refused:
            await engine.create("a")
        assert refused.value.errno is not None
        assert str(refused.value.filename).startswith(str(root))
    assert file.read_bytes() == b"precious"


# --- the disk --------------------------------------------------------------------------


def no_room(patch: pytest.MonkeyPatch, free_bytes: int) -> None:
    original = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        fields = list(original(path))
        fields[4] = free_bytes // fields[1]  # f_bavail, in units of f_frsize
        return os.statvfs_result(fields)

    patch.setattr(os, "statvfs", statvfs)


async def test_a_disk_without_room_is_found_before_anything_is_written(
    root, monkeypatch
):
    async with engine_that_goes_on(root) as engine:
        await engine.create("large")
        with monkeypatch.context() as small:
            no_room(small, 1 << 20)
            handle = await engine.save({"w": torch.ones(1 << 20)}, "model.pt")
            with pytest.raises(StorageError, match=r"needed.*free") as full:
                await engine.commit("large")
        assert (full.value.errno, handle.progress.written_bytes) == (errno.ENOSPC, 0)
        assert str(full.value.filename).endswith("model.pt")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
async def test_a_disk_that_fills_up_during_the_save_fails_the_tag_with_the_path(
    call, root, monkeypatch
):
    original = getattr(os, call)
    num_calls = 0

    def fill_up(*args: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    async with engine_that_goes_on(root) as engine:
        await engine.create("large")
        with monkeypatch.context() as full:
            full.setattr(os, call, fill_up)
            with held(monkeypatch, LocalWriteFile, "_write"):
                for name in ("one.pt", "two.pt", "three.pt"):
                    await engine.save({"w": torch.ones(1 << 20)}, name, tag="large")
            with pytest.raises(StorageError) as failed:
                await engine.commit("large")
        assert failed.value.errno == errno.ENOSPC
        assert str(failed.value.filename).endswith(".pt")
        (area,) = (p for p in (root / ".aiockpt" / "work").iterdir() if p.is_dir())
        assert [path for path in area.rglob("*") if path.is_file()] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "aiockpt-test", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system can be mounted by root only: {error}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_a_real_disk_that_is_full_loses_nothing_and_the_next_save_works(
    small_disk,
):
    async with engine_that_goes_on(small_disk / "root") as engine:
        await engine.create("large")
        # Each fits by itself; the second finds what the first has left.
        for name in ("one.pt", "two.pt"):
            await engine.save({"w": torch.ones(9 << 18)}, name)
        with pytest.raises(StorageError) as full:
            await engine.commit("large")
        assert full.value.errno == errno.ENOSPC
        assert str(full.value.filename).endswith(".pt")
        await engine.create("large", overwrite=True)
        await engine.save({"w": torch.ones(9 << 18)}, "one.pt", tag="large")
        await engine.commit("large")
        await engine.delete("large")
