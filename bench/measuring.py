"""What the benchmarks share: machine, figures, a clock, and the disk as it is."""

__all__ = [
    "GIB",
    "MIB",
    "Clock",
    "Raw",
    "Rounds",
    "can_drop_caches",
    "figure",
    "figures",
    "machine",
    "read_raw",
    "results_file",
    "table",
    "touch_mapping",
]

import ctypes
import mmap
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch

GIB = 1 << 30
MIB = 1 << 20
_CHUNK_BYTES = 8 * MIB
_NUM_RAW_THREADS = 4
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def machine(*packages: str) -> dict[str, object]:
    """The machine, the commit and the versions of torch and `packages`."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / GIB, 1),
        "kernel": platform.release(),
        "huge_pages": _HUGE_PAGES.read_text(encoding="ascii").strip(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", *packages)},
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit that is measured, marked where the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"  # A copy of the tree, without its repository.
    return found.stdout.strip()


def results_file(bench: str, about: dict[str, object]) -> Path:
    """Where results go that are kept: one file a machine, day and commit."""
    commit = str(about["commit"]).removesuffix("-dirty")
    today = datetime.now(UTC).strftime("%Y%m%d")
    name = f"{bench}_{about['cores']}cores_{today}_{commit}.jsonl"
    return Path(__file__).parent / "results" / name


def figure(name: str, values: list[float], unit: str) -> dict[str, object]:
    """One figure: median, least, greatest."""
    return {
        "figure": name,
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "n": len(values),
        "unit": unit,
    }


def can_drop_caches() -> bool:
    """Whether this process may drop the page cache: it does, to see.

    Root may, but not in most containers.
    """
    try:
        _drop_caches()
    except OSError:
        return False
    return True


def _drop_caches() -> None:
    # Dirty pages are not dropped.
    os.sync()
    _DROP_CACHES.write_text("3", encoding="ascii")


def _warm_libraries() -> None:
    """Reads back the code of this process.

    Where code was mapped but not yet run, the drop has taken it too: the first load
    would read tens of MiB of torch along with the file.
    """
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    for path in {line[line.index("/") :] for line in maps if line.endswith(".so")}:
        _warm(Path(path))


class Clock:
    """Measures one load in this process.

    Attributes:
        seconds: Wall time.
        rchar_bytes: What read calls returned, from the disk or the page cache. Bytes
            that are looked at through a mapping are not among them.
        read_bytes: What was fetched from the disk, for whichever call or page fault.
        extra_rss_bytes: The resident memory's high-water mark above where it was at
            the start; pages of mapped files count.
    """

    def __init__(self, *, is_cold: bool) -> None:
        """Nothing measured yet.

        Args:
            is_cold: Whether files are read from the disk, or from the page cache.
        """
        self.is_cold = is_cold
        self.seconds = 0.0
        self.rchar_bytes = 0
        self.read_bytes = 0
        self.extra_rss_bytes = 0

    @contextmanager
    def reading(self, path: Path) -> Iterator[None]:
        """Measures the block; before it, `path` leaves or enters the page cache."""
        if self.is_cold:
            _drop_caches()
            _warm_libraries()
        else:
            _warm(path)
        # 5 sets the high-water mark back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        rss_bytes = 1024 * _field("status", "VmRSS")
        rchar_bytes, read_bytes = _field("io", "rchar"), _field("io", "read_bytes")
        start = perf_counter()
        yield
        self.seconds = perf_counter() - start
        self.extra_rss_bytes = 1024 * _field("status", "VmHWM") - rss_bytes
        self.rchar_bytes = _field("io", "rchar") - rchar_bytes
        self.read_bytes = _field("io", "read_bytes") - read_bytes

    def costs(self) -> dict[str, float]:
        """What was measured."""
        return {
            "seconds": self.seconds,
            "rchar_bytes": self.rchar_bytes,
            "read_bytes": self.read_bytes,
            "extra_rss_bytes": self.extra_rss_bytes,
        }


def _warm(path: Path) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _field(file: str, name: str) -> int:
    """A number of this process, in the file's own unit."""
    for line in Path("/proc/self", file).read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise LookupError(name)


Rounds = dict[str, list[dict[str, float]]]
"""By contender, what `Clock.costs` said in each round.

The raw limit comes first; the first of aiockpt's is what the others compare to.
"""

_UNITS = {
    "time": "ms",
    "speed/raw": "ratio",
    "time/aiockpt": "ratio",
    "rchar": "MiB",
    "read_bytes": "MiB",
    "extra RSS": "MiB",
}


def figures(title: str, rounds: Rounds) -> Iterator[dict[str, object]]:
    """The figures of every contender."""
    for name in rounds:
        for column, values in _columns(rounds, name).items():
            yield figure(f"{title}: {name}: {column}", values, _UNITS[column])


