"""Keeps optimizers away from tensors that are being staged.

A torch optimizer changes tensors in `step()`. A process-wide step pre-hook makes
it wait until what was being staged has been staged; where that is not wanted, the
hook notes which saves a step came too early for (fused optimizers do not touch
the version counters by which other changes are found).

Of a save whose tensors are on devices, nobody waits longer than until all copies have
been begun: from there on, the work that the caller enqueues waits, on the device.
"""

__all__ = [
    "StagingGate",
    "before_change",
    "changing",
    "check_at_rest",
    "look_again",
]

import collections
import concurrent.futures
import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from aiockpt.capture import Capture
from aiockpt.capturing.marks import storage_ptrs
from aiockpt.errors import EngineStateError


class Staging(Protocol):
    """A save whose sources are being copied.

    Attributes:
        stall_s: Seconds that callers have been held for it.
        is_begun: Whether all copies have been begun, on devices that are at them.
    """

    stall_s: float
    is_begun: bool

    def hurry(self) -> None:
        """Somebody waits for it."""
        ...

    def follow(self) -> bool:
        """What the calling thread enqueues from now on comes after the copies.

        To be called where `is_begun`; False where the caller must wait after all.
        """
        ...

    def note_step(self, touched: set[int]) -> None:
        """An optimizer is about to change the storages at these data pointers."""
        ...


class StagingGate:
    """The saves being staged, and those who wait for them. Used from any thread."""

    def __init__(self, *, is_holding: bool) -> None:
        """With `is_holding`, `step()` waits; without, it is only watched."""
        self._is_holding = is_holding
        self._staging: dict[int, Staging] = {}
        self._changed = threading.Condition()
        self._pid = os.getpid()
        _hook.add(self)

    @property
    def _is_forked(self) -> bool:
        # What was being staged at a fork is staged by the parent, and only there.
        return os.getpid() != self._pid

    def enter(self, save: Staging) -> None:
        """From now on the sources of `save` must not change."""
        with self._changed:
            self._staging[id(save)] = save

    def look_again(self) -> None:
        """A save has set `is_begun`, or somebody was stopped: who waits for it goes on."""
        if self._is_forked:
            return  # Whoever waited, waits in the parent; so may the lock.
        with self._changed:
            self._changed.notify_all()

    def leave(self, save: Staging) -> None:
        """The sources of `save` are free. Idempotent; may block for a moment."""
        with self._changed:
            self._staging.pop(id(save), None)
            self._changed.notify_all()

    @property
    def is_staging(self) -> bool:
        """Whether anything is being staged, by this process."""
        return bool(self._staging) and not self._is_forked

    def wait(
        self,
        is_stopped: Callable[[], bool] = lambda: False,
        followed: dict[int, Staging] | None = None,
        *,
        may_follow: bool = True,
    ) -> bool:
        """Blocks the thread until everything that is being staged now has been.

        What it enqueues on its current streams afterwards is made to wait, where
        devices are still at copies.

        Args:
            is_stopped: Asked after each `look_again`; it then waits no longer.
            followed: By their `id`, saves that the thread's streams wait for already;
                those of this call are added.
            may_follow: Whether the thread's streams are what changes tensors; else it
                waits for devices itself.

        Returns:
            Whether anything was being staged, beside `followed`.
        """
        if not self._staging or self._is_forked:
            return False
        start = perf_counter()
        known = {} if followed is None else followed
        with self._changed:
            waited = [s for s in self._staging.values() if id(s) not in known]
        for save in waited:
            save.hurry()
        self._wait_for(waited, is_stopped, or_begun=may_follow)
        if may_follow and not is_stopped():
            for save in [each for each in waited if each.follow()]:
                known[id(save)] = save
        held = [save for save in waited if id(save) not in known]
        self._wait_for(held, is_stopped, or_begun=False)
        for save in waited:
            # Shared among the saves, so that the tag's sum is the time once.
            save.stall_s += (perf_counter() - start) / len(waited)
        return bool(waited)

    def _wait_for(
        self,
        saves: Sequence[Staging],
        is_stopped: Callable[[], bool],
        *,
        or_begun: bool,
    ) -> None:
        with self._changed:
            while not is_stopped() and any(
                id(save) in self._staging and not (or_begun and save.is_begun)
                for save in saves
            ):
                self._changed.wait()

    def close(self) -> None:
        """Lets everyone through, from now on."""
        _hook.remove(self)
        with self._changed:
            self._staging.clear()
            self._changed.notify_all()

    @property
    def is_holding(self) -> bool:
        """Whether optimizers wait here; else their steps are noted."""
        return self._is_holding

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to change its tensors, and nobody holds it."""
        if not self._staging or self._is_forked:
            return
        touched = storage_ptrs(_tensors(optimizer))
        with self._changed:
            for save in self._staging.values():
                save.note_step(touched)


class _Hook:
    """The one hook in torch, of all gates; it stays once it is there.

    torch goes over its hooks while they run, and an optimizer may be waiting in one: if
    another came or went meanwhile, its step would fail.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._is_registered = False
        # Replaced, never changed: a step may be going over it.
        self.gates: tuple[StagingGate, ...] = ()

    def add(self, gate: StagingGate) -> None:
        """From the next step on, optimizers ask it."""
        with self._changing:
            self.gates = (*self.gates, gate)
            if not self._is_registered:
                register_optimizer_step_pre_hook(self._before_step)
                self._is_registered = True

    def remove(self, gate: StagingGate) -> None:
        """Optimizers do not ask it any more. Idempotent."""
        with self._changing:
            self.gates = tuple(each for each in self.gates if each is not gate)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object
    ) -> None:
        before_change()
        for gate in self.gates:
            if not gate.is_holding:
                gate.note_step(optimizer)


