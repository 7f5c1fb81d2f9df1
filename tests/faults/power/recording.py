"""What saves leave on a disk that loses what it was not told to flush: row 6."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.places import mounted
from faults.power.disks import looped
from faults.power.flush_log import logged, read_log
from faults.power.oracle import Oracle
from faults.power.replay import Cut, Replay
from faults.power.writers import Writers


@dataclass(frozen=True)
class Recorder:
    """Where logs of saves are recorded and replayed.

    Attributes:
        base: The image of a file system, as it was before anything was saved.
        work: A directory in memory.
        writers: Makes those who save.
    """

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
