"""What one engine costs, next to the raw disk, in one run.

    python bench/engine.py throughput|stall|gap|memory [--gib 2] [--repeats 5] [--dir DIR]

Each case prints one JSON line per figure. Times are comparable within a run only.
"""

import argparse
import asyncio
import json
import mmap
import os
import resource
import shutil
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Self

import torch
from measuring import GIB, MIB, figure, machine

import aiockpt

CHUNK_BYTES = 8 * MIB


def main() -> None:
    """Runs one case in a fresh directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["throughput", "stall", "gap", "memory"])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--ring-gib", type=float, default=None)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path.cwd())
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=arguments.dir))
    print(json.dumps({"machine": machine(), "case": vars(arguments)}, default=str))
    try:
        case = {
            "throughput": throughput,
            "stall": stall,
            "gap": gap,
            "memory": memory,
        }[arguments.case]
        asyncio.run(case(directory, arguments))
    finally:
        shutil.rmtree(directory)


def state_of(nbytes: int, num_tensors: int) -> dict[str, object]:
    """A state dict of `num_tensors` equal float32 tensors, `nbytes` in all."""
    numel = max(1, nbytes // num_tensors // 4)
    tensors = {f"layers.{i}.weight": torch.rand(numel) for i in range(num_tensors)}
    return {"model": tensors, "step": 1}


def config_of(arguments: argparse.Namespace, ring_gib: float) -> dict[str, object]:
    """The engine's configuration for a case."""
    size = arguments.ring_gib if arguments.ring_gib is not None else ring_gib
    return {"host_cache_size": size, "parser_threads": arguments.threads}


def report(name: str, values: list[float], unit: str) -> None:
    """Prints one figure."""
    print(json.dumps(figure(name, values, unit)), flush=True)


def raw_write(path: Path, buffer: mmap.mmap, nbytes: int) -> float:
    """Seconds to write and sync `nbytes` with O_DIRECT from one touched buffer."""
    start = perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    os.posix_fallocate(descriptor, 0, nbytes)
    view = memoryview(buffer)
    for offset in range(0, nbytes, CHUNK_BYTES):
        os.pwrite(descriptor, view[:CHUNK_BYTES], offset)
    os.fsync(descriptor)
    os.close(descriptor)
    elapsed = perf_counter() - start
    view.release()
    path.unlink()
    return elapsed


async def throughput(directory: Path, arguments: argparse.Namespace) -> None:
    """Durable throughput of the engine as a share of raw O_DIRECT, interleaved."""
    nbytes = int(arguments.gib * GIB)
    state = state_of(nbytes, 300)
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    buffer[:] = os.urandom(CHUNK_BYTES)
    raws: list[float] = []
    ours: list[float] = []
    plains: list[float] = []
    async with aiockpt.CheckpointEngine(
        directory / "root", config_of(arguments, 0.5)
    ) as engine:
        for repeat in range(arguments.repeats + 1):
            raw_s = raw_write(directory / "raw", buffer, nbytes)
            start = perf_counter()
            await engine.create(f"t{repeat}")
            await engine.save(state, "model.pt")
            await engine.commit(f"t{repeat}")
            ours_s = perf_counter() - start
            await engine.delete(f"t{repeat}")
            start = perf_counter()
            plain = directory / "plain.pt"
            with plain.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            plain_s = perf_counter() - start
            plain.unlink()
            if repeat:  # the first round warms up
                raws.append(raw_s)
                ours.append(ours_s)
                plains.append(plain_s)
    report("raw", [nbytes / GIB / s for s in raws], "GiB/s")
    report("aiockpt", [nbytes / GIB / s for s in ours], "GiB/s")
    report("torch.save+fsync", [nbytes / GIB / s for s in plains], "GiB/s")
    report("aiockpt/raw", [r / o for r, o in zip(raws, ours, strict=True)], "ratio")
    report(
        "aiockpt/torch.save+fsync",
        [p / o for p, o in zip(plains, ours, strict=True)],
        "ratio",
    )


