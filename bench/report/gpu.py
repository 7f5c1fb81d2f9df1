"""The results of `bench/gpu.py`, which has its own program, held against the targets."""

__all__ = ["rows"]

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GB = 1e9
_GIB = 1 << 30
_DEVICES = ("H100", "H200")
_CACHED = "share of the file cached, cold"
_COLD_SHARE = 0.01

Figure = dict[str, Any]


@dataclass(frozen=True)
class _Target:
    """What is aimed for on one H100 or H200.

    Attributes:
        metric: Of what.
        aim: How much.
        figure: What `bench/gpu.py` calls it.
        is_met: By a median.
        least_gb: Of what state, at least, in GB.
        is_cold: Whether nothing of a file may have been in the page cache.
    """

    metric: str
    aim: str
    figure: str
    is_met: Callable[[float], bool]
    least_gb: float = 0.0
    is_cold: bool = False


_TARGETS = (
    _Target(
        "device-to-host staging",
        "≥ 95 % of the pinned copy rate",
        "staging/raw",
        lambda share: share >= 0.95,
    ),
    _Target(
        "stall per 20 GB save, lazy",
        "≤ 40 ms",
        "stall, step after 1 s",
        lambda seconds: seconds <= 0.04,
        least_gb=20,
    ),
    _Target(
        "training throughput lost, save every 10 steps",
        "< 1 %",
        "training throughput lost, a save every 10 steps",
        lambda share: share < 0.01,
    ),
    _Target(
        "step inflation while copying",
        "≤ 1.05",
        "step inflation while copying, median",
        lambda factor: factor <= 1.05,
    ),
    _Target(
        "durable throughput",
        "≥ 0.95 × raw disk",
        "durable/raw",
        lambda share: share >= 0.95,
    ),
    _Target(
        "restore from page cache or /dev/shm to GPU",
        "≥ 50 GB/s",
        "restore from /dev/shm, into",
        lambda rate: rate >= 50,
    ),
    _Target(
        "restore from disk",
        "≥ 0.9 × raw disk",
        "restore from disk, cold, into/raw",
        lambda share: share >= 0.9,
        is_cold=True,
    ),
)


def rows(directory: Path) -> str:
    """A row of the table of targets for each, from the newest `gpu_*.jsonl`."""
    paths = sorted(directory.glob("gpu_*.jsonl"), key=_when)
    if not paths:
        return "".join(
            _row(each, "–", "needs a GPU, and was not run") for each in _TARGETS
        )
    head: dict[str, Any] = {}
    figures: dict[str, Figure] = {}
    for line in map(json.loads, paths[-1].read_text(encoding="utf-8").splitlines()):
        if "machine" in line:
            # Of a run that was begun again, in the same file, only the last counts.
            head, figures = line, {}
        elif "figure" in line:
            figures[line["figure"]] = line
    link = f"[`{paths[-1].name}`](results/{paths[-1].name}.txt)"
    told = ""
    for target in _TARGETS:
        figure = figures.get(target.figure)
        if figure is None:
            told += _row(target, "–", f"not measured: {link}")
        else:
            word = _word(target, figure, figures, head)
            told += _row(target, _text(figure), f"{word}: {link}")
    return told


def _word(
    target: _Target, figure: Figure, figures: dict[str, Figure], head: dict[str, Any]
) -> str:
    """How a target stands, or why that cannot be told."""
    device = head["machine"].get("device", "another device")
    state_gb = head["case"]["gib"] * _GIB / _GB
    if not any(name in device for name in _DEVICES):
        return f"on {device}"
    if state_gb < target.least_gb:
        return f"of {state_gb:.1f} GB"
    if target.is_cold and figures[_CACHED]["median"] > _COLD_SHARE:
        return "not cold"
    return "met" if target.is_met(figure["median"]) else "**missed**"


def _row(target: _Target, figure: str, word: str) -> str:
    return (
        f"| {target.metric} | one H100 or H200 | {target.aim} | {figure} | {word} |\n"
    )


def _text(figure: Figure) -> str:
    median, least, most = (f"{figure[key]:.3g}" for key in ("median", "min", "max"))
    return f"{median} ({least}–{most}) {figure['unit']}".rstrip()


def _when(path: Path) -> str:
    """The time in a name: `gpu_16cores_20261128T1122_COMMIT.jsonl`."""
    return path.name.split("_")[2]
