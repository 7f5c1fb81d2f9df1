"""The project's targets for a machine without GPU, held against results."""

__all__ = ["TARGETS", "Target", "Verdict"]

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.contenders.ours import (
    OurEngine,
    OurSyncEngine,
    Prepared,
    Unsummed,
    Unverified,
)
from bench.contenders.raw import Writing
from bench.contenders.safetensors_files import Synced as Safetensors
from bench.contenders.torch_files import InThread, Mmapped
from bench.contenders.torch_files import Synced as Torch
from bench.report.results import CellResults, Results, Spread
from bench.workloads import MIB

_OURS = OurEngine.name
_META = "torch_checkpointing + fsync"
_DCP = "DCP async_save, thread"
_ALL_DCP = (_DCP, "DCP async_save, process", "DCP async_save, staged in a thread")
_PER_RECORD_BYTES = 256


@dataclass(frozen=True)
class Verdict:
    """How a target stands.

    Attributes:
        figure: What was measured.
        is_met: Whether that is what was aimed for; None where the repeats of two who are
            compared overlap.
    """

    figure: str
    is_met: bool | None


@dataclass(frozen=True)
class Target:
    """One thing that is aimed for.

    Attributes:
        metric: Of what.
        workload: On what.
        aim: How much.
        case: The case that measures it.
        cell: How the name of its cell begins.
        check: Holds it against a cell; None where a contender is missing.
        is_added: Whether it is none of the project's targets, but stands beside one.
    """

    metric: str
    workload: str
    aim: str
    case: str
    cell: str
    check: Callable[[CellResults], Verdict | None]
    is_added: bool = False

    def verdict(self, results: Results) -> Verdict | None:
        """How it stands; None where it was not measured."""
        cell = results.cell(self.case, self.cell)
        return self.check(cell) if cell is not None else None


# ------------------------------------------------------------- kinds of checks


def _at_least(spread: Spread | None, limit: float, unit: str = "×") -> Verdict | None:
    if spread is None:
        return None
    return Verdict(f"{spread.text(2)} {unit}", spread.median >= limit)


def _at_most(value: float | None, limit: float, unit: str) -> Verdict | None:
    if value is None:
        return None
    return Verdict(f"{value:.2f} {unit}", value <= limit)


def _faster(
    other: str, limit: float, *, ours: str = _OURS, key: str = "durable_s"
) -> Callable[[CellResults], Verdict | None]:
    """How much sooner we are done than another, repeat by repeat."""
    return lambda cell: _at_least(cell.ratio(other, ours, key), limit)


def _of_raw(
    limit: float, *, ours: str = _OURS, key: str = "durable_s"
) -> Callable[[CellResults], Verdict | None]:
    """How fast we are beside the raw disk."""
    return lambda cell: _at_least(cell.ratio(cell.raw(key), ours, key), limit)


def _best(cell: CellResults, names: Iterable[str], key: str) -> str | None:
    """Who of some has the least of a figure, if any was measured."""
    medians = {
        name: spread.median
        for name in names
        if (spread := cell.spread(name, key)) is not None
    }
    return min(medians, key=lambda name: medians[name], default=None)


def _worst(
    key: str, limit: float, unit: str, factor: float, *, ours: str = _OURS
) -> Callable[[CellResults], Verdict | None]:
    """The greatest of all, the first of the process included."""

    def check(cell: CellResults) -> Verdict | None:
        worst = cell.worst(ours, key)
        return None if worst is None else _at_most(worst * factor, limit, unit)

    return check


def _median(
    key: str, limit: float, unit: str, factor: float, *, ours: str = _OURS
) -> Callable[[CellResults], Verdict | None]:
    def check(cell: CellResults) -> Verdict | None:
        spread = cell.spread(ours, key, scale=factor)
        if spread is None:
            return None
        return Verdict(f"{spread.text(2)} {unit}", spread.median <= limit)

    return check


def _first_plan(ours: str) -> Callable[[CellResults], Verdict | None]:
    def check(cell: CellResults) -> Verdict | None:
        first = cell.first(ours, "plan_s")
        return None if first is None else _at_most(1e3 * first, 200, "ms")

    return check


def _stall_share(cell: CellResults) -> Verdict | None:
    spread = cell.ratio(_DCP, _OURS, "stall_s")
    if spread is None:
        return None
    return Verdict(_share(spread), spread.median >= 500)


def _share(spread: Spread) -> str:
    if spread.median < 1:
        return f"{1 / spread.median:.1f} ×"
    return f"1/{spread.median:.0f}" if spread.median >= 10 else f"1/{spread.median:.1f}"


