"""aiockpt beside its peers, through the same power cuts and the same damage.

    PYTHONPATH=tests python -m faults.peers RESULTS.jsonl [--cuts 50] [--flips 500] [--saves 8]

adds one record for each comparison to the results. Needs root, and mkfs for each of
the file systems. Each contender is in its ordinary use (`faults.power.contenders`):
what it saved is acknowledged when its call has returned. A cut comes within a tenth of
a second of that, as the unlucky one does; before half of them the kernel writes back
what it caches, at any moment of a save. Then all save on a disk that logs, and lose, at
each of its flushes and between them, what it was not told to flush.
"""

import argparse
import dataclasses
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from faults.damage import flipped
from faults.matrix import Cases
from faults.places import mkfs, new_image
from faults.power.contenders import PEERS, Contender, contender, is_state
from faults.power.cuts import NUM_SEEDS_A_CUT, Cutter
from faults.power.disks import IMAGE_MIB, powered, write_back
from faults.power.oracle import Oracle
from faults.power.recording import Recorder
from faults.power.writers import Writers

# What is lost, in the words of `Losses`.
LOST = ("missing", "older", "unreadable", "wrong", "torn")
KINDS = ("ext4", "xfs", "btrfs")
CONTENDERS = ("aiockpt", *PEERS)
NAMES = tuple(f"step-{number}" for number in range(4))
# What loading raises: each has errors of its own, and one that is no `Exception`.
FAILURES = (Exception, CheckpointException)


@dataclass
class Losses:
    """What came of many power cuts.

    Attributes:
        cuts: How many.
        acknowledged: Saves that had returned before one of them.
        missing: Saves that were acknowledged, and nothing has their name.
        older: Saves that were acknowledged, and what was there before them still is.
        unreadable: Saves that were acknowledged, and loading what is there fails.
        wrong: Saves that load without an error, as what was never saved.
        torn: Saves that were never acknowledged, have their name, and do not load.
    """

    cuts: int = 0
    acknowledged: int = 0
    missing: int = 0
    older: int = 0
    unreadable: int = 0
    wrong: int = 0
    torn: int = 0

    def judge(
        self, saved: Contender, name: str, allowed: Collection[int | None]
    ) -> None:
        """Loads what has a name."""
        is_acked = None not in allowed
        try:
            loaded = saved.load(name)
        except FAILURES:
            self.unreadable += is_acked
            self.torn += not is_acked
            return
        if loaded is None:
            self.missing += is_acked
        elif (seed := _seed_of(loaded)) is None:
            self.wrong += 1
        elif seed not in allowed:
            self.older += 1


def cut_power(cutter: Cutter, name: str, num_cuts: int, *, is_new: bool) -> Losses:
    """What a contender loses by so many power cuts.

    Before each there is a whole save under each of the names, as old as it needs to
    be to be on the disk; unless all names are new.
    """
    losses = Losses()
    for number in range(num_cuts):
        oracle = Oracle()
        with closing(contender(name, cutter.root)) as saving:
            if not is_new:
                # Not one of the seeds of this cut or of another.
                first = number * NUM_SEEDS_A_CUT + NUM_SEEDS_A_CUT // 2
                for seed, tag in enumerate(NAMES, first):
                    saving.save(tag, seed)
                    oracle.allowed[tag] = {seed}
        write_back(cutter.root.parent)
        cutter.cut(oracle)
        losses.cuts += 1
        losses.acknowledged += oracle.num_acked
        with closing(contender(name, cutter.root)) as saved:
            for tag, allowed in oracle.allowed.items():
                losses.judge(saved, tag, allowed)
                if saved.path(tag).exists():
                    saved.remove(tag)
    return losses


def lose_unflushed(recorder: Recorder, name: str, num_saves: int) -> Losses:
    """What a contender loses of what its disk was not told to flush.

    What was acknowledged is counted anew for each cut: it is at risk in each.
    """
    losses = Losses()
    for _, root, oracle in recorder.cuts(recorder.record(name, num_saves)):
        losses.cuts += 1
        losses.acknowledged += len(oracle.acked)
        with closing(contender(name, root)) as saved:
            for tag, allowed in oracle.allowed.items():
                losses.judge(saved, tag, allowed)
    return losses


