"""Fails a test in which aiockpt blocks an event loop.

A call counts when a frame of aiockpt is on the stack and the thread has a running
loop: the caller's, or the engine's own. What tests, pytest and asyncio do on a loop
is their affair, and so is what runs on a worker thread.
"""

import importlib.util
import io
import pickle
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

from blockbuster import BlockBuster, BlockBusterFunction, BlockingError
from isal import isal_zlib

ENGINE_THREAD = "aiockpt-engine"

# About 5 microseconds of CRC-32: headers and directories are no burden to a loop.
MAX_LOOP_CRC_BYTES = 64 * 1024

# Applications that ship with the package: they may do on their own loop what they
# like. The engine's frames below them still count.
APPLICATIONS = ("testing", "demo", "cli", "__main__")

FILE_CALLS = (
    "fcntl.flock",
    "fcntl.lockf",
    "os.copy_file_range",
    "os.fdatasync",
    "os.fsync",
    "os.ftruncate",
    "os.lstat",
    "os.open",
    "os.posix_fadvise",
    "os.posix_fallocate",
    "os.pread",
    "os.preadv",
    "os.pwrite",
    "os.pwritev",
    "os.readv",
    "os.scandir",
    "os.sync",
    "os.truncate",
    "os.writev",
)
CUDA_CALLS = (
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaHostAlloc",
    "cudaHostRegister",
    "cudaStreamSynchronize",
)
LOCKS = "threading.Lock.acquire"

# The kernel answers these from memory: no disk, no network is asked.
HARMLESS_CALLS = ("os.getcwd", "os.path.abspath")


class _EveryFunction:
    """In place of a set of function names: all of a file's functions."""

    def __contains__(self, name: object) -> bool:
        return True


# These block the calling thread by contract, also one that has a running loop.
DELIBERATE_WAITS = (
    ("aiockpt/sync.py", _EveryFunction()),
    ("aiockpt/guard.py", _EveryFunction()),
    ("aiockpt/engine.py", {"wait_staged"}),
)


@contextmanager
def blocking_calls_raise() -> Iterator[list[str]]:
    """Makes the calls raise `BlockingError`; yields the stacks of those that did.

    The list outlives an `except Exception` that took the error for a failed write.
    """
    caught: list[str] = []

    class RecordedBlockingError(BlockingError):
        def __init__(self, call: str) -> None:
            super().__init__(call)
            stack = "".join(traceback.format_stack(limit=12)[:-2])
            caught.append(f"{call} on {threading.current_thread().name}\n{stack}")

    guard = _block_buster()
    with mock.patch("blockbuster.blockbuster.BlockingError", RecordedBlockingError):
        guard.activate()
        try:
            yield caught
        finally:
            guard.deactivate()


def _block_buster() -> BlockBuster:
    package = package_dir()
    scope = {
        "scanned_modules": [_stand_in(package)],
        "excluded_modules": [_stand_in(package / name) for name in APPLICATIONS],
    }
    guard = BlockBuster(**scope)
    for name in HARMLESS_CALLS:
        del guard.functions[name]
    for name in FILE_CALLS:
        guard.functions[name] = BlockBusterFunction(None, name, **scope)
    for module in (io, sys.modules["builtins"]):
        name = f"{module.__name__}.open"
        guard.functions[name] = BlockBusterFunction(None, name, **scope)
        for source_reader in ("linecache.py", "tokenize.py"):
            guard.functions[name].can_block_in(source_reader, {"updatecache", "open"})
    for module in (zlib, isal_zlib):
        guard.functions[f"{module.__name__}.crc32"] = BlockBusterFunction(
            module, "crc32", can_block_predicate=_is_small, **scope
        )
    guard.functions |= _pickle_calls(scope) | _cuda_calls(scope)
    # Small steps of its own hide a large sum from the guard of what it calls.
    memory = importlib.import_module("aiockpt.memory")
    guard.functions["aiockpt.memory.crc32"] = BlockBusterFunction(
        memory, "crc32", can_block_predicate=_is_small, **scope
    )
    for file, functions in DELIBERATE_WAITS:
        guard.functions[LOCKS].can_block_in(file, functions)
    for function in guard.functions.values():
        # The first import of a module reads its file, wherever it happens.
        function.can_block_in("<frozen importlib._bootstrap>", {"_find_and_load"})
        # The blocking doors for one file work on their caller's thread.
        function.can_block_in("aiockpt/onefile.py", {"save_blocking", "load_blocking"})
        # Where log records go is the application's choice.
        function.can_block_in("logging/__init__.py", {"handle"})
    guard.functions |= _bound_names(guard, scope)
    return guard


def _pickle_calls(scope: dict[str, list[ModuleType]]) -> dict[str, BlockBusterFunction]:
    """Pickling is forbidden on the engine's loop; `save` may do it on its caller's."""
    calls = [(pickle, name) for name in ("dump", "dumps", "load", "loads")]
    calls += [(pickle.Pickler, "dump"), (pickle.Unpickler, "load")]
    return {
        f"{owner.__name__}.{name}": BlockBusterFunction(
            owner, name, can_block_predicate=_is_not_engine_thread, **scope
        )
        for owner, name in calls
    }


def _cuda_calls(scope: dict[str, list[ModuleType]]) -> dict[str, BlockBusterFunction]:
    runtime = sys.modules.get("cuda.bindings.runtime")
    if runtime is None:
        return {}
    return {name: BlockBusterFunction(runtime, name, **scope) for name in CUDA_CALLS}


def _bound_names(
    guard: BlockBuster, scope: dict[str, list[ModuleType]]
) -> dict[str, BlockBusterFunction]:
    """The same calls where a module of aiockpt holds one: `from os import fsync`."""
    watched = {id(known.original_func): known for known in guard.functions.values()}
    return {
        f"{module.__name__}.{name}": BlockBusterFunction(
            module,
            name,
            can_block_functions=known.can_block_functions,
            can_block_predicate=known.can_block_predicate,
            **scope,
        )
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("aiockpt.")
        for name, value in list(vars(module).items())
        if (known := watched.get(id(value)))
    }


def _is_small(data: object, *_: object) -> bool:
    return memoryview(data).nbytes <= MAX_LOOP_CRC_BYTES


def _is_not_engine_thread(*_: object, **__: object) -> bool:
    return threading.current_thread().name != ENGINE_THREAD


def package_dir() -> Path:
    """Where aiockpt lies; found without importing it."""
    spec = importlib.util.find_spec("aiockpt")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _stand_in(path: Path) -> ModuleType:
    """What blockbuster can ask for a path without the real module being imported."""
    module = ModuleType(path.name)
    module.__file__ = str(path)
    return module
