"""Jobs of several ranks in processes of their own, which may die.

`Jobs` starts one helper process that imports torch once and forks the ranks of each
job: a fresh interpreter per rank would take seconds. Each rank joins a gloo group and
runs a function `module:name(rank, world_size, **arguments)`, whose result comes back
as JSON. Run as a program, this file is that helper.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

# Of a job; only a failing test ever waits this long.
LIMIT_S = 200


class Jobs:
    """The helper process, seen from the tests."""

    def __init__(self) -> None:
        package = Path(sys.modules["aiockpt"].__file__).parent.parent
        tests = Path(__file__).parent
        path = os.pathsep.join([str(package), str(tests)])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def run(self, function: str, world_size: int, **arguments: object) -> list[Any]:
        """Runs `function` on every rank; its results, `{"died": signal}` of the dead."""
        request = {"function": function, "world_size": world_size, "with": arguments}
        self._process.stdin.write(json.dumps(request) + "\n")
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


def main() -> None:
    torch.set_num_threads(1)
    # Imported before the forks, and never used here: a used engine has threads.
    importlib.import_module("aiockpt")
    importlib.import_module("aiockpt.ranks.torch_dist")
    importlib.import_module("aiockpt.ranks.store")
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as directory:
            results = _run(request, Path(directory))
        sys.stdout.write(json.dumps(results) + "\n")
        sys.stdout.flush()


def _run(request: dict[str, Any], directory: Path) -> list[Any]:
    world_size = request["world_size"]
    children = [_fork(request, rank, directory) for rank in range(world_size)]
    results: list[Any] = []
    for rank, child in enumerate(children):
        _, status = os.waitpid(child, 0)
        written = directory / f"result-{rank}"
        if os.WIFSIGNALED(status):
            results.append({"died": os.WTERMSIG(status)})
        else:
            results.append(json.loads(written.read_text()))
    return results


def _fork(request: dict[str, Any], rank: int, directory: Path) -> int:
    child = os.fork()
    if child:
        return child
    signal.alarm(LIMIT_S)
    # The protocol's lines are the parent's alone.
    os.dup2(2, 1)
    try:
        result = json.dumps(_be_rank(request, rank, directory))
    except BaseException:  # noqa: BLE001 - told to the test
        result = json.dumps({"raised": traceback.format_exc()})
    (directory / f"result-{rank}").write_text(result)
    # Not `sys.exit`: what the parent registered to run at exit is the parent's.
    sys.stderr.flush()
    os._exit(0)


def _be_rank(request: dict[str, Any], rank: int, directory: Path) -> Any:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=request["world_size"],
        timeout=timedelta(seconds=LIMIT_S),
    )
    module, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        return function(rank, request["world_size"], **request["with"])
    finally:
        # Collective where all are alive, and never needed by what is tested.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
