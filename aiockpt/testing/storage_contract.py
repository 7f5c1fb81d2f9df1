"""The tests that every implementation of the storage port must pass.

Needs pytest, and no plugin of it.
"""

# These are tests: their names are sentences, and cancelling takes a bare task.
# ruff: noqa: D102, FBT001, PLR2004, TID251

__all__ = ["StorageContract"]

import asyncio
import errno
import functools
import mmap
import os
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing

import pytest

from aiockpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    StorageError,
)
from aiockpt.storage.base import Storage

_PAGE = 4096
_CHUNK = 4 * _PAGE
# Only a failing test waits this long.
_LIMIT_S = 30.0
_SIZES = (0, 1, _PAGE - 1, _PAGE, _PAGE + 1, _CHUNK, 2 * _CHUNK + 4097)


def _nothing() -> None:
    pass


def _pages(nbytes: int) -> memoryview:
    """Random bytes in page-aligned memory, a whole number of pages of it."""
    num_pages = -(-nbytes // _PAGE)
    memory = memoryview(mmap.mmap(-1, max(num_pages, 1) * _PAGE))[: num_pages * _PAGE]
    memory[:nbytes] = os.urandom(nbytes)
    return memory


async def _write(storage: Storage, path: str, memory: memoryview, nbytes: int) -> None:
    """Writes the chunks of a file all at once, last first, as the engine may."""
    file = await storage.create(path, nbytes)
    try:
        async with asyncio.TaskGroup() as group:
            for offset in reversed(range(0, len(memory), _CHUNK)):
                part = memory[offset : offset + _CHUNK]
                group.create_task(file.write(offset, part, _nothing))
        await file.sync()
    finally:
        await file.close()


def _content(storage: Storage, path: str) -> bytes:
    return storage.read_bytes(path, 1 << 30)


class StorageContract:
    """What the engine relies on.

    Subclass it where pytest collects, with a fixture:

        class TestMyStorage(StorageContract):
            @pytest.fixture
            def storage(self, tmp_path):
                return MyStorage(tmp_path)

    The fixture gives a storage whose root is an empty directory; it may be on any
    thread, and its coroutines are run by an event loop of the test's own.
    """

    @pytest.fixture
    def storage(self) -> Storage:
        """The storage to test, empty."""
        raise NotImplementedError

    @pytest.fixture
    def lookers(self) -> Iterator[Executor]:
        """Threads that look at files."""
        with ThreadPoolExecutor(2) as pool:
            yield pool

    def run(self, work: Coroutine[object, object, None]) -> None:
        """Runs a coroutine to its end."""
        asyncio.run(work)

    # --- files in chunks ----------------------------------------------------------

    @pytest.mark.parametrize("nbytes", _SIZES)
    def test_a_file_has_the_bytes_that_were_written_and_no_more(
        self, storage: Storage, nbytes: int
    ) -> None:
        memory = _pages(nbytes)

        self.run(_write(storage, "f", memory, nbytes))

        assert _content(storage, "f") == memory[:nbytes]

    def test_the_bytes_are_those_that_prepare_leaves(self, storage: Storage) -> None:
        memory = _pages(_PAGE)
        calls: list[None] = []

        def prepare() -> None:
            memory[:4] = b"last"
            calls.append(None)

        async def work() -> None:
            file = await storage.create("f", _PAGE)
            await file.write(0, memory, prepare)
            await file.close()

        self.run(work())

        assert len(calls) == 1
        assert _content(storage, "f") == memory

    def test_a_turn_may_wait_for_those_of_earlier_calls(self, storage: Storage) -> None:
        begun = [threading.Event() for _ in range(16)]

        def prepare(index: int) -> None:
            # Out of order, all workers would wait here for one that has none.
            assert index == 0 or begun[index - 1].wait(_LIMIT_S)
            begun[index].set()

        async def work() -> None:
            memory = _pages(_PAGE)
            file = await storage.create("f", len(begun) * _PAGE)
            async with asyncio.TaskGroup() as group:
                for index in range(len(begun)):
                    turn = functools.partial(prepare, index)
                    group.create_task(file.write(index * _PAGE, memory, turn))
            await file.close()

        self.run(work())

        assert begun[-1].is_set()

    def test_an_error_of_prepare_is_raised_as_it_is(self, storage: Storage) -> None:
        def prepare() -> None:
            raise ZeroDivisionError

        async def work() -> None:
            file = await storage.create("f", _PAGE)
            try:
                with pytest.raises(ZeroDivisionError):
                    await file.write(0, _pages(_PAGE), prepare)
            finally:
                await file.close()

        self.run(work())

    def test_a_cancelled_write_has_ended_when_it_returns(
        self, storage: Storage
    ) -> None:
        has_returned: list[bool] = []

        async def work() -> None:
            file = await storage.create("f", _PAGE)
            loop = asyncio.get_running_loop()

            async def cancel() -> None:
                task.cancel()
                for _ in range(10):
                    await asyncio.sleep(0)
                has_returned.append(task.done())

            def prepare() -> None:
                # Returns when the waiter has had its turns, to go if it would.
                asyncio.run_coroutine_threadsafe(cancel(), loop).result()

            task = asyncio.ensure_future(file.write(0, _pages(_PAGE), prepare))
            with pytest.raises(asyncio.CancelledError):
                await task
            await file.close()

        self.run(work())

        assert has_returned == [False]

    def test_a_name_that_is_taken_is_not_written_over(self, storage: Storage) -> None:
        storage.write_durable("f", b"old")

        with pytest.raises(StorageError) as caught:
            self.run(_write(storage, "f", _pages(_PAGE), _PAGE))

        assert caught.value.errno == errno.EEXIST
        assert _content(storage, "f") == b"old"

    def test_a_file_in_a_missing_directory_is_refused(self, storage: Storage) -> None:
        with pytest.raises(StorageError) as caught:
            self.run(_write(storage, "none/f", _pages(_PAGE), _PAGE))

        assert caught.value.errno == errno.ENOENT

    def test_a_file_without_room_is_refused_and_not_left(
        self, storage: Storage
    ) -> None:
        async def work() -> None:
            with pytest.raises(StorageError) as caught:
                await storage.create("f", 1 << 60)
            assert caught.value.errno in {errno.ENOSPC, errno.EFBIG}

        self.run(work())

        assert not storage.exists("f")

    @pytest.mark.parametrize("nbytes", [_PAGE - 9, 3 * _PAGE, 5 * _PAGE + 100])
    def test_any_bytes_of_a_written_file_can_be_amended(
        self, storage: Storage, nbytes: int
    ) -> None:
        memory = _pages(nbytes)
        expected = bytearray(memory[:nbytes])
        # Within a page, over a boundary where there is one, and at the end.
        amendments = [(3, b"first"), (nbytes // 2 - 60, b"m" * 120), (nbytes - 1, b"z")]

        async def work() -> None:
            file = await storage.create("f", nbytes)
            await file.write(0, memory, _nothing)
            for offset, data in amendments:
                await file.amend(offset, data)
            await file.sync()
            await file.close()

        for offset, data in amendments:
            expected[offset : offset + len(data)] = data
        self.run(work())

        assert _content(storage, "f") == expected

    # --- files of several writers -------------------------------------------------

    @pytest.mark.parametrize("nbytes", [2 * _PAGE, 2 * _PAGE + 1, 3 * _PAGE - 1])
    def test_two_writers_make_one_file_each_its_own_pages(
        self, storage: Storage, nbytes: int
    ) -> None:
        memory = _pages(nbytes)
        expected = bytearray(memory[:nbytes])
        expected[_PAGE + 5 : _PAGE + 7] = b"am"

        async def work() -> None:
            first = await storage.create("f", nbytes)
            second = await storage.open_write("f", nbytes)
            await second.write(_PAGE, memory[_PAGE:], _nothing)
            await first.write(0, memory[:_PAGE], _nothing)
            await first.sync()
            await first.close()
            await second.amend(_PAGE + 5, b"am")
            await second.sync()
            await second.close()

        self.run(work())

        assert _content(storage, "f") == expected

    def test_a_missing_file_is_not_opened_for_writing(self, storage: Storage) -> None:
        async def work() -> None:
            with pytest.raises(CheckpointNotFoundError):
                await storage.open_write("f", _PAGE)

        self.run(work())

        assert not storage.exists("f")

    def test_closing_a_written_file_twice_is_closing_it_once(
        self, storage: Storage
    ) -> None:
        async def work() -> None:
            file = await storage.create("f", 0)
            await file.close()
            await file.close()

        self.run(work())

    # --- reading ------------------------------------------------------------------

    def test_any_part_of_a_file_can_be_read(self, storage: Storage) -> None:
        storage.write_durable("f", bytes(range(256)))
        with closing(storage.open_read("f")) as file:
            assert file.nbytes == 256
            part = bytearray(10)
            file.read_into(250 - 10, memoryview(part))

        assert part == bytes(range(240, 250))

    def test_blocks_are_read_as_far_as_the_file_goes(self, storage: Storage) -> None:
        nbytes = _PAGE + 100
        memory = _pages(nbytes)
        self.run(_write(storage, "f", memory, nbytes))
        block = _pages(2 * _PAGE)

        with closing(storage.open_read("f")) as file:
            file.read_block(0, block)
            assert block[:nbytes] == memory[:nbytes]
            file.read_block(_PAGE, block[:_PAGE])

        assert block[:100] == memory[_PAGE:nbytes]

    def test_reading_past_the_end_is_told_as_corruption(self, storage: Storage) -> None:
        storage.write_durable("f", b"short")
        with closing(storage.open_read("f")) as file:
            with pytest.raises(CorruptCheckpointError):
                file.read_into(3, memoryview(bytearray(3)))

    def test_a_missing_file_is_not_found(self, storage: Storage) -> None:
        for path in ("f", "none/f"):
            with pytest.raises(CheckpointNotFoundError):
                storage.open_read(path)

    def test_a_directory_is_not_read_as_a_file(self, storage: Storage) -> None:
        storage.make_dirs("d")

        with pytest.raises(StorageError):
            storage.open_read("d")

    def test_closing_a_read_file_twice_is_closing_it_once(
        self, storage: Storage
    ) -> None:
        storage.write_durable("f", b"")
        file = storage.open_read("f")

        file.close()
        file.close()

    # --- small files --------------------------------------------------------------

    def test_a_small_file_is_read_back(self, storage: Storage) -> None:
        storage.write_durable("f", b"text")

        assert storage.read_bytes("f", 4) == b"text"
        with pytest.raises(StorageError):
            storage.read_bytes("f", 3)

    def test_a_small_file_takes_no_name_that_is_taken(self, storage: Storage) -> None:
        storage.write_durable("f", b"old")

        with pytest.raises(StorageError) as caught:
            storage.write_durable("f", b"new")

        assert caught.value.errno == errno.EEXIST
        assert _content(storage, "f") == b"old"

    def test_replacing_a_file_puts_another_in_its_place(self, storage: Storage) -> None:
        storage.write_durable("old", b"old")
        storage.write_durable("new", b"new")

        storage.replace("new", "old")

        assert _content(storage, "old") == b"new"
        assert not storage.exists("new")

    def test_a_file_with_a_second_name_outlives_the_first(
        self, storage: Storage
    ) -> None:
        storage.write_durable("one", b"content")
        storage.write_durable("taken", b"other")

        storage.link("one", "other")
        storage.remove("one")

        assert _content(storage, "other") == b"content"
        with pytest.raises(StorageError) as caught:
            storage.link("other", "taken")
        assert caught.value.errno == errno.EEXIST
        assert _content(storage, "taken") == b"other"

    def test_removing_a_file_twice_is_removing_it_once(self, storage: Storage) -> None:
        storage.write_durable("f", b"")

        storage.remove("f")
        storage.remove("f")

        assert not storage.exists("f")

    # --- directories --------------------------------------------------------------

    def test_directories_are_made_with_their_parents_once(
        self, storage: Storage
    ) -> None:
        assert storage.make_dirs("a/b/c") == ["a", "a/b", "a/b/c"]
        assert storage.make_dirs("a/b/d") == ["a/b/d"]
        assert storage.make_dirs("a/b/d") == []

    def test_what_a_directory_holds_is_listed_by_kind_and_name(
        self, storage: Storage
    ) -> None:
        for name in ("b", "a"):
            storage.make_dirs(name)
            storage.write_durable(f"{name}.txt", b"")

        assert storage.list_dir("") == ["a", "b"]
        assert storage.list_files("") == ["a.txt", "b.txt"]
        assert storage.list_dir("none") == []
        assert storage.list_files("none") == []

    def test_only_a_directory_with_nothing_in_it_is_empty(
        self, storage: Storage
    ) -> None:
        storage.make_dirs("d")
        storage.write_durable("f", b"")

        assert storage.is_empty_dir("d")
        storage.make_dirs("d/sub")
        assert not storage.is_empty_dir("d")
        assert not storage.is_empty_dir("f")
        assert not storage.is_empty_dir("none")

    def test_a_directory_can_be_synced_and_a_missing_one_cannot(
        self, storage: Storage
    ) -> None:
        storage.make_dirs("d")

        storage.sync_dir("")
        storage.sync_dir("d")
        with pytest.raises(StorageError):
            storage.sync_dir("none")

    @pytest.mark.parametrize("is_there", [False, True])
    def test_a_directory_moves_to_a_free_or_empty_place(
        self, storage: Storage, is_there: bool
    ) -> None:
        storage.make_dirs("source")
        storage.write_durable("source/f", b"text")
        if is_there:
            storage.make_dirs("target")

        storage.rename_dir("source", "target")

        assert not storage.exists("source")
        assert _content(storage, "target/f") == b"text"

    def test_a_directory_does_not_move_to_a_taken_place(self, storage: Storage) -> None:
        for name in ("source", "target"):
            storage.make_dirs(name)
            storage.write_durable(f"{name}/f", name.encode())

        with pytest.raises(StorageError):
            storage.rename_dir("source", "target")

        for name in ("source", "target"):
            assert _content(storage, f"{name}/f") == name.encode()

    def test_two_directories_change_places(self, storage: Storage) -> None:
        for name in ("one", "other"):
            storage.make_dirs(name)
            storage.write_durable(f"{name}/f", name.encode())

        storage.exchange("one", "other")

        assert _content(storage, "one/f") == b"other"
        assert _content(storage, "other/f") == b"one"

    def test_a_tree_is_removed_with_all_that_is_in_it(self, storage: Storage) -> None:
        storage.make_dirs("d/sub")
        storage.write_durable("d/sub/f", b"")

        storage.remove_tree("d")
        storage.remove_tree("d")

        assert not storage.exists("d")

    # --- lengths and stamps ---------------------------------------------------------

    def test_only_a_file_has_a_length(self, storage: Storage) -> None:
        """Nothing else is taken for one that was written."""
        storage.make_dirs("d")
        storage.write_durable("d/f", b"abc")
        assert storage.length("d/f") == 3
        for other in ("d", "missing", "d/f/g"):
            assert storage.length(other) is None

    def test_a_file_keeps_its_stamp_when_its_directory_moves(
        self, storage: Storage
    ) -> None:
        storage.make_dirs("d")
        storage.write_durable("d/f", b"abc")
        stamp = storage.stamp("d/f")
        assert stamp is not None
        assert storage.stamp("d/f") == stamp
        storage.rename_dir("d", "e")
        assert storage.stamp("e/f") == stamp
        for missing in ("d/f", "e/g", "e/f/g"):
            assert storage.stamp(missing) is None

    def test_a_file_in_the_place_of_another_has_its_own_stamp(
        self, storage: Storage
    ) -> None:
        storage.write_durable("f", b"abc")
        stamp = storage.stamp("f")
        storage.write_durable("g", b"abc")
        assert storage.stamp("g") != stamp
        storage.replace("g", "f")
        assert storage.stamp("f") != stamp

    # --- locks --------------------------------------------------------------------

    def test_a_lock_is_held_by_one_until_it_is_released(self, storage: Storage) -> None:
        lock = storage.lock("l", wait=True)
        assert lock is not None
        assert storage.lock("l", wait=False) is None

        lock.release()
        lock.release()

        again = storage.lock("l", wait=False)
        assert again is not None
        again.release()
        assert storage.exists("l")

    def test_a_lock_is_shared_by_those_who_ask_for_that(self, storage: Storage) -> None:
        one = storage.lock("l", wait=True, shared=True)
        other = storage.lock("l", wait=False, shared=True)
        assert one is not None
        assert other is not None

        one.release()
        assert storage.lock("l", wait=False) is None
        other.release()

        alone = storage.lock("l", wait=False)
        assert alone is not None
        assert storage.lock("l", wait=False, shared=True) is None
        alone.release()

    # --- notices ------------------------------------------------------------------

    @pytest.mark.parametrize("is_there", [True, False])
    def test_whoever_waits_sees_what_appears_in_a_directory(
        self, storage: Storage, lookers: Executor, is_there: bool
    ) -> None:
        if is_there:
            storage.make_dirs("d")
        num_looks: list[None] = []

        def look() -> str | None:
            num_looks.append(None)
            if storage.exists("d/new"):
                return "seen"
            if len(num_looks) == 1:
                storage.make_dirs("d")
                storage.write_durable("f", b"")
                # After this look has found nothing, and before it has said so.
                storage.replace("f", "d/new")
            return None

        async def work() -> None:
            notices = storage.notices("d", lookers)
            async with asyncio.timeout(_LIMIT_S):
                assert await notices.until(look) == "seen"
            await notices.close()

        self.run(work())

    def test_the_end_of_notices_is_the_end_of_waiting(
        self, storage: Storage, lookers: Executor
    ) -> None:
        async def work() -> None:
            loop, has_looked = asyncio.get_running_loop(), asyncio.Event()

            def look() -> str | None:
                loop.call_soon_threadsafe(has_looked.set)
                return None

            notices = storage.notices("", lookers)
            waiting = asyncio.ensure_future(notices.until(look))
            await has_looked.wait()
            await notices.close()
            await notices.close()
            for each in (waiting, notices.until(look)):
                with pytest.raises(EngineStateError):
                    await each

        self.run(work())

    def test_the_error_of_a_look_is_that_of_the_waiting(
        self, storage: Storage, lookers: Executor
    ) -> None:
        async def work() -> None:
            notices = storage.notices("", lookers)
            with pytest.raises(StorageError):
                await notices.until(lambda: storage.read_bytes("f", -1))
            await notices.close()

        storage.write_durable("f", b"text")
        self.run(work())
