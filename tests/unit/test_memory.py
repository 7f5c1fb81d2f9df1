"""`aiockpt.memory`: sums are right, and small ones keep the interpreter's lock."""

import random
import sys
import threading
import zlib
from contextlib import contextmanager

import pytest

from aiockpt.memory import crc32

KIB = 1 << 10
SMALL_BYTES = 128 * KIB - 1
# A thread that waits for the lock gets it when it is given away, and not before.
FOREVER_S = 1000


@pytest.mark.parametrize(
    "nbytes", [0, 1, 5 * KIB, 5 * KIB + 1, SMALL_BYTES, SMALL_BYTES + 1, 300 * KIB]
)
@pytest.mark.parametrize("start", [0, 0xDEAD_BEEF])
def test_a_sum_goes_on_from_another(nbytes, start):
    data = random.Random(nbytes).randbytes(nbytes)
    assert crc32(memoryview(data), start) == zlib.crc32(data, start)
    assert crc32(data, start) == zlib.crc32(data, start)


@contextmanager
def waiting_thread():
    """A thread that waits for the interpreter's lock, and notes when it has it."""
    interval = sys.getswitchinterval()
    gate, had_it = threading.Lock(), []

    def wait():
        with gate:
            had_it.append(True)

    thread = threading.Thread(target=wait)
    try:
        with gate:
            # From here on, the thread keeps the lock until it waits for the gate.
            sys.setswitchinterval(FOREVER_S)
            thread.start()
        yield had_it
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_a_small_sum_keeps_the_lock():
    data = memoryview(bytes(SMALL_BYTES))
    with waiting_thread() as had_it:
        for _ in range(1000):
            crc32(data)
        assert not had_it


def test_a_large_sum_gives_the_lock_away():
    data = memoryview(bytes(1 << 20))
    with waiting_thread() as had_it:
        for _ in range(10_000):
            crc32(data)
            if had_it:
                return
    pytest.fail("the lock was kept")
