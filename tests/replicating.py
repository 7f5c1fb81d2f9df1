"""A program for every rank of a job: they save together. Prints what came of it.

Its arguments: a root, and which of the functions in `WAYS` to run.
"""

import asyncio
import contextlib
import json
import os
import sys

import torch
import torch.distributed as dist

import aiockpt

# Chunks of 2 MiB, so that files of some MiB are dealt out to all.
CONFIG = {"host_cache_size": 16 / 1024, "parser_threads": 2}


def model() -> dict[str, object]:
    """The same on every rank."""
    torch.manual_seed(7)
    sizes = [1, 3, 500, 70_000, 3_000_001, 5, 900_000]
    state: dict[str, object] = {str(size): torch.rand(size) for size in sizes}
    return {
        "model": state,
        "tied": state["500"].view(5, 100),
        "part": state["70000"][10:20],
        "step": 1,
    }


FILES = {
    "model.pt": model,
    "sub/vector.pt": lambda: torch.arange(1_500_000),
    "w.safetensors": lambda: {"a": torch.arange(1_500_000)},
}


async def all_ranks(engine: aiockpt.CheckpointEngine, rank: int) -> object:
    """Several files of all ranks, and one of each rank's own."""
    await engine.create("one")
    handles = [
        await engine.save(state(), name, replicated=True)
        for name, state in FILES.items()
    ]
    await engine.save({"rank": rank}, f"own-{rank}.pt")
    await engine.staged()
    report = await engine.commit("one")
    written = [handle.progress.written_bytes for handle in handles]
    return [written, report.nbytes, report.num_files]


async def groups(engine: aiockpt.CheckpointEngine, rank: int) -> object:
    """Even and odd ranks write a file each."""
    await engine.create("one")
    group = [0, 2] if rank % 2 == 0 else [1, 3]
    await engine.save(model(), f"{rank % 2}.pt", replicated=group)
    return (await engine.commit("one")).num_files


async def failures(engine: aiockpt.CheckpointEngine, rank: int) -> object:
    """State that differs, then state that one rank cannot save."""
    nested = {"a": {"b": torch.ones(1)}} if rank == 1 else {"a": torch.ones(1)}
    said: list[str] = []
    for name, state in (
        ("model.pt", {"step": rank, "a": torch.ones(1)}),
        ("model.safetensors", nested),
    ):
        await engine.create("one")
        await engine.save(state, name, replicated=True)
        try:
            await engine.commit("one")
        except aiockpt.CheckpointError as error:
            said.append(str(error))
    return said


async def too_late(engine: aiockpt.CheckpointEngine, rank: int) -> object:
    """One rank's tag has failed before the others save together with it."""
    await engine.create("one")
    try:
        if rank == 1:
            nested = {"a": {"b": torch.ones(1)}}
            handle = await engine.save(nested, "own.safetensors")
            with contextlib.suppress(aiockpt.CheckpointError):
                await handle.written()
        await engine.save(model(), "model.pt", replicated=True)
        await engine.commit("one")
    except aiockpt.CheckpointError as error:
        said = [type(error).__name__, str(error)]
    # No rank leaves, which would tell the others, before all have been told.
    dist.barrier()
    return said


WAYS = {
    "all_ranks": all_ranks,
    "groups": groups,
    "failures": failures,
    "too_late": too_late,
}


async def main(root: str, what: str) -> None:
    """Prints the rank and what its function returned."""
    rank = dist.get_rank()
    async with aiockpt.CheckpointEngine(root, CONFIG) as engine:
        outcome = await WAYS[what](engine, rank)
    # In one call: the ranks share the pipe.
    os.write(1, f"{json.dumps([rank, outcome])}\n".encode())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    asyncio.run(main(*sys.argv[1:]))
    dist.destroy_process_group()
