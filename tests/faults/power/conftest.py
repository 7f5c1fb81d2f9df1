"""What the tests of power cuts need: root, the file systems, and writers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.matrix import Cases
from faults.places import mkfs
from faults.power.disks import Disk, powered
from faults.power.writers import Writers


@pytest.fixture(scope="session")
def writers() -> Iterator[Writers]:
    """The process that forks those whose power is cut."""
    with Writers() as writers:
        yield writers


@pytest.fixture
def make(kind: str, as_root: None, cases: Cases) -> Callable[[object], object]:
    """Makes a file system of the kind that a test is about."""
    return mkfs(kind, cases)


@pytest.fixture
def disk(kind: str, make: Callable[[object], object], memory: Path) -> Iterator[Disk]:
    """A new disk, in memory."""
    with powered(memory, kind, make) as disk:
        yield disk
