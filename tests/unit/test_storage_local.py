"""Local storage keeps the port's word, also where a file system is at its worst."""

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from aiockpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
)
from aiockpt.storage import local, local_read, local_write
from aiockpt.storage.local import LocalStorage
from aiockpt.threads import WorkerPool
from gates import LIMIT_S, Gate
from tracing import Fault, Moment, fail_on, tapped

PAGE = 4096
CHUNK = 64 * PAGE


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory of the disk's file system, or of tmpfs."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool(3, "test-worker")
    yield pool
    pool.shutdown()


@pytest.fixture
def storage(place: Path, workers: WorkerPool) -> LocalStorage:
    return LocalStorage(str(place), workers)


def pages(nbytes: int) -> tuple[memoryview, bytes]:
    """Page-aligned memory as the ring gives it, and what the file is to hold."""
    padded = -(-nbytes // PAGE) * PAGE
    memory = memoryview(mmap.mmap(-1, max(padded, PAGE)))[:padded]
    memory[:nbytes] = os.urandom(nbytes)
    return memory, bytes(memory[:nbytes])


async def write_file(
    storage: LocalStorage, path: str, memory: memoryview, nbytes: int
) -> bool:
    """Writes all chunks at once, last first, as the engine would; is it direct?"""
    file = await storage.create(path, nbytes)
    try:
        async with asyncio.TaskGroup() as group:
            for offset in reversed(range(0, len(memory), CHUNK)):
                chunk = memory[offset : offset + CHUNK]
                group.create_task(file.write(offset, chunk, nothing))
        await file.sync()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        await file.close()
    return file.is_direct


def nothing() -> None:
    pass


SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, CHUNK, 5 * CHUNK + 4097]


# --- writing ----------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", SIZES)
async def test_a_file_has_the_bytes_that_were_written_and_no_more(
    storage, place, nbytes
):
    memory, expected = pages(nbytes)

    await write_file(storage, "f", memory, nbytes)

    assert (place / "f").read_bytes() == expected


async def test_the_bytes_are_made_final_by_the_worker_just_before(storage, place):
    memory, _ = pages(PAGE)
    threads = []

    def prepare() -> None:
        threads.append(threading.current_thread().name)
        memory[:4] = b"done"

    file = await storage.create("f", PAGE)
    await file.write(0, memory, prepare)
    await file.close()

    assert (place / "f").read_bytes()[:4] == b"done"
    assert threads[0].startswith("test-worker")


def is_direct_open(moment: Moment) -> bool:
    return moment.name == "create" and bool(moment.args[0] & os.O_DIRECT)


@pytest.mark.parametrize("leaves_file", [False, True])
@pytest.mark.parametrize("nbytes", SIZES)
async def test_direct_writes_refused_at_open_become_buffered_ones(
    storage, place, nbytes, leaves_file
):
    def refuse(moment: Moment) -> None:
        if is_direct_open(moment):
            if leaves_file:
                os.close(moment.make())
            raise OSError(errno.EINVAL, "no O_DIRECT here")

    memory, expected = pages(nbytes)

    with tapped(refuse):
        is_direct = await write_file(storage, "f", memory, nbytes)

    assert not is_direct
    assert (place / "f").read_bytes() == expected


@pytest.mark.parametrize("nbytes", SIZES[1:])
async def test_direct_writes_refused_at_the_first_write_become_buffered_ones(
    storage, place, nbytes
):
    def refuse(moment: Moment) -> None:
        is_direct = fcntl.fcntl(moment.args[0], fcntl.F_GETFL) & os.O_DIRECT
        if is_direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")

    memory, expected = pages(nbytes)

    with tapped(on("pwrite", refuse)):
        is_direct = await write_file(storage, "f", memory, nbytes)

    assert not is_direct
    assert (place / "f").read_bytes() == expected


def on(name: str, fault: Fault) -> Fault:
    return lambda moment: fault(moment) if moment.name == name else None


async def test_direct_writes_refused_to_several_workers_at_once(storage, place):
    together = threading.Barrier(3)
    first = threading.local()

    def refuse(moment: Moment) -> None:
        if not hasattr(first, "is_over"):
            first.is_over = True
            together.wait(LIMIT_S)
            raise OSError(errno.EINVAL, "no O_DIRECT here")

    memory, expected = pages(3 * CHUNK)

    with tapped(on("pwrite", refuse)):
        await write_file(storage, "f", memory, 3 * CHUNK)

    assert (place / "f").read_bytes() == expected


