"""Whoever watches a root gets each publication once, in order, whoever made it."""

import asyncio
import errno
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch

import aiockpt.sync
from aiockpt import (
    CheckpointEngine,
    CheckpointNotFoundError,
    EngineStateError,
    TagInfo,
    watching,
)
from aiockpt.errors import InvalidArgumentError, StorageError
from aiockpt.runtime import Runtime
from aiockpt.storage import notices
from aiockpt.storage.base import Stamp
from aiockpt.storage.local import LocalStorage
from aiockpt.watching import Watcher
from catalogs import catalog_at, make_tags, prepare, publish
from gates import (
    LIMIT_S,
    RING_8_MIB,
    EngineSide,
    Gate,
    cancelled_at,
    happened,
    held,
    in_thread,
    run_script,
    turns,
)
from tracing import Moment, tapped

every_loop = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


@pytest.fixture
async def engine(root: Path) -> AsyncIterator[CheckpointEngine]:
    async with CheckpointEngine(root, RING_8_MIB) as engine, asyncio.timeout(LIMIT_S):
        yield engine


@pytest.fixture
def blocking(root: Path) -> Iterator[aiockpt.sync.CheckpointEngine]:
    with aiockpt.sync.CheckpointEngine(root, RING_8_MIB) as engine:
        yield engine


@pytest.fixture
def told_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks but when something has happened."""
    monkeypatch.setattr(notices, "_TOLD_INTERVAL_S", 1000.0)


async def save(engine: CheckpointEngine, *tags: str, overwrite: bool = False) -> None:
    for tag in tags:
        await engine.create(tag, overwrite=overwrite)
        await engine.save({"w": torch.arange(3)}, "model.pt")
        await engine.commit(tag)


async def make_elsewhere(root: Path, *tags: str) -> None:
    """Publishes tags by an engine that is gone again."""
    making = in_thread(lambda: make_tags(root, *tags))
    await happened(making)
    making.result()


async def first(watch: AsyncIterator[TagInfo], count: int) -> list[str]:
    return [(await anext(watch)).tag for _ in range(count)]


async def listening(engine: CheckpointEngine) -> None:
    """Returns when somebody waits for the kernel's notices."""
    notices = engine._runtime.watcher._notices
    # It goes on listening when nobody waits any more.
    while not (notices._is_listening and notices._changed._waiters):
        await turns(1)


# --- what is yielded --------------------------------------------------------------


@every_loop
@pytest.mark.usefixtures("told_only")
async def test_tags_come_in_order_of_publication_as_they_are_published(root, engine):
    await save(engine, "before")
    watch = engine.watch()
    async with (
        CheckpointEngine(root, RING_8_MIB) as other,
        asyncio.TaskGroup() as group,
    ):
        watching = group.create_task(first(watch, 4))
        await listening(engine)
        await save(other, "z", "m")
        await save(engine, "a")
        await save(other, "k")
    assert watching.result() == ["z", "m", "a", "k"]


async def test_what_is_yielded_is_what_tags_lists(engine):
    await save(engine, "a")
    watch = engine.watch()
    await save(engine, "b")
    assert await anext(watch) == (await engine.tags())[-1]


async def test_what_is_published_before_the_first_look_is_yielded(engine, monkeypatch):
    gate, look = Gate(), Watcher._position_ns

    def look_later(watcher: Watcher, after: str | None) -> int:
        gate.pass_through()
        return look(watcher, after)

    await save(engine, "before")
    monkeypatch.setattr(Watcher, "_position_ns", look_later)
    watch = engine.watch()
    await gate.reached()
    await save(engine, "a")
    gate.open()
    assert await first(watch, 1) == ["a"]


async def test_all_that_came_after_a_tag_is_yielded_first(root, engine):
    await make_elsewhere(root, "c", "b", "d", "a")
    watch = engine.watch("b")
    assert await first(watch, 2) == ["d", "a"]
    await save(engine, "e")
    assert await first(watch, 1) == ["e"]


