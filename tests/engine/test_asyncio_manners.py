"""The engine on asyncio: any loop, any number of tasks, errors told once, a clean end."""

import asyncio
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from aiockpt import (
    CheckpointEngine,
    events,
)
from aiockpt.attempt import Attempt
from aiockpt.catalog import Catalog
from aiockpt.staging import host
from aiockpt.storage.local_write import LocalWriteFile
from gates import (
    LIMIT_S,
    RING_8_MIB,
    happened,
    held,
    in_thread,
    quietly,
    run_script,
    turns,
)
from optimizers import training

STATE = {"w": torch.arange(5 << 20, dtype=torch.float32), "step": 7}
every_loop = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


@every_loop
async def test_a_save_goes_on_while_the_callers_loop_is_blocked(root):
    is_written, is_published = threading.Event(), threading.Event()

    def observer(event: events.Event) -> None:
        if isinstance(event, events.Written):
            is_written.set()
        if isinstance(event, events.Published):
            is_published.set()

    async with CheckpointEngine(root, RING_8_MIB, observers=[observer]) as engine:
        await engine.create("a")
        await engine.save(STATE, "model.pt")
        assert is_written.wait(LIMIT_S)
        async with asyncio.TaskGroup() as group:
            commit = group.create_task(engine.commit("a"))
            # One turn begins the commit; in a second one it could end.
            await turns(1)
            assert is_published.wait(LIMIT_S)
            assert not commit.done()
        loaded = await engine.load("model.pt")
    assert torch.equal(loaded["w"], STATE["w"])


@every_loop
async def test_any_number_of_tasks_and_loops_await_the_same_things(root, monkeypatch):
    async def wait_for_all(engine: CheckpointEngine, handle: Any) -> set[Any]:
        async with asyncio.TaskGroup() as group:
            for wait in (engine.staged, handle.staged, handle.written):
                for _ in range(10):
                    group.create_task(wait())
            commits = [group.create_task(engine.commit("a")) for _ in range(10)]
        return {task.result() for task in commits}

    def on_other_loop() -> set[Any]:
        return asyncio.run(wait_for_all(engine, handle))

    commits: list[int] = []
    commit = Attempt.commit

    async def noted(attempt: Attempt, number: int) -> None:
        commits.append(number)
        await commit(attempt, number)

    monkeypatch.setattr(Attempt, "commit", noted)
    seen: list[events.Event] = []
    async with CheckpointEngine(root, RING_8_MIB, observers=[seen.append]) as engine:
        await engine.create("a")
        with held(monkeypatch, Catalog, "publish") as gate:
            handle = await engine.save(STATE, "model.pt")
            others = [in_thread(on_other_loop) for _ in range(3)]
            async with asyncio.TaskGroup() as group:
                here = group.create_task(wait_for_all(engine, handle))
                await gate.reached()
                # Every commit must have come before the first one ends.
                while len(commits) < 4 * 10:
                    await turns()
                gate.open()
        for other in others:
            await happened(other)
        reports = here.result().union(*(other.result() for other in others))
    assert len(reports) == 1
    assert [type(event).__name__ for event in seen].count("Published") == 1


def test_an_engine_may_be_used_from_one_loop_after_the_other(root):
    engine = CheckpointEngine(root, RING_8_MIB)
    asyncio.run(engine.create("a"))
    handle = asyncio.run(engine.save({"n": 1}, "model.pt"))
    asyncio.run(handle.written())
    assert asyncio.run(engine.commit("a")).num_files == 1
    assert asyncio.run(engine.load("model.pt")) == {"n": 1}
    asyncio.run(engine.aclose())


async def test_tags_may_be_created_saved_and_committed_by_concurrent_tasks(root):
    async def checkpoint(number: int) -> None:
        await engine.create(f"step-{number}")
        await engine.save({"n": number}, "model.pt", tag=f"step-{number}")
        await engine.commit(f"step-{number}")

    async with CheckpointEngine(root, RING_8_MIB) as engine:
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(checkpoint(number))
        assert len(await engine.tags()) == 20
        for number in range(20):
            state = await engine.load("model.pt", tag=f"step-{number}")
            assert state == {"n": number}


