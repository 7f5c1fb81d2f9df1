"""Row 10: a place that is full, small or forbidden fails by name, and gives it back."""

import contextlib
import errno
import itertools
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiockpt.errors import CheckpointError, StorageError
from aiockpt.testing.roots import assert_root_consistent
from catalogs import leftovers, names_in
from crashing import Server
from faults.matrix import Cases
from faults.places import MIB, mkfs, mounted, new_image, run_command
from tracing import tapped
from workloads import SMALL, Engine, assert_whole, make_start, save

pytestmark = pytest.mark.usefixtures("as_root")

NUM_STREAMS = 3


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(
    request: pytest.FixtureRequest, cases: Cases, tmp_path: Path
) -> Iterator[Path]:
    """A file system of 16 MiB."""
    point = tmp_path / "mounted"
    if request.param == "tmpfs":
        with mounted(point, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
            yield point
        return
    image = new_image(tmp_path / "image", mkfs("ext4", cases), num_mib=16)
    with mounted(point, "-o", "loop", image):
        yield point


def sized(num_mib: float, fill: int = 1) -> dict[str, torch.Tensor]:
    return {"w": torch.full((int(num_mib * MIB),), fill, dtype=torch.uint8)}


def free_bytes(place: Path) -> int:
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def assert_no_room(error: StorageError, root: Path) -> None:
    assert error.errno == errno.ENOSPC
    assert str(error.filename).startswith(str(root))


# --- a full disk ------------------------------------------------------------------


@pytest.mark.case(10, "no room")
def test_a_file_that_cannot_fit_is_refused_before_a_byte_is_written(small_disk):
    root = small_disk / "root"
    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        before = free_bytes(root)
        with tapped() as tap:
            engine.create("new")
            engine.save(sized(20), "big.pt")
            with pytest.raises(StorageError, match="bytes needed") as caught:
                engine.commit("new")

        assert_no_room(caught.value, root)
        assert not [call for call in tap.calls if call.name in {"create", "pwrite"}]
        assert abs(free_bytes(root) - before) <= 64 * 1024
        assert engine.latest() == "old"
        save(engine, "new", 2)
        assert_whole(engine, "new", 2)
    assert leftovers(root) == []


@pytest.mark.case(10, "no room during a save")
def test_a_disk_that_fills_up_during_the_save_is_given_back(small_disk):
    root = small_disk / "root"
    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        before = free_bytes(root)
        engine.create("new")
        # Each fits, and so may pass the first check; all three do not.
        for number in range(3):
            engine.save(sized(5), f"part{number}.pt")
        with pytest.raises(StorageError) as caught:
            engine.commit("new")

        assert_no_room(caught.value, root)
        assert abs(free_bytes(root) - before) <= 64 * 1024
        assert engine.latest() == "old"
        assert_whole(engine, "old", 1)
        assert names_in(root) == ["latest", "old"]

        engine.create("new")
        engine.save(sized(1, fill=7), "part.pt")
        engine.commit("new")
        assert torch.equal(engine.load("part.pt")["w"], sized(1, fill=7)["w"])
    assert leftovers(root) == []


@pytest.mark.case(10, "room taken by others")
def test_room_that_is_taken_by_others_before_the_reservation_is_missed_by_name(
    small_disk,
):
    root = small_disk / "root"
    ballast = small_disk / "ballast"

    def fill(moment) -> None:
        if moment.name == "create" and moment.path.endswith("model.pt"):
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                for _ in itertools.count():
                    file.write(bytes(64 * 1024))

    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        with tapped(fill):
            engine.create("new")
            engine.save(sized(2), "model.pt")
            with pytest.raises(StorageError) as caught:
                engine.commit("new")

        assert_no_room(caught.value, root)
        assert engine.latest() == "old"
        ballast.unlink()
        save(engine, "new", 2)
        assert_whole(engine, "new", 2)
    assert leftovers(root) == []


@pytest.mark.case(10, "no room for a manifest")
def test_a_disk_too_full_for_the_manifest_keeps_the_old_tag(tmp_path):
    with mounted(tmp_path / "m", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as place:
        root = place / "root"
        with Engine(root, SMALL) as engine:
            save(engine, "old", 1)
            engine.create("new")
            engine.save({"seed": 2}, "sub/opt.pt").written()
            ballast = place / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                for _ in itertools.count():
                    file.write(bytes(4096))
            with pytest.raises(StorageError) as caught:
                engine.commit("new")

            assert_no_room(caught.value, root)
            assert engine.latest() == "old"
            ballast.unlink()
            save(engine, "new", 2)
        assert leftovers(root) == []


@pytest.mark.case(10, "no inodes")
def test_a_disk_without_inodes_fails_by_name_and_gives_back(tmp_path):
    options = "size=64m,nr_inodes=24"
    with mounted(tmp_path / "m", "-t", "tmpfs", "-o", options, "tmpfs") as place:
        root = place / "root"
        with Engine(root, SMALL) as engine:
            save(engine, "old", 1)
            engine.create("new")
            with pytest.raises(StorageError) as caught:
                for number in range(24):
                    engine.save({"x": number}, f"part{number}.pt").written()

            assert_no_room(caught.value, root)
            engine.abort("new")
            save(engine, "new", 2)
            assert_whole(engine, "new", 2)
        assert leftovers(root) == []


# --- limits of the process --------------------------------------------------------


@contextlib.contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.mark.case(10, "RLIMIT_FSIZE")
def test_a_file_larger_than_the_process_may_write_fails_by_name(root):
    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        engine.create("new")
        with limited(resource.RLIMIT_FSIZE, 4 * MIB):
            engine.save(sized(5), "model.pt")
            with pytest.raises(StorageError) as caught:
                engine.commit("new")

        assert caught.value.errno == errno.EFBIG
        assert str(caught.value.filename).endswith("model.pt")
        assert engine.latest() == "old"
        save(engine, "new", 2)
        assert_whole(engine, "new", 2)
    assert leftovers(root) == []


@pytest.mark.case(10, "RLIMIT_NOFILE")
def test_a_process_out_of_descriptors_fails_by_name_and_recovers(root):
    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        engine.create("new")
        # What bounds their numbers: below this one are the standard streams. One as high
        # as what is open leaves room as soon as something else is closed.
        with limited(resource.RLIMIT_NOFILE, NUM_STREAMS):
            engine.save({"x": 1}, "model.pt")
            with pytest.raises(StorageError) as caught:
                engine.commit("new")
            # Never taken for "there is nothing": that would be a start from scratch.
            with pytest.raises(StorageError):
                engine.latest()

        assert caught.value.errno == errno.EMFILE
        save(engine, "new", 2)
        assert engine.latest() == "new"
    assert leftovers(root) == []


# --- places that must not be written ----------------------------------------------


@pytest.mark.case(10, "read-only mount")
def test_a_read_only_root_is_read_and_refuses_saves_by_name(tmp_path, caplog):
    real = make_start(tmp_path / "real")
    (real / ".aiockpt" / "work" / "host-1-dead").mkdir()
    place = tmp_path / "bound"
    with mounted(place, "--bind", real):
        run_command("mount", "-o", "remount,bind,ro", place)
        with Engine(place, SMALL) as engine:
            with pytest.raises(StorageError) as caught:
                engine.create("new")
            assert caught.value.errno == errno.EROFS
            assert str(caught.value.filename).startswith(str(place))
            with pytest.raises(StorageError):
                engine.delete("old")

            assert engine.latest() == "old"
            assert_whole(engine, "old", 2)
    assert "could not be swept" in caplog.text


@pytest.mark.case(10, "another user")
def test_a_directory_of_somebody_else_refuses_saves_by_name():
    # Not below pytest's own directory, which other users cannot even enter.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path, Server() as server:
        os.chmod(path, 0o755)  # noqa: S103 - others are to enter, and get no further
        root = make_start(Path(path) / "root")

        told = server.ask("refused", root=str(root), uid=65534)
        told_new = server.ask("refused", root=f"{path}/none", uid=65534)

        for error, *status in (told, told_new):
            assert status == [0]
            assert (error["error"], error["errno"]) == ("StorageError", errno.EACCES)
            assert error["filename"].startswith(path)
        assert names_in(root) == ["latest", "old", "older"]
        assert leftovers(root) == []
        assert not Path(path, "none").exists()


@pytest.mark.case(10, "a root below a file")
def test_a_root_below_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")

    with Engine(tmp_path / "file" / "root", SMALL) as engine:
        with pytest.raises(StorageError):
            engine.latest()
        with pytest.raises(StorageError) as caught:
            engine.create("new")

    assert caught.value.errno in {errno.ENOTDIR, errno.EEXIST}
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.case(10, "chattr +i")
def test_a_directory_that_must_not_change_refuses_saves_by_name(root):
    make_start(root)
    run_command("chattr", "+i", root)
    try:
        with Engine(root, SMALL) as engine:
            engine.create("new")
            engine.save({"x": 1}, "model.pt")
            with pytest.raises(StorageError) as caught:
                engine.commit("new")
            assert caught.value.errno == errno.EPERM
            assert engine.latest() == "old"
    finally:
        run_command("chattr", "-i", root)
    assert leftovers(root) == []


# --- what breaks under a mounted root ---------------------------------------------


@pytest.fixture
def disk(cases: Cases, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An ext4 of its own, and its image."""
    image = new_image(tmp_path / "image", mkfs("ext4", cases), num_mib=64)
    # The file system is not to panic when it finds out.
    with mounted(tmp_path / "mounted", "-o", "loop,errors=remount-ro", image) as point:
        yield point, image


@pytest.mark.case(10, "a file system that found an error")
def test_a_file_system_that_goes_read_only_during_a_save_fails_it_by_name(disk):
    point, _ = disk
    root = point / "root"
    engine = Engine(root, SMALL)
    try:
        save(engine, "old", 1)
        engine.create("new")
        engine.save(sized(2), "model.pt").written()
        (device,) = (
            line.split()[0].rpartition("/")[2]
            for line in Path("/proc/mounts").read_text().splitlines()
            if line.split()[1] == str(point)
        )
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("for a test")
        engine.save(sized(3), "more.pt")
        with pytest.raises(StorageError) as caught:
            engine.commit("new")
        # Shut down, it is read-only, or says that it needs to be cleaned.
        known = {errno.EROFS, errno.EIO, 117}
        assert caught.value.errno in known
        assert str(caught.value.filename).startswith(str(root))
        assert engine.latest() == "old"
        assert_whole(engine, "old", 1)
    finally:
        with contextlib.suppress(CheckpointError):
            engine.close()
    assert_root_consistent(root, acked=["old"], absent=["new"])


@pytest.mark.case(10, "a disk that is cut short")
def test_a_file_whose_blocks_cannot_be_read_fails_by_name_and_offset(disk):
    point, image = disk
    root = point / "root"
    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        engine.create("new")
        engine.save(sized(24), "model.pt")
        engine.commit("new")
        drop_caches()
        # As a disk whose last sectors have gone: its file system is mounted still.
        os.truncate(image, 12 * MIB)
        with pytest.raises(StorageError) as caught:
            engine.load("model.pt", tag="new")
        assert caught.value.errno == errno.EIO
        assert str(caught.value.filename).endswith("new/model.pt")
        # It is never taken for another tag's turn.
        with pytest.raises(StorageError):
            engine.load("model.pt")


def drop_caches() -> None:
    """What was read or written must come from the disk again."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


# --- memory -----------------------------------------------------------------------


@pytest.mark.case(10, "RLIMIT_AS")
def test_a_process_that_gets_no_more_memory_fails_by_name_and_goes_on(root):
    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        engine.create("new")
        engine.save(sized(48), "model.pt")
        engine.commit("new")
        assert_whole(engine, "old", 1)  # which starts the threads that load
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        with limited(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + 8 * MIB):
            with pytest.raises(MemoryError):
                engine.load("model.pt")
        assert_whole(engine, "old", 1)
        assert torch.equal(engine.load("model.pt")["w"], sized(48)["w"])
    assert leftovers(root) == []
