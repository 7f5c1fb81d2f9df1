"""Measures the GPU rows of the targets: staging, stall, inflation, disk and restore.

`python -m bench.gpu [--results FILE] [--gib 4] [--directory DIR]` runs every case on
one CUDA device and prints a JSON line a figure; with `--results` it keeps them. Rates
stand beside the raw rate that was measured in the same run: of pinned copies for
staging and restore, of plain direct writes for what is durable, and of plain direct
reads of the same file for what is read from the disk. Bytes are compared after each
timed save and load.
"""

import argparse
import asyncio
import ctypes
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import torch

import aiockpt
from bench.measuring import figure, file_system, machine

GIB = 1 << 30
MIB = 1 << 20
REPEATS = 5
BLOCK_BYTES = 8 * MIB
NUM_STEPS = 50
SAVE_EVERY = 10
NUM_WRITERS = 8
NUM_READERS = 16
DEVICE = "cuda"


class Report:
    """Prints figures, and keeps them in a file if there is one."""

    def __init__(self, path: Path | None) -> None:
        """Nothing to report yet."""
        self._path = path

    def tell(self, line: dict[str, object]) -> None:
        """Reports one line."""
        text = json.dumps(line)
        print(text)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def figure(self, name: str, values: list[float], unit: str) -> None:
        """Reports the median and the spread of a figure."""
        self.tell(figure(name, values, unit))


def state_of(nbytes: int, num_tensors: int) -> dict[str, torch.Tensor]:
    """Tensors of one size on the device, no two of them alike."""
    length = nbytes // num_tensors // 4
    return {f"k{i}": torch.randn(length, device=DEVICE) for i in range(num_tensors)}


def check(loaded: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Every byte is as it was saved."""
    for key, tensor in state.items():
        assert torch.equal(loaded[key].to(DEVICE), tensor), key


def synced_s(work: Callable[[], object]) -> float:
    """Seconds of work on the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def raw_copy_rate(*, is_to_host: bool, num_bytes: int = 4 * GIB) -> float:
    """GB/s of pinned copies of 8 MiB each, as many as make `num_bytes`."""
    num = num_bytes // BLOCK_BYTES
    host = [
        torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(8)
    ]
    device = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=DEVICE)

    def copy() -> None:
        for index in range(num):
            block = host[index % len(host)]
            target, source = (block, device) if is_to_host else (device, block)
            target.copy_(source, non_blocking=True)

    copy()
    return num * BLOCK_BYTES / min(synced_s(copy) for _ in range(3)) / 1e9


def raw_write_rate(directory: Path, nbytes: int, num_writers: int) -> float:
    """GB/s of plain direct writes of 8 MiB to a file that has its room, and a sync."""
    path = directory / "raw"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        descriptor = os.open(path, flags | os.O_DIRECT)
    except OSError:
        descriptor = os.open(path, flags)
    os.posix_fallocate(descriptor, 0, nbytes)
    block = mmap.mmap(-1, BLOCK_BYTES)
    block.write(os.urandom(BLOCK_BYTES))
    start = time.perf_counter()
    with ThreadPoolExecutor(num_writers) as writers:
        offsets = range(0, nbytes, BLOCK_BYTES)
        list(writers.map(lambda at: os.pwrite(descriptor, block, at), offsets))
    os.fsync(descriptor)
    elapsed_s = time.perf_counter() - start
    os.close(descriptor)
    path.unlink()
    return nbytes / elapsed_s / 1e9


