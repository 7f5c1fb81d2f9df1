"""What the ranks of a job do in the tests of commits across processes."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

import aiockpt.sync
from aiockpt.agreement import Agreement
from aiockpt.catalog import Catalog
from aiockpt.errors import CheckpointError
from aiockpt.saver import Saver
from aiockpt.storage.local import LocalStorage
from aiockpt.testing.faults import Fault, Kill, inject

RING = {"host_cache_size": 8 / 1024, "parser_threads": 2, "peer_timeout_s": 30.0}


def state(rank: int, step: int = 0) -> dict[str, Any]:
    return {"w": torch.arange(1000) + 10 * rank + step, "rank": rank, "step": step}


def told(error: BaseException) -> dict[str, Any]:
    causes: list[str] = []
    cause = error.__cause__
    while cause is not None:
        causes.append(type(cause).__name__)
        cause = cause.__cause__
    return {
        "error": type(error).__name__,
        "text": str(error),
        "rank": getattr(error, "rank", None),
        "phase": getattr(error, "phase", None),
        "causes": causes,
        "notes": getattr(error, "__notes__", []),
    }


def attempt(call: Callable[[], Any]) -> Any:
    """What `call` returns, or what it raises."""
    try:
        return call()
    except CheckpointError as error:
        return told(error)


def save_all(
    engine: aiockpt.sync.CheckpointEngine, tag: str, rank: int, **options: Any
) -> Any:
    engine.create(tag, **options)
    engine.save(state(rank), f"rank{rank}.pt", tag=tag)
    report = engine.commit(tag)
    return {"files": report.num_files, "bytes": report.nbytes, "all": repr(report)}


# --- acts -------------------------------------------------------------------------


def commit(rank: int, world_size: int, root: str, counts: list[int]) -> Any:
    """Commits `counts[rank]` files."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        engine.create("a")
        for number in range(counts[rank]):
            engine.save(state(rank), f"dir{rank}/{number}.pt")
        result = attempt(lambda: repr(engine.commit("a")))
        if not any(counts):
            engine.abort("a")
        return result


def commit_alike(rank: int, world_size: int, root: str) -> Any:
    """All ranks save a file of the same name; then they do better."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        engine.create("a")
        engine.save(state(rank), "model.pt")
        first = attempt(lambda: repr(engine.commit("a")))
        return first, attempt(lambda: save_all(engine, "a", rank))


def fail(rank: int, world_size: int, root: str, at: int, step: str) -> Any:
    """Rank `at` fails at `step`; then the tag is tried again."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        save_all(engine, "before", rank)
        undo = _break(step) if rank == at else None
        first = attempt(lambda: save_all(engine, "a", rank))
        if undo is not None:
            undo()
        latest = engine.latest()
        return first, latest, attempt(lambda: save_all(engine, "a", rank))


STEPS: dict[str, tuple[type, str]] = {
    "make": (Catalog, "open_work"),
    "write": (LocalStorage, "create"),
    "publish": (Catalog, "publish"),
    "pointer": (LocalStorage, "replace"),
}


def _break(step: str) -> Callable[[], None]:
    owner, name = STEPS[step]
    original = getattr(owner, name)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise aiockpt.StorageError(28, "no space", "somewhere")

    async def refuse_later(*_args: object, **_kwargs: object) -> None:
        refuse()

    is_coroutine = asyncio.iscoroutinefunction(original)
    setattr(owner, name, refuse_later if is_coroutine else refuse)
    return lambda: setattr(owner, name, original)


MOMENTS: dict[str, tuple[type, str]] = {
    "create": (Catalog, "new_directory"),
    "file": (LocalStorage, "create"),
    "written": (Saver, "release"),
    "commit": (Agreement, "publish"),
    "decide": (Catalog, "publish"),
    "manifest": (Catalog, "_write_manifest"),
    "rename": (LocalStorage, "rename_dir"),
    "pointer": (LocalStorage, "replace"),
}