async def test_one_of_several_concurrent_creates_opens_the_tag(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(quietly(engine.create("a"))) for _ in range(10)]
        outcomes = [task.result() for task in tasks]
        assert outcomes.count(None) == 1
        refused = [error for error in outcomes if error is not None]
        assert all("'a' is open already" in str(error) for error in refused)
        await engine.abort("a")


async def calls(engine: CheckpointEngine, handle: Any) -> dict[str, str]:
    """What comes of each method of an engine that must not be used."""
    methods: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "enter": engine.__aenter__,
        "create": lambda: engine.create("b"),
        "save": lambda: engine.save({}, "f.pt"),
        "staged": engine.staged,
        "commit": lambda: engine.commit("a"),
        "abort": lambda: engine.abort("a"),
        "load": lambda: engine.load("f.pt"),
        "latest": engine.latest,
        "tags": engine.tags,
        "delete": lambda: engine.delete("a"),
        "sweep": engine.sweep,
        "handle.staged": handle.staged,
        "handle.written": handle.written,
        "wait_staged": lambda: as_coroutine(engine.wait_staged),
    }
    return {name: repr(await quietly(method())) for name, method in methods.items()}


async def as_coroutine(call: Callable[[], object]) -> object:
    return call()


async def test_an_engine_that_was_closed_says_so(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        handle = await engine.save({}, "f.pt")
        await engine.commit("a")
    for name, outcome in (await calls(engine, handle)).items():
        assert outcome.startswith("EngineStateError("), name
        assert "has been closed" in outcome, name


def in_child(work: Callable[[], object]) -> str:
    """What `work` returns in a forked child, as text."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Later versions of Python warn of a fork with threads, the case at hand.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(LIMIT_S))
            os.write(writer, repr(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    return text


def test_an_engine_says_so_in_a_forked_child_and_goes_on_in_the_parent(
    root, monkeypatch
):
    trained = training("AdamW-loop")
    engine = CheckpointEngine(root, RING_8_MIB)
    asyncio.run(engine.create("a"))

    def child() -> dict[str, str]:
        trained.optimizer.step()
        outcomes = asyncio.run(calls(engine, handle))
        return outcomes | {"aclose": repr(asyncio.run(quietly(engine.aclose())))}

    with held(monkeypatch, host, "_fill") as gate:
        handle = asyncio.run(engine.save(trained.state(), "model.pt"))
        gate.wait_reached()
        outcomes = eval(in_child(child))  # noqa: S307 - our own repr
    assert len(outcomes) == 15
    for name, outcome in outcomes.items():
        assert outcome.startswith("EngineStateError("), name
        assert "parent process" in outcome, name
    asyncio.run(engine.commit("a"))
    asyncio.run(engine.aclose())
    assert torch.load(root / "a" / "model.pt").keys() == {"model", "optimizer"}


async def test_tensors_are_let_go_of_once_staged(root, monkeypatch):
    tensor = torch.ones(1000)
    gone = weakref.ref(tensor)
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with held(monkeypatch, LocalWriteFile, "_write"):
            handle = await engine.save({"w": tensor}, "model.pt")
            del tensor
            await handle.staged()
            await turns()
            assert gone() is None
        await engine.commit("a")


USE = """
import asyncio, logging, sys, torch, aiockpt

# Below: "took 0.2 s", which is the machine's fault.
logging.getLogger("asyncio").setLevel(logging.ERROR)

async def main(root):
    state = {"w": torch.arange(5 << 20)}
    async with aiockpt.CheckpointEngine(root, {"host_cache_size": 8 / 1024}) as engine:
        for tag in "ab":
            await engine.create(tag)
            await engine.save(state, "model.pt")
            await engine.staged()
            await engine.commit(tag)
        assert torch.equal((await engine.load("model.pt"))["w"], state["w"])
        await engine.delete("a")
    await aiockpt.save(state, root + "/one.pt")
    assert torch.equal((await aiockpt.load(root + "/one.pt"))["w"], state["w"])

def uvloop_run(work):
    import uvloop
    uvloop.run(work)

{run}(main(sys.argv[1]))
"""


@pytest.mark.parametrize("run", ["asyncio.run", "uvloop_run"])
def test_python_in_development_mode_finds_nothing_to_warn_of(run, root):
    options = ("-X", "dev", "-W", "error")
    done = run_script(USE.replace("{run}", run), root, options=options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
