"""What `aiockpt.testing` gives to users does what it says."""

import errno
import math
import os
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from aiockpt import save as save_file
from aiockpt.errors import InvalidArgumentError, StorageError
from aiockpt.storage.local import LocalStorage
from aiockpt.testing.faults import (
    Delay,
    Fail,
    Fault,
    FlipBit,
    Kill,
    Lie,
    Short,
    inject,
)
from aiockpt.testing.roots import assert_root_consistent
from aiockpt.testing.storage_contract import StorageContract
from aiockpt.testing.strategies import DTYPES, state_dicts, tensors
from aiockpt.testing.system_calls import Moment
from aiockpt.threads import WorkerPool
from catalogs import catalog_at, make_tags, publish, storage_at
from crashing import Server
from equality import assert_same_state
from gates import LIMIT_S
from workloads import SMALL, Engine, save

# --- faults -----------------------------------------------------------------------


def test_the_nth_call_of_a_name_and_path_fails_and_no_other(tmp_path):
    storage = storage_at(tmp_path)
    with inject(Fault("fsync", Fail(errno.EIO), path="/b", nth=2)) as injection:
        storage.write_durable("a1", b"")
        storage.write_durable("b1", b"")
        with pytest.raises(StorageError) as caught:
            storage.write_durable("b2", b"")
        storage.write_durable("b3", b"")

    assert caught.value.errno == errno.EIO
    (spoiled,) = injection.spoiled
    assert (spoiled.name, spoiled.path) == ("fsync", str(tmp_path / "b2"))
    failed = [call for call in injection.calls if call.error]
    assert [(call.name, call.path) for call in failed] == [("fsync", spoiled.path)]
    assert sorted(os.listdir(tmp_path)) == ["a1", "b1", "b3"]


@pytest.mark.parametrize("calls", ["fdatasync", ["fsync", "pwrit"]])
def test_a_fault_of_calls_that_there_are_not_is_refused(calls):
    with pytest.raises(InvalidArgumentError, match=r"no call is named .*(fdata|pwrit)"):
        Fault(calls, Fail(errno.EIO))


@pytest.mark.parametrize(("num_times", "num_failed"), [(1, 1), (2, 2), (math.inf, 3)])
def test_calls_fail_as_often_as_asked(tmp_path, num_times, num_failed):
    storage = storage_at(tmp_path)
    fault = Fault((), Fail(errno.EIO), nth=2, num_times=num_times)
    with inject(fault) as injection:
        storage.make_dirs("a")
        for _ in range(3):
            try:
                storage.sync_dir("a")
            except StorageError:
                continue

    failed = [call.name for call in injection.calls if call.error == errno.EIO]
    assert failed == (["open", "open", "open"] if num_failed == 3 else failed)
    assert len(failed) == num_failed


def test_nothing_is_injected_once_the_block_has_ended(tmp_path):
    with inject(Fault((), Fail(errno.EIO), num_times=math.inf)):
        pass

    storage_at(tmp_path).write_durable("a", b"text")


def test_of_several_faults_the_first_that_is_due_acts(tmp_path):
    storage = storage_at(tmp_path)
    with inject(
        Fault("fsync", Fail(errno.EIO), nth=2),
        Fault("fsync", Fail(errno.ENOSPC), nth=2, num_times=2),
    ):
        storage.write_durable("a", b"")
        for name, number in (("b", errno.EIO), ("c", errno.ENOSPC)):
            with pytest.raises(StorageError) as caught:
                storage.write_durable(name, b"")
            assert caught.value.errno == number


@pytest.mark.parametrize(
    ("short", "moved"),
    [
        (Short(Fraction(1, 2)), 5),
        (Short(0, 1), 1),
        (Short(1, -1), 9),
        (Short(1, 5), 10),
    ],
)
def test_a_short_write_moves_a_part_and_the_rest_follows(tmp_path, short, moved):
    storage = storage_at(tmp_path)
    sizes = []

    def look(moment):
        sizes.append(os.path.getsize(moment.path))
        return moment.make()

    with inject(Fault("write", short), Fault(("write", "fsync"), look, num_times=9)):
        storage.write_durable("a", b"0123456789")

    assert sizes[0] == moved
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_short_read_moves_a_part_and_the_rest_follows(tmp_path):
    storage = storage_at(tmp_path)
    storage.write_durable("a", b"0123456789")

    with inject(Fault("pread", Short(Fraction(1, 2)), num_times=3)) as injection:
        assert storage.read_bytes("a", 10) == b"0123456789"

    assert len(injection.spoiled) == 3


def test_a_write_that_moves_nothing_is_an_error(tmp_path):
    with inject(Fault("write", Short(0))), pytest.raises(StorageError):
        storage_at(tmp_path).write_durable("a", b"0123456789")

    assert os.listdir(tmp_path) == []


