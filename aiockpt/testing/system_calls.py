"""Stands between local storage and the kernel: sees every call, and may change it.

`tapped` replaces, in the modules of local storage, those functions that reach the
kernel. Each call is recorded with the ticks of a clock that only orders, and handed
to an *interceptor*, which makes it, or does something else in its place.
"""

__all__ = [
    "CALL_NAMES",
    "Call",
    "Interceptor",
    "Moment",
    "Tap",
    "path_of",
    "tapped",
    "tapped_names",
]

import contextlib
import ctypes
import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final
from unittest import mock

import aiofiles
from typing_extensions import override

from aiockpt.storage import local


@dataclass(frozen=True, slots=True)
class Call:
    """One call to the system that has ended.

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

    @override
    def __str__(self) -> str:
        to = f" -> {self.target}" if self.target else ""
        return f"{self.begin}-{self.end} {self.name}({self.path}{to}) = {self.error}"


@dataclass(frozen=True, slots=True)
class Moment:
    """A call that is about to be made: what an interceptor gets to see.

    Attributes:
        index: Its number among all calls, from 1.
        name: As for `Call`.
        path: As for `Call`.
        make: Makes the call and returns what it returns.
        args: What local storage passed: of reads and writes the descriptor, the
            buffer (of a read, a list of one) and, but for `write`, the offset.
    """

    index: int
    name: str
    path: str
    make: Callable[[], Any]
    args: tuple[Any, ...]

    @override
    def __str__(self) -> str:
        return f"call {self.index}: {self.name}({self.path})"


Interceptor = Callable[[Moment], object]


def _make(moment: Moment) -> object:
    return moment.make()


class Tap:
    """The calls so far, in the order in which they ended. Any thread may call it.

    Attributes:
        calls: These calls; the list grows.
    """

    def __init__(self, intercept: Interceptor = _make) -> None:
        """Hands every call to `intercept`, on the thread that makes it.

        Args:
            intercept: As for `tapped`.
        """
        self.calls: list[Call] = []
        self._intercept = intercept
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
        """Has the interceptor make a call, and notes it.

        Args:
            name: As for `Call`.
            path: As for `Call`.
            make: Makes the call.
            args: As for `Moment`.
            target: As for `Call`.

        Returns:
            What the interceptor returns.

        Raises:
            OSError: Whatever it raises; noted, too.
        """
        with self._lock:
            self._num_begun += 1
            index = self._num_begun
            self._tick += 1
            begin = self._tick
        code = 0
        try:
            return self._intercept(Moment(index, name, path, make, args))
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
                self.calls.append(Call(name, path, target, begin, self._tick, code))


@contextlib.contextmanager
def tapped(intercept: Interceptor = _make) -> Generator[Tap]:
    """Local storage's calls go through the tap, of every engine in this process.

    Args:
        intercept: Called for each, on the thread that makes it; it makes the call or
            does something in its place, and what it returns or raises is the call's
            outcome.

    Yields:
        What sees them; it sees nothing more when the block has ended.
    """
    tap = Tap(intercept)
    with contextlib.ExitStack() as stack:
        for module in _modules():
            for name, calls in _CALLS.items():
                if hasattr(module, name):
                    stand_in = _Tapped(getattr(module, name), calls(tap))
                    stack.enter_context(mock.patch.object(module, name, stand_in))
        yield tap


def _modules() -> list[ModuleType]:
    """The modules of local storage, into however many it is divided."""
    return [
        module
        for name, module in sys.modules.items()
        if name.startswith(local.__name__)
    ]


def tapped_names(module: str) -> Collection[str]:
    """The functions of one of the modules that local storage uses, that are tapped."""
    return _CALLS[module](Tap()).keys()


class _Tapped:
    """A module, some of whose functions are others."""

    def __init__(self, module: ModuleType | ctypes.CDLL, calls: dict[str, Any]) -> None:
        self._module = module
        self.__dict__.update(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_BY_DESCRIPTOR = {
    "fstat": "fstat",
    "fsync": "fsync",
    "ftruncate": "ftruncate",
    "preadv": "pread",
    "pwrite": "pwrite",
    "write": "write",
    "close": "close",
}
_BY_PATH = ("lstat", "mkdir", "rmdir", "scandir", "stat", "statvfs", "unlink")
_BY_TWO_PATHS = {"link": "link", "rename": "rename", "replace": "rename"}
_DESCRIPTORS = "/proc/self/fd/"

CALL_NAMES: Final = frozenset(
    {
        *(
            "open",
            "create",
            "flock",
            "fallocate",
            "sync_file_range",
            "exchange",
            "copy",
        ),
        *_BY_DESCRIPTOR.values(),
        *_BY_PATH,
        *_BY_TWO_PATHS.values(),
    }
)
"""The names of all calls that are seen."""


def path_of(descriptor: int) -> str:
    """What a descriptor is open on."""
    return os.readlink(f"{_DESCRIPTORS}{descriptor}")  # noqa: PTH115 - may be no path


def _os_calls(tap: Tap) -> dict[str, Any]:
    def by_path(name: str) -> Callable[..., Any]:
        def call(path: str, *args: Any) -> Any:
            function = partial(getattr(os, name), path, *args)
            return tap.run(name, path, function, args)

        return call

    def by_two_paths(name: str) -> Callable[..., Any]:
        def call(source: str, target: str, **kwargs: Any) -> Any:
            function = partial(getattr(os, name), source, target, **kwargs)
            return tap.run(_BY_TWO_PATHS[name], source, function, target=target)

        return call

    def open_(
        path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> Any:
        full = path if dir_fd is None else f"{path_of(dir_fd)}/{path}"
        if path.startswith(_DESCRIPTORS):
            full = path_of(int(path.removeprefix(_DESCRIPTORS)))
        name = "create" if flags & os.O_EXCL else "open"
        make = partial(os.open, path, flags, mode, dir_fd=dir_fd)
        return tap.run(name, full, make, (flags,))

    return {
        "open": open_,
        **_by_descriptor(tap, os, _BY_DESCRIPTOR),
        **{name: by_path(name) for name in _BY_PATH},
        **{name: by_two_paths(name) for name in _BY_TWO_PATHS},
    }


def _by_descriptor(
    tap: Tap, module: ModuleType, names: dict[str, str]
) -> dict[str, Any]:
    def by_descriptor(name: str) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            function = partial(getattr(module, name), descriptor, *args)
            path = path_of(descriptor)
            return tap.run(names[name], path, function, (descriptor, *args))

        return call

    return {name: by_descriptor(name) for name in names}


def _fcntl_calls(tap: Tap) -> dict[str, Any]:
    return _by_descriptor(tap, fcntl, {"flock": "flock"})


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


def _shutil_calls(tap: Tap) -> dict[str, Any]:
    def copying(name: str) -> Callable[..., Any]:
        def call(source: str, target: str, **kwargs: Any) -> Any:
            make = partial(getattr(shutil, name), source, target, **kwargs)
            return tap.run("copy", source, make, target=target)

        return call

    copies = {name: copying(name) for name in ("copy2", "copyfile")}
    return {"rmtree": partial(_rmtree, tap), **copies}


def _rmtree(tap: Tap, path: str) -> None:
    """`shutil.rmtree`, every step of which can be seen and spoiled."""
    if not os.path.isdir(path):  # noqa: PTH112 - as local storage speaks
        shutil.rmtree(path)
    for parent, directories, files in os.walk(path, topdown=False):
        for name in files:
            full = f"{parent}/{name}"
            tap.run("unlink", full, partial(os.unlink, full))
        for name in directories:
            full = f"{parent}/{name}"
            tap.run("rmdir", full, partial(os.rmdir, full))
    tap.run("rmdir", path, partial(os.rmdir, path))


def _aiofiles_calls(tap: Tap) -> dict[str, Any]:
    async def open_(*args: Any, **kwargs: Any) -> Any:
        handle: Any = await aiofiles.open(*args, **kwargs)
        handle._file = _ClosingFile(tap, handle._file)  # noqa: SLF001 - no other way in
        return handle

    return {"open": open_}


class _ClosingFile:
    """A file that tells the tap when it is closed."""

    def __init__(self, tap: Tap, file: Any) -> None:
        self._tap = tap
        self._file = file

    def close(self) -> None:
        self._tap.run("close", self._file.name, self._file.close)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# What local storage reaches the kernel through, by the names of its modules' globals.
_CALLS: dict[str, Callable[[Tap], dict[str, Any]]] = {
    "os": _os_calls,
    "fcntl": _fcntl_calls,
    "shutil": _shutil_calls,
    "aiofiles": _aiofiles_calls,
    "_libc": _libc_calls,
}
