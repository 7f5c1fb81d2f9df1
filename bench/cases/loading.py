"""Loads: from the disk to memory that can be used."""

__all__ = ["CASES"]

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from bench.cases.base import Case, Cell
from bench.cases.saving import DCP_THREAD, META, OURS, RAW, SAFETENSORS, TORCH
from bench.contenders.raw import Writing
from bench.measuring import Clock, can_drop_caches, touch_mapping
from bench.sessions import Bench
from bench.workloads import GIB, Scale, Workload

_TAG = "step-1"
_UNVERIFIED = "aiockpt, unverified"
_MMAPPED = "torch.save + fsync, mmap"


def _prepare(bench: Bench, tag: str) -> dict[str, float]:
    """Saves what will be loaded."""
    del tag
    bench.contender.open_tag(_TAG)
    bench.contender.save(bench.state, _TAG).wait_durable()
    return {}


def _measure(bench: Bench, tag: str, *, is_in_place: bool) -> dict[str, float]:
    """One load, with a cold cache where it can be dropped."""
    del tag
    contender, state = bench.contender, bench.state
    keys = [bench.workload.middle] if bench.settings.get("is_partial") else None
    if isinstance(contender, Writing) and bench.settings.get("is_touched", True):
        contender.get_ready(sum(each.nbytes for each in state.values()))
    like: Mapping[str, Any] = state
    if is_in_place:
        like = {name: tensor.new_ones(tensor.shape) for name, tensor in state.items()}
    clock = Clock(is_cold=bench.settings["is_cold"] and can_drop_caches())
    with clock.reading(contender.directory / _TAG):
        loaded = contender.load(_TAG, like, is_in_place=is_in_place, keys=keys)
        if contender.is_lazy and not (keys or is_in_place):
            touch_mapping(contender.directory)
    bench.check(loaded, keys)
    return {"is_cold": clock.is_cold, **clock.costs()}


def _fresh(scale: Scale) -> Sequence[Cell]:
    contenders = (RAW, OURS, _UNVERIFIED, TORCH, _MMAPPED, SAFETENSORS)
    # What went through the page cache is there still.
    again = "1 GiB, right after the save"
    return [
        _cell(scale, "4 GiB", 4, contenders, 5),
        _cell(scale, again, 1, contenders, 5, is_cold=False),
    ]


def _in_place(scale: Scale) -> Sequence[Cell]:
    return [_cell(scale, "4 GiB", 4, (RAW, OURS, _MMAPPED, SAFETENSORS), 5)]


def _others(scale: Scale) -> Sequence[Cell]:
    contenders = (RAW, OURS, TORCH, DCP_THREAD, "torchsnapshot take + fsync", META)
    return [_cell(scale, "0.5 GiB, in place", 0.5, contenders, 3)]


def _partial(scale: Scale) -> Sequence[Cell]:
    cell = _cell(scale, "one of 300 tensors of 4 GiB", 4, (OURS, TORCH, SAFETENSORS), 5)
    return [cell]


def _cell(
    scale: Scale,
    name: str,
    gib: float,
    contenders: Sequence[str],
    repeats: int,
    *,
    is_cold: bool = True,
) -> Cell:
    workload = Workload(scale.size(int(gib * GIB)), scale.number(300))
    # Who only looks whether it runs leaves the machine's caches alone.
    settings = {
        "is_partial": name.startswith("one of"),
        "is_cold": is_cold and scale is not Scale.TINY,
    }
    return Cell(name, workload, contenders, scale.repeats(repeats), settings=settings)


_load_fresh = partial(_measure, is_in_place=False)
_load_in_place = partial(_measure, is_in_place=True)

CASES = [
    Case("load", "How soon is a state in memory?", _fresh, _load_fresh, _prepare),
    Case("into", "And in tensors that exist?", _in_place, _load_in_place, _prepare),
    Case("into_all", "And by the others?", _others, _load_in_place, _prepare),
    Case("partial", "What does one tensor take?", _partial, _load_fresh, _prepare),
]
