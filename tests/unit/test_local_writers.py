"""Local storage lets several writers make one file, and amend what they have written."""

import asyncio
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiockpt.errors import CheckpointNotFoundError, StorageError
from aiockpt.storage.local import LocalStorage
from aiockpt.threads import WorkerPool
from gates import Gate
from tracing import Moment, fail_on, tapped

PAGE = 4096


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[LocalStorage]:
    pool = WorkerPool(3, "test-worker")
    yield LocalStorage(str(tmp_path), pool)
    pool.shutdown()


def page_of(letter: bytes) -> memoryview:
    memory = memoryview(mmap.mmap(-1, PAGE))
    memory[:] = letter * PAGE
    return memory


def nothing() -> None:
    pass


# --- another writer -------------------------------------------------------------------


async def test_opening_a_file_for_writing_leaves_what_is_in_it(storage, tmp_path):
    content = os.urandom(2 * PAGE)
    (tmp_path / "f").write_bytes(content)
    file = await storage.open_write("f", 2 * PAGE)
    assert (tmp_path / "f").read_bytes() == content
    await file.write(PAGE, page_of(b"x"), nothing)
    await file.sync()
    await file.close()
    assert (tmp_path / "f").read_bytes() == content[:PAGE] + b"x" * PAGE


async def test_a_second_writer_goes_around_the_page_cache_too(storage):
    first = await storage.create("f", PAGE)
    second = await storage.open_write("f", PAGE)
    assert second.is_direct == first.is_direct
    await first.close()
    await second.close()


async def test_where_direct_writes_are_refused_the_second_writer_uses_the_cache(
    storage, tmp_path
):
    def refuse(moment: Moment) -> None:
        if moment.name == "open" and moment.args[0] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")

    (tmp_path / "f").write_bytes(b"abc")
    with tapped(refuse):
        file = await storage.open_write("f", PAGE)
    assert not file.is_direct
    await file.write(0, page_of(b"y"), nothing)
    await file.close()
    assert (tmp_path / "f").read_bytes() == b"y" * PAGE


async def test_only_a_regular_file_is_opened_for_writing(storage, tmp_path):
    (tmp_path / "there").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "directory", "pipe"):
        with pytest.raises(StorageError) as caught:
            await storage.open_write(name, PAGE)
        assert caught.value.filename == str(tmp_path / name)
    assert (tmp_path / "there").read_bytes() == b"abc"


async def test_a_missing_file_is_named(storage, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="there is no file") as caught:
        await storage.open_write("f", PAGE)
    assert str(tmp_path / "f") in str(caught.value)
    assert isinstance(caught.value.__cause__, StorageError)


async def test_a_caller_who_is_cancelled_while_a_file_is_opened_leaves_none_open(
    storage, tmp_path
):
    (tmp_path / "f").write_bytes(b"abc")
    gate = Gate()
    with tapped(lambda moment: gate.pass_through() if moment.name == "open" else None):
        task = asyncio.create_task(storage.open_write("f", PAGE))
        await gate.reached()
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task


# --- amending -------------------------------------------------------------------------


async def test_an_amendment_needs_no_alignment_and_keeps_what_is_around_it(
    storage, tmp_path
):
    file = await storage.create("f", 2 * PAGE)
    for index, letter in enumerate((b"a", b"b")):
        await file.write(index * PAGE, page_of(letter), nothing)
    await file.amend(PAGE - 1, b"xyz")
    await file.sync()
    await file.close()
    expected = b"a" * (PAGE - 1) + b"xyz" + b"b" * (PAGE - 2)
    assert (tmp_path / "f").read_bytes() == expected


async def test_amending_says_nothing_of_how_the_file_was_written(storage):
    file = await storage.create("f", PAGE)
    was_direct = file.is_direct
    await file.write(0, page_of(b"a"), nothing)
    await file.amend(3, b"xyz")
    assert file.is_direct == was_direct
    await file.close()


async def test_amendments_go_through_the_page_cache(storage):
    flags: list[int] = []

    def look(moment: Moment) -> None:
        if moment.name == "pwrite":
            flags.append(fcntl.fcntl(moment.args[0], fcntl.F_GETFL) & os.O_DIRECT)

    file = await storage.create("f", PAGE)
    await file.write(0, page_of(b"a"), nothing)
    with tapped(look):
        await file.amend(3, b"xyz")
        await file.amend(PAGE - 1, b"z")
    await file.close()
    assert flags == [0, 0]


async def test_a_failing_amendment_names_errno_and_file(storage, tmp_path):
    file = await storage.create("f", PAGE)
    with tapped(fail_on("pwrite", "f", errno.EIO)):
        with pytest.raises(StorageError) as caught:
            await file.amend(3, b"xyz")
    await file.close()
    assert (caught.value.errno, caught.value.filename) == (
        errno.EIO,
        str(tmp_path / "f"),
    )


async def test_a_cancelled_amendment_has_ended_when_it_returns(storage, tmp_path):
    gate = Gate()
    file = await storage.create("f", PAGE)
    with tapped(
        lambda moment: gate.pass_through() if moment.name == "pwrite" else None
    ):
        task = asyncio.create_task(file.amend(0, b"xyz"))
        await gate.reached()
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (tmp_path / "f").read_bytes()[:3] == b"xyz"
    await file.close()
