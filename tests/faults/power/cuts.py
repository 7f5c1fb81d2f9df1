"""A power cut at a random moment: row 5, and what the peers are put through."""

import random
import time

from faults.power.disks import Disk, write_back
from faults.power.oracle import Oracle
from faults.power.writers import Writers, Writing

# A save takes about as long, so that the cut falls anywhere in one.
MAX_WAIT_S = 0.03
NUM_SEEDS_A_CUT = 1000


class Cutter:
    """Cuts the power of a disk, again and again, while a contender saves on it.

    Attributes:
        root: Where it saves.
    """

    def __init__(
        self, writers: Writers, disk: Disk, name: str, seed: int, **request: object
    ) -> None:
        """Has `name` save as the further parts of a request say: see `write_on`."""
        self.root = disk.point / "runs"
        self._writers = writers
        self._disk = disk
        self._request = {"name": name, "root": str(self.root), **request}
        self._choices = random.Random(seed)
        self._num_cuts = 0

    def cut(self, oracle: Oracle) -> str:
        """Lets a writer save a little, then cuts its power; the disk is up again.

        The order is what makes it a cut: the writer is stopped first. A call that
        returned because the disk was going down would else be acknowledged.

        Args:
            oracle: Told of what was saved.

        Returns:
            When it was cut.
        """
        num_done = self._choices.randint(1, 4)
        is_at_ack = self._choices.random() < 0.3
        self._num_cuts += 1
        writing = self._writers.start(
            seed=NUM_SEEDS_A_CUT * self._num_cuts,
            stop_after=num_done if is_at_ack else None,
            **self._request,
        )
        try:
            when = self._stop(writing, num_done, is_at_ack=is_at_ack)
            self._disk.cut()
        finally:
            writing.kill()
        self._disk.restore()
        oracle.take(writing.records)
        return when

    def _stop(self, writing: Writing, num_done: int, *, is_at_ack: bool) -> str:
        writing.wait_until(num_done)
        if is_at_ack:
            writing.stop()
            return f"cut {self._num_cuts}, right after acknowledgement {num_done}"
        waits_s = [self._wait()]
        if self._choices.random() < 0.5:
            # The kernel does so by itself, every few seconds, wherever a save is then.
            write_back(self._disk.point)
            waits_s.append(self._wait())
        writing.stop()
        return f"cut {self._num_cuts}, {waits_s} s after acknowledgement {num_done}"

    def _wait(self) -> float:
        wait_s = self._choices.uniform(0, MAX_WAIT_S)
        time.sleep(wait_s)  # not for an order: any moment will do
        return wait_s
