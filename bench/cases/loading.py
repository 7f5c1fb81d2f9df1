"""Loads: from the disk to memory that can be used."""

__all__ = [
    "CASES",
    "load_cell",
    "load_fresh",
    "load_in_place",
    "prepare",
    "state_of",
]

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.cases.base import Case, Cell
from bench.cases.saving import DCP_THREAD, MANY, META, OURS, RAW, SAFETENSORS, TORCH
from bench.contenders.raw import Writing
from bench.measuring import Cache, Clock, can_drop_caches, touch_mapping
from bench.sessions import Bench
from bench.workloads import GIB, KIB, Scale, Workload

_TAG = "step-1"
_REPEATS = 5
_TINY_TAG = "tiny"
_TINY_KEY = "weight"
_SNAPSHOT = "torchsnapshot take + fsync"
_UNVERIFIED = "aiockpt, unverified"
_MMAPPED = "torch.save + fsync, mmap"


def prepare(bench: Bench, tag: str) -> dict[str, float]:
    """Saves what will be loaded."""
    del tag
    for each, state in ((_TINY_TAG, _tiny(bench)), (_TAG, bench.state)):
        bench.contender.open_tag(each)
        bench.contender.save(state, each).wait_durable()
    return {}


def _tiny(bench: Bench) -> dict[str, torch.Tensor]:
    """What is loaded first, so that no import that comes late is in a load's time."""
    return {_TINY_KEY: torch.zeros(KIB, device=bench.workload.device)}


def _measure(bench: Bench, tag: str, *, is_in_place: bool) -> dict[str, float]:
    """One load, from a page cache as the cell wants it."""
    del tag
    contender, state = bench.contender, bench.state
    keys = [bench.workload.middle] if bench.settings.get("is_partial") else None
    tiny_keys = [_TINY_KEY] if keys else None
    contender.load(_TINY_TAG, _tiny(bench), is_in_place=is_in_place, keys=tiny_keys)
    if isinstance(contender, Writing) and contender.is_touched:
        contender.get_ready(sum(each.nbytes for each in state.values()))
    like: Mapping[str, Any] = state
    if is_in_place:
        # No byte of theirs is right.
        like = {name: tensor.new_ones(tensor.shape) for name, tensor in state.items()}
    cache = bench.settings["cache"]
    if cache is Cache.EMPTY and not can_drop_caches():
        cache = Cache.FULL
    is_mapped = contender.is_lazy and not (keys or is_in_place)
    bench.settle()
    clock = Clock(cache)
    with clock.reading(contender.directory / _TAG):
        loaded = contender.load(_TAG, like, is_in_place=is_in_place, keys=keys)
        if is_mapped and not bench.workload.is_on_gpu:
            touch_mapping(contender.directory)
        bench.settle()
    bench.check(loaded, keys, must_be_placed=True)
    return {"is_cold": cache is Cache.EMPTY, **clock.costs()}


def _fresh(scale: Scale) -> Sequence[Cell]:
    contenders = (OURS, _UNVERIFIED, TORCH, _MMAPPED, SAFETENSORS)
    limits = (RAW, "raw O_DIRECT, fresh memory")
    left, full = "1 GiB, right after the save", "1 GiB, from the page cache"
    large, small = state_of(scale, 4), state_of(scale, 1)
    many = state_of(scale, 1, 20_000)
    return [
        load_cell(scale, "4 GiB", large, (*limits, *contenders, DCP_THREAD, META)),
        load_cell(scale, left, small, (*limits, *contenders), cache=Cache.LEFT),
        load_cell(scale, full, small, contenders, cache=Cache.FULL),
        load_cell(scale, MANY, many, (RAW, *contenders)),
    ]


def _in_place(scale: Scale) -> Sequence[Cell]:
    contenders = (RAW, OURS, TORCH, _MMAPPED, SAFETENSORS)
    return [load_cell(scale, "4 GiB", state_of(scale, 4), contenders)]


def _others(scale: Scale) -> Sequence[Cell]:
    contenders = (RAW, OURS, TORCH, DCP_THREAD, _SNAPSHOT, META)
    return [load_cell(scale, "0.5 GiB, in place", state_of(scale, 0.5), contenders)]


def _partial(scale: Scale) -> Sequence[Cell]:
    contenders = (OURS, TORCH, SAFETENSORS, DCP_THREAD, _SNAPSHOT)
    name = "one of 300 tensors of 4 GiB"
    return [load_cell(scale, name, state_of(scale, 4), contenders)]


def state_of(
    scale: Scale, gib: float, num_tensors: int = 300, *, device: str = "cpu"
) -> Workload:
    """A state of `gib` GiB on a device, at a scale."""
    nbytes = scale.size(int(gib * GIB))
    return Workload(nbytes, scale.number(num_tensors), device=device)


def load_cell(
    scale: Scale,
    name: str,
    workload: Workload,
    contenders: Sequence[str],
    *,
    cache: Cache = Cache.EMPTY,
) -> Cell:
    """A comparison of loads."""
    # Who only looks whether it runs leaves the machine's caches alone.
    settings = {
        "is_partial": name.startswith("one of"),
        "cache": Cache.LEFT if scale is Scale.TINY else cache,
    }
    return Cell(name, workload, contenders, scale.repeats(_REPEATS), settings=settings)


load_fresh = partial(_measure, is_in_place=False)
load_in_place = partial(_measure, is_in_place=True)

CASES = [
    Case("load", "How soon is a state in memory?", _fresh, load_fresh, prepare),
    Case("into", "And in tensors that exist?", _in_place, load_in_place, prepare),
    Case("into_all", "And by the others?", _others, load_in_place, prepare),
    Case("partial", "What does one tensor take?", _partial, load_fresh, prepare),
]
