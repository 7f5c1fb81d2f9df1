"""Row 6: whatever a disk loses of what it was not told to flush, nothing is lost."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.matrix import Cases
from faults.places import mounted, new_image
from faults.power.contenders import BROKEN, BUFFERED
from faults.power.disks import IMAGE_MIB, looped
from faults.power.flush_log import logged, read_log
from faults.power.oracle import Oracle, check_aiockpt, has_lost
from faults.power.replay import Cut, Replay
from faults.power.writers import Writers
from faults.user_space import needs_mfusepy

KINDS = ("ext4", "xfs", "btrfs")
WAYS = {"direct": "aiockpt", "buffered": f"aiockpt{BUFFERED}"}


@dataclass(frozen=True)
class Bench:
    """Where logs are recorded and replayed.

    Attributes:
        kind: The kind of file system.
        base: Its image, as it was before anything was saved.
        work: A directory in memory.
        writers: Makes those who save.
    """

    kind: str
    base: Path
    work: Path
    writers: Writers

    def record(self, name: str, num_saves: int) -> Replay:
        """Has a contender save on a disk that logs; what reached the disk."""
        image, log = self.work / "recorded", self.work / "log"
        shutil.copyfile(self.base, image)
        with contextlib.ExitStack() as stack:
            files = stack.enter_context(logged(image, log, self.work / "fuse"))
            device = stack.enter_context(looped(files / "disk"))
            disk = stack.enter_context(mounted(self.work / "mounted", device))
            writing = self.writers.start(
                name=name,
                root=str(disk / "runs"),
                seed=1,
                num_saves=num_saves,
                is_deleting=True,
                marks=str(files / "marks"),
            )
            writing.finish()
        return Replay(self.base, list(read_log(log)), seed=1)

    def cuts(self, replay: Replay) -> Iterator[tuple[Cut, Path, Oracle]]:
        """Each cut, with the root as it is then, and what may be found in it."""
        image = self.work / "replayed"
        for cut in replay.cuts(image):
            oracle = Oracle()
            oracle.take(cut.records)
            with mounted(self.work / "mounted", "-o", "loop", image) as point:
                yield cut, point / "runs", oracle


@pytest.fixture
def bench(
    kind: str,
    cases: Cases,
    make: Callable[[object], object],
    writers: Writers,
    memory: Path,
) -> Iterator[Bench]:
    needs_mfusepy(cases)
    work = memory / f"flushes-{kind}"
    work.mkdir()
    yield Bench(kind, new_image(work / "base", make, IMAGE_MIB), work, writers)
    shutil.rmtree(work)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_loss_of_what_was_not_flushed_loses_what_was_acknowledged(
    cases: Cases, bench: Bench, kind, way
):
    replay = bench.record(WAYS[way], cases.pick(1, 8))
    assert replay.num_flushes > 0
    for cut, root, oracle in bench.cuts(replay):
        with cases.case(6, f"{kind}, {way} writes", cut):
            check_aiockpt(root, oracle)
    assert oracle.num_acked > 0


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_flush_points_show_what_a_mutant_does_not_sync(cases, bench, kind, name):
    replay = bench.record(name, 4)
    with cases.case(20, f"{name}, flush points on {kind}", ""):
        assert any(has_lost(root, oracle) for _, root, oracle in bench.cuts(replay))
