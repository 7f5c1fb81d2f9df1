"""Row 13: of those who race one wins, and nobody ever reads anything torn."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from aiockpt.errors import CheckpointError, CheckpointNotFoundError
from aiockpt.testing.roots import assert_root_consistent
from catalogs import catalog_at, prepare
from faults.driver import link_root
from gates import LIMIT_S, in_thread
from workloads import SMALL, Engine, content, save, state

# By one writer: each has a state of its own, all of which are kept.
NUM_OVERWRITES = 40


def all_at_once(*work: Callable[[], Any]) -> list[Future[Any]]:
    """Each on a thread of its own, begun in one moment; all have ended."""
    start = threading.Barrier(len(work))

    def racer(run: Callable[[], Any]) -> Any:
        start.wait(LIMIT_S)
        return run()

    racing = [in_thread(lambda run=run: racer(run)) for run in work]
    for outcome in racing:
        outcome.exception(LIMIT_S)
    return racing


def test_of_many_processes_that_commit_a_tag_one_wins(cases, server, memory):
    for number in range(cases.pick(100, 1000)):
        root = memory / "race" / str(number)
        with cases.case(13, "8 processes commit one tag", number):
            racers = server.ask("race", root=str(root), tag="new", num_racers=8)

            told = [
                what for racer in racers for what in racer if isinstance(what, dict)
            ]
            won = [what["won"] for what in told if "won" in what]
            lost = [what["error"] for what in told if "error" in what]
            assert (len(won), len(lost)) == (1, 7)
            assert set(lost) == {"EngineStateError"}
            assert_root_consistent(root, acked=["new"], is_swept=True)
            with Engine(root, SMALL) as engine:
                assert engine.load("sub/opt.pt", tag="new") == {"seed": won[0]}


def test_of_many_catalogs_that_publish_a_tag_one_wins(cases, memory):
    for number in range(cases.pick(100, 2000)):
        root = memory / "publishers" / str(number)
        with cases.case(13, "8 threads publish one tag", number):
            publish_all_at_once(root)


def publish_all_at_once(root: Path) -> None:
    def racer(index: int) -> Callable[[], str]:
        def run() -> str:
            with catalog_at(root) as catalog:
                prepared = prepare(catalog, root, {"f": b"x" * index})
                return catalog.publish("new", is_overwrite=False, **prepared).attempt

        return run

    racing = all_at_once(*(racer(index) for index in range(8)))

    won = [outcome.result() for outcome in racing if outcome.exception() is None]
    errors = [outcome.exception() for outcome in racing if outcome.exception()]
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert len(won) == 1
    assert_root_consistent(root, acked=["new"], is_swept=True)
    with catalog_at(root) as reader:
        assert reader.manifest("new").attempt == won[0]


def test_readers_of_a_tag_that_is_overwritten_never_read_two_of_it(
    cases, server, memory
):
    root = memory / "overwritten"
    num_reads = 0
    with Engine(root, SMALL) as engine:
        save(engine, "tag", 1)
        while num_reads < cases.pick(10_000, 100_000):
            request = {"root": str(root), "tag": "tag", "num_times": NUM_OVERWRITES}
            writing = in_thread(
                lambda request=request: server.ask("save_many", **request)
            )
            newest = 0
            while not writing.done():
                with cases.case(13, "reads during overwrites", num_reads):
                    seed = engine.load("sub/opt.pt")["seed"]
                    assert 1 <= seed <= NUM_OVERWRITES + 1
                    # Never back, but for the next writer's beginning.
                    assert seed >= newest
                    assert engine.latest() == "tag"
                    if num_reads % 50 == 0:
                        check_a_large_file(engine)
                newest = seed if seed <= NUM_OVERWRITES else 0
                num_reads += 1
            assert writing.result()[-1] == 0
    assert_root_consistent(root, acked=["tag"], is_swept=True)


def check_a_large_file(engine: Engine) -> None:
    """All of its tensors are of one save."""
    loaded = engine.load("model.pt")
    assert content(loaded) == content(state(int(loaded["w"][0])))


@pytest.mark.parametrize("mmap", [False, True])
def test_a_load_of_a_tag_that_is_deleted_gets_all_of_it_or_nothing(
    cases, template, mmap
):
    for number in range(cases.pick(50, 1000)):
        root = link_root(template, "deleted")
        with Engine(root, SMALL) as reader, Engine(root, SMALL) as deleter:
            with cases.case(13, "a load of a tag that is deleted", number):
                loading, deleting = all_at_once(
                    lambda reader=reader: content(
                        reader.load("model.pt", tag="old", mmap=mmap, verify=not mmap)
                    ),
                    lambda deleter=deleter: deleter.delete("old"),
                )
                assert deleting.exception() is None
                error = loading.exception()
                if error is None:
                    assert loading.result() == content(state(2))
                else:
                    assert isinstance(error, CheckpointNotFoundError), repr(error)
                assert reader.latest() == "older"


def test_a_sweep_during_saves_takes_nothing_from_them(cases, template):
    root = link_root(template, "swept")
    with Engine(root, SMALL) as saver, Engine(root, SMALL) as sweeper:
        for number in range(cases.pick(30, 500)):
            with cases.case(13, "a sweep during a save", number):
                saving, sweeping = all_at_once(
                    lambda number=number: save(saver, f"step-{number}", number % 3 + 1),
                    sweeper.sweep,
                )
                assert saving.exception() is None
                assert sweeping.result() == []
                assert saver.latest() == f"step-{number}"
    assert_root_consistent(root, is_swept=True)
