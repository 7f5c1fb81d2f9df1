"""Single files: the old one or the new one, whole, and nothing beside it."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiockpt.config import EngineConfig
from aiockpt.errors import (
    CheckpointError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.machinery import Machinery
from aiockpt.saver import Saver
from aiockpt.single_files import SingleFile, SingleFiles
from aiockpt.storage import local_write
from aiockpt.storage.local import LocalStorage
from aiockpt.testing.faults import Fail, Fault, inject
from gates import RING_8_MIB, failing, held

OLD, NEW = {"step": 1}, {"w": torch.arange(5.0), "step": 2}


@pytest.fixture
def machinery() -> Iterator[Machinery]:
    machinery = Machinery(EngineConfig(**RING_8_MIB))
    yield machinery
    machinery.stop()
    machinery.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "model.pt"
    torch.save(OLD, target)
    return target


def done(machinery: Machinery, work: object) -> object:
    return machinery.spawn(work).result()


def assert_only(path: Path, step: int) -> None:
    """The path holds that state, and nothing is beside it."""
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert torch.load(path)["step"] == step


def test_a_file_takes_its_place_when_it_is_published(machinery, path):
    file = SingleFiles(machinery).save(NEW, path)
    done(machinery, file.written())
    assert torch.load(path) == OLD
    done(machinery, file.publish())
    assert_only(path, 2)
    assert file.progress.written_bytes == path.stat().st_size


def test_a_file_that_is_discarded_leaves_the_old_one(machinery, path):
    file = SingleFiles(machinery).save(NEW, path)
    done(machinery, file.discard())
    assert_only(path, 1)


@pytest.mark.parametrize("name", ["create", "pwrite", "fsync", "fallocate"])
def test_a_failure_is_raised_to_all_who_wait_and_leaves_the_old_file(
    machinery, path, name
):
    number = errno.ENOSPC if name == "fallocate" else errno.EIO
    with inject(Fault(name, Fail(number), path=".model.pt.")) as injection:
        file = SingleFiles(machinery).save(NEW, path)
        for wait in (file.written, file.staged, file.publish):
            with pytest.raises(StorageError) as caught:
                done(machinery, wait())
            assert caught.value.errno == number
    assert injection.spoiled
    assert_only(path, 1)
    assert machinery.ring.leased_bytes == 0


def test_what_cannot_be_removed_does_not_hide_what_failed(machinery, path):
    broken = Fault("fsync", Fail(errno.EIO)), Fault("unlink", Fail(errno.EROFS))
    with inject(*broken):
        file = SingleFiles(machinery).save(NEW, path)
        with pytest.raises(StorageError) as caught:
            done(machinery, file.publish())
    assert caught.value.errno == errno.EIO
    assert torch.load(path) == OLD


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_rename_that_fails_leaves_the_old_file(machinery, path, number):
    with inject(Fault("rename", Fail(number))):
        file = SingleFiles(machinery).save(NEW, path)
        with pytest.raises(StorageError) as caught:
            done(machinery, file.publish())
    assert caught.value.errno == number
    assert_only(path, 1)


def test_state_that_cannot_be_planned_fails_the_file(machinery, path):
    target = path.with_suffix(".safetensors")
    file = SingleFiles(machinery).save({"a": {"b": torch.ones(1)}}, target)
    with pytest.raises(InvalidArgumentError):
        done(machinery, file.publish())
    assert_only(path, 1)
    # Nothing is being staged: no optimizer waits.
    machinery.gate.wait()


def test_a_failure_of_another_kind_is_told_as_ours(machinery, path, monkeypatch):
    monkeypatch.setattr(Saver, "create", failing(ZeroDivisionError("a bug")))
    file = SingleFiles(machinery).save(NEW, path)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        done(machinery, file.written())
    assert_only(path, 1)


@pytest.mark.parametrize("end", ["publish", "discard"])
def test_a_write_that_is_cancelled_leaves_nothing_and_nobody_waiting(
    machinery, path, end, monkeypatch
):
    file = SingleFile(NEW, path)
    with held(monkeypatch, local_write.LocalWriteFile, "_sync") as gate:
        call = file.start(machinery)
        gate.wait_reached()
        machinery._thread.run_soon(call._cancel_task)
    waiting = machinery.spawn(getattr(file, end)())
    if end == "publish":
        with pytest.raises(CheckpointError, match="was not finished"):
            waiting.result()
    else:
        waiting.result()
    assert_only(path, 1)
    machinery.gate.wait()


def test_a_publication_that_is_cancelled_is_finished_first(
    machinery, path, monkeypatch
):
    file = SingleFiles(machinery).save(NEW, path)
    done(machinery, file.written())
    with held(monkeypatch, LocalStorage, "replace") as gate:
        call = machinery.spawn(file.publish())
        gate.wait_reached()
        machinery._thread.run_soon(call._cancel_task)
    machinery.spawn(call.ended()).result()
    assert_only(path, 2)


def test_a_publication_that_is_cancelled_before_the_file_is_written_can_be_repeated(
    machinery, path, monkeypatch
):
    file = SingleFile(NEW, path)
    with held(monkeypatch, LocalStorage, "sync_dir"):
        file.enter(machinery)
        call = machinery.spawn(file.publish())
        machinery._thread.run_soon(call._cancel_task)
        machinery.spawn(call.ended()).result()
        assert torch.load(path) == OLD
    done(machinery, file.write())
    done(machinery, file.publish())
    assert_only(path, 2)


@pytest.mark.parametrize("name", ["", "model.pt/", "/"])
def test_a_path_that_names_no_file_is_refused(name):
    with pytest.raises(InvalidArgumentError, match="name a file"):
        SingleFile(NEW, name)


def test_a_stopped_machinery_takes_no_file_and_holds_no_optimizer(path):
    machinery = Machinery(EngineConfig(**RING_8_MIB))
    machinery.stop()
    machinery.join()
    with pytest.raises(EngineStateError):
        SingleFiles(machinery).save(NEW, path)
    machinery.gate.wait()
    assert_only(path, 1)
