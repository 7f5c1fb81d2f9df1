"""Processes that save until their power is cut, and tell of it.

`Writers` starts one helper process that imports torch once and forks a writer for each
cut. A writer's records reach the driver through a pipe, in order: `begin` before each
step, `done` when its call has returned, that is: when it was acknowledged. Run as a
program, this file is that helper.
"""

import contextlib
import fcntl
import gc
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import aiockpt

LIMIT_S = 30.0
# What is done ("save" or "delete"), under which name, and the seed of what is saved.
Step = tuple[str, str, int | None]
# From linux/fs.h by way of xfs and ext4: _IOR('X', 125, __u32), and "do not write
# the log first".
GOING_DOWN, NO_LOG_FLUSH = 0x8004587D, 2


class Writers:
    """The helper process, seen from the driver."""

    def __init__(self) -> None:
        tests = Path(__file__).parents[2]
        package = Path(aiockpt.__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{tests}"},
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(LIMIT_S)
        self._process.stdout.close()

    def start(self, **request: object) -> "Writing":
        """Forks a writer; see `write_on` for what can be asked."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Writing(self._records())

    def _records(self) -> Iterator[dict[str, Any]]:
        while line := self._process.stdout.readline():
            record = json.loads(line)
            yield record
            if "ended" in record:
                return
        raise RuntimeError("the helper process has ended; see its traceback")


class Writing:
    """One writer, from its start to its end.

    Attributes:
        records: What it has told so far, `begin` and `done`.
    """

    def __init__(self, source: Iterator[dict[str, Any]]) -> None:
        self.records: list[dict[str, Any]] = []
        self._source = source
        self._has_ended = False
        self._pid = next(source)["pid"]

    def wait_until(self, num_done: int) -> None:
        """Returns when so many steps have been acknowledged, by this writer."""
        while sum("done" in record for record in self.records) < num_done:
            self._take(next(self._source))

    def stop(self) -> None:
        """Stops its threads: what the disk says from now on nobody hears."""
        os.kill(self._pid, signal.SIGSTOP)
        deadline_s = time.monotonic() + LIMIT_S
        # In the kernel (D) it is as good as stopped: there is no way out.
        while not _states(self._pid) <= {"T", "D"}:
            assert time.monotonic() < deadline_s, _states(self._pid)

    def kill(self) -> None:
        """Ends it, stopped or not, and reads what it told before."""
        if not self._has_ended:
            os.kill(self._pid, signal.SIGKILL)
        self.finish()

    def finish(self) -> None:
        """Waits for its end."""
        for record in self._source:
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        if "ended" not in record:
            self.records.append(record)
            return
        self._has_ended = True
        if record["ended"] not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the writer failed: {record}")


def _states(pid: int) -> set[str]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may just have ended.
        with contextlib.suppress(OSError):
            found.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return found


def shut_down(point: Path) -> None:
    """The file system forgets all that the disk has not, and refuses everything."""
    descriptor = os.open(point, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, GOING_DOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(descriptor)


# --- in the helper process --------------------------------------------------------


class _Telling:
    """Tells the driver of each step, and a file of marks where there is one."""

    def __init__(self, marks: str | None = None, stop_after: int | None = None) -> None:
        self._places = [sys.stdout.fileno()]
        self._num_left = stop_after
        if marks is not None:
            self._places.append(os.open(marks, os.O_WRONLY))

    def __call__(self, **record: object) -> None:
        for place in self._places:
            os.write(place, json.dumps(record).encode() + b"\n")

    def step(self, what: Step, work: Callable[..., object], *args: object) -> None:
        """Does one step, and tells before and after; after the last it stops."""
        self(begin=what)
        work(*args)
        self(done=what)
        if self._num_left is not None:
            self._num_left -= 1
            if self._num_left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)


def write_on(  # noqa: PLR0913 - one request
    *,
    name: str,
    root: str,
    seed: int,
    num_names: int | None = 4,
    is_deleting: bool = False,
    num_saves: int = 1 << 30,
    stop_after: int | None = None,
    marks: str | None = None,
) -> None:
    """Saves, overwrites and deletes until it is killed.

    Args:
        name: The contender's.
        root: Its directory.
        seed: Of the first state, and of the choices; they count up.
        num_names: How many names are saved under, in turns; None: always a new one.
        is_deleting: Whether the oldest tags are deleted now and then, by aiockpt.
        num_saves: After so many it ends.
        stop_after: After so many acknowledgements it stops itself.
        marks: A file to tell as well.
    """
    from faults.power.contenders import Aiockpt, contender

    telling = _Telling(marks, stop_after)
    telling(pid=os.getpid())
    saving = contender(name, Path(root))
    choices = random.Random(seed)
    for current in range(seed, seed + num_saves):
        if is_deleting and isinstance(saving, Aiockpt) and choices.random() < 0.2:
            for tag in saving.tags()[:-2][:1]:
                telling.step(("delete", tag, None), saving.remove, tag)
        tag = f"step-{current % num_names if num_names else current}"
        telling.step(("save", tag, current), saving.save, tag, current)
    saving.close()


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        write_on(**request)
        status = 0
    except BaseException:  # noqa: BLE001 - nobody else would show it
        traceback.print_exc()
    finally:
        os._exit(status)


def serve() -> None:
    """Forks a writer for each request, one to a line, until there are no more."""
    import torch

    # Imports what is imported late: nothing is read from the disks while they fail.
    import faults.power.contenders  # noqa: F401

    torch.set_num_threads(1)
    # What a child's collector touched would have to be copied first.
    gc.disable()
    gc.freeze()
    tell = _Telling()
    for line in sys.stdin:
        _, status = os.waitpid(_fork(json.loads(line)), 0)
        tell(ended=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    serve()
