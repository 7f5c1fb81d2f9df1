"""Engines in processes of their own, which can be killed at any call to the system.

`Server` starts one helper process that imports torch once and forks a child for each
case: a fork of the test process, which has threads, would not be safe, and a fresh
interpreter per case would take seconds. Run as a program, this file is that helper.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch

from aiockpt.errors import CheckpointError
from aiockpt.testing.faults import Fault, Kill, inject
from aiockpt.testing.system_calls import Moment
from faults.driver import ALL_WORKLOADS, CONFIGS, put_note
from workloads import SMALL, Engine, make_start, save, state


class Server:
    """The helper process, seen from the tests."""

    def __init__(self) -> None:
        package = Path(sys.modules["aiockpt"].__file__).parent.parent
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(package)},
            text=True,
        )

    def ask(self, kind: str, **request: object) -> Any:
        """Has one of the cases below run, and waits for what it returns."""
        self._process.stdin.write(json.dumps({"kind": kind, **request}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the helper process has ended; see its traceback"
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(120)
        self._process.stdout.close()


# --- in the helper process --------------------------------------------------------


def _kill(
    at: int | list[str],
    when: Literal["before", "half-way", "after"],
    calls: Collection[str],
    tell: Callable[[object], None],
) -> Fault:
    """A call at which the process dies, having told of it.

    Args:
        at: The call's number among those named in `calls`, or its name and a part
            of its path.
        when: How far the call has come by then.
        calls: The names of the calls to count; all if there are none.
        tell: Told of the call, just before.
    """
    kill = Kill(when)

    def action(moment: Moment) -> object:
        tell({"call": moment.name, "path": moment.path})
        return kill(moment)

    if isinstance(at, int):
        return Fault(calls, action, nth=at)
    return Fault(at[0], action, path=at[1])


def crash(
    root: str,
    workload: str,
    at: int | list[str],
    *,
    when: Literal["before", "half-way", "after"] = "before",
    is_torn: bool = False,
    calls: Collection[str] = (),
) -> list[Any]:
    """Runs a workload in a child that is killed at a call; what the child told."""

    put_note(Path(root), workload)

    def work(tell: Callable[[object], None]) -> None:
        with inject(_kill(at, "half-way" if is_torn else when, calls, tell)):
            with Engine(root, CONFIGS.get(workload, SMALL)) as engine:
                ALL_WORKLOADS[workload].work(engine)
                tell("acknowledged")
        tell("ended")

    return _told(*_fork(work))


def race(root: str, tag: str, num_racers: int) -> list[Any]:
    """Has children commit the same tag, all at once; what each of them told."""
    start, starter = os.pipe()

    def racer(seed: int) -> Callable[[Callable[[object], None]], None]:
        def work(tell: Callable[[object], None]) -> None:
            os.close(starter)
            with Engine(root, SMALL) as engine:
                engine.create(tag)
                engine.save({"seed": seed}, "sub/opt.pt")
                engine.save({"w": None}, "model.pt").written()
                tell("ready")
                os.read(start, 1)
                try:
                    engine.commit(tag)
                except CheckpointError as error:
                    tell({"error": type(error).__name__, "text": str(error)})
                else:
                    tell({"won": seed})

        return work

    children = [_fork(racer(seed)) for seed in range(num_racers)]
    firsts = [_first_line(pipe) for _, pipe in children]
    os.close(starter)
    told = [
        [*first, *_told(*child)] for first, child in zip(firsts, children, strict=True)
    ]
    os.close(start)
    return told


def save_many(root: str, tag: str, num_times: int) -> list[Any]:
    """Overwrites a tag again and again, in a child."""

    def work(tell: Callable[[object], None]) -> None:
        with Engine(root, SMALL) as engine:
            for seed in range(2, num_times + 2):
                save(engine, tag, seed, overwrite=True)
                tell(seed)

    return _told(*_fork(work))


def starve(root: str, group: str, num_bytes: int) -> list[Any]:
    """Saves tag after tag in a control group, taking more memory each time."""

    def work(tell: Callable[[object], None]) -> None:
        Path(group, "cgroup.procs").write_text(str(os.getpid()))
        taken = []
        with Engine(root, SMALL) as engine:
            for number in range(1000):
                engine.create(f"step-{number}")
                engine.save(state(number % 3 + 1), "model.pt")
                engine.save({"seed": number % 3 + 1}, "sub/opt.pt")
                # While that is written.
                taken.append(bytearray(os.urandom(1)) * num_bytes)
                engine.commit(f"step-{number}")
                tell(f"step-{number}")

    return _told(*_fork(work))


def refused(root: str, uid: int) -> list[Any]:
    """Tries to save as another user; the error."""

    def work(tell: Callable[[object], None]) -> None:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            with Engine(root, SMALL) as engine:
                save(engine, "new", 3)
        except OSError as error:
            tell(
                {
                    "error": type(error).__name__,
                    "errno": error.errno,
                    "filename": error.filename,
                }
            )

    return _told(*_fork(work))


def _fork(work: Callable[[Callable[[object], None]], None]) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader

    def tell(what: object) -> None:
        os.write(writer, json.dumps(what).encode() + b"\n")

    status = 1
    try:
        work(tell)
        status = 0
    except BaseException:  # noqa: BLE001 - nobody else would show it
        traceback.print_exc()
    finally:
        os._exit(status)


def _first_line(pipe: int) -> list[Any]:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(pipe, 1)):
        line += byte
    return [json.loads(line)] if line else []


def _told(pid: int, pipe: int) -> list[Any]:
    """All that a child told until it ended, and its exit status, at last."""
    with open(pipe, "rb") as lines:
        told = [json.loads(line) for line in lines]
    _, status = os.waitpid(pid, 0)
    return [*told, os.waitstatus_to_exitcode(status)]


CASES: Sequence[Callable[..., list[Any]]] = (
    crash,
    race,
    refused,
    save_many,
    starve,
)


def serve() -> None:
    """Answers requests, one to a line, until there are no more."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as path:
        # Imports what is imported late: a child may not be allowed to.
        make_start(Path(path))
    # What a child's collector touched would have to be copied first.
    gc.disable()
    gc.freeze()
    cases = {case.__name__: case for case in CASES}
    for line in sys.stdin:
        request = json.loads(line)
        answer = cases[request.pop("kind")](**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