async def test_a_write_that_is_refused_buffered_too_fails(storage):
    memory, _ = pages(PAGE)

    with tapped(fail_on("pwrite", "f", errno.EINVAL)) as tap:
        with pytest.raises(StorageError) as caught:
            await write_file(storage, "f", memory, PAGE)

    assert caught.value.errno == errno.EINVAL
    assert len([call for call in tap.calls if call.name == "pwrite"]) == 2


@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, CHUNK // 2, CHUNK - 1])
@pytest.mark.parametrize("how_often", [1, 5])
async def test_short_writes_are_continued(
    storage, place, length, how_often, monkeypatch
):
    memory, expected = pages(3 * CHUNK + 5)
    counts: Counter[int] = Counter()

    def short(descriptor: int, view: memoryview, offset: int) -> int:
        counts[offset // CHUNK] += 1
        if counts[offset // CHUNK] > how_often:
            return os.pwrite(descriptor, view, offset)
        # Through the cache, because a direct write takes whole blocks only.
        buffered = os.open(place / "f", os.O_WRONLY)
        try:
            return os.pwrite(buffered, view[:length], offset)
        finally:
            os.close(buffered)

    monkeypatch.setattr(local_write, "os", Patched(os, pwrite=short))
    await write_file(storage, "f", memory, len(expected))

    assert (place / "f").read_bytes() == expected


class Patched:
    """A module with other functions in the place of some."""

    def __init__(self, module: object, **functions: Callable[..., object]) -> None:
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


async def test_a_write_of_nothing_is_an_error_and_no_endless_loop(storage, monkeypatch):
    monkeypatch.setattr(local_write, "os", Patched(os, pwrite=lambda *_: 0))

    with pytest.raises(StorageError, match="wrote nothing"):
        await write_file(storage, "f", pages(PAGE)[0], PAGE)


async def test_room_is_reserved_before_the_first_write(storage, place):
    file = await storage.create("f", 100 * PAGE + 1)

    status = (place / "f").stat()
    await file.close()

    assert status.st_blocks * 512 >= 100 * PAGE + 1


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
async def test_a_file_system_that_cannot_reserve_is_written_all_the_same(
    storage, place, number
):
    memory, expected = pages(CHUNK + 1)

    with tapped(fail_on("fallocate", "f", number)):
        await write_file(storage, "f", memory, CHUNK + 1)

    assert (place / "f").read_bytes() == expected


async def test_a_reservation_that_a_signal_interrupts_is_made_again(storage, place):
    memory, expected = pages(CHUNK)
    interruptions = iter([errno.EINTR, errno.EINTR])

    def interrupt(_moment: Moment) -> None:
        for number in interruptions:
            raise OSError(number, "a signal came")

    with tapped(on("fallocate", interrupt)) as tap:
        await write_file(storage, "f", memory, CHUNK)

    assert (place / "f").read_bytes() == expected
    assert len([call for call in tap.calls if call.name == "fallocate"]) == 3


async def test_more_than_there_is_room_for_is_refused_before_the_file_is_made(
    storage, place
):
    status = os.statvfs(place)
    too_much = status.f_blocks * status.f_frsize + PAGE

    with tapped() as tap, pytest.raises(StorageError, match="bytes needed") as caught:
        await storage.create("f", too_much)

    assert (caught.value.errno, caught.value.filename) == (
        errno.ENOSPC,
        str(place / "f"),
    )
    assert [call.name for call in tap.calls] == ["statvfs"]
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
async def test_a_file_whose_room_cannot_be_reserved_is_not_left_behind(
    storage, place, number
):
    with tapped(fail_on("fallocate", "f", number)):
        with pytest.raises(StorageError) as caught:
            await storage.create("f", CHUNK)

    assert (caught.value.errno, caught.value.filename) == (number, str(place / "f"))
    assert list(place.iterdir()) == []


async def test_a_file_that_exists_is_not_written_over(storage, place):
    (place / "f").write_bytes(b"old")

    with pytest.raises(StorageError) as caught:
        await storage.create("f", 1)

    assert caught.value.errno == errno.EEXIST
    assert (place / "f").read_bytes() == b"old"


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "close"])
async def test_every_failure_on_the_way_names_errno_and_file(storage, place, call):
    with tapped(fail_on(call, "f", errno.EIO)), pytest.raises(StorageError) as caught:
        await write_file(storage, "f", pages(CHUNK)[0], CHUNK)

    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(place / "f"))


