"""Saves beside an event loop: how long it stands still."""

__all__ = ["CASES"]

import asyncio
from collections.abc import Sequence
from time import perf_counter

from bench.cases.base import Case, Cell
from bench.cases.saving import DCP_STAGED, DCP_THREAD, OURS, PREPARED, TORCH
from bench.contenders.ours import OurEngine
from bench.sessions import Bench
from bench.workloads import GIB, Scale, Workload

_BEAT_S = 0.001
_IN_THREAD = "torch.save + fsync in a thread"
_AWAITED = "torch.save + fsync, asyncio.to_thread"


class _Heart:
    """A heartbeat of 1 ms; `gaps` are the times between beats."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.is_beating = True

    async def beat(self) -> None:
        """Beats until `is_beating` is false."""
        last = perf_counter()
        while self.is_beating:
            await asyncio.sleep(_BEAT_S)
            now = perf_counter()
            self.gaps.append(now - last)
            last = now

    def told(self, name: str) -> dict[str, float]:
        """Median, 99th percentile and longest gap."""
        gaps = sorted(self.gaps)
        return {
            f"{name}_p50_s": gaps[len(gaps) // 2],
            f"{name}_p99_s": gaps[int(len(gaps) * 0.99)],
            f"{name}_max_s": gaps[-1],
        }


def _measure(bench: Bench, tag: str) -> dict[str, float]:
    bench.alter()
    told = asyncio.run(_beating(bench, tag))
    bench.check(bench.contender.load(tag, bench.state))
    bench.contender.delete(tag)
    return told


async def _beating(bench: Bench, tag: str) -> dict[str, float]:
    contender = bench.contender
    idle, callers, engines = _Heart(), _Heart(), _Heart()
    async with asyncio.TaskGroup() as group:
        group.create_task(idle.beat())
        await asyncio.sleep(bench.settings["idle_s"])
        idle.is_beating = False
    contender_loop = None
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, contender.begin_training, bench.state)
    await loop.run_in_executor(None, contender.open_tag, tag)
    if isinstance(contender, OurEngine):
        # The heartbeat belongs on the engine's own loop, which has no door for it.
        contender_loop = contender.engine._runtime.spawn(engines.beat())  # noqa: SLF001
    async with asyncio.TaskGroup() as group:
        group.create_task(callers.beat())
        # It has to beat before a call that blocks the loop, to notice.
        await asyncio.sleep(2 * _BEAT_S)
        start = perf_counter()
        await contender.save_on_loop(bench.state, tag)
        durable_s = perf_counter() - start
        callers.is_beating = engines.is_beating = False
    told = {"durable_s": durable_s, **idle.told("idle"), **callers.told("caller")}
    if contender_loop is not None:
        await contender_loop.wait()
        told |= engines.told("engine")
    return told


def _cells(scale: Scale) -> Sequence[Cell]:
    workload = Workload(scale.size(4 * GIB), scale.number(300))
    small = Workload(scale.size(1 * GIB), scale.number(300))
    peers = (OURS, DCP_THREAD, DCP_STAGED, _AWAITED, _IN_THREAD, TORCH)

    def settings(idle_s: float) -> dict[str, float]:
        # About as long as a save: of a longer time the longest gap is longer.
        return {"idle_s": scale.seconds(idle_s)}

    return [
        Cell(
            "4 GiB",
            workload,
            (OURS, PREPARED, DCP_THREAD),
            scale.repeats(5),
            settings=settings(8.0),
        ),
        Cell("1 GiB", small, peers, scale.repeats(5), settings=settings(2.0)),
    ]


CASES = [Case("gap", "How long does an event loop stand still?", _cells, _measure)]
