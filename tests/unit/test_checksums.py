"""`aiockpt.checksums`: CRCs of a file whose chunks finish in any order."""

import queue
import random
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import pytest

from aiockpt.checksums import AbandonedError, Checksums
from aiockpt.formats import torch_zip
from aiockpt.image import Chunk, Data, Extent, Layout, Literal, Seal, chunks
from aiockpt.threads import WorkerPool
from gates import LIMIT_S, in_thread
from rendering import render


class File:
    """A file to be made: its image, its records, and views of its filled chunks."""

    def __init__(self, layout: Layout, records: Sequence[bytes], chunk_bytes: int):
        self.expected = render(layout, records, chunk_bytes)
        self.chunks = list(chunks(layout, chunk_bytes))
        self.views = [filled(chunk, records, chunk_bytes) for chunk in self.chunks]
        self.sums = Checksums(len(records), len(self.chunks))

    def seal(self, index: int) -> None:
        self.sums.seal(self.chunks[index], self.views[index])

    def is_right(self, index: int) -> bool:
        """Whether what would be written of a chunk is what belongs in the file."""
        chunk = self.chunks[index]
        expected = self.expected[chunk.offset : chunk.offset + chunk.nbytes]
        return self.views[index][: chunk.nbytes] == expected


def filled(chunk: Chunk, records: Sequence[bytes], chunk_bytes: int) -> memoryview:
    """A leased chunk as a stager leaves it: with rubbish where nothing was copied."""
    view = memoryview(bytearray(b"\xa5") * chunk_bytes)
    for at, data in chunk.literals:
        view[at : at + len(data)] = data
    for at, record, start, nbytes in chunk.copies:
        view[at : at + nbytes] = records[record][start : start + nbytes]
    return view


def seal_of(first: int, stop: int) -> Callable[[Sequence[int]], bytes]:
    return lambda crcs: b"".join(crc.to_bytes(4, "big") for crc in crcs[first:stop])


def made_file(records: Sequence[bytes], chunk_bytes: int) -> File:
    """As in a zip file: a literal, data and a seal per record, a seal over all."""
    extents: list[Extent] = []
    offset = 0

    def put(kind: Callable[..., Extent], nbytes: int, *args: object) -> None:
        nonlocal offset
        extents.append(kind(offset, nbytes, *args))
        offset += nbytes

    for number, record in enumerate(records):
        put(Literal, 3, b"PK%d" % (number % 10))
        put(Data, len(record), number)
        put(Seal, 4, number, number + 1, seal_of(number, number + 1))
    put(Seal, 4 * len(records), 0, len(records), seal_of(0, len(records)))
    return File(Layout(offset, extents), records, chunk_bytes)


def random_file(rng: random.Random) -> File:
    sizes = [rng.choice((0, 1, 5, 40, 300)) for _ in range(rng.randint(1, 12))]
    records = [rng.randbytes(size) for size in sizes]
    chunk_bytes = rng.choice((4, 16, 50, 200))
    if rng.random() < 0.2:
        return File(torch_zip.layout(sizes), records, 64)
    return made_file(records, chunk_bytes)


@pytest.fixture
def one_record() -> File:
    """Chunks 0 to 2 hold one record; chunk 3 holds its CRC."""
    file = made_file([bytes(range(90))], 31)
    assert [bool(chunk.seals) for chunk in file.chunks] == [False] * 3 + [True]
    return file


# --- one after the other --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_chunks_sealed_in_order_make_the_file(seed):
    file = random_file(random.Random(seed))
    for index in range(len(file.chunks)):
        file.seal(index)
        assert file.is_right(index)
    assert file.sums.file_crc32() == zlib.crc32(file.expected)


def test_a_file_without_chunks_has_the_crc_of_nothing():
    assert Checksums(0, 0).file_crc32() == zlib.crc32(b"")


# --- out of order ---------------------------------------------------------------------


def test_chunks_that_hold_no_checksums_never_wait(one_record):
    for index in (2, 1, 0):
        one_record.seal(index)
    one_record.seal(3)
    assert one_record.is_right(3)


def test_a_chunk_that_holds_checksums_waits_for_all_before_it(one_record):
    one_record.seal(2)
    sealing = in_thread(lambda: one_record.seal(3))
    wait_until_posted(one_record.sums, 3)
    one_record.seal(0)
    assert not sealing.done()
    one_record.seal(1)
    sealing.result(LIMIT_S)
    assert one_record.is_right(3)
    assert one_record.sums.file_crc32() == zlib.crc32(one_record.expected)


def wait_until_posted(sums: Checksums, index: int) -> None:
    """Returns once the call for a chunk that has to wait does so."""
    while True:
        with sums._changed:
            if index in sums._pieces:
                return


# --- failures -------------------------------------------------------------------------


