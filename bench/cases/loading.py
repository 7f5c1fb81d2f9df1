"""Loads: from the disk to memory that can be used."""

__all__ = ["CASES"]

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


def _prepare(bench: Bench, tag: str) -> dict[str, float]:
    """Saves what will be loaded."""
    del tag
    for each, state in ((_TINY_TAG, _tiny()), (_TAG, bench.state)):
        bench.contender.open_tag(each)
        bench.contender.save(state, each).wait_durable()
    return {}


def _tiny() -> dict[str, torch.Tensor]:
    """What is loaded first, so that no import that comes late is in a load's time."""
    return {_TINY_KEY: torch.zeros(KIB)}


def _measure(bench: Bench, tag: str, *, is_in_place: bool) -> dict[str, float]:
    """One load, from a page cache as the cell wants it."""
    del tag
    contender, state = bench.contender, bench.state
    keys = [bench.workload.middle] if bench.settings.get("is_partial") else None
    tiny_keys = [_TINY_KEY] if keys else None
    contender.load(_TINY_TAG, _tiny(), is_in_place=is_in_place, keys=tiny_keys)
    if isinstance(contender, Writing) and contender.is_touched:
        contender.get_ready(sum(each.nbytes for each in state.values()))
    like: Mapping[str, Any] = state
    if is_in_place:
        # No byte of theirs is right.
        like = {name: tensor.new_ones(tensor.shape) for name, tensor in state.items()}
    cache = bench.settings["cache"]
    if cache is Cache.EMPTY and not can_drop_caches():
        cache = Cache.FULL
    clock = Clock(cache)
    with clock.reading(contender.directory / _TAG):
        loaded = contender.load(_TAG, like, is_in_place=is_in_place, keys=keys)
        if contender.is_lazy and not (keys or is_in_place):
            touch_mapping(contender.directory)
    bench.check(loaded, keys)
    return {"is_cold": cache is Cache.EMPTY, **clock.costs()}


def _fresh(scale: Scale) -> Sequence[Cell]:
    contenders = (OURS, _UNVERIFIED, TORCH, _MMAPPED, SAFETENSORS)
    limits = (RAW, "raw O_DIRECT, fresh memory")
    left, full = "1 GiB, right after the save", "1 GiB, from the page cache"
    return [
        _cell(scale, "4 GiB", 4, (*limits, *contenders, DCP_THREAD, META)),
        _cell(scale, left, 1, (*limits, *contenders), cache=Cache.LEFT),
        _cell(scale, full, 1, contenders, cache=Cache.FULL),
        _cell(scale, MANY, 1, (RAW, *contenders), num_tensors=20_000),
    ]


def _in_place(scale: Scale) -> Sequence[Cell]:
    return [_cell(scale, "4 GiB", 4, (RAW, OURS, TORCH, _MMAPPED, SAFETENSORS))]


def _others(scale: Scale) -> Sequence[Cell]:
    contenders = (RAW, OURS, TORCH, DCP_THREAD, _SNAPSHOT, META)
    return [_cell(scale, "0.5 GiB, in place", 0.5, contenders)]


def _partial(scale: Scale) -> Sequence[Cell]:
    contenders = (OURS, TORCH, SAFETENSORS, DCP_THREAD, _SNAPSHOT)
    return [_cell(scale, "one of 300 tensors of 4 GiB", 4, contenders)]


def _cell(
    scale: Scale,
    name: str,
    gib: float,
    contenders: Sequence[str],
    *,
    cache: Cache = Cache.EMPTY,
    num_tensors: int = 300,
) -> Cell:
    workload = Workload(scale.size(int(gib * GIB)), scale.number(num_tensors))
    # Who only looks whether it runs leaves the machine's caches alone.
    settings = {
        "is_partial": name.startswith("one of"),
        "cache": Cache.LEFT if scale is Scale.TINY else cache,
    }
    return Cell(name, workload, contenders, scale.repeats(_REPEATS), settings=settings)


_load_fresh = partial(_measure, is_in_place=False)
_load_in_place = partial(_measure, is_in_place=True)

CASES = [
    Case("load", "How soon is a state in memory?", _fresh, _load_fresh, _prepare),
    Case("into", "And in tensors that exist?", _in_place, _load_in_place, _prepare),
    Case("into_all", "And by the others?", _others, _load_in_place, _prepare),
    Case("partial", "What does one tensor take?", _partial, _load_fresh, _prepare),
]
