"""`aiockpt.saver`: one file from captured tensors to a disk that is only pretended."""

import asyncio
import io
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor

import pytest
import torch

from aiockpt.capture import capture
from aiockpt.checksums import AbandonedError
from aiockpt.errors import CheckpointError
from aiockpt.file_save import FileSave
from aiockpt.guard import StagingGate
from aiockpt.image import Chunk
from aiockpt.ring import Lease, Ring
from aiockpt.saver import Saver, _first
from aiockpt.staging.base import Source
from aiockpt.staging.host import HostStager
from aiockpt.threads import WorkerPool, run_blocking
from gates import Gate, turns
from thread_work import WorkError

MIB = 1 << 20
CHUNK_BYTES = MIB
NUM_CHUNKS = 11  # of the file; the ring has eight


class Disk:
    """A storage with one file, kept in memory.

    Attributes:
        written: What was written.
        order: Chunks in the order in which their writes were asked for.
        on_write: Awaited first of all with the number of the chunk.
        in_worker: Called with it in the worker, before the bytes are made final.
    """

    def __init__(self, workers: Executor) -> None:
        self.written = bytearray()
        self.order: list[int] = []
        self.on_write: Callable[[int], Awaitable[object]] = nothing
        self.in_worker: Callable[[int], object] = int
        self.on_create: Callable[[], Awaitable[object]] = at_once
        self.is_direct = False
        self.is_closed = False
        self._workers = workers

    async def create(self, path: str, nbytes: int) -> "Disk":
        self.written = bytearray(nbytes)
        await self.on_create()
        return self

    async def write(
        self, offset: int, view: memoryview, prepare: Callable[[], None]
    ) -> None:
        chunk = offset // CHUNK_BYTES
        self.order.append(chunk)
        if self.on_write is not nothing:
            await self.on_write(chunk)
        await run_blocking(self._workers, self._write, offset, view, prepare)

    def _write(
        self, offset: int, view: memoryview, prepare: Callable[[], None]
    ) -> None:
        self.in_worker(offset // CHUNK_BYTES)
        prepare()
        data = bytes(view)[: len(self.written) - offset]
        self.written[offset : offset + len(data)] = data

    async def sync(self) -> None:
        assert not self.is_closed

    async def close(self) -> None:
        self.is_closed = True


async def nothing(_: int) -> None:
    raise AssertionError


async def at_once() -> None:
    pass


@pytest.fixture
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool(4, "worker")
    yield pool
    pool.shutdown()


@pytest.fixture
def disk(workers: WorkerPool) -> Disk:
    return Disk(workers)


@pytest.fixture
def saver(disk: Disk) -> Iterator[Saver]:
    """Its ring must be whole again at the end."""
    ring = Ring(8 * CHUNK_BYTES)
    gate = StagingGate(is_holding=True)
    pools = WorkerPool(2, "plan"), WorkerPool(1, "copy")
    yield Saver(
        ring=ring,
        stager=HostStager(pools[1]),
        storage=disk,  # type: ignore[arg-type]
        gate=gate,
        planners=pools[0],
        clerks=pools[0],
        copiers=pools[1],
        emit=lambda _: None,
    )
    for pool in pools:
        pool.shutdown()
    gate.close()
    assert ring.leased_bytes == 0
    ring.close()


@pytest.fixture
def save() -> FileSave:
    numbers = torch.arange((NUM_CHUNKS - 1) * MIB // 8)
    state = {"numbers": numbers, "few": torch.ones(3)}
    return FileSave("tag", "model.pt", capture(state))


async def started(saver: Saver, save: FileSave) -> "asyncio.Task[None]":
    return asyncio.create_task(saver.run(save, "model.pt", 0))


async def test_the_file_is_what_torch_loads(saver, save, disk):
    await saver.run(save, "model.pt", 3)
    assert disk.order == list(range(NUM_CHUNKS))
    assert disk.is_closed
    assert save.entry is not None
    assert save.entry.rank == 3
    assert save.entry.nbytes == len(disk.written)
    assert save.entry.crc32 == zlib.crc32(disk.written)
    state = torch.load(io.BytesIO(disk.written))
    assert torch.equal(
        state["numbers"], torch.arange(len(state["numbers"]), dtype=torch.int64)
    )
    assert torch.equal(state["few"], torch.ones(3))


async def test_writes_are_asked_for_in_order_in_whatever_order_chunks_are_filled(
    saver, save, disk
):
    fill = saver.stager.fill
    is_filled = [asyncio.Event() for _ in range(NUM_CHUNKS)]
    filled: list[int] = []

    class SwappingStager:
        """Of two chunks, the second is filled first."""

        check = staticmethod(saver.stager.check)

        async def fill(
            self, lease: Lease, chunk: Chunk, sources: Sequence[Source]
        ) -> None:
            await fill(lease, chunk, sources)
            if chunk.index % 2 == 0 and chunk.index + 1 < NUM_CHUNKS:
                await is_filled[chunk.index + 1].wait()
            is_filled[chunk.index].set()
            filled.append(chunk.index)

    object.__setattr__(saver, "stager", SwappingStager())
    await saver.run(save, "model.pt", 0)
    assert all(
        filled.index(even + 1) < filled.index(even)
        for even in range(0, NUM_CHUNKS - 1, 2)
    )
    assert disk.order == list(range(NUM_CHUNKS))
    assert save.entry is not None
    assert save.entry.crc32 == zlib.crc32(disk.written)


# --- failures -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
@pytest.mark.parametrize("is_in_worker", [True, False])
async def test_whichever_write_fails_the_ring_is_whole_again(
    chunk, is_in_worker, saver, save, disk
):
    def fail(at: int) -> None:
        if at == chunk:
            raise WorkError(chunk)

    async def fail_on_loop(at: int) -> None:
        fail(at)

    if is_in_worker:
        disk.in_worker = fail
    else:
        disk.on_write = fail_on_loop
    with pytest.raises(WorkError):
        await saver.run(save, "model.pt", 0)
    assert saver.ring.leased_bytes == 0
    assert disk.is_closed
    await saver.release(save)


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_file_that_is_not_opened_after_all_ends_what_was_staged_for_it(
    is_cancelled, saver, disk
):
    save = FileSave("tag", "model.pt", capture({"few": torch.ones(3)}))
    opening, refused = asyncio.Event(), asyncio.Event()

    async def refuse() -> None:
        opening.set()
        await refused.wait()
        raise WorkError

    disk.on_create = refuse
    running = await started(saver, save)
    await opening.wait()
    # All is staged, and waits for the file.
    await save.staged.wait()
    assert saver.ring.leased_bytes > 0
    if is_cancelled:
        running.cancel()
    refused.set()
    with pytest.raises(asyncio.CancelledError if is_cancelled else WorkError):
        await running
    assert saver.ring.leased_bytes == 0
    assert disk.order == []
    assert not disk.is_closed
    await saver.release(save)


async def test_a_failure_wakes_the_writes_that_wait_for_its_checksum(saver, save, disk):
    last = NUM_CHUNKS - 1
    waiting = Gate()
    waiting.open()

    async def fail_when_the_last_waits(at: int) -> None:
        if at == last - 1:
            await waiting.reached()
            raise WorkError

    def tell(at: int) -> None:
        if at == last:
            waiting.pass_through()

    disk.on_write, disk.in_worker = fail_when_the_last_waits, tell
    with pytest.raises(WorkError):
        await saver.run(save, "model.pt", 0)
    await saver.release(save)


async def test_a_save_that_is_cancelled_ends_with_its_last_write(saver, save, disk):
    gate = Gate()
    disk.in_worker = lambda _: gate.pass_through()
    task = await started(saver, save)
    await gate.reached()
    task.cancel()
    await turns()
    assert not task.done()
    assert saver.ring.leased_bytes > 0
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert saver.ring.leased_bytes == 0
    assert disk.is_closed
    await saver.release(save)


@pytest.mark.parametrize("num_turns", [*range(0, 60, 3), 100, 200, 400, 4000])
async def test_a_save_that_is_cancelled_at_any_time_leaves_the_ring_whole(
    num_turns, saver, save
):
    task = await started(saver, save)
    await turns(num_turns)
    task.cancel()
    await asyncio.wait([task])
    # How many turns a save takes is up to the threads: it may have ended before.
    assert task.cancelled() or save.entry is not None
    assert saver.ring.leased_bytes == 0
    await saver.release(save)
    assert save.capture is None
    assert save.staged.is_set()
    saver.gate.wait()


# --- which failure is told ------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ([WorkError("a"), WorkError("b")], "a"),
        ([WorkError("a"), CheckpointError("b")], "b"),
        ([AbandonedError("a"), WorkError("b")], "b"),
        ([AbandonedError("a"), WorkError("b"), CheckpointError("c")], "c"),
        ([ExceptionGroup("", [AbandonedError("a"), WorkError("b")])], "b"),
        ([AbandonedError("a")], "a"),
    ],
)
def test_a_caller_is_told_what_it_can_act_on_else_a_cause(errors, told):
    assert str(_first(BaseExceptionGroup("", errors))) == told