def test_a_lie_says_that_all_was_written_and_writes_nothing(tmp_path):
    with inject(Fault("write", Lie())):
        storage_at(tmp_path).write_durable("a", b"0123456789")

    assert (tmp_path / "a").read_bytes() == b""


def test_a_bit_is_flipped_on_its_way_and_the_source_is_not(tmp_path):
    data = b"\0\0\0"
    storage = storage_at(tmp_path)

    with inject(Fault("write", FlipBit(1, 3))):
        storage.write_durable("a", data)
    with inject(Fault("pread", FlipBit(2))):
        assert storage.read_bytes("a", 3) == b"\0\x08\x01"

    assert data == b"\0\0\0"
    assert (tmp_path / "a").read_bytes() == b"\0\x08\0"


def test_no_bit_is_flipped_where_there_are_no_bytes():
    moment = Moment(1, "write", "f", make=lambda: 0, args=(-1, b""))
    assert FlipBit(2)(moment) == 0


def test_a_call_that_moves_no_bytes_cannot_do_so_in_part(tmp_path):
    with inject(Fault("fsync", Short(0))), pytest.raises(TypeError, match="fsync"):
        storage_at(tmp_path).write_durable("a", b"")


def test_a_delayed_call_is_made_when_the_wait_is_over(tmp_path):
    reached, go = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        assert go.wait(LIMIT_S)

    storage = storage_at(tmp_path)
    with inject(Fault("mkdir", Delay(wait))):
        thread = threading.Thread(target=storage.make_dirs, args=["a"])
        thread.start()
        assert reached.wait(LIMIT_S)
        assert not storage.exists("a")
        go.set()
        thread.join()
    assert storage.exists("a")


@pytest.mark.parametrize(
    ("when", "content"),
    [("before", b""), ("half-way", b"01234"), ("after", b"0123456789")],
)
def test_a_killed_process_has_come_as_far_as_asked(tmp_path, when, content):
    pid = os.fork()
    if pid == 0:
        try:
            with inject(Fault("write", Kill(when))):
                storage_at(tmp_path).write_durable("a", b"0123456789")
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)

    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == content


# --- roots ------------------------------------------------------------------------


@pytest.fixture
def tags(root: Path) -> Path:
    """A root with the tags "one" and "two"."""
    make_tags(root, "one", "two")
    return root


def test_a_sound_root_is_consistent_and_its_tags_are_told_oldest_first(tags):
    options = {"acked": ["one", "two"], "absent": ["three"], "is_swept": True}

    assert assert_root_consistent(tags, **options) == ["one", "two"]


def test_a_root_in_which_nothing_was_ever_done_is_consistent(root):
    assert assert_root_consistent(root) == []
    root.mkdir()
    assert assert_root_consistent(root, absent=["one"], is_swept=True) == []


def test_foreign_directories_and_work_in_progress_are_consistent(tags):
    (tags / "mine").mkdir()
    (tags / "mine" / "f").touch()
    (tags / ".aiockpt" / "work" / "host-1-dead").mkdir()

    assert assert_root_consistent(tags) == ["one", "two"]


def lose_a_file(root: Path) -> None:
    (root / "two" / "model.pt").unlink()


def cut_a_file(root: Path) -> None:
    os.truncate(root / "two" / "model.pt", 10)


def flip_a_bit(root: Path) -> None:
    path = root / "two" / "model.pt"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def add_a_file(root: Path) -> None:
    (root / "two" / "sub" / "more").touch()


def make_a_link(root: Path) -> None:
    (root / "two" / "model.pt").rename(root / "elsewhere")
    (root / "two" / "model.pt").symlink_to(root / "elsewhere")


def break_the_manifest(root: Path) -> None:
    path = root / "two" / ".aiockpt" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"model.pt", b"model.pu"))


def rename_a_tag(root: Path) -> None:
    (root / "two").rename(root / "three")


def copy_a_tag(root: Path) -> None:
    with catalog_at(root) as catalog:
        publish(catalog, root, "three")
    path = root / "three" / ".aiockpt" / "manifest.json"
    path.write_bytes((root / "two" / ".aiockpt" / "manifest.json").read_bytes())


def tear_the_pointer(root: Path) -> None:
    (root / "latest").write_bytes(b"tw")


