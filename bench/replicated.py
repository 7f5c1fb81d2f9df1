"""What it brings when all ranks that hold a state write it together.

    python -m torch.distributed.run --standalone --nproc-per-node=2 -m bench.replicated
        [--gib 1] [--repeats 5] [--dir DIR]

Every rank has the same state. In turns, rank 0 writes it alone and all ranks write it
together; a round of raw O_DIRECT writes by rank 0 stands beside them. Rank 0 prints one
JSON line per figure. On one node the ranks share one disk: what is to be won there is
the part of the time in which one process does not keep it busy.
"""

import argparse
import asyncio
import json
import os
import shutil
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist

import aiockpt
from bench.contenders.base import Options
from bench.contenders.raw import Writing
from bench.measuring import figure, machine
from bench.workloads import GIB

_NUM_TENSORS = 300


def main() -> None:
    """Runs the rounds in a directory that all ranks share, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--ring-gib", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path.cwd())
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    directory = arguments.dir / f"bench-replicated-{os.environ['TORCHELASTIC_RUN_ID']}"
    if dist.get_rank() == 0:
        directory.mkdir()
        head = {"machine": machine(), "case": vars(arguments)}
        print(json.dumps(head | {"ranks": dist.get_world_size()}, default=str))
    try:
        asyncio.run(rounds(directory, arguments))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(directory)
        dist.destroy_process_group()


async def rounds(directory: Path, arguments: argparse.Namespace) -> None:
    """Alone, together, raw, and again; the first round warms up."""
    torch.manual_seed(7)
    numel = int(arguments.gib * GIB) // _NUM_TENSORS // 4
    state = {f"layers.{i}.weight": torch.rand(numel) for i in range(_NUM_TENSORS)}
    writer = Writing()
    writer.setup(directory, Options())
    seconds: dict[str, list[float]] = {"raw": [], "alone": [], "together": []}
    config = {
        "host_cache_size": arguments.ring_gib,
        "parser_threads": arguments.threads,
    }
    async with aiockpt.CheckpointEngine(directory / "root", config) as engine:
        for repeat in range(arguments.repeats + 1):
            took = {
                "raw": raw(writer, state),
                "alone": await save(engine, state, f"a{repeat}", replicated=False),
                "together": await save(engine, state, f"t{repeat}", replicated=True),
            }
            for name in seconds if repeat else ():
                seconds[name].append(took[name])
    if dist.get_rank() == 0:
        for name, values in seconds.items():
            speeds = [arguments.gib / each for each in values]
            print(json.dumps(figure(name, speeds, "GiB/s")))
        pairs = zip(seconds["alone"], seconds["together"], strict=True)
        ratios = [one / other for one, other in pairs]
        print(json.dumps(figure("together/alone", ratios, "ratio")))


def raw(writer: Writing, state: dict[str, torch.Tensor]) -> float:
    """Seconds in which rank 0 writes as much to the disk, and the others wait."""
    took_s = 0.0
    if dist.get_rank() == 0:
        writer.open_tag("raw")
        start = perf_counter()
        writer.save(state, "raw")
        took_s = perf_counter() - start
        writer.delete("raw")
    dist.barrier()
    return took_s


async def save(
    engine: aiockpt.CheckpointEngine,
    state: dict[str, torch.Tensor],
    tag: str,
    *,
    replicated: bool,
) -> float:
    """Seconds from `save` to the durable tag, which is then compared and deleted."""
    await engine.create(tag)
    dist.barrier()
    start = perf_counter()
    if replicated or dist.get_rank() == 0:
        await engine.save(state, "model.pt", replicated=replicated)
    await engine.commit(tag)
    took_s = perf_counter() - start
    loaded = await engine.load("model.pt", tag=tag)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    dist.barrier()
    if dist.get_rank() == 0:
        await engine.delete(tag)
    dist.barrier()
    return took_s


if __name__ == "__main__":
    main()