async def test_a_caller_who_is_cancelled_while_the_file_is_opened_leaves_none_open(
    storage,
):
    gate = Gate()
    with tapped(on("create", lambda _: gate.pass_through())):
        task = asyncio.get_running_loop().create_task(storage.create("f", PAGE))
        await gate.reached()
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task

    # That no descriptor is left is seen by the guard around every test.


# --- small files ------------------------------------------------------------------


def test_a_small_file_is_written_and_read(storage, place):
    storage.write_durable("f", b"text" * 5000)

    assert (place / "f").read_bytes() == b"text" * 5000
    assert storage.read_bytes("f", 20_000) == b"text" * 5000


def test_a_small_file_is_continued_where_a_write_was_short(storage, place, monkeypatch):
    short = Patched(os, write=lambda fd, view: os.write(fd, view[:3]))
    monkeypatch.setattr(local, "os", short)

    storage.write_durable("f", b"0123456789")

    assert (place / "f").read_bytes() == b"0123456789"


def test_a_small_file_of_which_nothing_can_be_written_fails(storage, monkeypatch):
    monkeypatch.setattr(local, "os", Patched(os, write=lambda *_: 0))

    with pytest.raises(StorageError, match="wrote nothing"):
        storage.write_durable("f", b"text")


@pytest.mark.parametrize("call", ["write", "fsync", "close"])
def test_a_small_file_that_fails_is_not_left_behind(storage, place, call):
    with (
        tapped(fail_on(call, "f", errno.ENOSPC)),
        pytest.raises(StorageError) as caught,
    ):
        storage.write_durable("f", b"text")

    assert (caught.value.errno, caught.value.filename) == (
        errno.ENOSPC,
        str(place / "f"),
    )
    assert list(place.iterdir()) == []


def test_a_small_file_that_exists_is_not_written_over(storage, place):
    (place / "f").write_bytes(b"old")

    with pytest.raises(StorageError):
        storage.write_durable("f", b"new")

    assert (place / "f").read_bytes() == b"old"


def test_a_file_that_is_larger_than_expected_is_not_read(storage, place):
    (place / "f").write_bytes(b"12345")

    with pytest.raises(StorageError) as caught:
        storage.read_bytes("f", 4)

    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(place / "f")


# --- reading ----------------------------------------------------------------------


def test_a_file_is_read_from_anywhere(storage, place):
    (place / "sub").mkdir()
    (place / "sub" / "f").write_bytes(bytes(range(100)))

    with closing(storage.open_read("sub/f")) as file:
        buffer = bytearray(10)
        file.read_into(42, memoryview(buffer))

        assert bytes(buffer) == bytes(range(42, 52))
        assert file.nbytes == 100
        assert os.fstat(file.fileno()).st_size == 100


def test_short_reads_are_continued(storage, place, monkeypatch):
    (place / "f").write_bytes(bytes(range(100)))
    short = Patched(os, preadv=lambda fd, views, at: os.preadv(fd, [views[0][:7]], at))
    monkeypatch.setattr(local_read, "os", short)

    assert storage.read_bytes("f", 100) == bytes(range(100))


def test_a_file_that_ends_too_early_is_corrupt_and_where_is_said(storage, place):
    (place / "f").write_bytes(bytes(100))

    with closing(storage.open_read("f")) as file:
        os.truncate(place / "f", 60)
        with pytest.raises(CorruptCheckpointError) as caught:
            file.read_into(50, memoryview(bytearray(20)))

    assert caught.value.path == str(place / "f")
    assert caught.value.offset == 60


@pytest.mark.parametrize("path", ["f", "sub/f", "f/below"])
def test_what_is_not_there_is_not_found(storage, path):
    with pytest.raises(CheckpointNotFoundError, match=path):
        storage.open_read(path)


def test_what_is_no_regular_file_is_refused_without_waiting(storage, place):
    os.mkfifo(place / "fifo")
    (place / "directory").mkdir()
    (place / "file").write_bytes(b"secret")
    (place / "link").symlink_to(place / "file")
    (place / "link_dir").symlink_to(place)
    (place / "dangling").symlink_to(place / "nowhere")

    for path in (
        "fifo",
        "directory",
        "link",
        "dangling",
        "link_dir/file",
        "file/below",
    ):
        with pytest.raises(StorageError) as caught:
            storage.open_read(path)
        assert caught.value.filename == str(place / path)


