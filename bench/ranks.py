"""How long ranks take: `python -m bench.ranks KIND NUMBER ... [--dir DIR]`.

`processes` are real ranks of a `torch.distributed` job, say 2 to 16, that agree on
something; `simulated` are up to 4 096 members in a few processes, each with a socket of
its own, of one hub; `commits` are whole commits of real ranks, each with a file of 4 KiB
that has been written, to a disk that they share. Prints a JSON line for each size, told
by rank 0: the time of one `consult` or `commit`, of 50, in milliseconds, and the
processor time of rank 0 (hub and member) for it. All processes share this machine: the
time holds the work of all members, one after another.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter, process_time

import torch
from typing_extensions import override

import aiockpt
from aiockpt.ranks.base import Ranks
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.link import HubConnection, LocalLink, dial
from aiockpt.ranks.member import Door, Link, Member
from aiockpt.ranks.messages import Hello
from aiockpt.ranks.server import HubServer
from bench.scratch import scratch
from bench.workloads import KIB, Scale

_NUM_CALLS = 50
_NUM_WARM_UPS = 5
_WORD = bytes(100)
_TIMEOUT_S = 300
_WORLD_SIZES = {
    Scale.FULL: ((2, 4, 8, 16), (64, 512, 4096)),
    Scale.MEDIUM: ((2, 4), (64, 512)),
    Scale.TINY: ((2,), (3,)),
}
_SELF = (sys.executable, "-m", "bench.ranks")
_NUM_PROCESSES = 4
_TOKEN = "bench"  # noqa: S105 - of this machine only


class _KnownDoor(Door):
    """The hub is at a port of this machine, or here."""

    def __init__(self, port: int, server: HubServer | None = None) -> None:
        self._port = port
        self._server = server

    @override
    async def connect(self, member: Member) -> Link:
        if self._server is not None:
            return LocalLink(self._server.hub, member)
        hello = Hello(_TOKEN, member.rank, member.world_size)
        return await dial("127.0.0.1", self._port, lambda: HubConnection(hello, member))

    @override
    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()


async def _decide(words: Sequence[bytes]) -> bytes:
    return len(words).to_bytes(8)


async def _measure(
    ranks: Ranks, call: Callable[[int], Awaitable[object]]
) -> list[tuple[float, float]]:
    """Milliseconds of each call, and of this process's processor time."""
    times = []
    for number in range(_NUM_WARM_UPS + _NUM_CALLS):
        # All begin together, as ranks do that come from a training step.
        await ranks.consult("ready", b"", _decide)
        begin, cpu_begin = perf_counter(), process_time()
        await call(number)
        end, cpu_end = perf_counter(), process_time()
        times.append((1e3 * (end - begin), 1e3 * (cpu_end - cpu_begin)))
    return times[_NUM_WARM_UPS:]


async def _agree(ranks: Ranks) -> list[tuple[float, float]]:
    return await _measure(ranks, lambda _: ranks.consult("commit", _WORD, _decide))


async def _commit(ranks: Ranks, root: Path) -> list[tuple[float, float]]:
    """Commits tags that are open, each with a written file of every rank."""
    state = {"weight": torch.zeros(4 * KIB, dtype=torch.uint8)}
    async with aiockpt.CheckpointEngine(root, {"host_cache_size": 1 / 64}) as engine:
        for number in range(_NUM_WARM_UPS + _NUM_CALLS):
            await engine.create(f"step-{number}")
            handle = await engine.save(state, f"{ranks.rank}.pt", tag=f"step-{number}")
            await handle.written()
        return await _measure(ranks, lambda number: engine.commit(f"step-{number}"))


def _tell(kind: str, world_size: int, times: list[tuple[float, float]]) -> None:
    wall, cpu = zip(*times, strict=True)
    figures = {
        "median_ms": round(statistics.median(wall), 3),
        "min_ms": round(min(wall), 3),
        "max_ms": round(max(wall), 3),
        "median_cpu_ms": round(statistics.median(cpu), 3),
    }
    print(json.dumps({"kind": kind, "ranks": world_size, **figures}), flush=True)


