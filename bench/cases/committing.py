"""Commits of many small files: what making them durable costs beyond their bytes."""

__all__ = ["CASES"]

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bench.cases.base import Case, Cell
from bench.cases.saving import OURS, RAW, SAFETENSORS, TORCH
from bench.contenders.base import Contender, sync_tree
from bench.contenders.ours import OurEngine
from bench.sessions import Bench, ContenderError
from bench.workloads import KIB, Scale, Workload


def _measure(bench: Bench, tag: str) -> dict[str, float]:
    """Files of 4 KiB, each with the same small state."""
    num_files = bench.settings["num_files"]
    contender = bench.contender
    bench.alter()
    if isinstance(contender, OurEngine):
        return contender.run(_commit(contender, bench.state, tag, num_files))
    contender.open_tag(tag)
    directory = contender.directory / tag
    if contender.is_reference:
        seconds = _publish_raw(directory)
        told = {"commit_s": seconds, "total_s": seconds}
    else:
        # It has no commit: there is only the whole.
        seconds = _save_all(contender, bench.state, directory, num_files)
        told = {"total_s": seconds}
    contender.delete(tag)
    return told


async def _commit(
    contender: OurEngine, state: dict[str, Any], tag: str, num_files: int
) -> dict[str, float]:
    engine = contender.engine
    await engine.create(tag)
    start = perf_counter()
    handles = [await engine.save(state, f"{n}.pt") for n in range(num_files)]
    for handle in handles:
        await handle.written()
    written = perf_counter()
    await engine.commit(tag)
    end = perf_counter()
    for number in range(num_files):
        loaded = await engine.load(f"{number}.pt", tag=tag)
        if any(not torch.equal(loaded[name], state[name]) for name in state):
            raise ContenderError(f"file {number} is not what was saved")
    await engine.delete(tag)
    return {"commit_s": end - written, "total_s": end - start}


def _publish_raw(directory: Path) -> float:
    """One file written, synced, renamed, and its directory synced."""
    start = perf_counter()
    descriptor = os.open(directory / "new", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, bytes(4 * KIB))
    os.fsync(descriptor)
    os.close(descriptor)
    (directory / "new").rename(directory / "file")
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return perf_counter() - start


def _save_all(
    contender: Contender, state: dict[str, Any], directory: Path, num_files: int
) -> float:
    """Saved one after the other, then synced together with their directory."""
    save, load = _of_one_file(contender)
    start = perf_counter()
    for number in range(num_files):
        save(state, directory / f"{number}")
    sync_tree(directory)
    seconds = perf_counter() - start
    for number in range(num_files):
        loaded = load(directory / f"{number}")
        if any(not torch.equal(loaded[name], state[name]) for name in state):
            raise ContenderError(f"{contender.name}: file {number} is wrong")
    return seconds


def _of_one_file(contender: Contender) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How a contender saves a state to one file, and loads it."""
    if contender.name == TORCH:
        return torch.save, torch.load
    from safetensors.torch import load_file, save_file

    return save_file, load_file


def _cells(scale: Scale) -> Sequence[Cell]:
    workload = Workload(4 * KIB, 1)
    return [
        Cell(
            f"{num_files} files",
            workload,
            (RAW, OURS, TORCH, SAFETENSORS),
            scale.repeats(9),
            settings={"num_files": num_files},
        )
        for num_files in (1, 8, 64, 512)
        if num_files <= scale.number(512)
    ]


CASES = [Case("commit", "What does a commit cost, by files?", _cells, _measure)]
