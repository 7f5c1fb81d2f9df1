"""`aiockpt.threads.WorkerPool`: an executor that never loses a job."""

import asyncio
import contextlib
import queue
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import pytest

import aiockpt.threads
from aiockpt.threads import WorkerPool
from gates import LIMIT_S, in_thread
from thread_work import Job, Tensor, WorkError, no_cycle_collector, raise_


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    """One thread: what is submitted second waits for what was submitted first."""
    pool = WorkerPool(1, "test")
    yield pool
    pool.shutdown()


def threads_named(name: str) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(name)]


def test_a_pool_without_work_has_no_threads():
    pool = WorkerPool(3, "lazy")
    assert threads_named("lazy") == []
    pool.shutdown()


def test_jobs_start_in_the_order_of_their_submission(pool):
    started: list[int] = []
    jobs = [pool.submit(started.append, number) for number in range(100)]
    futures.wait(jobs, LIMIT_S)
    assert started == list(range(100))


def test_jobs_that_follow_one_another_share_one_thread():
    pool = WorkerPool(4, "alone")
    for _ in range(20):
        pool.submit(int).result(LIMIT_S)
        pool.submit(raise_, WorkError()).exception(LIMIT_S)
        # Submitted at the very moment at which the other is done.
        following: futures.Future[futures.Future[int]] = futures.Future()
        pool.submit(int).add_done_callback(
            lambda _, following=following: following.set_result(pool.submit(int))
        )
        following.result(LIMIT_S).result(LIMIT_S)
    assert len(threads_named("alone")) == 1
    pool.shutdown()


def test_a_thread_is_free_for_others_after_a_job_that_was_withdrawn():
    pool = WorkerPool(2, "free")
    jobs = [Job(), Job()]
    running = [pool.submit(job) for job in jobs]
    for _ in range(3):
        pool.submit(int).cancel()
    for job in jobs:
        job.gate.open()
    futures.wait(running, LIMIT_S)
    pool.submit(int).result(LIMIT_S)
    # The other thread may still be at what was withdrawn.
    pool.shutdown()
    assert pool._num_unfinished == 0


@pytest.mark.parametrize("max_threads", [1, 2, 8])
def test_as_many_jobs_run_at_once_as_there_may_be_threads(max_threads):
    pool = WorkerPool(max_threads, "full")
    for _ in range(50):
        # Jobs that end while others are submitted must not be taken for idle threads.
        passing = [pool.submit(int) for _ in range(max_threads)]
        everyone = threading.Barrier(max_threads)
        meeting = [pool.submit(everyone.wait, LIMIT_S) for _ in range(max_threads)]
        futures.wait([*passing, *meeting], LIMIT_S)
        assert all(job.exception() is None for job in meeting)
    names = {thread.name for thread in threads_named("full")}
    assert names == {f"full-{number}" for number in range(max_threads)}
    assert all(thread.daemon for thread in threads_named("full"))
    pool.shutdown()
    assert threads_named("full") == []


@pytest.mark.parametrize("error", [WorkError(), KeyboardInterrupt(), SystemExit(3)])
def test_a_thread_survives_whatever_a_job_raises(pool, error):
    job = pool.submit(raise_, error)
    assert job.exception(LIMIT_S) is error
    assert pool.submit(int).result(LIMIT_S) == 0


def test_an_idle_thread_keeps_nothing_of_its_last_job(pool):
    with no_cycle_collector():
        tensor = Tensor()
        was_freed = tensor.was_freed
        pool.submit(id, tensor).result(LIMIT_S)
        del tensor
        assert was_freed.wait(LIMIT_S)


async def test_a_pool_serves_code_that_expects_an_executor(pool):
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(pool, divmod, 7, 2) == (3, 1)


# --- its end --------------------------------------------------------------------------


def test_a_pool_that_was_shut_down_refuses_work():
    pool = WorkerPool(1, "ended")
    pool.shutdown()
    pool.shutdown()
    with pytest.raises(RuntimeError, match="'ended' has been shut down"):
        pool.submit(int)


def test_a_shutdown_waits_for_what_was_submitted(pool):
    job = Job()
    jobs = [pool.submit(job), *(pool.submit(int) for _ in range(5))]
    ending = in_thread(pool.shutdown)
    job.gate.wait_reached()
    assert not ending.done()
    job.gate.open()
    ending.result(LIMIT_S)
    assert [job.result() for job in jobs] == ["result", 0, 0, 0, 0, 0]


