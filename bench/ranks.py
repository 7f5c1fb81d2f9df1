"""How long ranks take to agree: `python -m bench.ranks processes|simulated NUMBER ...`.

`processes` are real ranks of a `torch.distributed` job, say 2 to 16; `simulated` are up
to 4 096 members in a few processes, each with a socket of its own, of one hub. Prints a
JSON line for each size, told by rank 0: the time of one `consult`, of 50, in
milliseconds, and the processor time of rank 0 (hub and member) for it. All processes
share this machine: the time holds the work of all members, one after another.
"""

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from time import perf_counter, process_time

from typing_extensions import override

from aiockpt.ranks.base import Ranks
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.link import HubConnection, LocalLink, dial
from aiockpt.ranks.member import Door, Link, Member
from aiockpt.ranks.messages import Hello
from aiockpt.ranks.server import HubServer
from bench.workloads import Scale

_NUM_CONSULTS = 50
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


async def _measure(ranks: Ranks) -> list[tuple[float, float]]:
    """Milliseconds of each call, and of this process's processor time."""
    times = []
    for _ in range(_NUM_WARM_UPS + _NUM_CONSULTS):
        # All begin together, as ranks do that come from a training step.
        await ranks.consult("ready", b"", _decide)
        begin, cpu_begin = perf_counter(), process_time()
        await ranks.consult("commit", _WORD, _decide)
        end, cpu_end = perf_counter(), process_time()
        times.append((1e3 * (end - begin), 1e3 * (cpu_end - cpu_begin)))
    return times[_NUM_WARM_UPS:]


def _tell(kind: str, world_size: int, times: list[tuple[float, float]]) -> None:
    wall, cpu = zip(*times, strict=True)
    figures = {
        "median_ms": round(statistics.median(wall), 3),
        "min_ms": round(min(wall), 3),
        "max_ms": round(max(wall), 3),
        "median_cpu_ms": round(statistics.median(cpu), 3),
    }
    print(json.dumps({"kind": kind, "ranks": world_size, **figures}), flush=True)


async def _be_real() -> None:
    from aiockpt.ranks.torch_dist import detect

    ranks = detect("bench", _TIMEOUT_S)
    times = await _measure(ranks)
    if ranks.rank == 0:
        _tell("processes", ranks.world_size, times)
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
    await _measure(member)
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
    _tell("simulated", world_size, await _measure(member))
    for helper in helpers:
        await helper.wait()
    await member.close()


def _start_real(world_size: int) -> None:
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
            [*_SELF, "real"],
            env={**environment, "RANK": f"{rank}"},
        )
        for rank in range(world_size)
    ]
    for job in jobs:
        job.wait()


def main(arguments: Sequence[str]) -> None:
    """Measures what is named, or is one of the processes that this needs."""
    kind, *numbers = arguments
    if kind == "real":
        import torch.distributed as dist

        dist.init_process_group("gloo")
        asyncio.run(_be_real())
        dist.destroy_process_group()
    elif kind == "members":
        port, world_size, first, stop = map(int, numbers)
        asyncio.run(_be_members(port, world_size, range(first, stop)))
    else:
        for world_size in map(int, numbers):
            if kind == "processes":
                _start_real(world_size)
            else:
                asyncio.run(_be_hub(world_size))


def agreements(scale: Scale) -> Iterator[dict[str, float | str]]:
    """What this program tells, run as one, at a scale."""
    real, simulated = _WORLD_SIZES[scale]
    for kind, numbers in (("processes", real), ("simulated", simulated)):
        command = [*_SELF, kind, *map(str, numbers)]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield from map(json.loads, told.stdout.splitlines())


if __name__ == "__main__":
    main(sys.argv[1:])
