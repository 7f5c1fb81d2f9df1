"""Makes the n-th call to the system fail, fall short, lie, wait, or be the last.

    with inject(Fault("fsync", Fail(errno.EIO), path="model.pt")) as injection:
        with pytest.raises(aiockpt.StorageError):
            await engine.commit("step-100")
    assert injection.spoiled

Calls are named as the kernel names them: `open`, `create` (an `open` that makes the
file), `mkdir`, `fallocate`, `write`, `pwrite`, `pread`, `sync_file_range`,
`ftruncate`, `fsync`, `close`, `link`, `copy`, `rename`, `exchange`, `unlink`, `rmdir`,
`scandir`, `stat`, `lstat`, `fstat`, `statvfs` and `flock`.

What is injected holds for every engine of the process, and for local storage only.
"""

__all__ = [
    "Action",
    "Delay",
    "Fail",
    "Fault",
    "FlipBit",
    "Injection",
    "Kill",
    "Lie",
    "Short",
    "inject",
]

import contextlib
import mmap
import os
import signal
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from aiockpt.errors import InvalidArgumentError
from aiockpt.testing.system_calls import CALL_NAMES, Call, Moment, tapped

Action = Callable[[Moment], object]
"""What is done in a call's place; it returns what the call should have returned."""

_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Fault:
    """Some calls, and what becomes of them.

    Attributes:
        calls: Name of the calls, or names; of all calls where there are none.
        action: What is done in their place.
        path: A part of the path that they are about.
        nth: The first of the calls above that is spoiled, counted from 1.
        num_times: How many are, from there on; `math.inf`: all.

    Raises:
        InvalidArgumentError: There is no call of that name: nothing would ever be spoiled.
    """

    calls: str | Collection[str]
    action: Action
    path: str = ""
    nth: int = 1
    num_times: float = 1

    def __post_init__(self) -> None:
        """Looks at the names."""
        unknown = sorted({*self._names} - CALL_NAMES)
        if unknown:
            message = f"no call is named {unknown}; there are {sorted(CALL_NAMES)}"
            raise InvalidArgumentError(message)

    @property
    def _names(self) -> Collection[str]:
        return (self.calls,) if isinstance(self.calls, str) else self.calls

    def concerns(self, moment: Moment) -> bool:
        """Whether a call counts for this fault."""
        names = self._names
        return (not names or moment.name in names) and self.path in moment.path


# --- actions ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fail:
    """The call does nothing and fails.

    Attributes:
        errno: With this number.
    """

    errno: int

    def __call__(self, moment: Moment) -> object:
        """Raises the error."""
        raise OSError(self.errno, os.strerror(self.errno))


@dataclass(frozen=True, slots=True)
class Short:
    """A read or write moves only a part of what was asked, and says so.

    A part that the file system itself refuses, as direct writes refuse one that is
    not a whole number of blocks, fails as it would there.

    Attributes:
        part: The share of the bytes that is moved, from 0 to 1.
        off_bytes: Added to that; the sum is cut to what was asked.
    """

    part: Fraction | float
    off_bytes: int = 0

    def __call__(self, moment: Moment) -> object:
        """The number of bytes moved; it may be 0."""
        nbytes = len(_buffer(moment))
        wanted = int(nbytes * self.part) + self.off_bytes
        return _move(moment, min(max(wanted, 0), nbytes))


@dataclass(frozen=True, slots=True)
class Lie:
    """The call does nothing and says that it did all."""

    def __call__(self, moment: Moment) -> object:
        """The number of bytes asked for by a read or write, else None."""
        return len(_buffer(moment)) if moment.name in _MOVING else None