def test_a_root_that_is_a_link_is_followed(place, workers):
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    storage = LocalStorage(str(place / "link"), workers)

    storage.make_dirs("sub")
    storage.write_durable("sub/f", b"text")
    storage.sync_dir("")

    assert storage.read_bytes("sub/f", 4) == b"text"


# --- directories ------------------------------------------------------------------


def test_directories_are_made_with_their_parents_and_told(storage, place):
    assert storage.make_dirs("a/b/c") == ["a", "a/b", "a/b/c"]
    assert storage.make_dirs("a/b/d") == ["a/b/d"]
    assert storage.make_dirs("a/b") == []
    assert (place / "a" / "b" / "c").is_dir()


def test_a_root_that_is_made_is_made_durable(place, workers):
    storage = LocalStorage(str(place / "new" / "root"), workers)

    with tapped() as tap:
        storage.make_dirs("a")

    synced = [call.path for call in tap.calls if call.name == "fsync"]
    assert synced == [str(place), str(place / "new")]


def test_a_root_whose_entry_cannot_be_synced_is_not_taken_for_durable(place, workers):
    storage = LocalStorage(str(place / "root"), workers)

    with tapped(fail_on("fsync", place.name, errno.EIO)):
        with pytest.raises(StorageError):
            storage.make_dirs("a")
    with tapped() as tap:
        storage.make_dirs("a")

    assert [call.path for call in tap.calls if call.name == "fsync"] == [str(place)]


@pytest.mark.parametrize("root", ["file", "file/root"])
def test_a_root_that_cannot_be_a_directory_is_refused(place, workers, root):
    (place / "file").write_bytes(b"")
    storage = LocalStorage(str(place / root), workers)

    with pytest.raises(StorageError) as caught:
        storage.make_dirs("a")

    assert caught.value.errno in {errno.ENOTDIR, errno.EEXIST}
    assert caught.value.filename.startswith(str(place / "file"))


def test_listings_are_sorted_and_do_not_follow_links(storage, place):
    for name in ("b", "a"):
        (place / name).mkdir()
    (place / "link").symlink_to(place / "a")
    (place / "file").write_bytes(b"")

    assert storage.list_dir("") == ["a", "b"]
    assert storage.list_files("") == ["file", "link"]
    assert storage.list_dir("missing") == storage.list_files("missing") == []


def test_empty_directories_are_told_from_all_else(storage, place):
    (place / "empty").mkdir()
    (place / "full").mkdir()
    (place / "full" / "f").write_bytes(b"")

    names = ("empty", "full", "full/f", "missing")
    assert [storage.is_empty_dir(name) for name in names] == [True, False, False, False]
    assert [storage.exists(name) for name in names] == [True, True, True, False]


def test_a_dangling_link_exists(storage, place):
    (place / "link").symlink_to(place / "nowhere")

    assert storage.exists("link")


def test_a_directory_moves_to_where_nothing_or_an_empty_directory_is(storage, place):
    storage.make_dirs("one")
    storage.write_durable("one/f", b"1")

    storage.rename_dir("one", "two")
    storage.make_dirs("three")
    storage.rename_dir("two", "three")

    assert (place / "three" / "f").read_bytes() == b"1"
    assert storage.list_dir("") == ["three"]


@pytest.mark.parametrize("taken", ["full", "file"])
def test_a_directory_does_not_move_to_where_something_is(storage, place, taken):
    storage.make_dirs("one")
    (place / "full").mkdir()
    (place / "full" / "f").write_bytes(b"old")
    (place / "file").write_bytes(b"old")

    with pytest.raises(StorageError) as caught:
        storage.rename_dir("one", taken)

    assert caught.value.filename == str(place / taken)
    assert (place / "full" / "f").read_bytes() == b"old"
    assert (place / "file").read_bytes() == b"old"
    assert storage.exists("one")


def test_two_directories_change_places(storage, place):
    for name in ("one", "other"):
        storage.make_dirs(name)
        storage.write_durable(f"{name}/f", name.encode())

    storage.exchange("one", "other")

    assert (place / "one" / "f").read_bytes() == b"other"
    assert (place / "other" / "f").read_bytes() == b"one"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_exchange_says_so(storage, place, number):
    storage.make_dirs("one")
    storage.make_dirs("other")

    with tapped(fail_on("exchange", "one", number)):
        with pytest.raises(StorageError) as caught:
            storage.exchange("one", "other")

    assert (caught.value.errno, caught.value.filename) == (number, str(place / "other"))