async def stall(directory: Path, arguments: argparse.Namespace) -> None:
    """Time inside `save`, and inside `staged` after a step of one second."""
    for num_tensors, nbytes in ((300, int(arguments.gib * GIB)), (10_000, 40 * MIB)):
        state = state_of(nbytes, num_tensors)
        ring_gib = nbytes / GIB + 0.25
        saves: list[float] = []
        waits: list[float] = []
        plans: list[float] = []
        root = directory / f"root-{num_tensors}"
        async with aiockpt.CheckpointEngine(
            root, config_of(arguments, ring_gib)
        ) as engine:
            for repeat in range(arguments.repeats):
                await engine.create(f"t{repeat}")
                start = perf_counter()
                await engine.save(state, "model.pt")
                saves.append(perf_counter() - start)
                await asyncio.sleep(1.0)  # the step
                start = perf_counter()
                await engine.staged()
                waits.append(perf_counter() - start)
                plans.append((await engine.commit(f"t{repeat}")).plan_s)
                await engine.delete(f"t{repeat}")
        for name, values in (("save", saves), ("staged", waits), ("plan", plans)):
            label = f"{num_tensors} tensors: {name}"
            report(f"{label}, first", [values[0] * 1e3], "ms")
            report(f"{label}, later", [value * 1e3 for value in values[1:]], "ms")


class Heart:
    """A 1 ms heartbeat on a loop; `gaps` are the times between beats."""

    def __init__(self) -> None:
        """Not beating yet."""
        self.gaps: list[float] = []
        self.is_beating = True

    async def beat(self) -> None:
        """Beats until `is_beating` is false."""
        last = perf_counter()
        while self.is_beating:
            await asyncio.sleep(0.001)
            now = perf_counter()
            self.gaps.append(now - last)
            last = now

    def tell(self, name: str) -> None:
        """Prints p50, p99 and the longest gap."""
        gaps = sorted(self.gaps)
        for label, value in (
            ("p50", gaps[len(gaps) // 2]),
            ("p99", gaps[int(len(gaps) * 0.99)]),
            ("max", gaps[-1]),
        ):
            report(f"{name}: gap {label}", [value * 1e3], "ms")


async def gap(directory: Path, arguments: argparse.Namespace) -> None:
    """Gaps of the caller's loop and the engine's during save+commit, and idle."""
    state = state_of(int(arguments.gib * GIB), 300)
    idle = Heart()
    async with asyncio.TaskGroup() as group:
        group.create_task(idle.beat())
        await asyncio.sleep(2.0)
        idle.is_beating = False
    idle.tell("idle loop")
    async with aiockpt.CheckpointEngine(
        directory / "root", config_of(arguments, 0.5)
    ) as engine:
        for name in ("first", "second"):
            callers, engines = Heart(), Heart()
            # The heartbeat belongs on the engine's own loop, which has no door for it.
            beating = engine._runtime.spawn(engines.beat())  # noqa: SLF001
            async with asyncio.TaskGroup() as group:
                group.create_task(callers.beat())
                await engine.create(name)
                await engine.save(state, "model.pt")
                await engine.commit(name)
                callers.is_beating = engines.is_beating = False
            await beating.wait()
            callers.tell(f"{name} save, caller's loop")
            engines.tell(f"{name} save, engine's loop")


async def memory(directory: Path, arguments: argparse.Namespace) -> None:
    """Peak resident memory above the trainer's own, with a ring of 256 MiB."""
    state = state_of(int(arguments.gib * GIB), 300)
    peak = Peak()
    before = peak.now()
    async with aiockpt.CheckpointEngine(
        directory / "root", config_of(arguments, 0.25)
    ) as engine:
        with peak:
            for repeat in range(2):
                await engine.create(f"t{repeat}")
                await engine.save(state, "model.pt")
                await engine.commit(f"t{repeat}")
    report("peak above the trainer", [(peak.most - before) / MIB], "MiB")
    report(
        "ru_maxrss", [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024], "MiB"
    )


class Peak:
    """Samples resident memory every few milliseconds in a thread."""

    def __init__(self) -> None:
        """Not sampling yet."""
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    @staticmethod
    def now() -> int:
        """Resident bytes of this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * mmap.PAGESIZE

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, self.now())

    def __enter__(self) -> Self:
        """Starts sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops sampling."""
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
