"""`aiockpt.guard.StagingGate`: who waits for what is being staged, and for how long."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
import torch

from aiockpt import guard
from aiockpt.guard import StagingGate
from gates import LIMIT_S, in_thread, num_held


class Save:
    """What the gate sees of a save."""

    def __init__(self) -> None:
        self.stall_s = 0.0
        self.is_free = False
        self.is_begun = False
        self.num_hurried = 0
        self.touched: list[set[int]] = []

    def hurry(self) -> None:
        self.num_hurried += 1

    def follow(self) -> bool:
        return self.is_begun

    def note_step(self, touched: set[int]) -> None:
        self.touched.append(touched)


@pytest.fixture
def gate() -> Iterator[StagingGate]:
    gate = StagingGate(is_holding=True)
    yield gate
    gate.close()


@pytest.fixture
def watching_gate() -> Iterator[StagingGate]:
    gate = StagingGate(is_holding=False)
    yield gate
    gate.close()


def entered(gate: StagingGate, num_saves: int = 1) -> list[Save]:
    saves = [Save() for _ in range(num_saves)]
    for save in saves:
        gate.enter(save)
    return saves


def held_at(
    gate: StagingGate, wait: Callable[[], object], number: int = 1
) -> Future[object]:
    """Calls `wait` on a thread; returns once that is the thread held as `number`."""
    waiting = in_thread(wait)
    while not waiting.done() and num_held(gate) < number:
        pass
    assert not waiting.done()
    return waiting


def sgd() -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)
    return torch.optim.SGD([parameter], lr=1.0, momentum=0.5)


# --- waiting --------------------------------------------------------------------------


def test_nobody_waits_where_nothing_is_staged(gate):
    gate.wait()
    (save,) = entered(gate)
    gate.leave(save)
    gate.wait()
    assert save.stall_s == 0


def test_a_caller_waits_for_all_that_was_being_staged(gate):
    first, second = entered(gate, 2)
    waiting = held_at(gate, gate.wait)
    gate.leave(first)
    # Woken, it looks and waits again.
    while not waiting.done() and not num_held(gate):
        pass
    assert not waiting.done()
    gate.leave(second)
    waiting.result(LIMIT_S)


def test_a_caller_does_not_wait_for_what_came_later(gate):
    (save,) = entered(gate)
    waiting = held_at(gate, gate.wait)
    (later,) = entered(gate)
    gate.leave(save)
    waiting.result(LIMIT_S)
    assert later.stall_s == 0
    gate.leave(later)


def test_everyone_who_waits_is_let_through(gate):
    (save,) = entered(gate)
    waiting = [held_at(gate, gate.wait, number) for number in range(1, 6)]
    gate.leave(save)
    for waiter in waiting:
        waiter.result(LIMIT_S)


def test_a_save_may_leave_twice_or_without_having_entered(gate):
    (save,) = entered(gate)
    gate.leave(Save())
    gate.leave(save)
    gate.leave(save)
    gate.wait()


def test_an_interrupted_caller_leaves_the_gate_usable(gate, monkeypatch):
    (save,) = entered(gate)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gate._changed, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gate.wait()
    in_thread(lambda: gate.leave(save)).result(LIMIT_S)
    gate.wait()


def test_closing_lets_everyone_through(gate):
    entered(gate, 2)
    waiting = held_at(gate, gate.wait)
    gate.close()
    waiting.result(LIMIT_S)
    gate.wait()


@pytest.mark.parametrize("is_holding", [True, False])
def test_a_forked_child_is_not_concerned(is_holding, monkeypatch):
    gate = StagingGate(is_holding=is_holding)
    (save,) = entered(gate)
    with monkeypatch.context() as patch:
        patch.setattr(guard.os, "getpid", lambda: -1)
        gate.wait()
        sgd().step()
    assert save.touched == []
    gate.close()


# --- the time that callers are held ---------------------------------------------------


def test_the_time_is_counted_once_and_shared_among_the_saves(gate, monkeypatch):
    clock = iter([10.0, 16.0, 16.0, 16.0])
    monkeypatch.setattr(guard, "perf_counter", lambda: next(clock))
    saves = entered(gate, 3)
    waiting = held_at(gate, gate.wait)
    for save in saves:
        gate.leave(save)
    waiting.result(LIMIT_S)
    assert [save.stall_s for save in saves] == [2.0, 2.0, 2.0]


# --- optimizers -----------------------------------------------------------------------


def test_a_step_of_any_optimizer_waits(gate):
    (save,) = entered(gate)
    optimizer = sgd()
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    stepping = held_at(gate, optimizer.step)
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)
    gate.leave(save)
    stepping.result(LIMIT_S)
    assert not torch.equal(optimizer.param_groups[0]["params"][0], before)
    assert save.touched == []


def test_a_gate_that_only_watches_tells_the_saves_what_a_step_touches(watching_gate):
    gone, save = entered(watching_gate, 2)
    watching_gate.leave(gone)
    optimizer = sgd()
    optimizer.step()
    optimizer.step()
    (parameter,) = optimizer.param_groups[0]["params"]
    momentum = optimizer.state[parameter]["momentum_buffer"]
    pointers = [t.untyped_storage().data_ptr() for t in (parameter, momentum)]
    # The first step is what makes the momentum.
    assert save.touched == [{pointers[0]}, set(pointers)]
    assert gone.touched == []
    assert save.stall_s == 0


@pytest.mark.parametrize(
    "parameter",
    [
        torch.zeros(0),
        torch.zeros(3, device="meta"),
        torch.zeros(3).to_sparse(),
    ],
)
def test_a_step_goes_on_whatever_the_parameters_are(watching_gate, parameter):
    (save,) = entered(watching_gate)
    optimizer = torch.optim.SGD([torch.nn.Parameter(parameter)])
    optimizer.state["step of all"] = 3
    optimizer.step()
    assert save.touched == [set()]


@pytest.mark.parametrize("is_holding", [True, False])
def test_a_closed_gate_has_nothing_to_do_with_steps_any_more(is_holding):
    gate = StagingGate(is_holding=is_holding)
    gate.close()
    gate.close()
    (save,) = entered(gate)
    sgd().step()
    assert save.touched == []


# --- all at once ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_held_for_ever_or_let_through_too_early(gate, seed):
    """Threads stage and wait as they like, in orders that are drawn."""
    start = threading.Barrier(6)

    def stage(rng: random.Random) -> None:
        start.wait(LIMIT_S)
        for _ in range(100):
            (save,) = entered(gate)
            for _ in range(rng.randrange(4)):
                time.sleep(0)
            save.is_free = True
            gate.leave(save)

    def wait() -> None:
        start.wait(LIMIT_S)
        for _ in range(100):
            with gate._changed:
                staged = list(gate._staging.values())
            gate.wait()
            assert all(save.is_free for save in staged)

    threads = [
        in_thread(lambda s=s: stage(random.Random(f"{seed} {s}"))) for s in range(3)
    ]
    threads += [in_thread(wait) for _ in range(3)]
    for thread in threads:
        thread.result(LIMIT_S)
    assert gate._staging == {}


@pytest.mark.parametrize("change", ["come", "go"])
def test_a_step_that_waits_goes_on_whichever_gates_come_and_go_meanwhile(gate, change):
    # It is asked after the one that the step waits in.
    other = StagingGate(is_holding=True)
    (save,) = entered(gate)
    optimizer = sgd()
    stepping = held_at(gate, optimizer.step)
    if change == "come":
        newest = StagingGate(is_holding=True)
    else:
        other.close()
    gate.leave(save)
    stepping.result(LIMIT_S)
    (parameter,) = optimizer.param_groups[0]["params"]
    assert parameter.tolist() == [-1.0] * 4
    if change == "come":
        newest.close()
        other.close()


def test_what_changes_tensors_without_a_step_waits_as_one_does(gate):
    (save,) = entered(gate)
    changing = held_at(gate, guard.before_change)
    assert not changing.done()
    gate.leave(save)
    changing.result(LIMIT_S)


@pytest.mark.parametrize("is_other", [False, True], ids=["same gate", "other gate"])
def test_what_begins_to_be_staged_while_a_step_waits_is_waited_for(gate, is_other):
    other = StagingGate(is_holding=True) if is_other else gate
    (first,) = entered(gate)
    stepping = held_at(gate, guard.before_change)
    (second,) = entered(other)
    gate.leave(first)
    while not stepping.done() and not num_held(other):
        time.sleep(0)
    assert not stepping.done()
    other.leave(second)
    stepping.result(LIMIT_S)
    if is_other:
        other.close()


def test_a_save_that_is_followed_is_waited_for_once(gate):
    (save,) = entered(gate)
    save.is_begun = True
    guard.before_change()
    assert save.num_hurried == 1
    gate.leave(save)


def test_what_changes_tensors_goes_on_where_steps_do(watching_gate):
    entered(watching_gate)
    guard.before_change()


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_compiled_step_waits_where_it_was_compiled_without_need(gate, monkeypatch):
    waits: list[int] = []

    def note(gate: StagingGate, *_: object, **__: object) -> None:
        waits.extend([len(gate._staging)] if gate._staging else [])

    monkeypatch.setattr(StagingGate, "wait", note)
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    step = torch.compile(torch.optim.SGD([weight]).step, backend="eager")
    for _ in range(2):
        step()
    assert waits == []
    saves = entered(gate)
    step()
    assert waits == [1]
    gate.leave(saves[0])
    step()
    assert waits == [1]