def raw_read_rate(path: Path) -> float:
    """GB/s of plain direct reads of a file, as many at once as a restore has."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    blocks = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(NUM_READERS)]
    for block in blocks:
        block.write(bytes(BLOCK_BYTES))
    nbytes = path.stat().st_size

    def read(first: int) -> int:
        offsets = range(first * BLOCK_BYTES, nbytes, NUM_READERS * BLOCK_BYTES)
        return sum(os.preadv(descriptor, [blocks[first]], at) for at in offsets)

    with ThreadPoolExecutor(NUM_READERS) as readers:
        start = time.perf_counter()
        num_read = sum(readers.map(read, range(NUM_READERS)))
        elapsed_s = time.perf_counter() - start
    os.close(descriptor)
    assert num_read == nbytes
    return nbytes / elapsed_s / 1e9


def remember(path: Path) -> None:
    """Brings a file into the page cache: a save and a load go around it."""
    buffer = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(path: Path) -> None:
    """Drops a file from the page cache, as far as the file system does so."""
    descriptor = os.open(path, os.O_RDONLY)
    # Dirty pages are not dropped.
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cached_share(path: Path) -> float:
    """The share of a file's pages that are in the page cache."""
    libc = ctypes.CDLL(None)
    # Written by nobody, but an address is given of writable memory only.
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    anchor = ctypes.c_char.from_buffer(mapping)
    pages = (ctypes.c_ubyte * -(-len(mapping) // mmap.PAGESIZE))()
    address = ctypes.c_void_p(ctypes.addressof(anchor))
    assert libc.mincore(address, ctypes.c_size_t(len(mapping)), pages) == 0
    del anchor
    mapping.close()
    return sum(page & 1 for page in pages) / len(pages)


@contextmanager
def a_folder(parent: Path) -> Iterator[Path]:
    """A new folder, removed afterwards."""
    path = Path(tempfile.mkdtemp(dir=parent, prefix="bench-gpu-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Stepper:
    """An optimizer whose step costs nothing but the wait for staging."""

    def __init__(self) -> None:
        """Makes a parameter to step."""
        parameter = torch.nn.Parameter(torch.ones(8, device=DEVICE))
        parameter.grad = torch.ones_like(parameter)
        self._optimizer = torch.optim.SGD([parameter], lr=0.0)
        self._optimizer.step()

    def held_s(self) -> float:
        """Seconds that a step is held."""
        start = time.perf_counter()
        self._optimizer.step()
        return time.perf_counter() - start


async def timed_save(
    engine: aiockpt.CheckpointEngine,
    state: dict[str, torch.Tensor],
    stepper: Stepper,
    pause_s: float,
) -> tuple[float, aiockpt.CommitReport]:
    """Saves, steps after a pause, and commits; seconds held, and the report."""
    await engine.create("t")
    start = time.perf_counter()
    await engine.save(state, "model.pt")
    held_s = time.perf_counter() - start
    time.sleep(pause_s)  # noqa: ASYNC251 - as a training step holds the loop
    held_s += stepper.held_s()
    report = await engine.commit("t")
    check(await engine.load("model.pt", "cpu"), state)
    await engine.delete("t")
    return held_s, report


async def saves(report: Report, directory: Path, nbytes: int) -> None:
    """Staging beside raw copies, stall, and durable throughput beside raw writes."""
    state, stepper = state_of(nbytes, 300), Stepper()
    ring = {"host_cache_size": nbytes / GIB + 0.25, "parser_threads": NUM_WRITERS}
    raw_copy = raw_copy_rate(is_to_host=True)
    raw_bytes = min(nbytes, 8 * GIB)
    raw_writes = [raw_write_rate(directory, raw_bytes, num) for num in (1, NUM_WRITERS)]
    # The faster of the two: which it is depends on the disk.
    raw_write = max(raw_writes)
    report.figure("raw pinned device-to-host", [raw_copy], "GB/s")
    for num, rate in zip((1, NUM_WRITERS), raw_writes, strict=True):
        report.figure(f"raw direct write, {num} at once", [rate], "GB/s")
    staging, stall, lazy, durable = [], [], [], []
    async with aiockpt.CheckpointEngine(directory / "root", ring) as engine:
        first_s, _ = await timed_save(engine, state, stepper, 1.0)
        report.figure("first save: stall, step after 1 s", [first_s], "s")
        for _ in range(REPEATS):
            held_s, done = await timed_save(engine, state, stepper, 0.0)
            stall.append(held_s)
            staging.append(nbytes / done.stage_s / 1e9)
            durable.append(nbytes / done.total_s / 1e9)
            held_s, _ = await timed_save(engine, state, stepper, 1.0)
            lazy.append(held_s)
            # At once: whatever ends the run, these are kept.
            report.tell(
                {
                    "repeat": len(lazy),
                    "staging GB/s": staging[-1],
                    "stall s": stall[-1],
                    "lazy stall s": lazy[-1],
                    "durable GB/s": durable[-1],
                }
            )
    report.figure("staging", staging, "GB/s")
    report.figure("staging/raw", [rate / raw_copy for rate in staging], "")
    report.figure("stall, step at once", stall, "s")
    report.figure("stall, step after 1 s", lazy, "s")
    report.figure("plain synchronous pinned copy", [nbytes / raw_copy / 1e9], "s")
    report.figure("durable", durable, "GB/s")
    report.figure("durable/raw", [rate / raw_write for rate in durable], "")


async def small(report: Report, directory: Path) -> None:
    """10 000 tensors of 4 KiB: how long they are staged."""
    state = state_of(10_000 * 4096, 10_000)
    seconds: list[float] = []
    async with aiockpt.CheckpointEngine(
        directory / "small", {"host_cache_size": 0.25}
    ) as engine:
        for repeat in range(REPEATS + 1):
            await engine.create(f"t{repeat}")
            await engine.save(state, "model.pt")
            done = await engine.commit(f"t{repeat}")
            check(await engine.load("model.pt", "cpu"), state)
            if repeat:
                seconds.append(done.stage_s - done.plan_s)
    report.figure("staging 10 000 tensors, beyond planning", seconds, "s")


async def training(report: Report, directory: Path) -> None:
    """Step times without saves, and with one every 10 steps.

    A step that begins a save while the one before is not durable yet waits for that;
    the disk's part of the time lost is told by itself.
    """
    layers = [torch.nn.Linear(4096, 4096) for _ in range(16)]
    model = torch.nn.Sequential(*layers).to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    # As much work for a byte of state as steps have that are saved between.
    inputs = torch.randn(65_536, 4096, device=DEVICE, dtype=torch.bfloat16)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(10):
        step()
    nbytes = sum(t.nbytes for t in model.state_dict().values()) * 3
    ring = {"host_cache_size": nbytes / GIB + 0.25, "parser_threads": 4}
    lost: list[float] = []
    waited: list[float] = []
    inflated: list[float] = []
    async with aiockpt.CheckpointEngine(directory / "training", ring) as engine:
        for repeat in range(REPEATS + 1):
            bare = [synced_s(step) for _ in range(NUM_STEPS)]
            steps = _Steps(engine, f"t{repeat}")
            for number in range(NUM_STEPS):
                state = {"model": model.state_dict(), "opt": optimizer.state_dict()}
                await steps.take(step, state if number % SAVE_EVERY == 0 else None)
            await steps.end()
            if repeat:
                lost.append(1 - sum(bare) / sum(steps.all_s))
                waited.append(steps.waited_s / sum(steps.all_s))
                p50 = statistics.median(steps.copying_s) / statistics.median(bare)
                inflated.append(p50)
    report.figure("training throughput lost, a save every 10 steps", lost, "")
    report.figure("beyond that, waits for the commit before", waited, "")
    report.figure("step inflation while copying, median", inflated, "")


class _Steps:
    """Training steps, some of which begin a save."""

    def __init__(self, engine: aiockpt.CheckpointEngine, name: str) -> None:
        self.all_s: list[float] = []
        self.copying_s: list[float] = []
        self.waited_s = 0.0
        self._engine = engine
        self._name = name
        self._handle: aiockpt.SaveHandle | None = None
        self._committing: asyncio.Task[object] | None = None

    async def take(self, step: Callable[[], None], state: object | None) -> None:
        """One step; before it, a save of the state, if there is one."""
        if state is not None:
            await self.end()
        start = time.perf_counter()
        if state is not None:
            tag = f"{self._name}-{len(self.all_s)}"
            await self._engine.create(tag)
            self._handle = await self._engine.save(state, "model.pt")
            self._committing = asyncio.create_task(self._engine.commit(tag))  # noqa: TID251
        is_copying = self._is_copying()
        step()
        torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - start
        self.all_s.append(elapsed_s)
        if is_copying:
            self.copying_s.append(elapsed_s)
        await asyncio.sleep(0)

    def _is_copying(self) -> bool:
        if self._handle is None:
            return False
        progress = self._handle.progress
        return not 0 < progress.planned_bytes <= progress.staged_bytes

    async def end(self) -> None:
        """Waits for the last commit, and removes it."""
        start = time.perf_counter()
        if self._committing is not None:
            await self._committing
            self.waited_s += time.perf_counter() - start
            for info in await self._engine.tags():
                await self._engine.delete(info.tag)


async def timed_loads(
    engine: aiockpt.CheckpointEngine,
    state: dict[str, torch.Tensor],
    get_ready: Callable[[], object],
) -> dict[str, list[float]]:
    """GB/s of loads to the device, without the first; each begins when all is ready."""
    nbytes = sum(tensor.nbytes for tensor in state.values())
    rates: dict[str, list[float]] = {"fresh": [], "into": []}
    into = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    for repeat in range(REPEATS + 1):
        for way, rate in rates.items():
            get_ready()
            start = time.perf_counter()
            if way == "into":
                loaded = await engine.load("model.pt", into=into)
            else:
                loaded = await engine.load("model.pt", DEVICE)
            elapsed_s = time.perf_counter() - start
            check(loaded, state)
            del loaded
            if repeat:
                rate.append(nbytes / elapsed_s / 1e9)
    return rates


@asynccontextmanager
async def saved(
    state: dict[str, torch.Tensor], root: Path
) -> AsyncIterator[tuple[aiockpt.CheckpointEngine, Path]]:
    """An engine that has committed the state, and where its file is."""
    ring = {"host_cache_size": 1, "parser_threads": NUM_READERS}
    async with aiockpt.CheckpointEngine(root, ring) as engine:
        await engine.create("a")
        await engine.save(state, "model.pt")
        await engine.commit("a")
        yield engine, root / "a" / "model.pt"


async def restores(report: Report, directory: Path, nbytes: int) -> None:
    """From the page cache of the disk's directory, and from memory, to the device."""
    raw = raw_copy_rate(is_to_host=False)
    report.figure("raw pinned host-to-device", [raw], "GB/s")
    state = state_of(nbytes, 300)
    for name, parent in (("disk, cached", directory), ("/dev/shm", Path("/dev/shm"))):  # noqa: S108
        if shutil.disk_usage(parent).free < 1.1 * nbytes:
            report.tell({"not measured": f"restore from {name}", "reason": "no room"})
            continue
        with a_folder(parent) as root:
            async with saved(state, root) as (engine, path):
                rates = await timed_loads(engine, state, lambda: remember(path))
                shares = [cached_share(path)]
        report.figure(f"share of the file cached, {name}", shares, "")
        for way, rate in rates.items():
            report.figure(f"restore from {name}, {way}", rate, "GB/s")


async def cold_restores(report: Report, directory: Path, nbytes: int) -> None:
    """From the disk, with nothing of the file cached, to the device."""
    state = state_of(nbytes, 300)
    raws: list[float] = []
    shares: list[float] = []
    with a_folder(directory) as root:
        async with saved(state, root) as (engine, path):

            def get_ready() -> None:
                forget(path)
                raws.append(raw_read_rate(path))
                shares.append(cached_share(path))

            rates = await timed_loads(engine, state, get_ready)
    # Two before the loads that are not counted.
    raws = raws[2:]
    report.figure("raw direct read", raws, "GB/s")
    report.figure("share of the file cached, cold", shares, "")
    for index, (way, rate) in enumerate(rates.items()):
        beside = zip(rate, raws[index :: len(rates)], strict=True)
        report.figure(f"restore from disk, cold, {way}", rate, "GB/s")
        shares_of_raw = [done / raw for done, raw in beside]
        report.figure(f"restore from disk, cold, {way}/raw", shares_of_raw, "")


async def run(report: Report, directory: Path, nbytes: int) -> None:
    """All cases, one after the other; one that fails takes no other with it."""
    loaded_bytes = min(nbytes, 8 * GIB)
    failures: list[Exception] = []
    for case in (
        partial(training, report, directory),
        partial(saves, report, directory, nbytes),
        partial(small, report, directory),
        partial(cold_restores, report, directory, loaded_bytes),
        partial(restores, report, directory, loaded_bytes),
    ):
        try:
            await case()
        except Exception as error:  # noqa: BLE001 - raised below
            report.tell({"failed": case.func.__name__, "error": repr(error)})
            failures.append(error)
        torch.cuda.empty_cache()
    if failures:
        raise ExceptionGroup("some cases failed", failures)


def main() -> None:
    """Reads the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--directory", type=Path, default=None)
    parser.add_argument("--commit", help="of a tree that came without its repository")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    report = Report(arguments.results)
    about = machine("cuda-bindings", commit=arguments.commit)
    free, total = torch.cuda.mem_get_info()
    device: dict[str, object] = {"device_bytes": total, "free_bytes": free}
    parent = arguments.directory or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    device["file_system"] = file_system(parent)
    report.tell({"machine": {**about, **device}, "case": {"gib": arguments.gib}})
    with a_folder(parent) as directory:
        nbytes = int(arguments.gib * GIB)
        asyncio.run(run(report, directory, nbytes))


if __name__ == "__main__":
    main()
