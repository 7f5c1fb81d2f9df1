"""`aiockpt.staging.host`: chunks of the ring filled from memory, in their order."""

import asyncio
import random
from collections.abc import Iterator
from concurrent import futures

import pytest
import torch

from aiockpt import memory
from aiockpt.errors import StagingError
from aiockpt.image import Chunk, Copy, Data, Extent, Layout, Literal, Seal, chunks
from aiockpt.ring import Ring
from aiockpt.staging import host
from aiockpt.staging.base import Source
from aiockpt.staging.host import HostStager
from aiockpt.storage_spans import Span
from aiockpt.threads import WorkerPool
from gates import LIMIT_S, Gate, held, turns
from rendering import render

MIB = 1 << 20
RUBBISH = 0xA5


@pytest.fixture
def copiers() -> Iterator[WorkerPool]:
    pool = WorkerPool(1, "copy")
    yield pool
    pool.shutdown()


@pytest.fixture
def stager(copiers: WorkerPool) -> HostStager:
    return HostStager(copiers)


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring(8 * MIB)
    yield ring
    ring.close()


def span(data: bytes, start: int = 0, after: int = 0) -> Span:
    """`data` as a part of a storage that has other bytes before and after it."""
    whole = bytearray(bytes([1]) * start + data + bytes([2]) * after)
    storage = torch.frombuffer(whole, dtype=torch.uint8).untyped_storage()
    return Span(storage, start, len(data))


async def filled(
    stager: HostStager, ring: Ring, chunk: Chunk, sources: list[Source]
) -> bytes:
    """A whole leased chunk after it was filled, over rubbish."""
    lease = await ring.lease()
    try:
        lease.view[:] = bytes([RUBBISH]) * ring.chunk_bytes
        await stager.fill(lease, chunk, sources)
        return bytes(lease.view)
    finally:
        lease.release()


# --- what is copied -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(15))
async def test_filled_chunks_are_the_file(seed, stager, ring):
    rng = random.Random(seed)
    extents: list[Extent] = []
    records: list[bytes] = []
    sources: list[Source] = []
    offset = 0
    for number in range(rng.randint(1, 10)):
        data = rng.randbytes(rng.choice((0, 1, 7, 4096, 100_000, 300_000)))
        extents.append(Literal(offset, 5, b"%05d" % number))
        extents.append(Data(offset + 5, len(data), number))
        offset += 5 + len(data)
        records.append(data)
        has_storage = data and rng.random() < 0.7
        start, after = rng.randrange(100), rng.randrange(100)
        sources.append(span(data, start, after) if has_storage else data)
    layout = Layout(offset, extents)
    chunk_bytes = rng.choice((1000, 4096, 200_000, MIB))
    file = bytearray()
    for chunk in chunks(layout, chunk_bytes):
        lease_bytes = await filled(stager, ring, chunk, sources)
        file += lease_bytes[: chunk.nbytes]
        # Nothing is written past the chunk.
        assert lease_bytes[chunk.nbytes :].count(RUBBISH) == MIB - chunk.nbytes
    assert file == render(layout, records, chunk_bytes)


# Below 128 KiB a copy keeps the interpreter's lock, from there on it gives it up.
@pytest.mark.parametrize("nbytes", [1, (128 << 10) - 1, 128 << 10, MIB - 3])
async def test_a_piece_of_any_size_is_copied_whole(nbytes, stager, ring):
    data = random.Random(nbytes).randbytes(nbytes + 2)
    chunk = Chunk(0, 0, MIB, copies=[Copy(at=3, record=0, start=1, nbytes=nbytes)])
    whole = await filled(stager, ring, chunk, [span(data, start=13, after=9)])
    assert whole[3 : 3 + nbytes] == data[1 : 1 + nbytes]
    assert whole[:3] + whole[3 + nbytes :] == bytes([RUBBISH]) * (MIB - nbytes)


async def test_what_depends_on_checksums_is_left_to_those_who_know_them(stager, ring):
    def refuse(_: object) -> bytes:
        raise AssertionError

    layout = Layout(9, [Literal(0, 3, b"abc"), Seal(3, 4, 0, 1, refuse), Data(7, 2, 0)])
    (chunk,) = chunks(layout, 64)
    whole = await filled(stager, ring, chunk, [b"yz"])
    assert whole[:9] == b"abc" + bytes([RUBBISH]) * 4 + b"yz"


# --- when -----------------------------------------------------------------------------


async def test_chunks_are_filled_in_the_order_in_which_it_was_asked(
    stager, copiers, ring, monkeypatch
):
    order: list[int] = []
    fill = host._fill

    def noted(lease: object, chunk: Chunk, sources: list[Source]) -> None:
        order.append(chunk.index)
        fill(lease, chunk, sources)  # type: ignore[arg-type]

    monkeypatch.setattr(host, "_fill", noted)
    gate = Gate()
    copiers.submit(gate.pass_through)
    cut = list(chunks(Layout(7 * 64, [Data(0, 7 * 64, 0)]), 64))
    async with asyncio.TaskGroup() as group:
        for chunk in cut:
            group.create_task(filled(stager, ring, chunk, [bytes(7 * 64)]))
        await turns()
        gate.open()
    assert order == list(range(7))


async def test_a_cancelled_fill_ends_with_its_copy(stager, ring, monkeypatch):
    lease = await ring.lease()
    chunk = Chunk(0, 0, MIB, copies=[Copy(0, 0, 0, MIB)])
    with held(monkeypatch, memory, "_copy_unlocked") as gate:
        task = asyncio.create_task(stager.fill(lease, chunk, [span(b"x" * MIB)]))
        await gate.reached()
        task.cancel()
        await turns()
        assert not task.done(), "the chunk would be leased again under the copy"
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert lease.view == b"x" * MIB
    lease.release()


async def test_a_fill_that_is_cancelled_in_the_queue_copies_nothing(
    stager, copiers, ring
):
    lease = await ring.lease()
    lease.view[0] = RUBBISH
    gate = Gate()
    copiers.submit(gate.pass_through)
    chunk = Chunk(0, 0, 1, copies=[Copy(0, 0, 0, 1)])
    task = asyncio.create_task(stager.fill(lease, chunk, [b"x"]))
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open()
    futures.wait([copiers.submit(int)], LIMIT_S)
    assert lease.view[0] == RUBBISH
    lease.release()


# --- what cannot be copied ------------------------------------------------------------


def test_sources_in_host_memory_are_accepted(stager):
    stager.check([])
    stager.check([b"pickle", span(b"x")])


def test_a_source_on_another_device_is_refused_by_name(stager):
    storage = torch.zeros(4, device="meta").untyped_storage()
    with pytest.raises(StagingError, match="meta"):
        stager.check([b"pickle", Span(storage, 0, 4)])


@pytest.mark.parametrize("length", [0, 99])
async def test_memory_that_was_given_back_is_not_read(stager, ring, length):
    storage = torch.ones(100, dtype=torch.uint8).untyped_storage()
    (chunk,) = chunks(Layout(100, [Data(0, 100, 0)]), ring.chunk_bytes)
    storage.resize_(length)
    lease = await ring.lease()
    with pytest.raises(StagingError, match="given back"):
        await stager.fill(lease, chunk, [Span(storage, 0, 100)])
    lease.release()
