"""Sees every call that local storage makes to the system, and holds it to a promise.

`tapped()` records the calls and hands each to a *fault*, which may raise, kill the
process or do nothing. `check_commit_order` holds a trace, this one or that of strace,
against the promise.
"""

import contextlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace

from aiockpt.testing import system_calls
from aiockpt.testing.system_calls import (
    Call,
    Moment,
    Tap,
    tapped_names,  # noqa: F401 - for the tests
)

# Calls on which a promise of durability rests.
SAVING = {"create", "write", "pwrite", "ftruncate", "fsync", "rename", "exchange"}
# Of what local storage names, these do not reach the kernel, or cannot fail.
HARMLESS = {"fcntl", "fsencode", "getpid", "path", "strerror"}

# Called with what is about to be done; it may raise, or kill the process.
Fault = Callable[[Moment], object]


@contextlib.contextmanager
def tapped(fault: Fault | None = None) -> Generator[Tap]:
    """Local storage's calls go through a tap, in this process, after the fault."""

    def intercept(moment: Moment) -> object:
        if fault is not None:
            fault(moment)
        return moment.make()

    with system_calls.tapped(intercept) as tap:
        yield tap


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