async def test_a_tag_that_is_gone_can_still_be_the_place_to_go_on_from(root, engine):
    await make_elsewhere(root, "a", "b", "c")
    info = (await engine.tags())[1]
    await engine.delete("b")
    assert await first(engine.watch(info), 1) == ["c"]
    with pytest.raises(CheckpointNotFoundError, match="'b'"):
        await anext(engine.watch("b"))


@pytest.mark.parametrize("after", ["../a", "", 7, b"a"])
async def test_what_is_no_tag_is_refused_by_the_call_itself(engine, after):
    with pytest.raises(InvalidArgumentError):
        engine.watch(after)
    with pytest.raises(InvalidArgumentError):
        await engine.wait_for(newer_than=after)
    with pytest.raises(InvalidArgumentError):
        await engine.wait_for(after)


async def test_a_tag_that_is_overwritten_comes_again(engine):
    await save(engine, "a", "b")
    watch = engine.watch("a")
    assert await first(watch, 1) == ["b"]
    await save(engine, "a", overwrite=True)
    await save(engine, "c")
    await save(engine, "a", overwrite=True)
    assert await first(watch, 2) == ["c", "a"]


async def test_a_tag_that_is_deleted_before_it_could_be_yielded_is_left_out(engine):
    await save(engine, "a", "b", "c", "d", "e")
    watch = engine.watch("a")
    assert await first(watch, 1) == ["b"]
    await engine.delete("c")
    assert await first(watch, 1) == ["d"]
    await engine.delete("e")
    await save(engine, "f")
    assert await first(watch, 1) == ["f"]


async def test_a_tag_to_which_latest_was_not_moved_comes_too(root, engine):
    watch = engine.watch()

    def publish_both() -> None:
        with catalog_at(root) as catalog:
            publish(catalog, root, "a")
            prepared = prepare(catalog, root)
            catalog.publish("b", is_overwrite=False, points_latest=False, **prepared)

    publishing = in_thread(publish_both)
    assert await first(watch, 2) == ["a", "b"]
    publishing.result()
    assert (await engine.wait_for()).tag == "a"


async def test_watches_do_not_take_from_each_other(engine):
    await save(engine, "a")
    watches = [engine.watch("a"), engine.watch(), engine.watch("a")]
    await save(engine, "b", "c")
    assert [await first(watch, 2) for watch in watches] == [["b", "c"]] * 3


async def test_a_root_that_is_made_later_can_be_watched(root, engine):
    watch = engine.watch()
    # From where it has looked: what is published before that may be passed over.
    await watch._start.ended()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(first(watch, 1))
        waiting = group.create_task(engine.wait_for())
        await turns()
        assert not root.exists()
        await make_elsewhere(root, "a")
    assert watching.result() == [waiting.result().tag] == ["a"]


async def test_a_broken_tag_is_left_out_and_told_of_once(root, engine, caplog):
    await make_elsewhere(root, "a", "b", "c")
    (root / "b" / ".aiockpt" / "manifest.json").write_bytes(b"{}")
    (root / "notes").mkdir()
    watch = engine.watch("a")
    with caplog.at_level(logging.WARNING, "aiockpt.watching"):
        assert await first(watch, 1) == ["c"]
        await save(engine, "d")
        assert await first(watch, 1) == ["d"]
    # Apart from what a commit says, which asks when the newest tag was published.
    (record,) = (each for each in caplog.records if each.name == "aiockpt.watching")
    assert "tag b is left out" in record.getMessage()


async def test_a_link_where_a_manifest_should_be_is_left_out(root, engine):
    await make_elsewhere(root, "a")
    (root / "x" / ".aiockpt").mkdir(parents=True)
    (root / "x" / ".aiockpt" / "manifest.json").symlink_to("nowhere")
    watch = engine.watch("a")
    await make_elsewhere(root, "b")
    assert await first(watch, 1) == ["b"]