@dataclass
class Damages:
    """What came of many damaged files.

    Attributes:
        detected: Loading failed.
        harmless: What was loaded is what was saved.
        undetected: Something else was loaded, without an error.
    """

    detected: int = 0
    harmless: int = 0
    undetected: int = 0

    def judge(self, saved: Contender) -> None:
        """Loads what was damaged."""
        try:
            loaded = saved.load(NAMES[0])
        except FAILURES:
            self.detected += 1
            return
        if loaded is None:
            self.detected += 1
        elif _seed_of(loaded) == 1:
            self.harmless += 1
        else:
            self.undetected += 1


def _seed_of(loaded: Any) -> int | None:
    """Of which state this is; None where it is none that was ever saved."""
    try:
        seed = int(loaded["seed"])
        return seed if is_state(loaded, seed) else None
    except Exception:  # noqa: BLE001 - damage may make anything of it
        return None


def damage(
    name: str, work: Path, change: Callable[[bytes], bytes], num: int
) -> Damages:
    """What a contender says of `num` files, each changed in another way."""
    chosen, damages = random.Random(4), Damages()
    with closing(contender(name, work)) as saved:
        saved.save(NAMES[0], 1)
        files = saved.files(NAMES[0])
        sizes = [path.stat().st_size for path in files]
        for _ in range(num):
            (path,) = chosen.choices(files, sizes)
            data = path.read_bytes()
            path.write_bytes(change(data))
            damages.judge(saved)
            path.write_bytes(data)
    return damages


def changes() -> dict[str, Callable[[bytes], bytes]]:
    """The ways to damage a file; each call does it elsewhere."""
    chosen = random.Random(5)
    return {
        "a bit flipped": lambda data: flipped(data, chosen.randrange(8 * len(data))),
        "cut short": lambda data: data[: chosen.randrange(len(data))],
        "a block of 4 KiB zeroed": lambda data: _zeroed(data, chosen),
    }


def _zeroed(data: bytes, chosen: random.Random) -> bytes:
    start = chosen.randrange(0, len(data), 4096)
    block = data[start : start + 4096]
    return data[:start] + bytes(len(block)) + data[start + len(block) :]


def compare(
    num_cuts: int, num_flips: int, num_saves: int
) -> Iterator[dict[str, object]]:
    """One record for each contender and each way to lose."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        work = Path(path)
        for name in CONTENDERS:
            for what, change in changes().items():
                found = damage(name, work / "damaged", change, num_flips)
                shutil.rmtree(work / "damaged")
                yield {"damage": what, "contender": name, **dataclasses.asdict(found)}
        with Writers() as writers:
            for kind, name, is_new in itertools.product(
                KINDS, CONTENDERS, (True, False)
            ):
                with powered(work, kind, mkfs(kind, Cases(is_long=True))) as disk:
                    names = None if is_new else len(NAMES)
                    cutter = Cutter(writers, disk, name, 3, num_names=names)
                    lost = cut_power(cutter, name, num_cuts, is_new=is_new)
                yield {
                    "disk": kind,
                    "names": "new" if is_new else "again",
                    "contender": name,
                    **dataclasses.asdict(lost),
                }
            for kind, name in itertools.product(KINDS, CONTENDERS):
                make = mkfs(kind, Cases(is_long=True))
                base = new_image(work / f"{kind}.base", make, IMAGE_MIB)
                lost = lose_unflushed(Recorder(base, work, writers), name, num_saves)
                base.unlink()
                about = {"unflushed": kind, "contender": name, "saves": num_saves}
                yield {**about, **dataclasses.asdict(lost)}


def main() -> None:
    """Adds the records to the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--saves", type=int, default=8)
    given = parser.parse_args()
    for record in compare(given.cuts, given.flips, given.saves):
        with given.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        sys.stdout.write(f"{record}\n")


if __name__ == "__main__":
    main()