@dataclass(frozen=True, slots=True)
class FlipBit:
    """One bit is another on its way through a read or write.

    Attributes:
        offset: The byte with it, counted from the beginning of what is moved, and
            from there again where less is moved.
        bit: Which of its bits, 0 to 7.
    """

    offset: int = 0
    bit: int = 0

    def __call__(self, moment: Moment) -> object:
        """The number of bytes moved: all; where there are none, nothing is wrong."""
        if not len(_buffer(moment)):
            return moment.make()
        if moment.name == "pread":
            num_moved = moment.make()
            buffer = _buffer(moment)
            buffer[self.offset % len(buffer)] ^= 1 << self.bit
            return num_moved
        source = _buffer(moment)
        descriptor, _, *place = moment.args
        # The caller's memory stays right: it is the way that is wrong. In pages of its
        # own, as a direct write needs them.
        with mmap.mmap(-1, len(source)) as wrong:
            wrong[:] = source
            wrong[self.offset % len(source)] ^= 1 << self.bit
            return _write(moment.name, descriptor, wrong, place)


@dataclass(frozen=True, slots=True)
class Delay:
    """The call is made only after a wait.

    Attributes:
        wait: Blocks the calling thread as long as it is to wait: `Event.wait`, or
            `partial(time.sleep, 3)`.
    """

    wait: Callable[[], object]

    def __call__(self, moment: Moment) -> object:
        """What the call returns."""
        self.wait()
        return moment.make()


@dataclass(frozen=True, slots=True)
class Kill:
    """The process dies, by SIGKILL.

    Attributes:
        when: Before the call, after it, or when a write has moved half of its bytes
            (whole blocks, where there is more than one); other calls have no half.
    """

    when: Literal["before", "half-way", "after"] = "before"

    def __call__(self, moment: Moment) -> object:
        """Does not return."""
        if self.when == "after":
            # Whatever came of it.
            with contextlib.suppress(OSError):
                moment.make()
        elif self.when == "half-way" and moment.name in _MOVING:
            half = len(_buffer(moment)) // 2
            _move(moment, half // _BLOCK * _BLOCK or half)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


_MOVING = frozenset({"pread", "pwrite", "write"})


def _buffer(moment: Moment) -> memoryview:
    if moment.name not in _MOVING:
        raise TypeError(f"{moment.name} moves no bytes: it cannot do so in part")
    data = moment.args[1]
    return memoryview(data[0] if moment.name == "pread" else data)


def _move(moment: Moment, nbytes: int) -> int:
    """Reads or writes the first bytes of what was asked; how many it moved."""
    descriptor, _, *place = moment.args
    with _buffer(moment)[:nbytes] as part:
        if moment.name == "pread":
            return os.preadv(descriptor, [part], *place) if nbytes else 0
        return _write(moment.name, descriptor, part, place) if nbytes else 0


def _write(
    name: str, descriptor: int, data: memoryview | mmap.mmap, place: Sequence[int]
) -> int:
    if name == "pwrite":
        return os.pwrite(descriptor, data, place[0])
    return os.write(descriptor, data)


# --- injecting --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Injection:
    """What has happened since faults were injected.

    Attributes:
        calls: Every call that has ended, in that order.
        spoiled: Those that a fault took.
    """

    calls: list[Call]
    spoiled: list[Moment]


class _Spoiler:
    def __init__(self, faults: Sequence[Fault]) -> None:
        self.spoiled: list[Moment] = []
        self._faults = faults
        self._nums_seen = [0] * len(faults)
        self._lock = threading.Lock()

    def __call__(self, moment: Moment) -> object:
        action = self._action(moment)
        return moment.make() if action is None else action(moment)

    def _action(self, moment: Moment) -> Action | None:
        acting: Action | None = None
        with self._lock:
            for index, fault in enumerate(self._faults):
                if not fault.concerns(moment):
                    continue
                self._nums_seen[index] += 1
                past = self._nums_seen[index] - fault.nth
                if acting is None and 0 <= past < fault.num_times:
                    acting = fault.action
                    self.spoiled.append(moment)
        return acting


@contextlib.contextmanager
def inject(*faults: Fault) -> Generator[Injection]:
    """Local storage meets the faults until the block ends, on all threads.

    Args:
        *faults: Where several are about one call, the first is done. Each counts the
            calls that it is about from here on, those that others took included.

    Yields:
        What has happened so far; it goes on growing.
    """
    spoiler = _Spoiler(faults)
    with tapped(spoiler) as tap:
        yield Injection(tap.calls, spoiler.spoiled)
