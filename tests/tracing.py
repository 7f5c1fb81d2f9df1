"""Sees, and can spoil, every call that local storage makes to the system.

`tapped()` stands between `aiockpt.storage.local` and the modules through which it
reaches the kernel. Each call is recorded with the ticks of a clock that only orders,
and handed to a *fault*, which may raise, kill the process or do nothing.

`check_commit_order` holds a trace, this one or that of strace, against the promise.
"""

import contextlib
import ctypes
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

from aiockpt.storage import local

# Calls on which a promise of durability rests.
SAVING = {"create", "write", "pwrite", "ftruncate", "fsync", "rename", "exchange"}
# Of what local storage names, these do not reach the kernel, or cannot fail.
HARMLESS = {"fcntl", "fsencode", "getpid", "path", "strerror"}


@dataclass(frozen=True, slots=True)
class Call:
    """One call to the system.

    Attributes:
        name: What was asked; `create` is an `open` that makes the file.
        path: Of what; the source of a rename.
        target: Where to, of a rename or an exchange.
        begin: The tick at which it began.
        end: The tick at which it ended.
        error: Its errno; 0 where it did what was asked.
    """

    name: str
    path: str
    target: str = ""
    begin: int = 0
    end: int = 0
    error: int = 0

    def __str__(self) -> str:
        to = f" -> {self.target}" if self.target else ""
        return f"{self.begin}-{self.end} {self.name}({self.path}{to}) = {self.error}"


@dataclass(frozen=True, slots=True)
class Moment:
    """A call that is about to be made: what a fault gets to see.

    Attributes:
        index: Its number among all calls, from 1.
        name: As for `Call`.
        path: As for `Call`.
        make: Makes the call.
        args: What local storage passed.
    """

    index: int
    name: str
    path: str
    make: Callable[[], object]
    args: tuple[Any, ...]


Fault = Callable[[Moment], object]


class Tap:
    """The calls so far, in the order in which they ended."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.calls: list[Call] = []
        self._fault = fault
        self._lock = threading.Lock()
        self._num_begun = 0
        self._tick = 0

    def now(self) -> int:
        """A tick of its own: later than all that has happened."""
        with self._lock:
            self._tick += 1
            return self._tick

    def run(
        self,
        name: str,
        path: str,
        make: Callable[[], Any],
        args: tuple[Any, ...] = (),
        target: str = "",
    ) -> Any:
        """Makes the call, unless the fault does something else."""
        with self._lock:
            self._num_begun += 1
            index = self._num_begun
            self._tick += 1
            begin = self._tick
        code = 0
        try:
            if self._fault is not None:
                self._fault(Moment(index, name, path, make, args))
            return make()
        except OSError as error:
            code = error.errno or -1
            if name == "close":
                # The kernel closes a descriptor whatever it says of it.
                with contextlib.suppress(OSError):
                    make()
            raise
        finally:
            with self._lock:
                self._tick += 1
                call = Call(name, path, target, begin, self._tick, code)
                self.calls.append(call)


@contextlib.contextmanager
def tapped(fault: Fault | None = None) -> Generator[Tap]:
    """Local storage's calls go through the tap, in this whole process."""
    tap = Tap(fault)
    modules = {
        "os": _Tapped(os, _os_calls(tap)),
        "fcntl": _Tapped(local.fcntl, _descriptor_calls(tap, local.fcntl, _FCNTL)),
        "shutil": _Tapped(shutil, {"rmtree": partial(_rmtree, tap)}),
        "aiofiles": _Tapped(local.aiofiles, {"open": partial(_aiofiles_open, tap)}),
        "_libc": _Tapped(local._libc, _libc_calls(tap)),
    }
    with mock.patch.multiple(local, **modules):
        yield tap


def tapped_names(module: str) -> Collection[str]:
    """The functions of one of local storage's modules that go through a tap."""
    tap = Tap()
    return {
        "os": _os_calls(tap).keys(),
        "fcntl": _FCNTL,
        "shutil": {"rmtree"},
        "aiofiles": {"open"},
        "_libc": _libc_calls(tap).keys(),
    }[module]


