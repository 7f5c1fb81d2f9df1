"""What is measured with: machine, figures, a clock, memory, the page cache."""

__all__ = [
    "GIB",
    "MIB",
    "Cache",
    "Clock",
    "DeviceMemory",
    "Memory",
    "can_drop_caches",
    "figure",
    "machine",
    "results_file",
    "touch_mapping",
]

import ctypes
import mmap
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch

GIB = 1 << 30
MIB = 1 << 20
_CHUNK_BYTES = 8 * MIB
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


# ------------------------------------------------------------- the machine


def machine(*packages: str, commit: str | None = None) -> dict[str, object]:
    """The machine, the commit and the versions of torch and `packages`.

    Args:
        packages: Whose versions are told.
        commit: What is measured, where the tree came without its repository.
    """
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / GIB, 1),
        "processor": _processor(),
        "kernel": platform.release(),
        "huge_pages": _huge_pages(),
        "python": platform.python_version(),
        **_gpu(),
        **{name: _version(name) for name in ("torch", *packages)},
        "commit": commit or _commit(),
    }


def _gpu() -> dict[str, object]:
    if not torch.cuda.is_available():
        return {}
    return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def _huge_pages() -> str | None:
    if not _HUGE_PAGES.exists():
        return None
    return _HUGE_PAGES.read_text(encoding="ascii").strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that is measured, marked where the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"  # A copy of the tree, without its repository.
    return found.stdout.strip()


def file_system(directory: Path) -> str:
    """The file system that holds a directory, its options, and what it lies on."""
    best, told = "", "unknown"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, name, options, *_ = line.split()
        is_above = directory.resolve().is_relative_to(place)
        if is_above and len(place) >= len(best):
            best, told = place, f"{name} ({options})"
    return f"{told} on {_disk(directory.stat().st_dev)}"


def _disk(number: int) -> str:
    """Name, model and cache of a block device, as far as the kernel tells."""
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not device.exists():
        return "no disk of its own"
    # A partition has neither; its parent directory is the disk.
    disk = device if (device / "queue").exists() else device.parent
    told = [_line(disk / place) for place in ("device/model", "queue/write_cache")]
    return ", ".join((disk.name, *filter(None, told)))


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def results_file(bench: str, about: dict[str, object]) -> Path:
    """Where results go that are kept: one file a machine, time and commit."""
    commit = str(about["commit"]).removesuffix("-dirty")
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M")
    name = f"{bench}_{about['cores']}cores_{now}_{commit}.jsonl"
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


# ---------------------------------------------------------------- the cache


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
    mapped = {
        Path(line[line.index("/") :]) for line in maps if "r-xp" in line and "/" in line
    }
    for path in mapped:
        if path.is_file():
            _warm(path)


def _warm(path: Path) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def touch_mapping(directory: Path) -> None:
    """Reads a byte of every page that is mapped from files below `directory`.

    In one go, whatever the number of tensors, so that a lazy loader pays for its
    page faults but not for a loop of ours.
    """
    ranges = [
        line.split(maxsplit=1)[0].split("-")
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if f" {directory}/" in line
    ]
    if not ranges:
        raise LookupError(f"nothing of {directory} is mapped: is it still read lazily?")
    for first, last in ranges:
        nbytes = int(last, 16) - int(first, 16)
        pages = (ctypes.c_char * nbytes).from_address(int(first, 16))
        torch.frombuffer(pages, dtype=torch.uint8)[:: mmap.PAGESIZE].sum()


# ------------------------------------------------------------ time and memory


class Cache(StrEnum):
    """What the page cache has of files that are to be read.

    Attributes:
        EMPTY: Nothing; for root only.
        FULL: All of it.
        LEFT: What their save has left there.
    """

    EMPTY = "empty"
    FULL = "full"
    LEFT = "left"


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

    def __init__(self, cache: Cache) -> None:
        """Nothing measured yet.

        Args:
            cache: What the page cache has of the files.
        """
        self.cache = cache
        self.seconds = 0.0
        self.rchar_bytes = 0
        self.read_bytes = 0
        self.extra_rss_bytes = 0

    @contextmanager
    def reading(self, directory: Path) -> Iterator[None]:
        """Measures the block; before it, files leave or enter the page cache."""
        if self.cache is Cache.EMPTY:
            _drop_caches()
            _warm_libraries()
        elif self.cache is Cache.FULL:
            for path in directory.rglob("*"):
                if path.is_file():
                    _warm(path)
        memory = Memory()
        rchar_bytes, read_bytes = _field("io", "rchar"), _field("io", "read_bytes")
        start = perf_counter()
        yield
        self.seconds = perf_counter() - start
        self.extra_rss_bytes = memory.extra_bytes()
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


class Memory:
    """The resident memory's high-water mark, counted from here."""

    def __init__(self) -> None:
        """Remembers what is resident now."""
        self._before = 1024 * _field("status", "VmRSS")
        self.mark()

    def mark(self) -> None:
        """Sets the high-water marks back to what is resident now.

        Those of the processes that this one has started are set back, too.
        """
        for process in ("self", *_children()):
            # Processes end while they are looked at.
            with suppress(FileNotFoundError, ProcessLookupError):
                path = Path("/proc") / process / "clear_refs"
                path.write_text("5", encoding="ascii")

    def extra_bytes(self) -> int:
        """How far the mark has been above what was resident at the beginning."""
        return 1024 * _field("status", "VmHWM") - self._before


class DeviceMemory:
    """The high-water mark of what torch takes on a GPU, counted from here.

    What others take there past torch's allocator is not seen.
    """

    def __init__(self) -> None:
        """Remembers what is taken now."""
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def extra_bytes(self) -> int:
        """How far the mark has been above what was taken at the beginning."""
        return torch.cuda.max_memory_allocated() - self._before


def children_bytes() -> int:
    """The most of their own that the processes which this one has started had resident.

    Since their marks were set back, each for itself; what they share with others, files
    and shared memory, is not counted.
    """
    total = 0
    for child in _children():
        # Processes end while they are counted.
        with suppress(FileNotFoundError, ProcessLookupError, LookupError):
            most, *theirs = (
                _field("status", name, process=child)
                for name in ("VmHWM", "RssFile", "RssShmem")
            )
            total += 1024 * max(0, most - sum(theirs))
    return total


def _children() -> list[str]:
    """The processes that this one has started and that run."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        # A thread may have ended since.
        with suppress(FileNotFoundError, ProcessLookupError):
            found += (task / "children").read_text(encoding="ascii").split()
    return found


def _field(file: str, name: str, process: str = "self") -> int:
    """A number of a process, in the file's own unit."""
    text = (Path("/proc") / process / file).read_text(encoding="ascii")
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise LookupError(name)