def table(rounds: Rounds) -> str:
    """Medians, a line for each contender; of the time also the least and greatest."""
    heads = "".join(f"{column:>14}" for column in list(_UNITS)[1:])
    lines = [f"{'ratios; sizes in MiB':26}{'ms median [min max]':>30}{heads}"]
    for name in rounds:
        time, *others = _columns(rounds, name).values()
        spread = f"{statistics.median(time):.1f} [{min(time):.1f} {max(time):.1f}]"
        cells = "".join(f"{statistics.median(values):14.2f}" for values in others)
        lines.append(f"{name:26}{spread:>30}{cells}")
    return "\n".join(lines) + "\n"


def _columns(rounds: Rounds, name: str) -> dict[str, list[float]]:
    """What is told about a contender; ratios are those of the same round."""
    reference = next(other for other in rounds if other.startswith("aiockpt"))
    raw_s = [costs["seconds"] for costs in next(iter(rounds.values()))]
    ours_s = [costs["seconds"] for costs in rounds[reference]]
    took_s = [costs["seconds"] for costs in rounds[name]]
    return {
        "time": [1e3 * seconds for seconds in took_s],
        "speed/raw": [r / took for r, took in zip(raw_s, took_s, strict=True)],
        "time/aiockpt": [took / o for took, o in zip(took_s, ours_s, strict=True)],
        "rchar": [costs["rchar_bytes"] / MIB for costs in rounds[name]],
        "read_bytes": [costs["read_bytes"] / MIB for costs in rounds[name]],
        "extra RSS": [costs["extra_rss_bytes"] / MIB for costs in rounds[name]],
    }


@dataclass(frozen=True)
class Raw:
    """Bytes of a file as they were read.

    Attributes:
        path: The file.
        offset: Where the bytes begin in it.
        buffer: The bytes, then whatever fills the last page.
    """

    path: Path
    offset: int
    buffer: mmap.mmap

    def is_as_in_file(self) -> bool:
        """Whether the bytes are those that a plain read returns."""
        with self.path.open("rb") as file, memoryview(self.buffer) as view:
            file.seek(self.offset)
            for start in range(0, len(view), _CHUNK_BYTES):
                piece = file.read(min(_CHUNK_BYTES, len(view) - start))
                if view[start : start + len(piece)] != piece:
                    return False
        return True


def read_raw(
    path: Path,
    clock: Clock,
    *,
    offset: int = 0,
    nbytes: int | None = None,
    is_touched: bool = True,
) -> Raw:
    """Reads with a few threads, past the page cache: what the disk can do.

    A warm file is read through the page cache: a direct read would go to the disk.

    Args:
        path: The file.
        clock: Measures the reading.
        offset: Where to begin; a multiple of the page size.
        nbytes: How many bytes, which is rounded up to pages; by default the rest.
        is_touched: Whether the memory is there before the clock starts. Either way
            it is in huge pages where the system has some.
    """
    file_bytes = path.stat().st_size
    nbytes = file_bytes - offset if nbytes is None else nbytes
    touched = _allocate(nbytes) if is_touched else None
    if touched is not None:
        torch.frombuffer(touched, dtype=torch.uint8).fill_(1)
    with clock.reading(path):
        buffer = _allocate(nbytes) if touched is None else touched
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if clock.is_cold else 0))

        def read(start: int) -> None:
            with memoryview(buffer)[start : start + _CHUNK_BYTES] as piece:
                num_read = os.preadv(descriptor, [piece], offset + start)
                if num_read < min(len(piece), file_bytes - offset - start):
                    raise OSError(f"{path}: a short read")

        with ThreadPoolExecutor(_NUM_RAW_THREADS) as threads:
            list(threads.map(read, range(0, len(buffer), _CHUNK_BYTES)))
        os.close(descriptor)
    return Raw(path, offset, buffer)


def _allocate(nbytes: int) -> mmap.mmap:
    """Memory in whole pages, not there until it is touched."""
    whole_bytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    buffer = mmap.mmap(-1, whole_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def touch_mapping(path: Path) -> None:
    """Reads a byte of every page that is mapped from `path`.

    In one go, whatever the number of tensors, so that a lazy loader pays for its
    page faults but not for a loop of ours.
    """
    ranges = [
        line.split(maxsplit=1)[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    if not ranges:
        raise LookupError(f"{path} is not mapped: is it still read lazily?")
    for first, last in ranges:
        nbytes = int(last, 16) - int(first, 16)
        pages = (ctypes.c_char * nbytes).from_address(int(first, 16))
        torch.frombuffer(pages, dtype=torch.uint8)[:: mmap.PAGESIZE].sum()