def test_a_shutdown_can_leave_the_threads_to_end_by_themselves():
    pool = WorkerPool(2, "left")
    job = Job()
    running = pool.submit(job)
    pool.shutdown(wait=False)
    job.gate.open()
    assert running.result(LIMIT_S) == "result"
    for thread in threads_named("left"):
        thread.join(LIMIT_S)
    assert threads_named("left") == []


def test_a_shutdown_can_withdraw_what_has_not_started(pool):
    job = Job()
    running = pool.submit(job)
    job.gate.wait_reached()
    queued = [pool.submit(Job()) for _ in range(3)]
    ending = in_thread(lambda: pool.shutdown(cancel_futures=True))
    futures.wait(queued, LIMIT_S)
    assert all(other.cancelled() for other in queued)
    job.gate.open()
    assert running.result(LIMIT_S) == "result"
    ending.result(LIMIT_S)


# --- no threads to be had -------------------------------------------------------------


@pytest.fixture
def no_more_threads(monkeypatch) -> Callable[[], None]:
    """Called, no thread can be started any more."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(threading.Thread, "start", refuse)


def test_work_is_done_by_fewer_threads_where_the_system_has_no_more(no_more_threads):
    pool = WorkerPool(2, "few")
    first = Job()
    running = pool.submit(first)
    first.gate.wait_reached()
    no_more_threads()
    second = pool.submit(divmod, 7, 2)
    first.gate.open()
    assert running.result(LIMIT_S) == "result"
    assert second.result(LIMIT_S) == (3, 1)
    pool.shutdown()


def test_work_that_no_thread_can_do_is_refused_and_never_done(
    no_more_threads, monkeypatch
):
    pool = WorkerPool(1, "none")
    done: list[str] = []
    no_more_threads()
    with pytest.raises(RuntimeError, match="can't start"):
        pool.submit(done.append, "refused")
    monkeypatch.undo()
    pool.submit(done.append, "accepted").result(LIMIT_S)
    assert done == ["accepted"]
    pool.shutdown()


# --- all at once ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_every_job_runs_once_or_is_withdrawn_whatever_happens_around_it(seed):
    """Several threads submit and cancel, one ends the pool; nothing is lost or hangs."""
    rng = random.Random(seed)
    num_threads = rng.randint(1, 8)
    pool = WorkerPool(num_threads, "stress")
    runs: queue.SimpleQueue[object] = queue.SimpleQueue()
    start = threading.Barrier(4)

    def submit(seed: int) -> list[tuple[object, futures.Future[None]]]:
        rng = random.Random(seed)
        jobs: list[tuple[object, futures.Future[None]]] = []
        start.wait(LIMIT_S)
        with contextlib.suppress(RuntimeError):
            for _ in range(200):
                key = object()
                jobs.append((key, pool.submit(runs.put, key)))
                if rng.random() < 0.3:
                    rng.choice(jobs)[1].cancel()
        return jobs

    submitters = [in_thread(lambda s=s: submit(seed * 10 + s)) for s in range(3)]
    start.wait(LIMIT_S)
    while runs.qsize() < rng.randrange(300) and not all(s.done() for s in submitters):
        pass
    pool.shutdown(cancel_futures=rng.random() < 0.5)
    jobs = [job for submitter in submitters for job in submitter.result(LIMIT_S)]
    done, waiting = futures.wait([future for _, future in jobs], LIMIT_S)
    assert not waiting
    ran = [runs.get_nowait() for _ in range(runs.qsize())]
    assert sorted(map(id, ran)) == sorted(
        id(key) for key, future in jobs if not future.cancelled()
    )
    assert all(future.exception() is None for future in done if not future.cancelled())
    assert threads_named("stress") == []


def test_a_pool_works_while_the_interpreter_ends():
    script = """
        import atexit, sys, types
        package = types.ModuleType("aiockpt")  # its parts, without torch
        package.__path__ = [sys.argv[1]]
        sys.modules["aiockpt"] = package
        from aiockpt.threads import WorkerPool
        pool = WorkerPool(2, "late")

        @atexit.register
        def drain():
            jobs = [pool.submit(divmod, 7, 2) for _ in range(3)]
            print([job.result(30) for job in jobs])
            pool.shutdown()
    """
    package = Path(aiockpt.threads.__file__).parent
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), package],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (ended.stdout, ended.stderr) == (f"{[(3, 1)] * 3}\n", "")
