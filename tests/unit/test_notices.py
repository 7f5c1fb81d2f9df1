"""Changes of a directory are told by the kernel where it will, and looked for."""

import asyncio
import ctypes
import errno
import logging
import os
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from aiockpt.errors import EngineStateError
from aiockpt.storage import notices
from aiockpt.storage.notices import LocalNotices
from aiockpt.threads import WorkerPool
from gates import LIMIT_S, turns
from leaks import census

NEVER_S = 1000.0
every_loop = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "place"
    path.mkdir()
    return path


@pytest.fixture
def lookers() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, "test-look")
    yield pool
    pool.shutdown()


@pytest.fixture
async def changes(place: Path, lookers: WorkerPool) -> AsyncIterator[LocalNotices]:
    changes = LocalNotices(str(place), lookers)
    yield changes
    await changes.close()


@pytest.fixture
def kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks but who was told."""
    monkeypatch.setattr(notices, "_TOLD_INTERVAL_S", NEVER_S)


def refuse(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, num_times: float = 1e9
) -> None:
    """The kernel's function fails, for so many times."""
    libc = ctypes.CDLL(None, use_errno=True)
    left = [num_times]

    class Refusing:
        def __getattr__(self, wanted: str) -> Callable[..., int]:
            if wanted != name or left[0] <= 0:
                return getattr(libc, wanted)
            left[0] -= 1
            return lambda *_: (ctypes.set_errno(number), -1)[1]

    monkeypatch.setattr(notices, "_libc", Refusing())


class Look:
    """Looks for a file, and tells of its looks."""

    def __init__(self, path: Path) -> None:
        self.num_looks = 0
        self._path = path
        self._has_looked = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self) -> Path | None:
        self.num_looks += 1
        found = self._path if self._path.exists() else None
        self._loop.call_soon_threadsafe(self._has_looked.set)
        return found

    async def again(self) -> None:
        """Returns when a look has been made that none of these calls has told of."""
        await self._has_looked.wait()
        self._has_looked.clear()


def appear(path: Path) -> None:
    path.with_suffix(".tmp").touch()
    path.with_suffix(".tmp").rename(path)


def num_instances() -> int:
    """How often this process has inotify open."""
    return census(Path(tempfile.gettempdir())).fds["anon_inode:inotify"]


async def asleep(changes: LocalNotices) -> None:
    """Returns when whoever waits has the kernel to wait for."""
    while not changes._is_listening:
        await turns(1)
    await turns()


@every_loop
@pytest.mark.usefixtures("kernel_alone")
async def test_what_is_renamed_into_the_directory_is_told_at_once(changes, place):
    look = Look(place / "tag")
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(changes.until(look)) for _ in range(3)]
        await asleep(changes)
        appear(place / "tag")
    assert [task.result() for task in waiting] == [place / "tag"] * 3


@every_loop
@pytest.mark.usefixtures("kernel_alone")
async def test_a_kernel_that_has_lost_notices_makes_everybody_look(
    changes, place, monkeypatch
):
    # What the kernel tells then, in place of what did not fit into its queue: no watch,
    # that there was more than it keeps, nothing that belongs together, and no name.
    overflow = struct.pack("iIII", -1, 0x4000, 0, 0)
    heard, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    monkeypatch.setattr(notices, "_open", lambda: heard)
    monkeypatch.setattr(notices, "_add_watch", lambda *_: None)
    with os.fdopen(told, "wb", buffering=0) as kernel:
        async with asyncio.TaskGroup() as group:
            looks = [Look(place / "tag") for _ in range(3)]
            for look in looks:
                group.create_task(changes.until(look))
            await asleep(changes)
            for look in looks:
                await look.again()
            # One look that finds nothing: who has waited once waits again.
            kernel.write(overflow)
            for look in looks:
                await look.again()
            await turns()
            appear(place / "tag")
            kernel.write(overflow)
    assert [look.num_looks for look in looks] == [3, 3, 3]


@pytest.mark.usefixtures("kernel_alone")
async def test_all_who_wait_share_one_descriptor_that_ends_with_close(changes, place):
    assert num_instances() == 0
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b", "a"):
            group.create_task(changes.until(Look(place / name)))
        await asleep(changes)
        assert num_instances() == 1
        appear(place / "a")
        appear(place / "b")
    await changes.close()
    assert num_instances() == 0


