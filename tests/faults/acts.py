"""What the ranks of a job do under faults that need more than one process."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import aiockpt.sync
from ranks.acts import RING, attempt

# Ranks are given up after that, or after twice that where it is rank 0.
TIMEOUT_S = 3.0


def be_stopped(rank: int, world_size: int, root: str, at: int) -> dict[str, Any]:
    """Rank `at` is stopped when it would commit, and goes on when all have given up."""
    marks = Path(f"{root}.marks")
    marks.mkdir(parents=True, exist_ok=True)
    config = RING | {"peer_timeout_s": TIMEOUT_S}
    engine = aiockpt.sync.CheckpointEngine(root, config)
    engine.create("a")
    engine.save({"rank": rank}, f"rank{rank}.pt")
    if rank == at:
        (marks / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    told = attempt(lambda: repr(engine.commit("a")))
    (marks / f"{rank}").touch()
    if rank != at and _num_told(marks) == world_size - 1:
        os.kill(int((marks / "pid").read_text()), signal.SIGCONT)
    # To be gone is another matter than to be late.
    while _num_told(marks) < world_size:
        time.sleep(0.01)  # not for an order: there is nothing else to do
    latest = engine.latest() if rank != at else None
    attempt(engine.close)
    return {"told": told, "latest": latest}


def _num_told(marks: Path) -> int:
    return sum(path.name != "pid" for path in marks.iterdir())
