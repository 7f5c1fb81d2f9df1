"""Row 7, by a real disk: it promises room that it does not have, and fails the sync."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
import torch

from aiockpt.errors import CheckpointError, StorageError
from aiockpt.testing.faults import Fail, Fault, Injection, inject
from aiockpt.testing.roots import assert_root_consistent
from aiockpt.testing.system_calls import Moment
from faults.places import MIB, mkfs, mounted
from workloads import SMALL, Engine, assert_whole, save


def refuse_direct(moment: Moment) -> object:
    """Makes every write a buffered one, whose failure only the sync tells."""
    if moment.name == "create" and moment.args[0] & os.O_DIRECT:
        return Fail(errno.EINVAL)(moment)
    return moment.make()


# Size of what there is, and of what the disk says that there is, in MiB.
FILE_SYSTEMS = {"ext4": (48, 400), "xfs": (120, 600), "btrfs": (120, 600)}


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_what_a_thin_disk_cannot_keep_is_never_published(
    cases, as_root, tmp_path, kind, is_direct
):
    make = mkfs(kind, cases)
    real, promised = FILE_SYSTEMS[kind]
    with contextlib.ExitStack() as stack:
        tmpfs = mounted(tmp_path / "tmpfs", "-t", "tmpfs", "-o", f"size={real}m", "t")
        image = stack.enter_context(tmpfs) / "image"
        image.touch()
        os.truncate(image, promised * MIB)
        make(image)
        disk = stack.enter_context(mounted(tmp_path / "disk", "-o", "loop", image))
        with cases.case(7, "a thin disk", f"{kind}, direct: {is_direct}"):
            check_a_save_that_does_not_fit(disk / "root", real, is_direct=is_direct)


def check_a_save_that_does_not_fit(
    root: Path, num_mib: int, *, is_direct: bool
) -> None:
    engine = Engine(root, SMALL)
    try:
        save(engine, "old", 1)
        engine.create("new")
        faults = [] if is_direct else [Fault("create", refuse_direct, num_times=1000)]
        with inject(*faults) as injection:
            engine.save({"w": torch.ones(2 * num_mib * MIB // 4)}, "model.pt")
            with pytest.raises(StorageError) as caught:
                engine.commit("new")
        assert caught.value.errno in {errno.EIO, errno.ENOSPC, errno.EROFS}
        assert_synced_once_at_most(injection, is_direct=is_direct)
        assert engine.latest() == "old"
        assert_whole(engine, "old", 1)
    finally:
        # The disk may have gone read-only: then nothing can be cleaned up.
        with contextlib.suppress(CheckpointError):
            engine.close()
    assert_root_consistent(root, acked=["old"], absent=["new"])


def assert_synced_once_at_most(injection: Injection, *, is_direct: bool) -> None:
    """A failed sync is final; a direct write, and some buffered ones, fail before it."""
    syncs = [c for c in injection.calls if c.name == "fsync" and "model.pt" in c.path]
    assert [bool(call.error) for call in syncs] in (
        [],
        *([] if is_direct else [[True]]),
    )