# --- when it is yielded -----------------------------------------------------------


async def test_a_publication_that_is_undone_was_never_told(root, engine):
    await save(engine, "a")
    watch = engine.watch()
    publishers: list[int] = []
    num_waiting = threading.Semaphore(0)

    def fault(moment: Moment) -> None:
        ident = threading.get_ident()
        if moment.name == "rename" and moment.path.endswith("/1"):
            publishers.append(ident)
        elif publishers == [ident] and moment.name == "fsync":
            # To be seen, and not yet durable. Both who have seen it wait.
            publishers.append(ident)
            for _ in range(2):
                assert num_waiting.acquire(timeout=LIMIT_S)
            raise OSError(errno.EIO, "injected")
        elif publishers and ident not in publishers and moment.name == "flock":
            num_waiting.release()

    async with (
        CheckpointEngine(root, RING_8_MIB) as other,
        asyncio.TaskGroup() as group,
    ):
        watching = group.create_task(first(watch, 1))
        naming = group.create_task(engine.wait_for("lost"))
        await listening(engine)
        with tapped(fault):
            with pytest.raises(StorageError, match="injected"):
                await save(other, "lost")
        await save(other, "kept")
        naming.cancel()
    assert watching.result() == ["kept"]
    assert naming.cancelled()


@pytest.mark.parametrize("missed_by_looks", [["b"], ["cd", "c"]])
async def test_a_tag_that_a_look_has_missed_is_not_passed_over(
    root, engine, monkeypatch, missed_by_looks
):
    await make_elsewhere(root, "a", "b", "c", "d")
    watch = engine.watch("a")
    await watch._start.ended()
    list_dir = LocalStorage.list_dir
    missing = [set(names) for names in missed_by_looks]

    def partly(storage: LocalStorage, path: str) -> list[str]:
        missed = missing.pop(0) if missing else set()
        return [name for name in list_dir(storage, path) if name not in missed]

    # A directory that changes while it is read may show the newer and not the older.
    monkeypatch.setattr(LocalStorage, "list_dir", partly)
    assert await first(watch, 3) == ["b", "c", "d"]
    assert not missing


async def test_a_root_without_a_lock_can_be_watched(root, engine, monkeypatch):
    await make_elsewhere(root, "a", "b")

    def refuse(*_: object, **__: object) -> None:
        raise StorageError(errno.EROFS, "read-only", "lock")

    monkeypatch.setattr(LocalStorage, "lock", refuse)
    assert await first(engine.watch("a"), 1) == ["b"]
    assert (await engine.wait_for("a")).tag == "a"


async def test_an_error_ends_one_step_and_not_the_watch(root, engine, monkeypatch):
    await make_elsewhere(root, "a", "b")
    watch = engine.watch("a")
    await watch._start.ended()
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise StorageError(errno.EIO, "injected", "root")

        patch.setattr(LocalStorage, "list_dir", refuse)
        with pytest.raises(StorageError, match="injected"):
            await anext(watch)
    assert await first(watch, 1) == ["b"]


async def test_a_tag_that_cannot_be_read_for_a_moment_is_not_passed_over(root, engine):
    await make_elsewhere(root, "a", "b", "c")
    watch = engine.watch("a")
    await watch._start.ended()
    failing = [True]

    def fault(moment: Moment) -> None:
        is_read = moment.name == "open" and moment.path.endswith("manifest.json")
        if is_read and "/b/" in moment.path and failing:
            failing.clear()
            raise OSError(errno.EMFILE, "injected")

    with tapped(fault):
        with pytest.raises(StorageError, match="injected"):
            await anext(watch)
        assert await first(watch, 2) == ["b", "c"]


