"""What an engine starts, holds on to, and lets go of, also where there is no more."""

import errno
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from aiockpt import CheckpointEngine, CheckpointError, guard, saver
from aiockpt.attempt import Attempt
from aiockpt.errors import EngineStateError, StorageError
from aiockpt.loop_thread import Call
from aiockpt.machinery import Machinery
from aiockpt.runtime import Runtime
from aiockpt.storage.local import LocalStorage
from aiockpt.storage.local_write import LocalWriteFile
from gates import LIMIT_S, failing, happened, held
from thread_work import no_cycle_collector


@pytest.fixture
def no_more_threads(monkeypatch) -> Callable[[], None]:
    """Called, the system has no more threads for this process."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(threading.Thread, "start", refuse)


def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(1000.0)}


async def test_a_save_for_which_there_is_no_thread_fails_the_tag(
    root, no_more_threads, monkeypatch
):
    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        no_more_threads()
        handle = await engine.save(state(), "model.pt")
        with pytest.raises(CheckpointError, match="can't start new thread"):
            await handle.staged()
        with pytest.raises(CheckpointError, match="can't start new thread"):
            await engine.commit("a")
        # Nor does an optimizer wait for what will never be staged.
        engine.wait_staged()
        monkeypatch.undo()
        assert await engine.tags() == []
        await engine.create("a")
        await engine.save(state(), "model.pt")
        assert (await engine.commit("a")).num_files == 1


def test_an_engine_for_which_there_is_no_thread_leaves_nothing(root, no_more_threads):
    gates = guard._hook.gates
    no_more_threads()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        CheckpointEngine(root)
    # What was left open would warn now.
    gc.collect(1)
    assert guard._hook.gates == gates


class ToldOfWaiting:
    """A lock that tells whether somebody has had to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.has_held = False

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.has_held = True
            self._lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


async def test_a_commit_does_not_wait_for_a_save_that_was_refused(root, monkeypatch):
    adding = ToldOfWaiting()
    committing: list[Call[Any]] = []
    spawn = Machinery.spawn

    def commit_and_refuse(
        machinery: Machinery, work: Coroutine[Any, Any, Any]
    ) -> Call[Any]:
        monkeypatch.setattr(Machinery, "spawn", spawn)
        attempt = attempt_of(engine._runtime, "a")
        committing.append(engine._runtime.spawn(engine._runtime.commit("a")))
        # It looks at the files of the tag as soon as it may.
        while not (attempt._is_sealed or adding.has_held):
            pass
        raise EngineStateError("refused")

    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        await engine.save(state(), "first.pt")
        monkeypatch.setattr(attempt_of(engine._runtime, "a"), "_adding", adding)
        monkeypatch.setattr(Machinery, "spawn", commit_and_refuse)
        with pytest.raises(EngineStateError, match="refused"):
            await engine.save(state(), "second.pt")
        await happened(committing[0]._outcome)
        assert committing[0].result().num_files == 1


def attempt_of(runtime: Runtime, tag: str) -> Attempt:
    return runtime.open_tags._attempts[tag]


async def test_what_was_loaded_goes_when_the_caller_lets_go_of_it(root):
    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        await engine.save(state(), "model.pt")
        await engine.commit("a")
        was_freed = threading.Event()
        with no_cycle_collector():
            loaded = await engine.load("model.pt")
            weakref.finalize(loaded["weight"], was_freed.set)
            del loaded
            assert was_freed.wait(LIMIT_S)


@pytest.mark.parametrize(
    ("owner", "name"), [(LocalStorage, "create"), (LocalWriteFile, "_write")]
)
async def test_the_error_of_a_failed_save_does_not_hold_its_tensors(
    owner, name, root, monkeypatch
):
    error = StorageError(errno.EIO, "injected", "model.pt")
    monkeypatch.setattr(owner, name, failing(error))
    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        was_freed = threading.Event()
        with no_cycle_collector():
            saved = state()
            weakref.finalize(saved["weight"].untyped_storage(), was_freed.set)
            await engine.save(saved, "model.pt")
            del saved
            with pytest.raises(StorageError, match="injected"):
                await engine.commit("a")
            assert was_freed.wait(LIMIT_S)


async def test_a_save_that_is_cancelled_by_others_fails_the_tag(root, monkeypatch):
    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        first = await engine.save(state(), "first.pt")
        await first.written()
        with held(monkeypatch, saver, "make_plan") as planning:
            others = engine._runtime._calls.copy()
            await engine.save(state(), "second.pt")
            await planning.reached()
            (saving,) = engine._runtime._calls - others
            saving._cancel()
        with pytest.raises(CheckpointError, match=r"second\.pt was not finished"):
            await engine.commit("a")
        assert await engine.tags() == []
