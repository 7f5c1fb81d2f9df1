"""Cases that need a big package, each in a process of its own.

`Helper` starts one process that imports a module of cases, and with it the package,
once; it forks a child for each case. Run as a program, this file is that process. A
module of cases is a program as well: `python trainer_cases.py CASE '{"out": ...}'`.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from aiockpt.staging import host
from aiockpt.testing.faults import Fault, inject
from aiockpt.testing.system_calls import Moment

TESTS = Path(__file__).parents[1]
LIMIT_S = 200.0

Cases = dict[str, Callable[..., Any]]


def environment() -> dict[str, str]:
    """For a process that sees the package under test, and the tests."""
    package = Path(sys.modules["aiockpt"].__file__).parent.parent
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": f"{package}:{TESTS}"}


def run(*command: str) -> list[Any]:
    """What a program tells on lines that begin with `told `; it must end well."""
    with subprocess.Popen(
        [sys.executable, *command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as ran:
        try:
            stdout, stderr = ran.communicate(timeout=LIMIT_S)
        except BaseException:
            # Not killed: a launcher then ends the processes that it has started.
            ran.terminate()
            ran.communicate()
            raise
    assert ran.returncode == 0, stderr
    lines = stdout.splitlines()
    return [json.loads(line[5:]) for line in lines if line.startswith("told ")]


class Helper:
    """The process with the package, seen from the tests."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )

    def ask(self, case: str, **request: object) -> Any:
        """What a case returns, or the status of the signal that ended it."""
        self._process.stdin.write(json.dumps([case, request]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process with the cases has ended; see its traceback"
        value, text = json.loads(answer)
        assert text is None, text
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


class Hold:
    """A call that is not made before `let_go`: to the system, or of the staging."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self._may_go = threading.Event()

    def __call__(self, moment: Moment) -> object:
        self.is_reached.set()
        assert self._may_go.wait(LIMIT_S)
        return moment.make()

    def wait_reached(self) -> None:
        """Returns when somebody is about to make the call."""
        assert self.is_reached.wait(LIMIT_S), "nobody makes the call"

    def let_go(self) -> None:
        self._may_go.set()

    @contextlib.contextmanager
    def publishing(self, nth: int = 1) -> Iterator[None]:
        """Within, the nth tag that would be published is not before `let_go`."""
        # What is renamed from there is a tag that gets its name, and nothing else.
        with inject(Fault("rename", self, path="/.aiockpt/work/", nth=nth)):
            yield

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        """Within, nothing is copied before `let_go`."""
        fill = host._fill

        def held(*args: Any) -> None:
            self.is_reached.set()
            assert self._may_go.wait(LIMIT_S)
            fill(*args)

        host._fill = held
        try:
            yield
        finally:
            host._fill = fill


def names(directory: str | Path) -> list[str]:
    """What lies in a directory, but for the engine's own."""
    if not Path(directory).is_dir():
        return []
    here = (path.name for path in Path(directory).iterdir())
    return sorted(name for name in here if name not in {".aiockpt", "latest"})


# --- in the process with the package ----------------------------------------------


def _answer(case: Callable[..., Any], request: dict[str, Any]) -> tuple[Any, Any]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            told = [case(**request), None]
        except BaseException:  # noqa: BLE001 - the test shows it
            told = [None, traceback.format_exc()]
        with open(writer, "w", encoding="utf-8") as pipe:
            json.dump(told, pipe)
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not text:
        return os.waitstatus_to_exitcode(status), None
    value, error = json.loads(text)
    return value, error


def serve(cases: Cases) -> None:
    """Answers requests, one to a line, until there are no more."""
    # What the packages print goes where it disturbs nobody.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        for line in sys.stdin:
            name, request = json.loads(line)
            channel.write(json.dumps(_answer(cases[name], request)) + "\n")
            channel.flush()


def run_case(cases: Cases) -> None:
    """Runs the case that the command line names; tells what it returns."""
    value = cases[sys.argv[1]](**json.loads(sys.argv[2]))
    sys.stdout.write(f"told {json.dumps(value)}\n")


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]).CASES)
