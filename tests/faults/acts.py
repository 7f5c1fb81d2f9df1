"""What the ranks of a job do under faults that need more than one process."""

import asyncio
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import aiockpt.sync
from aiockpt.ranks.member import Member
from faults.pairs import PairDoor
from ranks.acts import MOMENTS, RING, attempt

# Ranks are given up after that, or after twice that where it is rank 0. Tests wait for
# it; all must have come to create the tag by then.
TIMEOUT_S = 5.0


def be_stopped(rank: int, world_size: int, root: str, at: int) -> dict[str, Any]:
    """Rank `at` is stopped when it would commit, and goes on when all have given up."""
    marks = Path(f"{root}.marks")
    marks.mkdir(parents=True, exist_ok=True)
    config = RING | {"peer_timeout_s": TIMEOUT_S}
    engine = aiockpt.sync.CheckpointEngine(root, config)
    engine.create("a")
    engine.save({"rank": rank}, f"rank{rank}.pt")
    if rank == at:
        (marks / "stopped").symlink_to(f"/proc/{os.getpid()}")
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        # Whoever gives it up before it stops would wake it before, too.
        _await_stopped(marks / "stopped")
    told = attempt(lambda: repr(engine.commit("a")))
    (marks / f"{rank}").touch()
    if rank != at and _num_told(marks) == world_size - 1:
        os.kill(int((marks / "stopped").readlink().name), signal.SIGCONT)
    # To be gone is another matter than to be late.
    while _num_told(marks) < world_size:
        time.sleep(0.01)  # not for an order: there is nothing else to do
    latest = engine.latest() if rank != at else None
    attempt(engine.close)
    return {"told": told, "latest": latest}


def _await_stopped(process: Path) -> None:
    """Returns when the process, a directory of `/proc`, stands still."""
    while not process.is_symlink() or ") T " not in (process / "stat").read_text():
        time.sleep(0.01)  # nobody tells that it stands still


def _num_told(marks: Path) -> int:
    return sum(path.name != "stopped" for path in marks.iterdir())


# --- a network that fails ---------------------------------------------------------

# What cuts a rank off, in a network namespace of its own.
RESETTING = ("-j", "REJECT", "--reject-with", "tcp-reset")
CUTS: dict[str, list[list[str]]] = {
    "everything is dropped": [
        ["iptables", "-I", "INPUT", "-j", "DROP"],
        ["iptables", "-I", "OUTPUT", "-j", "DROP"],
    ],
    "connections are reset": [
        ["iptables", "-I", chain, "-p", "tcp", *RESETTING]
        for chain in ("INPUT", "OUTPUT")
    ],
    "everything is slow": [
        [
            *("tc", "qdisc", "add", "dev", "eth", "root", "tbf"),
            *("rate", "4kbit", "burst", "1600", "limit", "64kb"),
        ]
    ],
}
CUTS["everything is dropped for a second"] = CUTS["everything is dropped"]
# These end, or let something through: who waits long enough gives nobody up. What was
# dropped is sent again only after pauses that double.
LATE_CUTS = {"everything is slow", "everything is dropped for a second"}
LATE_TIMEOUT_S = 60.0
CLONE_NEWNET = 0x40000000


def be_cut_off(  # noqa: PLR0913, PLR0917 - the request of a test
    rank: int,
    world_size: int,
    root: str,
    namespaces: list[str],
    host: str,
    cut: str,
    at: int,
    moment: list[str],
) -> dict[str, Any]:
    """Rank `at` loses the network before or after a call; both tell what they saw."""
    enter(namespaces[rank])
    timeout_s = LATE_TIMEOUT_S if cut in LATE_CUTS else TIMEOUT_S
    door = PairDoor(rank, PortFile(Path(f"{root}.port")), timeout_s, host)
    member = Member(rank, world_size, door, timeout_s=timeout_s)
    with patch("aiockpt.runtime.detect", lambda *_: member):
        engine = aiockpt.sync.CheckpointEngine(root, RING)
    engine.create("a")
    engine.save({"rank": rank}, f"rank{rank}.pt").written()
    if rank == at:
        _disturb(*MOMENTS[moment[0]], moment[1], lambda: _cut(cut))
    told = attempt(lambda: repr(engine.commit("a")))
    attempt(engine.close)
    return {"told": told}


def enter(namespace: str) -> None:
    """This thread, and all that it starts, has the network of a namespace."""
    with open(f"/run/netns/{namespace}", "rb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


class PortFile:
    """A future port: a file that rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def set_result(self, port: int) -> None:
        draft = self._path.with_suffix(".draft")
        draft.write_text(f"{port}")
        draft.rename(self._path)

    async def found(self) -> int:
        while not self._path.exists():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        return int(self._path.read_text())


def _cut(cut: str) -> None:
    for command in CUTS[cut]:
        subprocess.run(command, check=True)
    if cut.endswith("a second"):
        healing = partial(subprocess.run, ["iptables", "-F"], check=True)
        threading.Timer(1, healing).start()


def _disturb(owner: type, name: str, when: str, disturb: Callable[[], object]) -> None:
    original = getattr(owner, name)

    def around(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            disturb()
        result = original(*args, **kwargs)
        if when == "after":
            disturb()
        return result

    setattr(owner, name, around)
