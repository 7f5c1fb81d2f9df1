"""Rows 11 and 12: no memory, or no end to a call, costs nobody but who needs it."""

import asyncio
import functools
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from aiockpt import CheckpointEngine, saver
from aiockpt.checksums import Checksums
from aiockpt.errors import CheckpointError
from aiockpt.staging import host
from aiockpt.testing.faults import Delay, Fault, inject
from aiockpt.testing.roots import assert_root_consistent
from aiockpt.testing.system_calls import Moment
from faults.driver import (
    ALL_WORKLOADS,
    Outcome,
    assert_survived,
    go_on,
    link_root,
    published_seeds,
)
from faults.places import MIB, cgroup, has_cgroups
from gates import LIMIT_S, RING_8_MIB, happened, in_thread
from workloads import SMALL, Engine, content, state

# --- row 11: no memory ------------------------------------------------------------


# These need no memory; what they return to, could not do without them.
GIVING_BACK = {"close", "flock", "unlink", "rmdir"}


class NoMemoryAt:
    """The n-th of the steps that need memory finds none.

    Attributes:
        failed: The step, if it was reached.
    """

    def __init__(self, nth: int) -> None:
        self.failed: object = None
        self._nth = nth
        self._counter = itertools.count(1)
        self._lock = threading.Lock()

    def step(self, what: object) -> None:
        """Raises if it is this one."""
        with self._lock:
            if next(self._counter) == self._nth:
                self.failed = what
                raise MemoryError(f"no memory for {what}")


@contextmanager
def no_memory(patch: pytest.MonkeyPatch, at: NoMemoryAt) -> Iterator[None]:
    """Planning, copying, summing and every call to the system may lack memory."""
    steps = [(saver, "make_plan"), (host, "_fill"), (Checksums, "seal")]

    def call(moment: Moment) -> object:
        if moment.name not in GIVING_BACK:
            at.step(moment)
        return moment.make()

    with patch.context() as context:
        for owner, name in steps:
            context.setattr(owner, name, _failing(at, getattr(owner, name)))
        with inject(Fault((), call, num_times=float("inf"))):
            yield


def _failing(at: NoMemoryAt, function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        at.step(function.__qualname__)
        return function(*args, **kwargs)

    return run


def run(root, name: str) -> Outcome:
    """As the driver's; what is raised may also be `MemoryError`, bare."""
    outcome = Outcome()
    engine = Engine(root, SMALL)
    for step in (lambda: ALL_WORKLOADS[name].work(engine), engine.close):
        try:
            step()
            outcome.is_done = outcome.is_done or step != engine.close
        except (CheckpointError, MemoryError) as error:
            outcome.errors.append(error)
    return outcome


@pytest.mark.parametrize("name", ["save", "overwrite the latest"])
def test_a_lack_of_memory_anywhere_fails_by_name_and_loses_nothing(
    cases, template, monkeypatch, name
):
    for nth in itertools.count(1):
        root = link_root(template)
        at = NoMemoryAt(nth)
        with no_memory(monkeypatch, at):
            outcome = run(root, name)
        if at.failed is None:
            break
        with cases.case(11, "MemoryError", f"{name}, {at.failed}"):
            for error in outcome.errors:
                assert "no memory for" in f"{error!r} {error.__cause__!r}", repr(error)
            assert_survived(root, name, outcome, may_stay=False)
    assert nth > 50


def test_a_process_that_is_killed_for_want_of_memory_loses_nothing(
    cases, as_root, server, tmp_path
):
    has_cgroups("memory", cases)
    limit = {"memory.limit_in_bytes": 200 * MIB}
    for number in range(cases.pick(2, 40)):
        root = tmp_path / str(number)
        with cgroup("memory", limit) as group:
            # Each time it comes as far as another number of tags.
            num_bytes = (20 + number % 20) * MIB
            request = {"root": str(root), "group": str(group), "num_bytes": num_bytes}
            told = server.ask("starve", **request)
        with cases.case(11, "SIGKILL by the kernel", f"{number}: {told}"):
            *acked, status = told
            assert status == -signal.SIGKILL
            assert acked
            published = published_seeds(root)
            assert [*published][: len(acked)] == acked
            assert len(published) <= len(acked) + 1
            go_on(root, published, has_failed=True)


# --- row 12: a call that does not end ---------------------------------------------

SLOW = {
    "create": "new",
    "fallocate": "model.pt",
    "pwrite": "model.pt",
    "fsync": "model.pt",
    "close": "model.pt",
    "write": "manifest.json",
    "rename": "",
    "flock": "/lock",
}


@pytest.mark.parametrize("call", SLOW)
async def test_a_hung_call_holds_up_no_loop_no_training_and_no_other_reader(
    cases, template, call
):
    root = link_root(template)
    disk, is_hung = threading.Event(), threading.Event()

    def hang() -> None:
        is_hung.set()
        assert disk.wait(LIMIT_S)

    path = SLOW[call] if call != "create" else "model.pt"
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("new")
        with inject(Fault(call, Delay(hang), path=path)):
            with cases.case(12, "a hung call", call):
                await engine.save(state(3), "model.pt")
                committing = asyncio.ensure_future(engine.commit("new"))
                await happened(in_thread(is_hung.wait))
                # The trainer goes on: its state fits the ring, and is staged.
                await engine.staged("new")
                await happened(in_thread(engine.wait_staged))
                # So does the engine's loop, and with it all that needs no such call.
                await engine._runtime.spawn(_turns_of_the_loop()).wait()
                if call not in {"write", "rename", "flock"}:
                    # The one thread that changes tags is not the one that hangs.
                    assert await engine.latest() == "old"
                assert not committing.done()
                disk.set()
                await committing
                loaded = await engine.load("model.pt", tag="new")
                assert content(loaded) == content(state(3))
    await happened(in_thread(lambda: assert_root_consistent(root, is_swept=True)))


async def _turns_of_the_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
