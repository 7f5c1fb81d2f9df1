"""Disks whose power can be cut. They need root."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Protocol

from faults.places import new_image, run_command
from faults.power.writers import shut_down

IMAGE_MIB = 400

_libc = ctypes.CDLL(None, use_errno=True)


class Disk(Protocol):
    """A file system that can lose its power.

    Attributes:
        point: Where it is mounted.
    """

    point: Path

    def cut(self) -> None:
        """What the disk has not by now is lost. Nobody may be at work but the dead."""
        ...

    def restore(self) -> None:
        """It is mounted again, as the next boot would do. Nobody has files open."""
        ...


class ShutDown:
    """ext4 or xfs, cut by the ioctl that both have for that.

    What the file system has handed to the disk stays, all else is gone.
    """

    def __init__(self, image: Path, point: Path) -> None:
        self.point = point
        self._image = image

    def cut(self) -> None:
        shut_down(self.point)

    def restore(self) -> None:
        run_command("umount", self.point)
        run_command("mount", "-o", "loop", self._image, self.point)


class Copied:
    """btrfs, which has no such ioctl: its image is copied in one moment.

    Nothing else may write then: the commit by the clock is put off.
    """

    OPTIONS = "loop,commit=300"

    def __init__(self, image: Path, point: Path) -> None:
        self.point = point
        self._image = image
        self._aside = image.with_suffix(".cut")

    def cut(self) -> None:
        run_command("cp", "--sparse=always", self._image, self._aside)

    def restore(self) -> None:
        # Only now: a copy cannot be mounted beside its original.
        run_command("umount", self.point)
        self._aside.replace(self._image)
        run_command("mount", "-o", self.OPTIONS, self._image, self.point)


@contextlib.contextmanager
def powered(work: Path, kind: str, make: Callable[[object], object]) -> Generator[Disk]:
    """A new disk, mounted; in the end it is neither mounted nor there.

    Args:
        work: A directory in memory.
        kind: Its file system: ext4, xfs or btrfs.
        make: Makes that.
    """
    image, point = work / f"{kind}.image", work / f"{kind}.mounted"
    options = Copied.OPTIONS if kind == "btrfs" else "loop"
    point.mkdir(exist_ok=True)
    try:
        new_image(image, make, IMAGE_MIB)
        run_command("mount", "-o", options, image, point)
        yield (Copied if kind == "btrfs" else ShutDown)(image, point)
    finally:
        # A test that ends while the power is off has no disk mounted.
        if point.is_mount():
            run_command("umount", point)
        image.unlink(missing_ok=True)
        image.with_suffix(".cut").unlink(missing_ok=True)


@contextlib.contextmanager
def looped(image: Path) -> Generator[Path]:
    """The block device of an image."""
    device = run_command("losetup", "--find", "--show", image)
    try:
        yield Path(device)
    finally:
        run_command("losetup", "--detach", device)


def write_back(point: Path) -> None:
    """All that the kernel caches of a file system goes to its disk."""
    descriptor = os.open(point, os.O_RDONLY)
    try:
        assert _libc.syncfs(descriptor) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(descriptor)
