"""The blocking door: the same engine, with or without a loop, under Ctrl-C, at exit."""

import inspect
import threading

import pytest
import torch

import aiockpt
import aiockpt.sync
from aiockpt import EngineStateError, StorageError, saver
from aiockpt.sync import CheckpointEngine
from gates import RING_8_MIB, happened, in_thread, run_script

STATE = {"w": torch.arange(9 << 18), "step": 7}


def checkpoint_in(root) -> None:
    """Uses every method of the blocking engine."""
    with CheckpointEngine(root, RING_8_MIB) as engine:
        assert engine.root == str(root)
        assert engine.latest() is None
        for tag in ("a", "b", "c"):
            engine.create(tag)
            handle = engine.save(STATE, "model.pt")
            handle.staged()
            engine.staged()
            engine.wait_staged()
            handle.written()
            assert handle.progress.written_bytes == handle.progress.planned_bytes
            report = engine.commit(tag)
            assert (report.tag, report.num_files) == (tag, 1)
        engine.create("dropped")
        engine.abort("dropped")
        engine.delete("b")
        assert engine.latest() == "c"
        assert [info.tag for info in engine.tags()] == ["a", "c"]
        assert engine.sweep() == []
        loaded = engine.load("model.pt", tag="a")
        assert engine.ring_bytes == (0, 8 << 20)
    assert torch.equal(loaded["w"], STATE["w"])
    engine.close()


def test_it_works_with_no_loop(root):
    checkpoint_in(root)


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_it_works_under_a_running_loop(root):
    checkpoint_in(root)


async def test_it_works_in_another_thread_beside_a_running_loop(root):
    thread = in_thread(lambda: checkpoint_in(root))
    await happened(thread)
    thread.result()


