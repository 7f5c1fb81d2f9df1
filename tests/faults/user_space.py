"""File systems in user space (FUSE), each served by a process of its own."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from faults.matrix import Cases
from faults.places import run_command

_LIMIT_S = 30.0
_MIRROR = Path(__file__).with_name("mirror.py")


def needs_mfusepy(cases: Cases) -> None:
    """Skips the test where nothing can be served; fails in the long run."""
    if find_spec("mfusepy") is None or not Path("/dev/fuse").exists():
        reason = "file systems in user space need mfusepy, libfuse and /dev/fuse"
        if cases.is_long:
            pytest.fail(reason)
        pytest.skip(reason)


@contextlib.contextmanager
def served(program: Path, *arguments: object, at: Path) -> Iterator[Path]:
    """What a program of these tests serves at a directory, which is made.

    Args:
        program: Is run with the arguments and the directory.
        arguments: What it is told.
        at: The directory; gone afterwards.
    """
    at.mkdir()
    tests = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, program, *arguments, at],
        env={**os.environ, "PYTHONPATH": str(tests)},
    )
    try:
        deadline_s = time.monotonic() + _LIMIT_S
        while not at.is_mount():
            assert process.poll() is None, f"{program.name} has ended"
            assert time.monotonic() < deadline_s, f"{program.name} mounted nothing"
        yield at
    finally:
        if at.is_mount():
            run_command("umount", at)
        process.wait(_LIMIT_S)
        at.rmdir()


@contextlib.contextmanager
def mirror(work: Path) -> Iterator[Path]:
    """A directory seen through a plain file system in user space.

    It can do what such file systems usually can: no exchange of two names, no
    reserved room, no file without a name.
    """
    behind = work / "behind"
    behind.mkdir()
    with served(_MIRROR, behind, at=work / "mounted") as point:
        yield point
