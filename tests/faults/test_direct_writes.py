"""Row 18: whatever a file system says to direct writes, the bytes are the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiockpt.events import Written
from aiockpt.testing.roots import assert_root_consistent
from faults.matrix import Cases
from faults.places import MIB, mkfs, mounted, on_a_loop, overlay
from faults.user_space import mirror, needs_mfusepy
from workloads import SMALL, Engine

# Below, at and above a block, off every boundary, and one of several chunks.
SIZES = (0, 1, 511, 4096, 4097, 3 * MIB + 17)


# The kind of file system, and its sectors where it is on a disk.
PLACES = {
    "ext4, sectors of 512": ("ext4", 512),
    "ext4, sectors of 4096": ("ext4", 4096),
    "xfs, sectors of 512": ("xfs", 512),
    "xfs, sectors of 4096": ("xfs", 4096),
    "btrfs": ("btrfs", 512),
    "tmpfs": ("tmpfs", 0),
    "ramfs": ("ramfs", 0),
    "overlay": ("overlay", 0),
    "FUSE": ("fuse", 0),
}


@pytest.fixture
def place(
    request: pytest.FixtureRequest, as_root: None, cases: Cases, tmp_path: Path
) -> Iterator[Path]:
    """One of the file systems above, mounted."""
    kind, sector_bytes = PLACES[request.param]
    if sector_bytes:
        made = on_a_loop(tmp_path, sector_bytes, mkfs(kind, cases))
    elif kind == "overlay":
        made = overlay(tmp_path)
    elif kind == "fuse":
        needs_mfusepy(cases)
        made = mirror(tmp_path)
    else:
        made = mounted(tmp_path / "mounted", "-t", kind, kind)
    with made as point:
        yield point


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_files_of_any_size_are_the_same_on_any_file_system(cases, place, request):
    name = request.node.callspec.params["place"]
    written: list[Written] = []
    states = {
        f"{nbytes}.pt": {"w": torch.randint(256, (nbytes,), dtype=torch.uint8)}
        for nbytes in SIZES
    }

    def observe(event: object) -> None:
        if isinstance(event, Written):
            written.append(event)

    root = place / "root"
    with Engine(root, SMALL, observers=[observe]) as engine:
        engine.create("tag")
        for path, state in states.items():
            engine.save(state, path)
        engine.commit("tag")
        for path, state in states.items():
            with cases.case(18, name, path):
                assert torch.equal(engine.load(path)["w"], state["w"])
                assert torch.equal(torch.load(root / "tag" / path)["w"], state["w"])
    assert_root_consistent(root, acked=["tag"], is_swept=True)
    # What was not direct is told.
    is_direct = {event.is_direct for event in written}
    assert is_direct == {name != "ramfs"}
    assert len(written) == len(SIZES)