def test_a_chunk_whose_predecessor_never_comes_is_abandoned(one_record):
    one_record.seal(0)
    sealing = in_thread(lambda: one_record.seal(3))
    wait_until_posted(one_record.sums, 3)
    one_record.sums.abandon()
    with pytest.raises(AbandonedError):
        sealing.result(LIMIT_S)


def test_a_chunk_that_comes_after_the_end_is_abandoned_at_once(one_record):
    one_record.sums.abandon()
    with pytest.raises(AbandonedError):
        one_record.seal(3)


def test_a_chunk_that_has_all_it_needs_is_sealed_whatever_else_failed(one_record):
    for index in range(3):
        one_record.seal(index)
    one_record.sums.abandon()
    one_record.seal(3)
    assert one_record.is_right(3)


def test_an_error_while_sealing_is_raised_and_wakes_those_who_wait(one_record):
    one_record.seal(0)
    one_record.seal(1)
    sealing = in_thread(lambda: one_record.seal(3))
    wait_until_posted(one_record.sums, 3)
    one_record.views[2].release()
    with pytest.raises(ValueError, match="released"):
        one_record.seal(2)
    with pytest.raises(AbandonedError):
        sealing.result(LIMIT_S)


def test_an_error_of_the_format_is_raised_as_it_is(one_record):
    class RefusedError(Exception):
        pass

    def refuse(crcs: Sequence[int]) -> bytes:
        raise RefusedError

    for index in range(3):
        one_record.seal(index)
    at, start, stop, seal = one_record.chunks[3].seals[0]
    one_record.chunks[3].seals[0] = (at, start, stop, seal._replace(render=refuse))
    with pytest.raises(RefusedError):
        one_record.seal(3)


# --- many workers ---------------------------------------------------------------------


class Workers:
    """Seals a file's chunks in a pool, as the engine does: queued in order, each held
    at a gate of its own before it is sealed, so that they finish in any order.
    """

    def __init__(self, file: File, num_workers: int) -> None:
        self.file = file
        self.pool = WorkerPool(num_workers, "sealing")
        self.started: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.may_seal = [threading.Event() for _ in file.chunks]
        self.may_fail: set[int] = set()
        self.jobs = [self.pool.submit(self.seal, i) for i in range(len(file.chunks))]

    def seal(self, index: int) -> None:
        self.started.put(index)
        assert self.may_seal[index].wait(LIMIT_S)
        if index in self.may_fail:
            # What the engine does when a chunk's write or its filling fails.
            self.file.sums.abandon()
            raise OSError
        self.file.seal(index)

    def open_gates(self, rng: random.Random, num_held: int) -> Iterator[int]:
        """Opens the gates in a random order, always of a worker that waits at one.

        A worker may wait for the others behind its gate. Those before it have started
        then, so one of them can always be let through.
        """
        held: list[int] = []
        num_opened = 0
        while num_opened < sum(not job.cancelled() for job in self.jobs):
            while not held or (len(held) < num_held and not self.started.empty()):
                held.append(self.started.get(timeout=LIMIT_S))
            index = held.pop(rng.randrange(len(held)))
            self.may_seal[index].set()
            num_opened += 1
            yield index

    def end(self) -> None:
        _, stuck = futures.wait(self.jobs, LIMIT_S)
        assert not stuck
        self.pool.shutdown()


@pytest.mark.parametrize("num_workers", range(1, 9))
@pytest.mark.parametrize("seed", range(6))
def test_workers_that_finish_in_any_order_make_the_same_file(seed, num_workers):
    rng = random.Random(f"{seed} {num_workers}")
    file = random_file(rng)
    workers = Workers(file, num_workers)
    for _ in workers.open_gates(rng, num_workers):
        pass
    workers.end()
    assert [job.exception() for job in workers.jobs] == [None] * len(file.chunks)
    assert all(file.is_right(index) for index in range(len(file.chunks)))
    assert file.sums.file_crc32() == zlib.crc32(file.expected)


@pytest.mark.parametrize("num_workers", range(1, 9))
@pytest.mark.parametrize("seed", range(6))
def test_no_worker_waits_for_ever_whichever_chunks_fail_or_are_withdrawn(
    seed, num_workers
):
    rng = random.Random(f"{seed} {num_workers}")
    file = random_file(rng)
    workers = Workers(file, num_workers)
    all_chunks = range(len(file.chunks))
    workers.may_fail.update(i for i in all_chunks if rng.random() < 0.1)
    for _ in workers.open_gates(rng, num_workers):
        if rng.random() < 0.1:
            job = rng.choice(workers.jobs)
            if not job.cancelled() and job.cancel():
                file.sums.abandon()
    workers.end()
    for index, job in enumerate(workers.jobs):
        if job.cancelled():
            continue
        if index in workers.may_fail:
            assert isinstance(job.exception(), OSError)
        elif job.exception() is None:
            assert file.is_right(index)
        else:
            assert isinstance(job.exception(), AbandonedError)
