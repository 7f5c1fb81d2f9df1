"""Saves of what is on a GPU, and loads to it.

Where there is none, the host's memory takes its place: to see the cases run, not to
measure.
"""

__all__ = ["CASES"]

from collections.abc import Sequence

import torch

from bench.cases.base import Case, Cell
from bench.cases.loading import (
    load_cell,
    load_fresh,
    load_in_place,
    prepare,
    state_of,
)
from bench.cases.saving import (
    DCP_PROCESS,
    DCP_THREAD,
    META,
    OURS,
    PREPARED,
    RAW,
    RAW_AT_ONCE,
    SAFETENSORS,
    SNAPSHOT,
    TORCH,
    measure,
)
from bench.contenders.base import Options
from bench.contenders.dcp import Pinned
from bench.contenders.nvrx_files import Queued
from bench.contenders.torch_files import Mmapped
from bench.workloads import GIB, Scale

_GIB = 2
_REPEATS = 5


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _saves(scale: Scale) -> Sequence[Cell]:
    peers = (TORCH, DCP_THREAD, DCP_PROCESS, Pinned.name, SNAPSHOT, META, Queued.name)
    workload = state_of(scale, _GIB, device=_device())
    return [
        Cell(
            f"{_GIB} GiB, ring larger than the state",
            workload,
            (RAW, RAW_AT_ONCE, OURS, PREPARED, *peers),
            scale.repeats(_REPEATS),
            options=Options(ring_gib=workload.nbytes / GIB + 0.25, threads=8),
            settings={"step_s": scale.seconds(1.0)},
        )
    ]


def _loads(scale: Scale) -> Sequence[Cell]:
    contenders = (RAW, OURS, TORCH, Mmapped.name, SAFETENSORS)
    workload = state_of(scale, _GIB, device=_device())
    return [load_cell(scale, f"{_GIB} GiB", workload, contenders)]


def _loads_in_place(scale: Scale) -> Sequence[Cell]:
    contenders = (RAW, OURS, TORCH, SAFETENSORS, DCP_THREAD, META)
    workload = state_of(scale, _GIB, device=_device())
    return [load_cell(scale, f"{_GIB} GiB", workload, contenders)]


CASES = [
    Case(
        "gpu_save",
        "How long is a trainer on a GPU held?",
        _saves,
        measure,
        needs_gpu=True,
    ),
    Case(
        "gpu_load",
        "How soon is a state on a GPU?",
        _loads,
        load_fresh,
        prepare,
        needs_gpu=True,
    ),
    Case(
        "gpu_into",
        "And in tensors that exist there?",
        _loads_in_place,
        load_in_place,
        prepare,
        needs_gpu=True,
    ),
]