def die(rank: int, world_size: int, root: str, at: int, moment: str, when: str) -> Any:
    """Rank `at` is killed before or after a call; the others tell what they saw."""
    engine = aiockpt.sync.CheckpointEngine(root, RING)
    save_all(engine, "before", rank)
    if rank == at:
        _kill(*MOMENTS[moment], when)
    result = attempt(lambda: save_all(engine, "a", rank))
    _leave_together(f"{root}.marks", rank, world_size - 1)
    lost = attempt(engine.close)
    return result, lost


def _kill(owner: type, name: str, when: str) -> None:
    original = getattr(owner, name)

    def kill_around(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    async def kill_around_later(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    is_coroutine = asyncio.iscoroutinefunction(original)
    setattr(owner, name, kill_around_later if is_coroutine else kill_around)


def again(rank: int, world_size: int, root: str) -> Any:
    """A new job in the root: what it finds, and the same tag once more."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        latest = engine.latest()
        found = engine.load("rank0.pt")
        assert torch.equal(found["w"], state(0)["w"])
        return latest, attempt(lambda: save_all(engine, "a", rank, overwrite=True))


def be_late(rank: int, world_size: int, root: str, at: int) -> Any:
    """Rank `at` does not commit before the others have given up."""
    # The test waits that long; all must have come to create the tag by then.
    config = {**RING, "peer_timeout_s": 5.0}
    with aiockpt.sync.CheckpointEngine(root, config) as engine:
        engine.create("a")
        engine.save(state(rank), f"{rank}.pt")
        marks = f"{root}/marks"
        os.makedirs(marks, exist_ok=True)
        if rank == at:
            _await_marks(marks, world_size - 1)
        first = attempt(lambda: repr(engine.commit("a")))
        open(f"{marks}/{rank}", "w").close()
        # Not closed before: to be gone is another matter than to be late.
        _await_marks(marks, world_size)
        return first


def _await_marks(directory: str, number: int) -> None:
    while len(os.listdir(directory)) < number:
        time.sleep(0.01)  # not for an order: whoever spins holds up the others


def abort(rank: int, world_size: int, root: str, at: int) -> Any:
    """Rank `at` aborts, the others commit; then all try again."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        engine.create("a")
        engine.save(state(rank), f"{rank}.pt")
        call = (lambda: engine.abort("a")) if rank == at else (
            lambda: repr(engine.commit("a"))
        )  # fmt: skip
        first = attempt(call)
        return first, attempt(lambda: save_all(engine, "a", rank))


def replicate_again(rank: int, world_size: int, root: str) -> Any:
    """Rank 0 saves a file of all ranks, the others do not come; then all do better."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        engine.create("a")
        if rank == 0:
            engine.save(state(0), "model.pt", replicated=True)
        engine.abort("a")
        engine.create("a")
        engine.save(state(0), "model.pt", replicated=True)
        result = attempt(lambda: engine.commit("a").num_files)
        engine.create("alone")
        if rank == 0:
            engine.save(state(0), "model.pt")
        engine.commit("alone")
        return result


def replicate_refused(rank: int, world_size: int, root: str, at: int) -> Any:
    """Rank `at` has something in a state of all ranks that cannot be saved."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        engine.create("a")
        value = (lambda: 0) if rank == at else 0
        saved = attempt(
            lambda: engine.save({"x": value}, "model.pt", replicated=True) and "begun"
        )
        return saved, attempt(lambda: repr(engine.commit("a")))


def skip(rank: int, world_size: int, root: str) -> Any:
    """Rank 0 fails by itself and goes on to the next tag; the others save together."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        engine.create("a")
        if rank == 0:
            undo = _break("write")
            attempt(engine.save(state(0), "own.pt").written)
            undo()
            first = None
        else:
            engine.save(state(0), "model.pt", replicated=True)
            first = attempt(lambda: repr(engine.commit("a")))
        engine.create("b")
        engine.save(state(0), "model.pt", tag="b", replicated=True)
        second = attempt(lambda: engine.commit("b").num_files)
        attempt(lambda: engine.abort("a"))
        return first, second


def leave(rank: int, world_size: int, root: str, at: int) -> Any:
    """Rank `at` closes its engine, with the tag open."""
    engine = aiockpt.sync.CheckpointEngine(root, RING)
    engine.create("a")
    engine.save(state(rank), f"{rank}.pt")
    if rank == at:
        return attempt(engine.close)
    result = attempt(lambda: repr(engine.commit("a")))
    attempt(engine.close)
    return result


def commit_in_places(
    rank: int, world_size: int, roots: list[str], broken: int | None = None
) -> Any:
    """Each rank works in a directory of its own, under a root of the same name."""
    os.chdir(roots[rank])
    with aiockpt.sync.CheckpointEngine("runs", RING) as engine:
        before = save_all(engine, "before", rank)
        undo = _break("publish") if rank == broken else None
        first = attempt(lambda: save_all(engine, "a", rank))
        if undo is not None:
            undo()
        tags = [info.tag for info in engine.tags()]
        latest = engine.latest()
        again = (
            attempt(lambda: save_all(engine, "a", rank)) if broken is not None else 0
        )
        own = engine.load(f"rank{rank}.pt")
        path = f"rank{(rank + 1) % world_size}.pt"
        other = attempt(lambda: engine.load(path, tag="a")["rank"])
        return before, first, tags, latest, again, own["rank"], other


def save_as_job(rank: int, world_size: int, root: str, tag: str) -> Any:
    """A tag with a file of each rank."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        return save_all(engine, tag, rank)["files"]


def look_around(rank: int, world_size: int, root: str) -> Any:
    """What a job of any size finds: every tag, and what each of its files holds."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        found = {
            info.tag: {
                entry.path: engine.load(entry.path, tag=info.tag)["rank"]
                for entry in info.files
            }
            for info in engine.tags()
        }
        sizes = [info.world_size for info in engine.tags()]
        return engine.latest(), engine.load("rank0.pt")["rank"], sizes, found


def load_common(rank: int, world_size: int, root: str) -> Any:
    """Rank 1's look at `latest` is a lie; all load from the tag that rank 0 sees."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        save_all(engine, "a", rank)
        if rank == 1:
            Catalog.latest = lambda _catalog: "nowhere"
        found = engine.load(f"rank{rank}.pt")
        return found["rank"]


def load_valid(rank: int, world_size: int, root: str) -> Any:
    """The file of rank 1 in the newest tag is damaged; all fall back together."""
    with aiockpt.sync.CheckpointEngine(root, RING) as engine:
        save_all(engine, "a", rank)
        save_all(engine, "b", rank)
        if rank == 1:
            with open(f"{root}/b/rank1.pt", "r+b") as file:
                file.seek(600)
                file.write(b"\xff" * 8)
        tag, states = engine.load_latest_valid(f"rank{rank}.pt")
        return tag, states[0]["rank"]


def die_at_call(
    rank: int, world_size: int, root: str, at: int, *, nth: int, spoiled: list[Any]
) -> Any:
    """Rank `at` is killed at its nth call to the system, once "before" is published.

    `spoiled` is when, and at which calls.
    """
    engine = aiockpt.sync.CheckpointEngine(root, RING)
    save_all(engine, "before", rank)
    when, calls = spoiled
    fault = Fault(calls, Kill(when), nth=nth)
    with inject(fault) if rank == at else contextlib.nullcontext():
        told = attempt(lambda: save_all(engine, "a", rank))
        _leave_together(f"{root}.marks", rank, world_size - 1)
        lost = attempt(engine.close)
    return {"told": told, "lost": lost}


def _leave_together(marks: str, rank: int, num_ranks: int) -> None:
    """Returns when so many ranks are here: one that is gone is another's failure."""
    os.makedirs(marks, exist_ok=True)
    open(f"{marks}/{rank}", "w").close()
    _await_marks(marks, num_ranks)
