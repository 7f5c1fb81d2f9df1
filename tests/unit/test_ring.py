"""`aiockpt.ring`: chunks of host memory, leased and waited for."""

import asyncio
import ctypes
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import InvalidArgumentError
from aiockpt.ring import Lease, Ring, chunk_bytes_for

MIB = 1 << 20
NUM_CHUNKS = 8


@pytest.fixture
def ring() -> Iterator[Ring]:
    """Eight chunks of 1 MiB; every lease must have been released at the end."""
    ring = Ring(NUM_CHUNKS * MIB)
    yield ring
    assert ring.leased_bytes == 0
    ring.close()


def index_of(ring: Ring, lease: Lease) -> int:
    return (lease.address - ring.address) // ring.chunk_bytes


async def lease_all(ring: Ring) -> list[Lease]:
    return [await ring.lease() for _ in range(ring.capacity_bytes // ring.chunk_bytes)]


def release_all(leases: list[Lease]) -> None:
    for lease in leases:
        lease.release()


async def turns(num_turns: int = 5) -> None:
    for _ in range(num_turns):
        await asyncio.sleep(0)


async def waiting(ring: Ring) -> "asyncio.Task[Lease]":
    """A task that waits for a chunk of a ring that has none."""
    task = asyncio.create_task(ring.lease())
    await turns()
    assert not task.done()
    return task


# --- sizes ----------------------------------------------------------------------------


@given(st.integers(8 * MIB, 1 << 50))
def test_a_chunk_is_a_few_aligned_mib_and_at_least_eight_make_a_ring(capacity_bytes):
    chunk_bytes = chunk_bytes_for(capacity_bytes)
    assert chunk_bytes % mmap.PAGESIZE == 0
    assert MIB <= chunk_bytes <= 16 * MIB
    assert capacity_bytes // chunk_bytes >= NUM_CHUNKS
    assert chunk_bytes == 16 * MIB or capacity_bytes < 128 * MIB


@given(st.integers(8 * MIB, 256 * MIB))
def test_a_ring_never_takes_more_than_it_was_given(capacity_bytes):
    ring = Ring(capacity_bytes)
    assert ring.capacity_bytes % ring.chunk_bytes == 0
    assert 0 <= capacity_bytes - ring.capacity_bytes < ring.chunk_bytes
    ring.close()


def test_memory_that_the_system_cannot_reserve_is_the_callers_mistake():
    with pytest.raises(InvalidArgumentError, match="host_cache_size"):
        Ring(1 << 60)


# --- memory ---------------------------------------------------------------------------


async def test_a_lease_is_its_chunk_s_bytes_and_where_they_are(ring):
    leases = await lease_all(ring)
    for number, lease in enumerate(leases):
        assert lease.address % mmap.PAGESIZE == 0
        assert (lease.view.nbytes, lease.view.format) == (MIB, "B")
        ctypes.memset(lease.address, number + 1, MIB)
    for number, lease in enumerate(leases):
        assert lease.view == bytes([number + 1]) * MIB
    release_all(leases)


async def test_a_released_view_cannot_be_used(ring):
    lease = await ring.lease()
    lease.release()
    with pytest.raises(ValueError, match="released"):
        lease.view[0] = 1


async def test_the_lowest_free_chunk_is_leased_first(ring):
    leases = await lease_all(ring)
    assert [index_of(ring, lease) for lease in leases] == list(range(NUM_CHUNKS))
    for index in (6, 1, 4):
        leases[index].release()
    again = [await ring.lease() for _ in range(3)]
    assert [index_of(ring, lease) for lease in again] == [1, 4, 6]
    release_all([*again, *(leases[index] for index in (0, 2, 3, 5, 7))])


async def test_a_ring_costs_the_memory_that_was_leased_at_once_and_no_more():
    ring = Ring(256 * MIB)
    before = resident_bytes(ring)
    for _ in range(20):
        leases = [await ring.lease() for _ in range(2)]
        for lease in leases:
            ctypes.memset(lease.address, 1, ring.chunk_bytes)
        release_all(leases)
    # The kernel may give memory in huge pages, which reach over the chunks' ends.
    huge_pages = 2 * 2 * MIB
    assert before <= huge_pages
    assert 0 < resident_bytes(ring) <= 2 * ring.chunk_bytes + huge_pages
    ring.close()


async def test_a_chunk_is_given_its_memory_and_keeps_its_bytes(ring):
    lease = await ring.lease()
    lease.view[0] = 7
    before = resident_bytes(ring)
    for index in range(NUM_CHUNKS):
        ring.populate(index)
    assert before < resident_bytes(ring) == ring.capacity_bytes
    assert lease.view[0] == 7
    lease.release()


async def test_a_child_that_the_trainer_forks_has_no_copy_of_the_ring(ring):
    lease = await ring.lease()
    lease.view[0] = 1
    flags = [re.findall(r"VmFlags:.*", block)[0] for block in mappings(ring)]
    assert flags
    assert all(" dc " in flag for flag in flags)
    lease.release()


@pytest.mark.leaks("closes a ring while a lease is out")
async def test_the_memory_goes_when_the_ring_is_closed():
    ring = Ring(8 * MIB)
    lease = await ring.lease()
    with pytest.raises(BufferError):
        ring.close()
    lease.release()
    ring.close()
    ring.close()


def mappings(ring: Ring) -> list[str]:
    """What the kernel says of the memory in which the ring lies."""
    blocks = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )",
        Path("/proc/self/smaps").read_text(),
        flags=re.MULTILINE,
    )
    found: list[str] = []
    for block in filter(None, blocks):
        start, stop = (int(word, 16) for word in block.split()[0].split("-"))
        if start < ring.address + ring.capacity_bytes and ring.address < stop:
            found.append(block)
    return found