def _stall_beside(names: Sequence[str]) -> Callable[[CellResults], Verdict | None]:
    """Our stall beside that of the best of some: aimed at is to be no longer."""

    def check(cell: CellResults) -> Verdict | None:
        best = _best(cell, names, "stall_s")
        spread = None if best is None else cell.ratio(best, _OURS, "stall_s")
        if spread is None:
            return None
        return Verdict(f"{_share(spread)} that of {best}", spread.median >= 1)

    return check


def _lower_steps(*others: str) -> Callable[[CellResults], Verdict | None]:
    """Whether steps beside our save are shorter than beside that of the best of some."""

    def check(cell: CellResults) -> Verdict | None:
        best = _best(cell, others, "p50")
        ours = cell.spread(OurSyncEngine.name, "p50")
        theirs = None if best is None else cell.spread(best, "p50")
        if ours is None or theirs is None:
            return None
        figure = f"{ours.text(2)} against {theirs.text(2)}"
        if len(others) > 1:
            figure += f" ({best})"
        overlap = ours.least <= theirs.most and theirs.least <= ours.most
        return Verdict(figure, None if overlap else ours.median < theirs.median)

    return check


def _fastest_load(cell: CellResults) -> Verdict | None:
    best = _best(cell, (Torch.name, Mmapped.name, Safetensors.name), "seconds")
    ratio = None if best is None else cell.ratio(_OURS, best, "seconds")
    if ratio is None:
        return None
    return Verdict(f"{ratio.text(2)} × the time of {best}", ratio.median <= 1)


def _partial(cell: CellResults) -> Verdict | None:
    tensor_bytes = cell.nbytes / cell.workload.num_tensors
    directory_bytes = _PER_RECORD_BYTES * cell.workload.num_tensors
    read = [cell.worst(_OURS, key) for key in ("rchar_bytes", "read_bytes")]
    most = max((each for each in read if each is not None), default=None)
    if most is None:
        return None
    beyond = most - tensor_bytes - directory_bytes
    return Verdict(f"tensor + {beyond / MIB:.2f} MiB", beyond <= MIB)


def _overhead(
    with_it: str, without_it: str, key: str
) -> Callable[[CellResults], Verdict | None]:
    def check(cell: CellResults) -> Verdict | None:
        spread = cell.ratio(with_it, without_it, key)
        if spread is None:
            return None
        percent = Spread([100 * (value - 1) for value in spread.values])
        return Verdict(f"{percent.text(1)} %", percent.median <= 5)

    return check


def _commit(cell: CellResults) -> Verdict | None:
    spread = cell.ratio(_OURS, Writing.name, "commit_s")
    if spread is None:
        return None
    return Verdict(f"{spread.text(2)} ×", spread.median <= 10)


# ------------------------------------------------------------------ the targets

_BIG = "4 GiB, 300 tensors"
_SMALL = "1 GiB in 100 000 tensors of 1–64 KiB"
_LOADED = "4 GiB"
_STALLED = "2 GiB, 300 tensors, a step of 1 s"
_NESTED = "10 000 tensors in nested dicts"
_STEPPED = "small CPU step, background save of 1 GiB"
_SYNC = OurSyncEngine.name


def _steps(metric: str, cell: str) -> Sequence[Target]:
    checks = (
        ("p50 ≤ 1.10", _median("p50", 1.10, "×", 1, ours=_SYNC)),
        ("lower than DCP `async_save`'s", _lower_steps(_DCP)),
        ("lower than a thread's with `torch.save`", _lower_steps(InThread.name)),
        ("lower than the best DCP `async_save`'s", _lower_steps(*_ALL_DCP)),
        ("lower than torch_checkpointing's", _lower_steps(_META)),
    )
    return [
        Target(
            "" if number else metric,
            "" if number else _STEPPED,
            aim,
            "steps",
            cell,
            check,
            is_added=number >= 3,
        )
        for number, (aim, check) in enumerate(checks)
    ]


