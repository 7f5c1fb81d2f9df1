"""A place that is full, small or forbidden fails the save by name, and gives it back."""

import contextlib
import errno
import itertools
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiockpt.errors import StorageError
from catalogs import leftovers, names_in
from crashing import Server
from tracing import tapped
from workloads import SMALL, Engine, assert_whole, make_start, save

MIB = 1 << 20


def run_command(*command: object) -> None:
    """Runs a program as root; where that is not allowed, the test fails."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"{' '.join(done.args)}: {done.stderr.strip()} (this test needs root)"
    )


@contextlib.contextmanager
def mounted(point: Path, *arguments: object) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounts a file system of its own: needs root")
    point.mkdir(exist_ok=True)
    run_command("mount", *arguments, point)
    try:
        yield point
    finally:
        run_command("umount", point)


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    point = tmp_path / "mounted"
    if request.param == "tmpfs":
        with mounted(point, "-t", "tmpfs", "-o", "size=8m", "tmpfs"):
            yield point
        return
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 8 * MIB)
    run_command("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
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


def test_a_disk_that_fills_up_during_the_save_is_given_back(small_disk):
    root = small_disk / "root"
    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        before = free_bytes(root)
        engine.create("new")
        # Each fits, and so may pass the first check; all three do not.
        for number in range(3):
            engine.save(sized(2), f"part{number}.pt")
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


def test_a_disk_too_full_for_the_manifest_keeps_the_old_tag(tmp_path):
    with mounted(tmp_path / "m", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as place:
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


def test_a_process_out_of_descriptors_fails_by_name_and_recovers(root):
    with Engine(root, SMALL) as engine:
        save(engine, "old", 1)
        engine.create("new")
        num_open = len(os.listdir("/proc/self/fd"))
        with limited(resource.RLIMIT_NOFILE, num_open - 1):
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


def test_a_root_below_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")

    with Engine(tmp_path / "file" / "root", SMALL) as engine:
        with pytest.raises(StorageError):
            engine.latest()
        with pytest.raises(StorageError) as caught:
            engine.create("new")

    assert caught.value.errno in {errno.ENOTDIR, errno.EEXIST}
    assert (tmp_path / "file").read_bytes() == b"mine"


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