def resident_bytes(ring: Ring) -> int:
    sizes = [re.findall(r"Rss: *(\d+) kB", block)[0] for block in mappings(ring)]
    return sum(map(int, sizes)) << 10


# --- counting -------------------------------------------------------------------------


async def test_the_ring_counts_what_is_leased_and_the_most_that_was(ring):
    assert (ring.leased_bytes, ring.peak_bytes) == (0, 0)
    leases = [await ring.lease() for _ in range(3)]
    assert (ring.leased_bytes, ring.peak_bytes) == (3 * MIB, 3 * MIB)
    leases.pop().release()
    leases.pop().release()
    assert (ring.leased_bytes, ring.peak_bytes) == (MIB, 3 * MIB)
    leases.append(await ring.lease())
    assert (ring.leased_bytes, ring.peak_bytes) == (2 * MIB, 3 * MIB)
    release_all(leases)


async def test_a_chunk_that_changes_hands_is_counted_once(ring):
    leases = await lease_all(ring)
    task = await waiting(ring)
    leases.pop().release()
    leases.append(await task)
    assert (ring.leased_bytes, ring.peak_bytes) == (8 * MIB, 8 * MIB)
    release_all(leases)


# --- waiting --------------------------------------------------------------------------


async def test_whoever_waited_longest_gets_the_next_chunk(ring):
    leases = await lease_all(ring)
    tasks = [await waiting(ring) for _ in range(3)]
    for number, index in enumerate((5, 0, 3)):
        leases[index].release()
        await turns()
        assert [task.done() for task in tasks] == [n <= number for n in range(3)]
        assert index_of(ring, tasks[number].result()) == index
    release_all([task.result() for task in tasks])
    release_all([leases[index] for index in (1, 2, 4, 6, 7)])


async def test_a_newcomer_does_not_overtake_those_who_wait(ring):
    leases = await lease_all(ring)
    first = await waiting(ring)
    newcomer = asyncio.create_task(ring.lease())
    leases[2].release()
    await turns()
    assert first.done()
    assert not newcomer.done()
    leases[4].release()
    leases[2], leases[4] = await first, await newcomer
    release_all(leases)


async def test_whoever_stops_waiting_leases_nothing(ring):
    leases = await lease_all(ring)
    tasks = [await waiting(ring) for _ in range(3)]
    tasks[0].cancel()
    await turns()
    assert tasks[0].cancelled()
    leases[7].release()
    leases[7] = await tasks[1]
    tasks[2].cancel()
    await turns()
    release_all(leases)


async def test_a_chunk_that_arrives_with_the_cancellation_goes_to_the_next(ring):
    leases = await lease_all(ring)
    tasks = [await waiting(ring) for _ in range(2)]
    leases[3].release()
    tasks[0].cancel()
    await turns()
    assert tasks[0].cancelled()
    leases[3] = await tasks[1]
    task = await waiting(ring)
    leases[3].release()
    task.cancel()
    await turns()
    assert task.cancelled()
    leases[3] = await ring.lease()
    release_all(leases)


async def test_a_chunk_passes_over_whoever_was_cancelled_in_the_same_turn(ring):
    leases = await lease_all(ring)
    tasks = [await waiting(ring) for _ in range(2)]
    tasks[0].cancel()
    leases[3].release()
    await turns()
    assert tasks[0].cancelled()
    leases[3] = await tasks[1]
    task = await waiting(ring)
    task.cancel()
    leases[3].release()
    await turns()
    assert task.cancelled()
    leases[3] = await ring.lease()
    release_all(leases)


async def test_a_timeout_ends_the_waiting_and_nothing_else(ring):
    leases = await lease_all(ring)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await ring.lease()
    leases[0].release()
    leases[0] = await ring.lease()
    release_all(leases)


# Eight chunks, and up to twenty who want one: what happens is drawn, turn by turn.
happenings = st.lists(
    st.one_of(
        st.just(("lease", 0)),
        st.just(("turn", 0)),
        st.tuples(st.sampled_from(["cancel", "release"]), st.integers(0, 20)),
    ),
    max_size=80,
)


@given(st.integers(0, NUM_CHUNKS), happenings)
def test_no_chunk_is_lost_or_leased_twice_whatever_happens(num_held, happenings):
    asyncio.run(happen(num_held, happenings))


async def happen(num_held: int, happenings: list[tuple[str, int]]) -> None:
    ring = Ring(NUM_CHUNKS * MIB)
    held = [await ring.lease() for _ in range(num_held)]
    tasks: list[asyncio.Task[None]] = []

    async def take() -> None:
        held.append(await ring.lease())
        assert len({lease.address for lease in held}) == len(held)
        assert ring.leased_bytes == len(held) * MIB

    for what, number in happenings:
        if what == "lease":
            tasks.append(asyncio.create_task(take()))
        elif what == "turn":
            await asyncio.sleep(0)
        elif what == "cancel" and tasks:
            tasks[number % len(tasks)].cancel()
        elif what == "release" and held:
            held.pop(number % len(held)).release()
    await turns()
    # Nobody waits for a chunk that is free.
    assert len(held) == NUM_CHUNKS or all(task.done() for task in tasks)
    while not all(task.done() for task in tasks):
        release_all(held)
        held.clear()
        await turns()
    assert all(task.cancelled() or task.exception() is None for task in tasks)
    release_all(held)
    assert ring.leased_bytes == 0
    assert sorted(ring._free) == list(range(NUM_CHUNKS))
    ring.close()