def test_a_real_failure_of_an_exchange_has_its_errno(storage):
    storage.make_dirs("one")
    ctypes.set_errno(0)

    with pytest.raises(StorageError) as caught:
        storage.exchange("one", "missing")

    assert caught.value.errno == errno.ENOENT


def test_what_is_not_there_need_not_be_removed(storage):
    storage.remove("f")
    storage.remove_tree("d")


def test_a_tree_is_removed_and_no_link_followed(storage, place):
    (place / "keep").mkdir()
    (place / "keep" / "f").write_bytes(b"")
    storage.make_dirs("d/e")
    (place / "d" / "link").symlink_to(place / "keep")

    storage.remove_tree("d")

    assert not (place / "d").exists()
    assert (place / "keep" / "f").exists()


DIRECTORY_CALLS: dict[str, tuple[str, Callable[[LocalStorage], object]]] = {
    "mkdir": ("d/e", lambda storage: storage.make_dirs("d/e")),
    "scandir": ("d", lambda storage: storage.list_dir("d")),
    "fsync": ("d", lambda storage: storage.sync_dir("d")),
    "rename": ("d2", lambda storage: storage.rename_dir("d", "d2")),
    "unlink": ("f", lambda storage: storage.remove("f")),
    "rmdir": ("d", lambda storage: storage.remove_tree("d")),
    "flock": ("l", lambda storage: storage.lock("l", wait=False)),
    "pread": ("f", lambda storage: storage.read_bytes("f", 10)),
    "open": ("f", lambda storage: storage.open_read("f")),
    "fstat": ("f", lambda storage: storage.open_read("f")),
}


@pytest.mark.parametrize("call", DIRECTORY_CALLS)
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS, errno.ESTALE])
def test_every_other_failure_names_errno_and_path(storage, place, call, number):
    path, use = DIRECTORY_CALLS[call]
    (place / "d").mkdir()
    (place / "f").write_bytes(b"text")

    with tapped(fail_on(call, "", number)), pytest.raises(StorageError) as caught:
        use(storage)

    assert (caught.value.errno, caught.value.filename) == (number, str(place / path))


# --- locks ------------------------------------------------------------------------


def test_a_lock_is_held_by_one_at_a_time_also_within_a_process(storage):
    lock = storage.lock("l", wait=False)

    assert storage.lock("l", wait=False) is None
    lock.release()
    lock.release()
    again = storage.lock("l", wait=False)
    assert again is not None
    again.release()


def test_whoever_waits_for_a_lock_gets_it_next(storage, workers):
    lock = storage.lock("l", wait=True)
    gate = Gate()

    with tapped(on("flock", lambda _: gate.pass_through())):
        waiting = workers.submit(storage.lock, "l", wait=True)
        gate.wait_reached()
        gate.open()
        lock.release()
        waiting.result(LIMIT_S).release()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_again(storage, place):
    removals = iter([place / "l"])

    def remove(_moment: Moment) -> None:
        for path in removals:
            path.unlink()

    with tapped(on("flock", remove)):
        lock = storage.lock("l", wait=False)

    assert lock is not None
    assert storage.lock("l", wait=False) is None, "it guards the file that all can see"
    lock.release()


def test_a_lock_that_was_given_up_is_free_though_a_child_has_its_descriptor(storage):
    lock = storage.lock("l", wait=False)
    with subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, pass_fds=[lock._descriptor]
    ) as child:
        lock.release()

        again = storage.lock("l", wait=False)
        assert again is not None
        again.release()
        child.stdin.close()


def test_a_forked_child_cannot_give_its_parents_lock_up(storage, monkeypatch):
    lock = storage.lock("l", wait=False)
    child_pid = os.getpid() + 1

    with monkeypatch.context() as child:
        child.setattr(local, "os", Patched(os, getpid=lambda: child_pid))
        lock.release()
    assert storage.lock("l", wait=False) is None

    os.close(fd_of_lock(storage))


def fd_of_lock(storage: LocalStorage) -> int:
    """The descriptor that the forked child's copy of the lock has forgotten."""
    path = f"{storage.root}/l"
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and os.path.realpath(entry) == path:
            return int(entry.name)
    raise AssertionError("the lock's descriptor was closed")