async def _be_real(root: Path | None) -> None:
    """A rank of a job; where there is a root, one that commits."""
    from aiockpt.ranks.torch_dist import detect

    ranks = detect("bench", _TIMEOUT_S)
    times = await (_agree(ranks) if root is None else _commit(ranks, root))
    if ranks.rank == 0:
        kind = "processes" if root is None else "commits"
        _tell(kind, ranks.world_size, times)
    await ranks.consult("end", b"", _decide)
    await ranks.close()


async def _be_members(port: int, world_size: int, ranks: range) -> None:
    """Some of the members, in this process."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * world_size + 512,) * 2)
    door = _KnownDoor(port)
    members = [Member(rank, world_size, door, timeout_s=_TIMEOUT_S) for rank in ranks]
    async with asyncio.TaskGroup() as group:
        for member in members:
            group.create_task(_follow(member))


async def _follow(member: Member) -> None:
    await _agree(member)
    await member.close()


async def _be_hub(world_size: int) -> None:
    """Rank 0 of a simulated job; starts the processes of the others."""
    server = HubServer(Hub(world_size, _TIMEOUT_S), world_size, _TOKEN)
    await server.start()
    share = -(-(world_size - 1) // _NUM_PROCESSES)
    helpers = [
        await asyncio.create_subprocess_exec(
            *(*_SELF, "members", f"{server.port}", f"{world_size}"),
            *(f"{first}", f"{min(first + share, world_size)}"),
        )
        for first in range(1, world_size, share)
    ]
    member = Member(
        0, world_size, _KnownDoor(server.port, server), timeout_s=_TIMEOUT_S
    )
    _tell("simulated", world_size, await _agree(member))
    statuses = [await helper.wait() for helper in helpers]
    await member.close()
    _end_well(statuses)


def _end_well(statuses: Sequence[int]) -> None:
    """Returns if all processes of a job have ended well."""
    if any(statuses):
        sys.exit(f"lost ranks: exit statuses {statuses}")


def _start_real(world_size: int, *root: str) -> None:
    """The processes of one job, on this machine."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29533",
        "WORLD_SIZE": f"{world_size}",
        "OMP_NUM_THREADS": "1",
    }
    jobs = [
        subprocess.Popen(
            [*_SELF, "real", *root],
            env={**environment, "RANK": f"{rank}"},
        )
        for rank in range(world_size)
    ]
    _end_well([job.wait() for job in jobs])


def main(arguments: Sequence[str]) -> None:
    """Measures what is named, or is one of the processes that this needs."""
    kind, *rest = arguments
    if kind == "real":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        asyncio.run(_be_real(Path(*rest) if rest else None))
        dist.destroy_process_group()
    elif kind == "members":
        port, world_size, first, stop = map(int, rest)
        asyncio.run(_be_members(port, world_size, range(first, stop)))
    else:
        _tell_all(arguments)


def _tell_all(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.ranks", description=__doc__)
    parser.add_argument("kind", choices=["processes", "simulated", "commits"])
    parser.add_argument("numbers", type=int, nargs="+", metavar="NUMBER")
    parser.add_argument("--dir", type=Path, default=Path.cwd())
    asked = parser.parse_args(arguments)
    for world_size in asked.numbers:
        if asked.kind == "simulated":
            asyncio.run(_be_hub(world_size))
        elif asked.kind == "processes":
            _start_real(world_size)
        else:
            with scratch(asked.dir) as root:
                _start_real(world_size, f"{root}")


def world_sizes(scale: Scale) -> dict[str, Sequence[int]]:
    """How many ranks there are, by what is measured."""
    real, simulated = _WORLD_SIZES[scale]
    return {"processes": real, "simulated": simulated, "commits": (1, *real)}


def agreements(scale: Scale, directory: Path) -> Iterator[dict[str, float | str]]:
    """What this program tells, run as one, at a scale.

    Raises:
        RuntimeError: Ranks were lost; told when everything else has been.
    """
    lost = []
    for kind, numbers in world_sizes(scale).items():
        command = [*_SELF, kind, *map(str, numbers), "--dir", f"{directory}"]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        yield from map(json.loads, told.stdout.splitlines())
        if told.returncode:
            lost.append(f"{kind}: exit status {told.returncode}")
    if lost:
        raise RuntimeError("; ".join(lost))


if __name__ == "__main__":
    main(sys.argv[1:])
