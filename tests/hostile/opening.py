"""Opens a file at every door, in a process of its own, and tells what came of it.

`Opener` starts one helper process that imports torch once and forks a child for each
file: what a file does to a process (memory, hooks, a hang) ends with it. Run as a
program, this file is that helper.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

import aiockpt.sync
from aiockpt.cli.places import opened, verifier
from aiockpt.errors import CheckpointError
from aiockpt.loader import inspect_file
from aiockpt.sync import load

# A child that is still at it after so long is taken for one that hangs.
MAX_CPU_S = 30
MIB = 1 << 20
# Room for memory that is reserved and never touched; only touched memory is counted.
MAX_GROWTH_BYTES = 6 << 30

Doors = dict[str, Callable[[str], object]]

# What no opening of a file has to do.
WATCHED = re.compile(
    r"open$|os\.(system|exec|posix_spawn|fork|remove|rename|mkdir|rmdir|link|symlink"
    r"|truncate|chmod|putenv|kill)|subprocess\.|socket\.(bind|connect|send|get)|shutil\.|ctypes\.dlopen"
    r"|webbrowser\.|urllib\.|ftplib\.|pty\.|code\.__new__|pickle\.find_class"
)


class Opener:
    """The helper process, seen from the tests."""

    def __init__(self) -> None:
        package = Path(sys.modules["aiockpt"].__file__).parent.parent
        paths = [str(package), str(Path(__file__).parent.parent)]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
        )

    def open(self, path: Path, *, trusted: bool = False) -> dict[str, Any]:
        """What came of opening the file; its directory is the working directory.

        With `trusted`, it is only loaded, and its pickle runs what it names.
        """
        self._process.stdin.write(json.dumps([str(path), trusted]) + "\n")
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
    for line in sys.stdin:
        path, trusted = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as stream:
                _answer(path, TRUSTED if trusted else DOORS, stream)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as stream:
            answer = stream.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            answer = json.dumps({"died": signal.Signals(os.WTERMSIG(status)).name})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(path: str, doors: Doors, stream: Any) -> None:
    os.chdir(os.path.dirname(path))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    limit = _status_bytes("VmSize") + MAX_GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    touched: list[str] = []
    before = _status_bytes("VmHWM")
    is_watching = True

    def watch(event: str, args: tuple[object, ...]) -> None:
        if is_watching and WATCHED.match(event) and not _is_import(args):
            touched.append(f"{event} {_place(args)!r}")

    sys.addaudithook(watch)
    made: dict[str, object] = {}
    outcomes = {door: _outcome(use, path, door, made) for door, use in doors.items()}
    is_watching = False
    grown = _status_bytes("VmHWM") - before
    json.dump(
        {
            "outcomes": outcomes,
            "grown_mib": grown / MIB,
            "touched": touched,
            "is_as_torch": _is_as_torch(path, made["load"]) if "load" in made else None,
        },
        stream,
    )


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def _place(args: tuple[object, ...]) -> object:
    """What the event is about; the file itself, where that is opened once more."""
    name = args[0] if args else None
    is_open = isinstance(name, str) and name.startswith("/proc/self/fd/")
    return os.readlink(name) if is_open else name


def _is_import(args: tuple[object, ...]) -> bool:
    """Whether the event is the import system reading a module of this Python."""
    name = args[0] if args else None
    return isinstance(name, str) and name.endswith((".py", ".pyc"))


def _outcome(
    use: Callable[[str], object], path: str, door: str, made: dict[str, object]
) -> dict[str, object]:
    try:
        made[door] = use(path)
    except CheckpointError as error:
        return {"error": type(error).__name__, "text": str(error)[:500]}
    except BaseException as error:  # noqa: BLE001 - the tests judge what it is
        return {"untyped": "".join(traceback.format_exception(error))[-3000:]}
    return {}


def inspect(path: str) -> object:
    """What `aiockpt inspect` shows."""
    with opened(Path(path).parent, Path(path).name) as file:
        return inspect_file(file)


def verify(path: str) -> object:
    """What `aiockpt verify` does to one file."""
    with (
        verifier(lambda _: None) as check,
        opened(Path(path).parent, Path(path).name) as file,
    ):
        return check(file)


def rows(path: str) -> None:
    """The rows of the first tensors, all and some of them."""
    with aiockpt.sync.open(path) as file:
        for tensor in file.tensors[:3]:
            for start, stop in ((0, None), (1, 2)) if tensor.shape else ():
                file.rows(tensor.key, start, stop)


DOORS: Doors = {
    "verify": verify,
    "inspect": inspect,
    "load": load,
    "mapped": lambda path: load(path, mmap=True),
    "chosen": lambda path: load(path, keys=["*"]),
    "rows": rows,
}
TRUSTED: Doors = {"trusted": lambda path: load(path, weights_only=False)}


def _is_as_torch(path: str, made: object) -> bool | str:
    """Whether it is what the format's own reader makes of the file, or its refusal."""
    try:
        if Path(path).suffix == ".safetensors":
            import safetensors.torch

            return _same(made, safetensors.torch.load_file(path))
        return _same(made, torch.load(path, weights_only=True))
    except Exception as error:  # noqa: BLE001 - it may refuse what is sound
        return f"{type(error).__name__}: {error}"[:500]


def _same(one: object, other: object) -> bool:
    """Whether two results are equal; both may be deep, cyclic or 2**100 paths wide."""
    pending, seen = [(one, other)], set[tuple[int, int]]()
    while pending:
        one, other = pending.pop()
        if (id(one), id(other)) in seen:
            continue
        seen.add((id(one), id(other)))
        if type(one) is not type(other) or _facts(one) != _facts(other):
            return False
        if isinstance(one, dict):
            pending.extend((value, other[key]) for key, value in one.items())
        elif isinstance(one, list | tuple):
            pending.extend(zip(one, other, strict=True))
    return True


def _facts(node: object) -> object:
    """What there is to a node beside its children."""
    match node:
        case torch.Tensor():
            # Not its elements: a file may describe 2**40 of them that are one.
            storage = node.untyped_storage().tolist()
            return node.dtype, node.shape, node.stride(), node.storage_offset(), storage
        case dict():
            return node.keys()
        case list() | tuple():
            return len(node)
        case int() | float() | str() | bytes():
            return node
        case _:
            return None


if __name__ == "__main__":
    main()