TARGETS: Sequence[Target] = [
    Target("durable throughput", _BIG, "≥ 0.95 × raw", "throughput", "", _of_raw(0.95)),
    Target("", "", "≥ 5 × `torch.save` + fsync", "throughput", "", _faster(Torch.name, 5)),
    Target("", "", "≥ 1.3 × safetensors + fsync", "throughput", "", _faster(Safetensors.name, 1.3)),
    Target("", "", "≥ 8 × DCP `async_save`", "throughput", "", _faster(_DCP, 8)),
    Target("durable throughput, small tensors", _SMALL, "≥ 0.5 × raw", "small", "", _of_raw(0.5)),
    Target("", "", "≥ 3 × `torch.save` + fsync", "small", "", _faster(Torch.name, 3)),
    Target("stall, ring ≥ state", _STALLED, "≤ 3 ms, first save included", "stall", "2 GiB, ring larger", _worst("stall_s", 3, "ms (worst)", 1e3)),
    Target("", "", "≤ 3 ms, first save included after `preflight`", "stall", "2 GiB, ring larger", _worst("stall_s", 3, "ms (worst)", 1e3, ours=Prepared.name), is_added=True),
    Target("", "", "≤ 1/500 of DCP `async_save`", "stall", "2 GiB, ring larger", _stall_share),
    Target("", "", "not longer than with the best DCP `async_save`", "stall", "2 GiB, ring larger", _stall_beside(_ALL_DCP), is_added=True),
    Target("", "", "not longer than with torch_checkpointing", "stall", "2 GiB, ring larger", _stall_beside((_META,)), is_added=True),
    Target("stall in `save`", _NESTED, "≤ 15 ms, first included", "stall", "10 000", _worst("save_s", 15, "ms (worst)", 1e3)),
    Target("", "", "≤ 15 ms, first included after `preflight`", "stall", "10 000", _worst("save_s", 15, "ms (worst)", 1e3, ours=Prepared.name), is_added=True),
    Target("planning in the worker", _NESTED, "≤ 200 ms first", "stall", "10 000", _first_plan(_OURS)),
    Target("", "", "≤ 200 ms first after `preflight`", "stall", "10 000", _first_plan(Prepared.name), is_added=True),
    Target("", "", "≤ 60 ms later", "stall", "10 000", _median("plan_s", 60, "ms", 1e3)),
    Target("durable throughput under a GIL-bound trainer", "2 GiB, pure Python without a pause", "≥ 0.5 × raw", "gil", "2 GiB", _of_raw(0.5, ours=_SYNC)),
    Target("", "", "trainer's speed ≥ 0.9 of undisturbed", "gil", "2 GiB", lambda cell: _at_least(cell.spread(_SYNC, "trainer_speed"), 0.9)),
    Target("peak host memory", "8 GiB, `host_cache_size` 0.5", "≤ 0.5 GiB + 96 MiB", "growth", "size: 8", _worst("extra_rss_bytes", 512 + 96, "MiB (worst)", 1 / MIB)),
    Target("loop gap, caller's loop", "4 GiB save and commit", "p99 ≤ 4 ms", "gap", "4 GiB", _median("caller_p99_s", 4, "ms", 1e3)),
    Target("", "", "max ≤ 15 ms", "gap", "4 GiB", _worst("caller_max_s", 15, "ms (worst)", 1e3)),
    Target("", "", "max ≤ 15 ms after `preflight`", "gap", "4 GiB", _worst("caller_max_s", 15, "ms (worst)", 1e3, ours=Prepared.name), is_added=True),
    Target("loop gap, engine's loop", "4 GiB save and commit", "p99 ≤ 4 ms", "gap", "4 GiB", _median("engine_p99_s", 4, "ms", 1e3)),
    Target("", "", "max ≤ 15 ms", "gap", "4 GiB", _worst("engine_max_s", 15, "ms (worst)", 1e3)),
    Target("", "", "max ≤ 15 ms after `preflight`", "gap", "4 GiB", _worst("engine_max_s", 15, "ms (worst)", 1e3, ours=Prepared.name), is_added=True),
    *_steps("step inflation, trainer on 1 of 2 cores", "1 GiB, trainer on 1"),
    *_steps("step inflation, trainer on 2 of 2 cores", "1 GiB, trainer on 2"),
    Target("restore to CPU, fresh", _LOADED, "≥ 0.85 × raw read into touched memory", "load", "4 GiB", _of_raw(0.85, key="seconds")),
    Target("", "", "not slower than the fastest of torch (plain, mmap) and safetensors", "load", "4 GiB", _fastest_load),
    Target("restore in place", _LOADED, "≥ 0.95 × raw", "into", "", _of_raw(0.95, key="seconds")),
    Target("", "", "extra memory ≤ ring (0.5 GiB)", "into", "", _worst("extra_rss_bytes", 512, "MiB (worst)", 1 / MIB)),
    Target("partial load", "one tensor of 4 GiB", "reads ≤ tensor + 1 MiB + directory", "partial", "", _partial),
    Target("checksum cost, save", "1 GiB", "≤ 5 %", "checksum", "", _overhead(_OURS, Unsummed.name, "durable_s")),
    Target("checksum cost, load", _LOADED, "≤ 5 %", "load", "4 GiB", _overhead(_OURS, Unverified.name, "seconds")),
    Target("commit beyond the data", "8 files", "≤ 10 × raw (write, fsync, rename, fsync directory)", "commit", "8 files", _commit),
]  # fmt: skip