async def test_what_nobody_tells_of_is_looked_for(changes, place, monkeypatch):
    # As another machine's changes in a network file system are.
    monkeypatch.setattr(notices, "_add_watch", lambda *_: None)
    monkeypatch.setattr(notices, "_TOLD_INTERVAL_S", 0.01)
    look = Look(place / "tag")
    async with asyncio.TaskGroup() as group:
        group.create_task(changes.until(look))
        await asleep(changes)
        appear(place / "tag")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("inotify_init1", errno.EMFILE),
        ("inotify_init1", errno.ENOSYS),
        ("inotify_add_watch", errno.ENOSPC),
        ("inotify_add_watch", errno.EACCES),
    ],
)
@pytest.mark.usefixtures("kernel_alone")
async def test_where_the_kernel_refuses_changes_are_looked_for_and_that_is_said_once(
    changes, place, monkeypatch, caplog, name, number
):
    refuse(monkeypatch, name, number)
    monkeypatch.setattr(notices, "_UNTOLD_INTERVAL_S", 0.01)
    look = Look(place / "tag")
    with caplog.at_level(logging.WARNING, "aiockpt"):
        async with asyncio.TaskGroup() as group:
            group.create_task(changes.until(look))
            for _ in range(3):
                await look.again()
            appear(place / "tag")
    assert caplog.text.count(os.strerror(number)) == 1


@pytest.mark.usefixtures("kernel_alone")
async def test_a_system_without_inotify_is_looked_at(changes, place, monkeypatch):
    monkeypatch.setattr(notices, "_libc", object())
    monkeypatch.setattr(notices, "_UNTOLD_INTERVAL_S", 0.01)
    look = Look(place / "tag")
    async with asyncio.TaskGroup() as group:
        group.create_task(changes.until(look))
        await look.again()
        appear(place / "tag")


@pytest.mark.usefixtures("kernel_alone")
async def test_a_kernel_that_refused_for_a_while_is_asked_again(
    changes, place, monkeypatch
):
    refuse(monkeypatch, "inotify_init1", errno.EMFILE, num_times=2)
    monkeypatch.setattr(notices, "_UNTOLD_INTERVAL_S", 0.01)
    look = Look(place / "tag")
    async with asyncio.TaskGroup() as group:
        group.create_task(changes.until(look))
        await asleep(changes)
        appear(place / "tag")


@pytest.mark.usefixtures("kernel_alone")
async def test_a_directory_that_is_made_later_is_watched_from_then_on(
    changes, place, monkeypatch, caplog
):
    place.rmdir()
    monkeypatch.setattr(notices, "_UNTOLD_INTERVAL_S", 0.01)
    look = Look(place / "tag")
    async with asyncio.TaskGroup() as group:
        group.create_task(changes.until(look))
        await look.again()
        place.mkdir()
        while changes._interval_s != NEVER_S:
            await look.again()
        await turns()
        appear(place / "tag")
    assert caplog.text == ""


async def test_a_slow_look_is_followed_by_a_longer_pause(changes, monkeypatch):
    pauses: list[float] = []
    now_s = iter([0.0, 2.0, 2.0, 2.001])
    timeout = asyncio.timeout

    def note(delay_s: float) -> asyncio.Timeout:
        pauses.append(delay_s)
        return timeout(0)

    monkeypatch.setattr(notices, "perf_counter", lambda: next(now_s, 9.0))
    looks = iter([None, None, "found"])
    with monkeypatch.context() as patch:
        patch.setattr(notices.asyncio, "timeout", note)
        assert await changes.until(lambda: next(looks)) == "found"
    assert pauses == [notices._MAX_PAUSE_S, notices._TOLD_INTERVAL_S]


async def test_cancelling_one_who_waits_ends_nothing_else(changes, place):
    async with asyncio.TaskGroup() as group:
        staying = group.create_task(changes.until(Look(place / "tag")))
        leaving = group.create_task(changes.until(Look(place / "tag")))
        await asleep(changes)
        leaving.cancel()
        # It may still be looking: a look is waited for.
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        appear(place / "tag")
    assert staying.result() == place / "tag"


async def test_a_look_during_the_close_opens_nothing(changes, place):
    reached, go_on = threading.Event(), threading.Event()

    def look() -> None:
        reached.set()
        assert go_on.wait(LIMIT_S)

    original = changes._watch

    def watch() -> None:
        look()
        original()

    changes._watch = watch
    waiting = asyncio.ensure_future(changes.until(look))
    while not reached.is_set():
        await turns(1)
    await changes.close()
    go_on.set()
    with pytest.raises(EngineStateError):
        await waiting
    assert changes._descriptor is None