class _Tapped:
    """A module, some of whose functions are others."""

    def __init__(self, module: ModuleType | ctypes.CDLL, calls: dict[str, Any]) -> None:
        self._module = module
        self.__dict__.update(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_FCNTL = {"flock": "flock"}
_BY_DESCRIPTOR = {
    "fstat": "fstat",
    "fsync": "fsync",
    "ftruncate": "ftruncate",
    "preadv": "pread",
    "pwrite": "pwrite",
    "write": "write",
    "close": "close",
}
_BY_PATH = ("mkdir", "rmdir", "scandir", "stat", "statvfs", "unlink")
_BY_TWO_PATHS = {"rename": "rename", "replace": "rename"}


def path_of(descriptor: int) -> str:
    """What a descriptor is open on."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _os_calls(tap: Tap) -> dict[str, Any]:
    def by_path(name: str) -> Callable[..., Any]:
        def call(path: str, *args: Any) -> Any:
            function = partial(getattr(os, name), path, *args)
            return tap.run(name, path, function, args)

        return call

    def by_two_paths(name: str) -> Callable[..., Any]:
        def call(source: str, target: str) -> Any:
            function = partial(getattr(os, name), source, target)
            return tap.run(_BY_TWO_PATHS[name], source, function, target=target)

        return call

    def open_(
        path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        full = path if dir_fd is None else os.path.join(path_of(dir_fd), path)
        name = "create" if flags & os.O_EXCL else "open"
        make = partial(os.open, path, flags, mode, dir_fd=dir_fd)
        return tap.run(name, full, make, (flags,))

    return {
        "open": open_,
        **_descriptor_calls(tap, os, _BY_DESCRIPTOR),
        **{name: by_path(name) for name in _BY_PATH},
        **{name: by_two_paths(name) for name in _BY_TWO_PATHS},
    }


def _descriptor_calls(
    tap: Tap, module: ModuleType, names: dict[str, str]
) -> dict[str, Any]:
    def by_descriptor(name: str) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            function = partial(getattr(module, name), descriptor, *args)
            path = path_of(descriptor)
            return tap.run(names[name], path, function, (descriptor, *args))

        return call

    return {name: by_descriptor(name) for name in names}


def _libc_calls(tap: Tap) -> dict[str, Any]:
    libc = ctypes.CDLL(None, use_errno=True)

    def run(name: str, path: str, args: tuple[Any, ...], target: str = "") -> int:
        def make() -> None:
            if getattr(libc, name)(*args) != 0:
                raise OSError(ctypes.get_errno(), name)

        shown = "exchange" if name == "renameat2" else name
        try:
            tap.run(shown, path, make, args, target)
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1
        return 0

    def renameat2(*args: Any) -> int:
        return run("renameat2", os.fsdecode(args[1]), args, os.fsdecode(args[3]))

    def by_descriptor(name: str) -> Callable[..., int]:
        return lambda *args: run(name, path_of(args[0]), args)

    return {
        "renameat2": renameat2,
        "fallocate": by_descriptor("fallocate"),
        "sync_file_range": by_descriptor("sync_file_range"),
    }


def _rmtree(tap: Tap, path: str) -> None:
    """`shutil.rmtree`, every step of which can be seen and spoiled."""
    os.stat(path)
    for parent, directories, files in os.walk(path, topdown=False):
        for name in files:
            full = os.path.join(parent, name)
            tap.run("unlink", full, partial(os.unlink, full))
        for name in directories:
            full = os.path.join(parent, name)
            tap.run("rmdir", full, partial(os.rmdir, full))
    tap.run("rmdir", path, partial(os.rmdir, path))


async def _aiofiles_open(tap: Tap, *args: Any, **kwargs: Any) -> Any:
    import aiofiles

    handle = await aiofiles.open(*args, **kwargs)
    handle._file = _ClosingFile(tap, handle._file)
    return handle


class _ClosingFile:
    """A file that tells the tap when it is closed."""

    def __init__(self, tap: Tap, file: Any) -> None:
        self._tap = tap
        self._file = file

    def close(self) -> None:
        self._tap.run("close", self._file.name, self._file.close)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# --- faults -----------------------------------------------------------------------


class FailAt:
    """From call number `index` on, `num_times` calls fail with an errno.

    Attributes:
        failed: The first call that was made to fail, if any has been.
    """

    def __init__(self, index: int, number: int, *, num_times: float = 1) -> None:
        self.failed: Moment | None = None
        self._calls = range(index, index + int(min(num_times, 1 << 40)))
        self._number = number

    def __call__(self, moment: Moment) -> None:
        if moment.index in self._calls:
            self.failed = self.failed or moment
            raise OSError(self._number, os.strerror(self._number))


def fail_on(name: str, path_end: str, number: int, *, after: int = 0) -> Fault:
    """Fails the calls `name` of paths that end so, after the first few of them."""
    seen: list[Moment] = []

    def fault(moment: Moment) -> None:
        if moment.name == name and moment.path.endswith(path_end):
            seen.append(moment)
            if len(seen) > after:
                raise OSError(number, os.strerror(number))

    return fault


# --- the order of a commit --------------------------------------------------------


def check_commit_order(
    calls: Sequence[Call], root: str, tag: str, paths: Iterable[str], returned: int
) -> None:
    """The calls from `create` to the return of `commit` are what R2 to R9 demand.

    Args:
        calls: All calls, those that failed included.
        root: The root, absolute; whether it is new is seen from the calls.
        tag: The tag that was committed.
        paths: The files that were saved, relative to the tag.
        returned: The tick at which `commit` had returned.
    """
    failed = [call for call in calls if call.error and call.name in SAVING]
    assert not failed, f"failed: {failed[0]}"
    trace = _Trace(calls)
    publish = trace.only(
        call
        for call in calls
        if call.name in {"rename", "exchange"} and call.target == f"{root}/{tag}"
    )
    work = publish.path
    for path in paths:
        _check_data_file(trace, f"{work}/{path}", publish)
    _check_small_file(trace, f"{work}/.aiockpt/manifest.json", publish)
    for call in trace.named("mkdir"):
        if f"{call.path}/".startswith(f"{work}/"):
            _check_new_dir(trace, call.path, publish)
        elif f"{root}/".startswith(f"{call.path}/"):
            sync = trace.sync_of(os.path.dirname(call.path), after=call)
            assert sync.end < publish.begin, f"published in a root at risk: {call}"

    published = trace.sync_of(root, after=publish)
    pointing = trace.only(
        call for call in trace.named("rename") if call.target == f"{root}/latest"
    )
    _check_small_file(trace, pointing.path, pointing)
    assert published.end < pointing.begin, "`latest` moved to a tag at risk"
    assert trace.sync_of(root, after=pointing).end < returned
    for call in calls:
        if call.name == "fsync" and os.path.basename(call.path) in {
            *paths,
            "manifest.json",
        }:
            trace.only(c for c in trace.named("fsync") if c.path == call.path)


def _check_data_file(trace: "_Trace", path: str, publish: Call) -> None:
    writes = trace.of(path, "pwrite", "ftruncate", "fallocate")
    assert any(call.name == "pwrite" for call in writes), f"{path} was never written"
    sync = trace.only(trace.of(path, "fsync"))
    assert max(call.end for call in writes) < sync.begin, f"written after {sync}"
    assert sync.end < publish.begin, f"published before {sync}"
    for closed in trace.of(path, "close"):
        assert sync.end < closed.begin, f"closed before {sync}"
        assert closed.end < publish.begin, f"published before {closed}"


def _check_small_file(trace: "_Trace", path: str, before: Call) -> None:
    writes = trace.of(path, "write")
    assert writes, f"{path} was never written"
    sync = trace.only(trace.of(path, "fsync"))
    assert max(call.end for call in writes) < sync.begin, f"written after {sync}"
    assert sync.end < before.begin, f"{before} before {sync}"


def _check_new_dir(trace: "_Trace", path: str, publish: Call) -> None:
    """Synced after the last entry was made in it, and before it is published."""
    made = [
        call
        for call in trace.named("mkdir", "create")
        if os.path.dirname(call.path) == path
    ]
    assert made, f"{path} is empty"
    sync = trace.sync_of(path, after=max(made, key=lambda call: call.end))
    assert sync.end < publish.begin, f"published before {sync}"


class _Trace:
    """The calls that did what was asked, and questions about them."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self._calls = sorted(
            (call for call in calls if not call.error), key=lambda call: call.begin
        )

    def named(self, *names: str) -> list[Call]:
        return [call for call in self._calls if call.name in names]

    def of(self, path: str, *names: str) -> list[Call]:
        return [call for call in self.named(*names) if call.path == path]

    def only(self, calls: Iterable[Call]) -> Call:
        found = list(calls)
        assert len(found) == 1, f"one call expected, not {[*map(str, found)]}"
        return found[0]

    def sync_of(self, path: str, *, after: Call) -> Call:
        """The first sync of `path` that began when `after` had ended."""
        syncs = [call for call in self.of(path, "fsync") if call.begin > after.end]
        assert syncs, f"{path} was never synced after {after}"
        return syncs[0]


