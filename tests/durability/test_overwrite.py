"""A tag is replaced at one instant: readers see the old one or the new one, whole."""

import asyncio
import errno
import logging
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import aiockpt
from aiockpt.errors import (
    CheckpointNotFoundError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.events import Published
from aiockpt.retention import KeepEvery, KeepLast
from aiockpt.storage.local_write import LocalWriteFile
from catalogs import leftovers, names_in
from crashing import Server
from gates import LIMIT_S, Gate, held, turns
from tracing import Moment, fail_on, tapped
from workloads import SMALL, Engine, assert_whole, content, save, seeds, state

NUM_OVERWRITES = 30


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


# --- replacing --------------------------------------------------------------------


def test_a_published_tag_is_refused_before_anything_is_saved(root):
    with Engine(root, SMALL) as engine:
        save(engine, "one", 1)

        with pytest.raises(EngineStateError, match="overwrite=True"):
            engine.create("one")

        assert_whole(engine, "one", 1)


def test_a_foreign_name_is_refused_before_anything_is_saved(root):
    (root / "one").mkdir(parents=True)
    (root / "one" / "notes").write_bytes(b"mine")

    with Engine(root, SMALL) as engine:
        for overwrite in (False, True):
            with pytest.raises(InvalidArgumentError, match="is not a tag"):
                engine.create("one", overwrite=overwrite)

    assert (root / "one" / "notes").read_bytes() == b"mine"


def test_the_old_tag_is_there_until_the_new_one_is(root):
    with Engine(root, SMALL) as engine:
        save(engine, "one", 1)
        engine.create("one", overwrite=True)
        engine.save(state(2), "model.pt").written()

        assert_whole(engine, "one", 1)
        engine.save({"seed": 2}, "sub/opt.pt")
        engine.commit("one")

        assert seeds(engine) == {"one": 2}
    assert names_in(root) == ["latest", "one"]
    assert leftovers(root) == []


def test_an_overwrite_that_is_aborted_leaves_the_old_tag(root):
    with Engine(root, SMALL) as engine:
        save(engine, "one", 1)
        engine.create("one", overwrite=True)
        engine.save(state(2), "model.pt")
        engine.abort("one")

        assert seeds(engine) == {"one": 1}
    assert leftovers(root) == []


def test_every_file_of_the_old_tag_goes(root):
    with Engine(root, SMALL) as engine:
        save(engine, "one", 1)
        engine.create("one", overwrite=True)
        engine.save({"x": 1}, "other.pt")
        engine.commit("one")

        with pytest.raises(CheckpointNotFoundError, match=r"other\.pt"):
            engine.load("model.pt")
    assert sorted(path.name for path in (root / "one").iterdir()) == [
        ".aiockpt",
        "other.pt",
    ]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_where_directories_cannot_be_exchanged_the_old_tag_stays(root, number):
    with Engine(root, SMALL) as engine:
        save(engine, "one", 1)
        save(engine, "two", 2)

        with tapped(fail_on("exchange", "", number)):
            with pytest.raises(StorageError) as caught:
                save(engine, "one", 3, overwrite=True)

        assert caught.value.errno == number
        assert caught.value.filename == str(root / "one")
        assert seeds(engine) == {"one": 1, "two": 2}
        assert engine.latest() == "two"
    assert leftovers(root) == []


def test_whoever_reads_at_any_call_of_an_overwrite_sees_the_old_or_the_new(root):
    seen = []

    def read(moment: Moment) -> None:
        # Not from inside the reader's own calls.
        if threading.current_thread() not in readers:
            seen.append(pool.submit(load).result(LIMIT_S))

    def load() -> int:
        loaded = observer.load("sub/opt.pt", tag="one")
        assert content(observer.load("model.pt", tag="one")) in contents
        return loaded["seed"]

    contents = [content(state(seed)) for seed in (1, 2)]
    with (
        Engine(root, SMALL) as engine,
        Engine(root, {**SMALL, "parser_threads": 1}) as observer,
        ThreadPoolExecutor(1) as pool,
    ):
        save(engine, "one", 1)
        observer.load("sub/opt.pt")
        readers = reading_threads(observer)
        with tapped(read):
            save(engine, "one", 2, overwrite=True)

    assert set(seen) == {1, 2}
    assert seen == sorted(seen)


def reading_threads(engine: Engine) -> list[threading.Thread]:
    """The threads in which an engine that has read before reads one file at a time."""
    machinery = engine._runtime._machinery
    return [*machinery._loaders._threads, *machinery._readers._threads]


def test_readers_in_another_process_see_the_old_or_the_new_whole(root, server):
    with Engine(root, SMALL) as engine, ThreadPoolExecutor(1) as pool:
        save(engine, "one", 1)
        request = {"root": str(root), "tag": "one", "num_times": NUM_OVERWRITES}
        writing = pool.submit(server.ask, "save_many", **request)
        last = 1
        while not writing.done():
            loaded = engine.load("model.pt", tag="one")
            seed = len(loaded["b"])
            assert content(loaded) == content(state(seed))
            assert seed >= last
            last = seed

        assert writing.result() == [*range(2, NUM_OVERWRITES + 2), 0]
        assert seeds(engine) == {"one": NUM_OVERWRITES + 1}
    assert leftovers(root) == []


def test_eight_processes_that_commit_one_tag_have_one_winner(server):
    for _ in range(3):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
            told = server.ask("race", root=path, tag="one", num_racers=8)

            assert [answer[0] for answer in told] == ["ready"] * 8
            assert [answer[-1] for answer in told] == [0] * 8
            outcomes = [answer[1] for answer in told]
            (winner,) = [outcome["won"] for outcome in outcomes if "won" in outcome]
            lost = [outcome for outcome in outcomes if "error" in outcome]
            assert {outcome["error"] for outcome in lost} == {"EngineStateError"}
            assert len(lost) == 7
            with Engine(path, SMALL) as engine:
                assert engine.latest() == "one"
                assert engine.load("sub/opt.pt") == {"seed": winner}
                assert [info.tag for info in engine.tags()] == ["one"]
            assert leftovers(Path(path)) == []


# --- keeping some -----------------------------------------------------------------


def keeping(*policies: object) -> dict[str, object]:
    return {**SMALL, "retention": policies}


def test_old_tags_go_after_a_commit(root):
    with Engine(root, keeping(KeepLast(2))) as engine:
        for seed in range(1, 5):
            save(engine, f"step-{seed}", seed)

    with Engine(root, SMALL) as engine:
        assert seeds(engine) == {"step-3": 3, "step-4": 4}
        assert engine.latest() == "step-4"
    assert leftovers(root) == []


def test_policies_are_combined(root):
    with Engine(root, keeping(KeepLast(1), KeepEvery(2))) as engine:
        for seed in range(1, 6):
            save(engine, f"step-{seed}", seed)

    assert names_in(root) == ["latest", "step-2", "step-4", "step-5"]


def test_nothing_goes_before_a_commit_or_without_one(root):
    with Engine(root, SMALL) as engine:
        for seed in range(1, 4):
            save(engine, f"step-{seed}", seed)

    with Engine(root, keeping(KeepLast(1))) as engine:
        engine.create("step-4")
        engine.save(state(4), "model.pt").written()
        engine.abort("step-4")
        with tapped(fail_on("fsync", "manifest.json", errno.EIO)):
            with pytest.raises(StorageError):
                save(engine, "step-5", 5)
        assert list(seeds(engine)) == ["step-1", "step-2", "step-3"]


async def test_commits_beside_each_other_lose_no_tag_that_is_newer(root, monkeypatch):
    async with aiockpt.CheckpointEngine(root, keeping(KeepLast(1))) as engine:
        await engine.create("step-1")
        await engine.create("step-2")
        await (await engine.save({"x": 2}, "model.pt", tag="step-2")).written()
        with held(monkeypatch, LocalWriteFile, "_write") as gate:
            await engine.save({"x": 1}, "model.pt", tag="step-1")
            await gate.reached()
            first = asyncio.create_task(engine.commit("step-1"))
            attempt = engine._runtime.open_tags.get("step-1")
            while not attempt._is_sealed:
                await turns(1)
            await engine.commit("step-2")
        await first
    async with aiockpt.CheckpointEngine(root, keeping(KeepLast(1))) as engine:
        assert await engine.latest() == "step-2"
        # The one that was published last stays as well, until the next.
        assert [info.tag for info in await engine.tags()] == ["step-2", "step-1"]
        await engine.create("step-3")
        await engine.save({"x": 3}, "model.pt")
        await engine.commit("step-3")
    assert names_in(root) == ["latest", "step-3"]


async def test_a_commit_does_not_wait_for_old_tags_to_go(root):
    gate = Gate()

    def hold(moment: Moment) -> None:
        # Not what else is removed: the clerks do more than this.
        if moment.name == "unlink" and moment.path.endswith("/model.pt"):
            gate.pass_through()

    async with aiockpt.CheckpointEngine(root, keeping(KeepLast(1))) as engine:
        for step in (1, 2):
            await engine.create(f"step-{step}")
            await engine.save({"x": torch.arange(step)}, "model.pt")
            if step == 1:
                await engine.commit("step-1")
        with tapped(hold):
            await engine.commit("step-2")
            await gate.reached()
            assert await engine.latest() == "step-2"
            gate.open()
            await engine.aclose()


@pytest.mark.parametrize(
    "call", ["rename", "fsync", "unlink", "rmdir", "mkdir", "flock"]
)
def test_a_tag_that_cannot_be_removed_is_worth_a_warning_only(root, call, caplog):
    failures: list[int] = []

    def on_event(event: object) -> None:
        if isinstance(event, Published) and event.report.tag == "b":
            failures.append(errno.EIO)

    def fault(moment: Moment) -> None:
        if moment.name == call and failures:
            number = failures.pop()
            raise OSError(number, "no")

    engine = Engine(root, keeping(KeepLast(1)), observers=[on_event])
    save(engine, "a", 1)
    with tapped(fault), caplog.at_level(logging.WARNING, "aiockpt"):
        # The commit succeeds; what fails is the first such call after it.
        save(engine, "b", 2)
        engine.close()

    assert not failures
    assert "remain" in caplog.text
    with Engine(root, SMALL) as engine:
        assert engine.latest() == "b"
        assert seeds(engine) in ({"a": 1, "b": 2}, {"b": 2})
    assert leftovers(root) == []


def test_a_policy_that_fails_is_worth_a_warning_only(root, caplog):
    class Broken:
        def keeps(self, tags):
            raise ZeroDivisionError("a policy's mistake")

    with Engine(root, keeping(Broken())) as engine:
        save(engine, "step-1", 1)
        save(engine, "step-2", 2)

    assert "a policy's mistake" in caplog.text
    assert names_in(root) == ["latest", "step-1", "step-2"]
    assert leftovers(root) == []


def test_what_a_killed_commit_left_never_costs_the_last_tag(root, server):
    with Engine(root, keeping(KeepLast(1))) as engine:
        save(engine, "old", 1)
        with tapped(fail_on("fsync", root.name, errno.EIO)):
            with pytest.raises(StorageError):
                save(engine, "new", 2)
        assert seeds(engine) == {"old": 1}

    server.ask("crash", root=str(root), workload="save", at=["fsync", "manifest.json"])
    with Engine(root, keeping(KeepLast(1))) as engine:
        assert seeds(engine) == {"old": 1}
        save(engine, "new", 3)
    assert names_in(root) == ["latest", "new"]