_hook = _Hook()


def before_change(
    is_stopped: Callable[[], bool] = lambda: False, *, may_follow: bool = True
) -> None:
    """Holds back a change of tensors: a step of an optimizer, or whatever else.

    Blocks the thread until no engine of the process is staging anything, but for those
    whose guard is off; or until it is stopped, and `look_again` was called. Arguments
    are those of `StagingGate.wait`.
    """
    followed: dict[int, Staging] = {}
    has_waited = True
    # Once more, if any of them had to be waited for: another save may have begun.
    while has_waited and not is_stopped():
        has_waited = False
        for gate in _hook.gates:
            if gate.is_holding and gate.wait(
                is_stopped, followed, may_follow=may_follow
            ):
                has_waited = True


def look_again() -> None:
    """Whoever waits looks whether it has been stopped; from any thread."""
    for gate in _hook.gates:
        gate.look_again()


# How many loads are filling the storages at these data pointers.
_filled: collections.Counter[int] = collections.Counter()
_filling = threading.Lock()


def _forget_filled() -> None:
    """In a forked child nothing is being filled, and nobody holds the lock."""
    global _filling  # noqa: PLW0603 - the lock may be held for ever
    _filled.clear()
    _filling = threading.Lock()


os.register_at_fork(after_in_child=_forget_filled)


@contextmanager
def changing(
    tensors: Iterable[torch.Tensor], check: Callable[[], object] = lambda: None
) -> Generator[None]:
    """Within, a load fills tensors: it waits as a step does, and none can be saved.

    Where a save came in between, or the guard is off, that save finds itself torn: the
    tensors' version counters are raised before the first byte is written.

    Args:
        tensors: What is filled.
        check: Raises where the load has been stopped, which also ends the waiting.
    """

    def is_stopped() -> bool:
        try:
            check()
        except concurrent.futures.CancelledError:
            return True
        return False

    tensors = list(tensors)
    pointers = storage_ptrs(tensors)
    with _filling:
        _filled.update(pointers)
    try:
        # It fills them on streams of its own.
        before_change(is_stopped, may_follow=False)
        check()
        for tensor in tensors:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        yield
    finally:
        with _filling:
            _filled.subtract(pointers)
            for pointer in [each for each in pointers if not _filled[each]]:
                del _filled[pointer]


def check_at_rest(capture: Capture) -> None:
    """Returns if no load is filling any tensor of a state.

    Raises:
        EngineStateError: One is; the message names the key.
    """
    if not _filled:
        return
    with _filling:
        filled = set(_filled)
    for tensor in capture.tensors:
        if filled & storage_ptrs([tensor]):
            key = capture.key_of(tensor)
            raise EngineStateError(f"{key} is being filled by a load: await that first")


def _tensors(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        for value in state.values() if isinstance(state, Mapping) else ():
            if isinstance(value, torch.Tensor):
                yield value