def without(calls: Sequence[Call], index: int) -> list[Call]:
    """The trace of a program that forgets one call."""
    return [*calls[:index], *calls[index + 1 :]]


def swapped(calls: Sequence[Call], one: int, other: int) -> list[Call]:
    """The trace of a program that makes two calls in each other's place."""
    changed = list(calls)
    first, second = calls[one], calls[other]
    changed[one] = replace(second, begin=first.begin, end=first.end)
    changed[other] = replace(first, begin=second.begin, end=second.end)
    return changed


# --- strace -----------------------------------------------------------------------

_STRACED = (
    "close", "fallocate", "fdatasync", "fsync", "ftruncate", "mkdir", "openat",
    "pwrite64", "rename", "renameat", "renameat2", "write",
)  # fmt: skip
STRACE = (
    "strace", "-f", "-qq", "-y", "-s", "0", "--seccomp-bpf",
    "-e", "signal=none", "-e", f"trace={','.join(_STRACED)}",
)  # fmt: skip

_LINE = re.compile(r"^(?P<pid>\d+) +(?P<rest>.*)$")
_RESUMED = re.compile(r"^<\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)$")
_RESULT = re.compile(r"\) += (?P<value>-?\d+)(?: (?P<error>E\w+))?")
_DESCRIPTOR = re.compile(r"^\w+\(\d+<(?P<path>[^>]*)>")
_QUOTED = re.compile(r'"([^"]*)"')


