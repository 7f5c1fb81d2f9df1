"""Finds what a test left behind: threads, open files, temporary files, tasks."""

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# How long what is already ending may take to end; nothing waits without need.
THREAD_GRACE_S = 30.0
TASK_GRACE_S = 30.0

# Caches that `multiprocessing` and torch keep for as long as the process lives.
LASTING_TEMP_PREFIXES = ("pymp-", "torchinductor_")


@dataclass(frozen=True, slots=True)
class Census:
    """What this process holds at one moment."""

    threads: frozenset[threading.Thread]
    fds: Counter[str]
    temp_names: frozenset[str]


def census(temp_dir: Path) -> Census:
    """Counts threads, descriptors by what they are open on, and names in `temp_dir`."""
    return Census(
        frozenset(threading.enumerate()), _open_files(), _lasting_names(temp_dir)
    )


def leaks_since(
    before: Census, temp_dir: Path, grace_s: float = THREAD_GRACE_S
) -> list[str]:
    """One line for each thing that `before` did not hold; threads get `grace_s`."""
    started = set(threading.enumerate()) - before.threads
    for thread in started:
        thread.join(grace_s)
    now = census(temp_dir)
    if now.fds - before.fds:
        # A traceback's cycle may hold the last reference to an open file.
        gc.collect()
        now = census(temp_dir)
    return [
        *(f"thread {t.name!r}" for t in now.threads - before.threads),
        *(f"{n} x open {what}" for what, n in (now.fds - before.fds).items()),
        *(f"temporary {name!r}" for name in now.temp_names - before.temp_names),
    ]


async def pending_tasks_since(
    before: Collection["asyncio.Task[object]"], grace_s: float = TASK_GRACE_S
) -> list[str]:
    """One line for each task of this loop that is not in `before` and does not end."""
    ours = asyncio.current_task()
    tasks = {t for t in asyncio.all_tasks() if t is not ours} - set(before)
    if not tasks:
        return []
    _, pending = await asyncio.wait(tasks, timeout=grace_s)
    return [f"task {task!r}" for task in pending]


def _open_files() -> Counter[str]:
    targets: Counter[str] = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            targets[str(fd.readlink())] += 1
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return targets


def _lasting_names(temp_dir: Path) -> frozenset[str]:
    names = [path.name for path in temp_dir.iterdir()]
    return frozenset(n for n in names if not n.startswith(LASTING_TEMP_PREFIXES))
