"""Row 6: whatever a disk loses of what it was not told to flush, nothing is lost."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.matrix import Cases
from faults.places import new_image
from faults.power.contenders import BROKEN, BUFFERED
from faults.power.disks import IMAGE_MIB
from faults.power.oracle import check_aiockpt, has_lost
from faults.power.recording import Recorder
from faults.power.writers import Writers
from faults.user_space import needs_mfusepy

KINDS = ("ext4", "xfs", "btrfs")
WAYS = {"direct": "aiockpt", "buffered": f"aiockpt{BUFFERED}"}


@pytest.fixture
def recorder(
    kind: str,
    cases: Cases,
    make: Callable[[object], object],
    writers: Writers,
    memory: Path,
) -> Iterator[Recorder]:
    needs_mfusepy(cases)
    work = memory / f"flushes-{kind}"
    work.mkdir()
    yield Recorder(new_image(work / "base", make, IMAGE_MIB), work, writers)
    shutil.rmtree(work)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_loss_of_what_was_not_flushed_loses_what_was_acknowledged(
    cases: Cases, recorder: Recorder, kind, way
):
    replay = recorder.record(WAYS[way], cases.pick(1, 8))
    assert replay.num_flushes > 0
    for cut, root, oracle in recorder.cuts(replay):
        with cases.case(6, f"{kind}, {way} writes", cut):
            check_aiockpt(root, oracle)
    assert oracle.num_acked > 0


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_flush_points_show_what_a_mutant_does_not_sync(cases, recorder, kind, name):
    replay = recorder.record(name, 4)
    with cases.case(20, f"{name}, flush points on {kind}", ""):
        assert any(has_lost(root, oracle) for _, root, oracle in recorder.cuts(replay))