async def test_one_file_is_saved_and_loaded_under_a_running_loop(tmp_path):
    aiockpt.sync.save(STATE, tmp_path / "one.pt")
    loaded = aiockpt.sync.load(tmp_path / "one.pt")
    assert torch.equal(loaded["w"], STATE["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["one.pt"]


@pytest.mark.parametrize("name", ["CheckpointEngine", "SaveHandle"])
def test_both_doors_have_the_same_methods_and_parameters(name):
    def signatures(door: type) -> dict[str, object]:
        return {
            {"aclose": "close"}.get(name, name): inspect.signature(value).parameters
            for name, value in vars(door).items()
            if inspect.isfunction(value) and not name.startswith("_")
        }

    blocking = getattr(aiockpt.sync, name)
    assert signatures(blocking) == signatures(getattr(aiockpt, name))


def test_errors_are_those_of_the_other_door(root, monkeypatch):
    def fail(*_: object) -> None:
        raise StorageError(5, "injected", "f")

    monkeypatch.setattr(saver, "make_plan", fail)
    with CheckpointEngine(root) as engine:
        with pytest.raises(EngineStateError, match="no tag is open"):
            engine.save({}, "model.pt")
        engine.create("a")
        handle = engine.save({}, "model.pt")
        for wait in (handle.staged, handle.written, engine.staged):
            with pytest.raises(StorageError, match="injected"):
                wait()
        with pytest.raises(StorageError, match="injected"):
            engine.commit("a")


def test_closing_names_a_tag_that_was_not_committed(root):
    engine = CheckpointEngine(root)
    engine.create("a")
    with pytest.raises(EngineStateError, match=r"'a'.*never committed"):
        engine.close()
    engine.close()
    with pytest.raises(EngineStateError, match="has been closed"):
        engine.create("b")
    with pytest.raises(EngineStateError, match="has been closed"):
        engine.__enter__()


def test_an_error_of_the_body_is_not_masked(root):
    with pytest.raises(ZeroDivisionError) as raised:
        with CheckpointEngine(root) as engine:
            engine.create("half-done")
            raise ZeroDivisionError
    assert "'half-done'" in "".join(raised.value.__notes__)


def test_an_engine_whose_entry_fails_is_closed(root, monkeypatch):
    def fail(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("aiockpt.catalog.Catalog.sweep_if_any", fail)
    # An engine of the test before may still be on its way out.
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        CheckpointEngine(root).__enter__()
    started = set(threading.enumerate()) - before
    assert "aiockpt-engine" not in {thread.name for thread in started}


# --- in a process of its own -------------------------------------------------------

PRELUDE = """
import atexit, os, signal, sys, threading
import torch, aiockpt, aiockpt.sync
from aiockpt import attempt, catalog, loop_thread
from aiockpt.storage import local_write

LIMIT_S = 120
root = sys.argv[1]
state = {"w": torch.arange(9 << 18)}
gate = threading.Event()

def signalling(owner, name):
    called, original = threading.Event(), getattr(owner, name)
    def call(*args, **kwargs):
        called.set()
        return original(*args, **kwargs)
    setattr(owner, name, call)
    return called

def hold(owner, name):
    reached, original = threading.Event(), getattr(owner, name)
    def call(*args, **kwargs):
        reached.set()
        assert gate.wait(LIMIT_S)
        return original(*args, **kwargs)
    setattr(owner, name, call)
    return reached

engine = aiockpt.sync.CheckpointEngine(root, {"host_cache_size": 8 / 1024})
"""


def lines(script: str, root) -> list[str]:
    done = run_script(PRELUDE + script, root)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_ctrl_c_ends_a_commit_that_waits_and_leaves_the_tag_open(root):
    script = """
writing = hold(local_write.LocalWriteFile, "_write")
waiting = signalling(attempt.Attempt, "_seal")

def press_ctrl_c():
    assert writing.wait(LIMIT_S) and waiting.wait(LIMIT_S)
    os.kill(os.getpid(), signal.SIGINT)

with engine:
    engine.create("a")
    handle = engine.save(state, "model.pt")
    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    try:
        engine.commit("a")
    except KeyboardInterrupt as interrupt:
        print("interrupted", getattr(interrupt, "__notes__", []))
    thread.join()
    print(engine.latest(), handle.progress.written_bytes)
    gate.set()
    engine.commit("a")
    print(torch.equal(engine.load("model.pt")["w"], state["w"]), engine.ring_bytes[0])
print([thread.name for thread in threading.enumerate()])
"""
    assert lines(script, root) == [
        "interrupted []",
        "None 0",
        "True 0",
        "['MainThread']",
    ]


def test_ctrl_c_before_a_commit_is_waited_for_ends_it_too(root):
    script = """
writing = hold(local_write.LocalWriteFile, "_write")
waiting = signalling(attempt.Attempt, "_seal")
spawn = loop_thread.LoopThread.spawn

def press_ctrl_c(thread, work):
    loop_thread.LoopThread.spawn = spawn
    call = spawn(thread, work)
    assert writing.wait(LIMIT_S) and waiting.wait(LIMIT_S)
    os.kill(os.getpid(), signal.SIGINT)
    return call

with engine:
    engine.create("a")
    engine.save(state, "model.pt")
    loop_thread.LoopThread.spawn = press_ctrl_c
    try:
        engine.commit("a")
    except KeyboardInterrupt:
        print("interrupted")
    engine.save(state, "not being committed any more.pt")
    gate.set()
    print(engine.latest(), engine.commit("a").num_files)
"""
    assert lines(script, root) == ["interrupted", "None 2"]


def test_ctrl_c_lets_a_publication_finish_and_says_so(root):
    script = """
publishing = hold(catalog.Catalog, "publish")
cancelled = signalling(loop_thread.Call, "_cancel")

def press_ctrl_c():
    assert publishing.wait(LIMIT_S)
    os.kill(os.getpid(), signal.SIGINT)
    assert cancelled.wait(LIMIT_S)
    gate.set()

thread = threading.Thread(target=press_ctrl_c)
try:
    with engine:
        engine.create("a")
        engine.save(state, "model.pt")
        thread.start()
        engine.commit("a")
except KeyboardInterrupt as interrupt:
    print(interrupt.__notes__)
thread.join()
print(torch.equal(torch.load(root + "/a/model.pt")["w"], state["w"]))
print([thread.name for thread in threading.enumerate()])
"""
    assert lines(script, root) == [
        "['the operation completed before the cancellation']",
        "True",
        "['MainThread']",
    ]


EXITS = {
    "sync": """
engine.create("kept")
engine.save(state, "model.pt")
engine.commit("kept")
engine.create("lost")
engine.save(state, "model.pt")
""",
    "async": """
import asyncio
engine.close()
engine = aiockpt.CheckpointEngine(root)

async def main():
    await engine.create("kept")
    await engine.save(state, "model.pt")
    await engine.commit("kept")
    await engine.create("lost")
    await engine.save(state, "model.pt")

asyncio.run(main())
""",
}


@pytest.mark.parametrize("script", EXITS.values(), ids=EXITS)
def test_an_exit_without_close_reports_what_was_not_committed(script, root):
    done = run_script(PRELUDE + script, root)
    assert done.returncode == 0
    assert f"the engine for {root} was never closed" in done.stderr
    assert "tag 'lost' was saved into but never committed" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert list((root / ".aiockpt" / "work").iterdir()) == []
    assert (root / "latest").read_text() == "kept\n"
    assert torch.equal(torch.load(root / "kept" / "model.pt")["w"], STATE["w"])


def test_an_exit_without_close_waits_for_a_commit_under_way(root):
    script = """
writing = hold(local_write.LocalWriteFile, "_write")
waiting = signalling(attempt.Attempt, "_seal")
engine.create("a")
engine.save(state, "model.pt")
threading.Thread(target=engine.commit, args=("a",), daemon=True).start()
assert writing.wait(LIMIT_S) and waiting.wait(LIMIT_S)
# Called first at exit, before the engine is drained.
atexit.register(gate.set)
"""
    done = run_script(PRELUDE + script, root)
    assert done.returncode == 0
    assert done.stderr == f"the engine for {root} was never closed\n"
    assert torch.equal(torch.load(root / "a" / "model.pt")["w"], STATE["w"])


def test_a_forked_child_exits_quietly_and_harms_nothing(root):
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads
with engine:
    engine.create("a")
    engine.save(state, "model.pt")
    child = os.fork()
    if child == 0:
        try:
            engine.close()
        except aiockpt.EngineStateError:
            sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    engine.commit("a")
    print(torch.equal(engine.load("model.pt")["w"], state["w"]))
"""
    assert lines(script, root) == ["7", "True"]
