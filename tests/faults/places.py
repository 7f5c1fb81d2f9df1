"""File systems of a test's own. They need root."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from faults.matrix import Cases

MIB = 1 << 20


def run_command(*command: object) -> str:
    """What a program prints; its failure is the test's."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout.strip()


def mkfs(kind: str, cases: Cases) -> Callable[[object], str]:
    """Makes a file system on a device; skips the test where that cannot be done.

    In the long run that is a failure.
    """
    program = f"mkfs.{kind}"
    if shutil.which(program) is None:
        if cases.is_long:
            pytest.fail(f"{program} is missing")
        pytest.skip(f"{program} is missing")
    options = {"ext4": ["-q"], "xfs": ["-q", "-K"], "btrfs": ["-q"]}[kind]
    return lambda device: run_command(program, *options, device)


def new_image(image: Path, make: Callable[[object], object], num_mib: int) -> Path:
    """An image with a file system in it, which takes only the room that it needs."""
    image.touch()
    os.truncate(image, num_mib * MIB)
    make(image)
    return image


@contextlib.contextmanager
def mounted(point: Path, *arguments: object) -> Iterator[Path]:
    """A file system at a directory, which is made."""
    point.mkdir(exist_ok=True)
    run_command("mount", *arguments, point)
    try:
        yield point
    finally:
        run_command("umount", point)


@contextlib.contextmanager
def on_a_loop(
    work: Path, sector_bytes: int, make: Callable[[object], str]
) -> Iterator[Path]:
    """A file system on a block device of its own, with sectors of this size."""
    image = new_image(work / "image", lambda _: None, 320)
    options = ("--find", "--show", "--sector-size", sector_bytes)
    device = run_command("losetup", *options, image)
    try:
        make(device)
        with mounted(work / "mounted", device) as point:
            yield point
    finally:
        run_command("losetup", "--detach", device)


@contextlib.contextmanager
def overlay(work: Path) -> Iterator[Path]:
    """One directory laid over another, both in memory."""
    with mounted(work / "base", "-t", "tmpfs", "tmpfs") as base:
        for name in ("lower", "upper", "work"):
            (base / name).mkdir()
        layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        with mounted(work / "mounted", "-t", "overlay", "-o", layers, "none") as point:
            yield point


@contextlib.contextmanager
def cgroup(controller: str, settings: Mapping[str, object]) -> Iterator[Path]:
    """A control group of a test's own (version 1); what enters must leave in time.

    Args:
        controller: "memory" or "blkio".
        settings: What is written to its files.
    """
    group = Path(f"/sys/fs/cgroup/{controller}/aiockpt-{os.getpid()}")
    group.mkdir()
    try:
        for name, value in settings.items():
            (group / name).write_text(f"{value}")
        yield group
    finally:
        group.rmdir()


def has_cgroups(controller: str, cases: Cases) -> None:
    """Skips the test where there is no such controller; fails in the long run."""
    if not Path(f"/sys/fs/cgroup/{controller}/cgroup.procs").exists():
        reason = f"needs the {controller} controller of control groups, version 1"
        if cases.is_long:
            pytest.fail(reason)
        pytest.skip(reason)