async def test_a_look_reads_what_it_has_not_read_before(root, engine, monkeypatch):
    monkeypatch.setattr(watching, "_STAMPED_NS", -(1 << 62))
    await make_elsewhere(root, "a", "b", "c")
    watch = engine.watch()
    await watch._start.ended()
    # The first commit looks when the others were published.
    await save(engine, "z")
    assert await first(watch, 1) == ["z"]
    with tapped() as tap:
        await save(engine, "d")
        assert await first(watch, 1) == ["d"]
        await save(engine, "b", overwrite=True)
        assert await first(watch, 1) == ["b"]
        assert await first(engine.watch("d"), 1) == ["b"]
    opened = {call.path for call in tap.calls if call.name == "open"}
    assert f"{root}/b/.aiockpt/manifest.json" in opened
    assert f"{root}/a/.aiockpt/manifest.json" not in opened


async def test_a_tag_that_is_too_young_to_be_told_from_the_next_is_read_again(
    root, engine, monkeypatch
):
    # A file system that gives every file the same number, and whose clock stands.
    stamp = LocalStorage.stamp
    now_ns = time.time_ns()

    def alike(storage: LocalStorage, path: str) -> Stamp | None:
        return stamp(storage, path) and Stamp((1,), now_ns)

    monkeypatch.setattr(LocalStorage, "stamp", alike)
    monkeypatch.setattr(watching, "_STAMPED_NS", 1 << 62)
    watch = engine.watch()
    await save(engine, "a")
    assert await first(watch, 1) == ["a"]
    await save(engine, "a", overwrite=True)
    assert await first(watch, 1) == ["a"]


# --- waiting for one --------------------------------------------------------------


async def test_what_is_there_is_not_waited_for(root, engine):
    await make_elsewhere(root, "b", "a")
    assert (await engine.wait_for()).tag == "a"
    assert (await engine.wait_for("b")).tag == "b"
    assert (await engine.wait_for(newer_than="b")).tag == "a"


@pytest.mark.usefixtures("told_only")
async def test_what_is_not_there_is_waited_for(root, engine):
    await make_elsewhere(root, "old")
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(engine.wait_for("a")),
            group.create_task(engine.wait_for(newer_than="old")),
            group.create_task(engine.wait_for("old", newer_than="old")),
        ]
        await listening(engine)
        await turns()
        assert not any(task.done() for task in tasks)
        await save(engine, "a")
        assert (await tasks[0]).tag == (await tasks[1]).tag == "a"
        await turns()
        assert not tasks[2].done()
        await save(engine, "old", overwrite=True)
    assert tasks[2].result() == (await engine.tags())[-1]


async def test_of_several_newer_tags_the_latest_is_returned(root, engine):
    await make_elsewhere(root, "a", "b", "c")
    first_info = (await engine.tags())[0]
    await engine.delete("a")
    assert (await engine.wait_for(newer_than=first_info)).tag == "c"
    with pytest.raises(CheckpointNotFoundError, match="'a'"):
        await engine.wait_for(newer_than="a")


# --- the end ----------------------------------------------------------------------


async def test_a_loop_that_is_left_can_be_taken_up_again(engine):
    await save(engine, "a", "b", "c")
    watch = engine.watch("a")
    async for info in watch:
        assert info.tag == "b"
        break
    async for info in watch:
        assert info.tag == "c"
        break
    assert not engine._runtime._calls


async def test_wherever_a_step_is_cancelled_nothing_is_passed_over(engine):
    await save(engine, "a", "b", "c")
    for at in range(1, 100):
        watch = engine.watch("a")
        was_cancelled = await cancelled_at(at, first(watch, 1))
        assert await first(watch, 1) == ["b" if was_cancelled else "c"]
        if not was_cancelled:
            break
    assert at > 1


async def test_wherever_the_engine_side_is_cancelled_nothing_is_passed_over(
    engine, monkeypatch
):
    await save(engine, "a", "b", "c")
    side = EngineSide(monkeypatch)
    for at in range(1, 100):
        watch = engine.watch("a")
        with side.cancelling_at(at):
            try:
                tags = await first(watch, 1)
            except asyncio.CancelledError:
                tags = []
        assert tags + await first(watch, 2 - len(tags)) == ["b", "c"]
        if side.num_suspensions < at:
            break
    assert at > 1