def parse_strace(text: str) -> list[Call]:
    """The calls in the output of `strace -f -y`; line numbers are the ticks."""
    calls: list[Call] = []
    unfinished: dict[str, tuple[int, str]] = {}
    for tick, line in enumerate(text.splitlines()):
        match = _LINE.match(line)
        if match is None:
            continue
        pid, rest = match["pid"], match["rest"]
        begin = tick
        if resumed := _RESUMED.match(rest):
            begin, start = unfinished.pop(pid)
            rest = start + resumed["rest"]
        elif rest.endswith("<unfinished ...>"):
            unfinished[pid] = tick, rest.removesuffix("<unfinished ...>").rstrip()
            continue
        if call := _parse_call(rest):
            calls.append(replace(call, begin=begin, end=tick))
    return calls


def _parse_call(text: str) -> Call | None:
    name = text.partition("(")[0]
    result = _RESULT.search(text)
    if result is None:
        return None
    error = 1 if result["error"] else 0
    if on := _DESCRIPTOR.match(text):
        return Call(name.removesuffix("64"), on["path"], error=error)
    paths = _QUOTED.findall(text)
    if not paths:
        return None
    if name == "openat":
        return Call("create" if "O_EXCL" in text else "open", paths[0], error=error)
    if "RENAME_EXCHANGE" in text:
        name = "exchange"
    elif name.startswith("rename"):
        name = "rename"
    return Call(name, paths[0], paths[1] if len(paths) > 1 else "", error=error)