def point_back(root: Path) -> None:
    (root / "latest").write_bytes(b"one\n")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a lost file": (lose_a_file, "model.pt is missing"),
    "a cut file": (cut_a_file, "has 10 bytes, not 600"),
    "a flipped bit": (flip_a_bit, "has CRC-32"),
    "a foreign file": (add_a_file, "more is not in the manifest"),
    "a link": (make_a_link, "is not a regular file"),
    "a changed manifest": (break_the_manifest, "fails its own checksum"),
    "a renamed tag": (rename_a_tag, "is of tag 'two'"),
    "a copied manifest": (copy_a_tag, "published at the same time"),
    "a torn pointer": (tear_the_pointer, "is torn"),
    "an old pointer": (point_back, "takes 'one' for the latest; 'two' is newer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_root_is_not_consistent_and_the_damage_is_told(tags, damage):
    do_damage, text = DAMAGES[damage]
    do_damage(tags)

    with pytest.raises(AssertionError, match=text):
        assert_root_consistent(tags, acked=["one", "two"])


def test_what_was_acknowledged_and_is_not_there_is_lost(tags):
    with pytest.raises(AssertionError, match="'three' was acknowledged and is lost"):
        assert_root_consistent(tags, acked=["one", "two", "three"])


def test_what_was_given_up_and_is_there_is_told(tags):
    with pytest.raises(AssertionError, match="'one' must not be there"):
        assert_root_consistent(tags, absent=["one"])


def test_what_was_left_behind_is_told(tags):
    (tags / ".aiockpt" / "work" / "host-1-dead.lock").touch()

    with pytest.raises(AssertionError, match=r"dead.lock was left behind"):
        assert_root_consistent(tags, is_swept=True)


def test_an_overwrite_in_flight_is_no_newer_acknowledged_tag(
    root: Path, server: Server
):
    with Engine(root, SMALL) as engine:
        save(engine, "older", 1)
        save(engine, "old", 2)
    # After the exchange of the two directories, and before the pointer.
    at = ["rename", "/latest."]
    told = server.ask("crash", root=str(root), workload="overwrite an older", at=at)
    assert told[-1] == -signal.SIGKILL

    found = assert_root_consistent(root, acked=["older", "old"])

    assert found == ["old", "older"]


# --- the storage contract ---------------------------------------------------------


class TestLocalStorage(StorageContract):
    """Local storage, whose tests in full stand in `unit/test_storage_local.py`."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[LocalStorage]:
        workers = WorkerPool(3, "test-worker")
        yield LocalStorage(str(tmp_path), workers)
        workers.shutdown()


# Each breaks one promise of the port, which a test of the contract is about.
BROKEN_STORAGE = {
    "test_a_directory_does_not_move_to_a_taken_place": """
    def rename_dir(self, source, target):
        import shutil
        shutil.rmtree(self._full(target), ignore_errors=True)
        super().rename_dir(source, target)
""",
    "test_a_lock_is_held_by_one_until_it_is_released": """
    def lock(self, path, **how):
        return super().lock(path + secrets.token_hex(4), **how)
""",
    "test_a_small_file_takes_no_name_that_is_taken": """
    def write_durable(self, path, data):
        self.remove(path)
        super().write_durable(path, data)
""",
    "test_what_a_directory_holds_is_listed_by_kind_and_name": """
    def list_dir(self, path):
        return super().list_dir(path)[::-1]
""",
    "test_a_file_has_the_bytes_that_were_written_and_no_more": """
    async def create(self, path, nbytes):
        return await super().create(path, -(-nbytes // 4096) * 4096)
""",
    "test_a_directory_can_be_synced_and_a_missing_one_cannot": """
    def sync_dir(self, path):
        if self.exists(path):
            super().sync_dir(path)
""",
}


def of_the_contract(pytester: pytest.Pytester, body: str) -> pytest.RunResult:
    """Runs the contract's tests on local storage with other methods in its place."""
    pytester.makepyfile(
        f"""
import secrets
import pytest
from aiockpt.storage.local import LocalStorage
from aiockpt.testing.storage_contract import StorageContract
from aiockpt.threads import WorkerPool

class Changed(LocalStorage):
{body}

class TestChanged(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path):
        workers = WorkerPool(3, "w")
        yield Changed(str(tmp_path), workers)
        workers.shutdown()
"""
    )
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:asyncio")


@pytest.mark.leaks("the locks of broken storage, where a test of them fails")
@pytest.mark.parametrize("broken", BROKEN_STORAGE)
def test_storage_that_breaks_a_promise_fails_the_contract(pytester, broken):
    result = of_the_contract(pytester, BROKEN_STORAGE[broken])

    result.stdout.fnmatch_lines([f"FAILED *::{broken}*"])
    assert result.parseoutcomes()["passed"] > 20


def test_storage_that_keeps_its_promises_fails_nothing(pytester):
    result = of_the_contract(pytester, "    pass")

    assert result.ret == pytest.ExitCode.OK


# --- strategies -------------------------------------------------------------------


@given(tensors())
def test_any_tensor_that_is_drawn_is_small_and_of_a_dtype_that_was_told(tensor):
    assert tensor.dtype in DTYPES
    assert tensor.numel() <= 64
    assert tensor.dim() <= 3


@given(state_dicts())
@settings(max_examples=25)
async def test_any_state_that_is_drawn_comes_back_as_it_was(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("drawn") / "state.pt"

    await save_file(state, path)

    assert zipfile.is_zipfile(path)
    assert_same_state(torch.load(path, weights_only=True), state)