async def test_cancelling_ends_the_waiting(engine):
    watch = engine.watch()
    for work in (lambda: anext(watch), lambda: engine.wait_for("a")):
        waiting = asyncio.ensure_future(work())
        await listening(engine)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert not engine._runtime._calls


async def test_closing_the_engine_ends_all_waiting(root):
    engine = CheckpointEngine(root, RING_8_MIB)
    await save(engine, "a", "b")
    watch, unread = engine.watch(), engine.watch("a")

    async def follow() -> str:
        async for info in watch:
            return info.tag
        return "ended"

    async with asyncio.TaskGroup() as group:
        following = group.create_task(follow())
        waiting = group.create_task(outcome(lambda: engine.wait_for("c")))
        await listening(engine)
        await engine.aclose()
    assert following.result() == "ended"
    assert isinstance(waiting.result(), EngineStateError)
    for ended in (watch, unread):
        assert [info async for info in ended] == []
    with pytest.raises(EngineStateError, match="closed"):
        engine.watch()
    with pytest.raises(EngineStateError, match="closed"):
        await engine.wait_for()


async def outcome(work: Callable[[], object]) -> object:
    try:
        return await work()
    except EngineStateError as error:
        return error


async def test_a_look_that_is_under_way_is_waited_for_by_the_close(root, monkeypatch):
    engine = CheckpointEngine(root, RING_8_MIB)
    watch = engine.watch()
    await watch._start.ended()
    with held(monkeypatch, Watcher, "_times_ns") as looking:
        async with asyncio.TaskGroup() as group:
            step = group.create_task(anext(watch, None))
            await looking.reached()
            closing = group.create_task(engine.aclose())
            await turns()
            assert not closing.done()
            looking.open()
    assert step.result() is None


async def test_a_forked_child_cannot_go_on_with_its_parents_watch(engine, monkeypatch):
    watch = engine.watch()
    await watch._start.ended()
    with monkeypatch.context() as child:
        child.setattr(Runtime, "is_forked", True)
        with pytest.raises(EngineStateError, match="parent process"):
            await anext(watch)


# --- the blocking door ------------------------------------------------------------


def test_the_blocking_door_yields_the_same(root, blocking):
    make_tags(root, "a", "b")
    watch, other = blocking.watch("a"), blocking.watch()
    assert next(watch).tag == "b"
    publishing = in_thread(lambda: make_tags(root, "c", "d"))
    assert [next(watch).tag, next(watch).tag] == ["c", "d"]
    assert [next(other).tag, next(other).tag] == ["c", "d"]
    publishing.result()
    assert blocking.wait_for(newer_than="a").tag == "d"
    with pytest.raises(CheckpointNotFoundError):
        blocking.watch("gone")
    blocking.close()
    assert list(watch) == []


@pytest.mark.parametrize("is_watch", [True, False])
def test_ctrl_c_ends_the_waiting_and_nothing_else(root, blocking, is_watch):
    make_tags(root, "a")
    watch = blocking.watch()

    def interrupt() -> None:
        while not blocking._runtime.watcher._notices._is_listening:
            pass
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(watch) if is_watch else blocking.wait_for("b")
    interrupting.result()
    make_tags(root, "b")
    assert next(watch).tag == blocking.wait_for("b").tag == "b"


def test_an_exit_without_close_ends_a_watch_of_another_thread(root):
    script = """
import sys, threading, aiockpt.sync
engine = aiockpt.sync.CheckpointEngine(sys.argv[1])
watch = engine.watch()
# It prints nothing: it may be the last thing that runs, and would hold the lock.
threading.Thread(target=list, args=(watch,), daemon=True).start()
while not engine._runtime.watcher._notices._changed._waiters:
    pass
"""
    root.mkdir()
    done = run_script(script, root)
    assert done.returncode == 0, done.stderr
    assert "was never closed" in done.stderr
