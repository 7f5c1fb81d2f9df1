"""Inside `reading` a tag stays, whatever retention and other processes want."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from aiockpt import (
    CheckpointEngine,
    CheckpointNotFoundError,
    EngineStateError,
    InvalidArgumentError,
    KeepLast,
)
from aiockpt.leases import ROOT_LOCK, Leases
from catalogs import leftovers, names_in, storage_at
from gates import (
    LIMIT_S,
    RING_8_MIB,
    EngineSide,
    cancelled_at,
    held,
    in_thread,
    run_script,
    turns,
)
from tracing import Moment, tapped
from workloads import SMALL, Engine, assert_whole, save, seeds

KEEPING_ONE = {**SMALL, "retention": [KeepLast(1)]}


def lease_files(root: Path) -> list[Path]:
    return list((root / ".aiockpt").glob("reading.*"))


# --- what is kept -----------------------------------------------------------------


def test_by_default_the_latest_is_kept(root):
    with Engine(root, SMALL) as engine:
        save(engine, "b", 1)
        save(engine, "a", 2)
        with engine.reading() as info:
            assert info == engine.tags()[-1]
            assert info.tag == "a"


def test_delete_refuses_what_another_engine_reads_and_says_who(root):
    with Engine(root, SMALL) as engine, Engine(root, SMALL) as other:
        save(engine, "a", 1)
        with engine.reading("a"), engine.reading("a"):
            who = f"2 readers.*-{os.getpid()}-"
            with pytest.raises(EngineStateError, match=who):
                other.delete("a")
            assert_whole(other, "a", 1)
        other.delete("a")
        assert other.tags() == []
    assert leftovers(root) == []


def test_retention_skips_what_is_read_and_comes_back_to_it(root):
    with Engine(root, SMALL) as reader:
        with Engine(root, KEEPING_ONE) as engine:
            for seed in (1, 2):
                save(engine, f"step-{seed}", seed)
        with reader.reading("step-2"):
            with Engine(root, KEEPING_ONE) as engine:
                for seed in (3, 4):
                    save(engine, f"step-{seed}", seed)
            # The one between the two was not in anybody's way.
            assert seeds(reader) == {"step-2": 2, "step-4": 4}
        assert seeds(reader) == {"step-2": 2, "step-4": 4}
        with Engine(root, KEEPING_ONE) as engine:
            save(engine, "step-5", 5)
    assert names_in(root) == ["latest", "step-5"]
    assert leftovers(root) == []


def test_what_is_read_is_no_reason_for_a_warning(root, caplog):
    with Engine(root, SMALL) as reader, Engine(root, KEEPING_ONE) as engine:
        save(engine, "a", 1)
        with reader.reading("a"):
            save(engine, "b", 2)
            engine.close()
    assert caplog.text == ""


def test_a_tag_that_is_overwritten_while_it_is_read_is_the_new_one_from_then_on(root):
    with Engine(root, SMALL) as reader, Engine(root, SMALL) as engine:
        save(engine, "a", 1)
        with reader.reading("a") as info, reader.open("model.pt", tag="a") as file:
            save(engine, "a", 2, overwrite=True)
            assert file.tensor("b").tolist() == [0]
            assert reader.load("sub/opt.pt", tag=info.tag) == {"seed": 2}
            with pytest.raises(EngineStateError, match="being read"):
                engine.delete("a")
        assert seeds(engine) == {"a": 2}
    assert leftovers(root) == []


# --- what is refused --------------------------------------------------------------


async def test_what_is_not_published_cannot_be_read(root):
    async with CheckpointEngine(root, SMALL) as engine:
        for tag in (None, "a"):
            with pytest.raises(CheckpointNotFoundError):
                async with engine.reading(tag):
                    pytest.fail("entered")
        with pytest.raises(InvalidArgumentError):
            async with engine.reading("../a"):
                pytest.fail("entered")
        assert not root.exists()
    with pytest.raises(EngineStateError, match="closed"):
        async with engine.reading("a"):
            pytest.fail("entered")


# --- how it ends ------------------------------------------------------------------


async def saved(engine: CheckpointEngine, tag: str) -> None:
    await engine.create(tag)
    await engine.save({"w": torch.arange(3)}, "model.pt")
    await engine.commit(tag)


async def test_an_error_of_the_block_ends_the_lease_and_passes(root):
    async with CheckpointEngine(root, SMALL) as engine:
        await saved(engine, "a")
        with pytest.raises(ZeroDivisionError):
            async with engine.reading():
                assert len(lease_files(root)) == 1
                raise ZeroDivisionError
        assert lease_files(root) == []
        await engine.delete("a")


async def test_closing_the_engine_ends_its_leases(root):
    engine = CheckpointEngine(root, SMALL)
    await saved(engine, "a")
    async with engine.reading():
        await engine.aclose()
        assert lease_files(root) == []
        async with CheckpointEngine(root, SMALL) as other:
            await other.delete("a")


def test_closing_the_blocking_engine_ends_its_leases(root):
    engine = Engine(root, SMALL)
    save(engine, "a", 1)
    with engine.reading():
        engine.close()
    assert leftovers(root) == []


async def read(engine: CheckpointEngine) -> None:
    async with engine.reading():
        pass


async def test_wherever_a_reader_is_cancelled_no_lease_is_left(root):
    async with CheckpointEngine(root, SMALL) as engine:
        await saved(engine, "a")
        for at in range(1, 100):
            was_cancelled = await cancelled_at(at, read(engine))
            assert lease_files(root) == []
            if not was_cancelled:
                break
        assert at > 2


async def test_wherever_the_engine_side_is_cancelled_no_lease_is_left(
    root, monkeypatch
):
    side = EngineSide(monkeypatch)
    async with CheckpointEngine(root, SMALL) as engine:
        await saved(engine, "a")
        for at in range(1, 100):
            with side.cancelling_at(at):
                with contextlib.suppress(asyncio.CancelledError):
                    await read(engine)
            assert lease_files(root) == []
            if side.num_suspensions < at:
                break
        assert at > 1


async def test_a_reader_that_is_cancelled_while_its_lease_is_taken_leaves_none(
    root, monkeypatch
):
    async with CheckpointEngine(root, SMALL) as engine:
        await saved(engine, "a")
        with held(monkeypatch, Leases, "_take") as taking:
            reading = asyncio.ensure_future(read(engine))
            await taking.reached()
            reading.cancel()
            await turns()
            assert not reading.done()
            taking.open()
            with pytest.raises(asyncio.CancelledError):
                await reading
        assert lease_files(root) == []


def test_ctrl_c_while_others_change_tags_leaves_no_lease(root):
    with Engine(root, SMALL) as engine:
        save(engine, "a", 1)
        lock = storage_at(root).lock(ROOT_LOCK, wait=True)
        is_waiting = threading.Event()

        def on_call(moment: Moment) -> None:
            if moment.name == "flock" and moment.path.endswith("/lock"):
                is_waiting.set()

        def interrupt() -> None:
            assert is_waiting.wait(LIMIT_S)
            os.kill(os.getpid(), signal.SIGINT)
            lock.release()

        with tapped(on_call):
            interrupting = in_thread(interrupt)
            with pytest.raises(KeyboardInterrupt):
                with engine.reading():
                    pytest.fail("entered")
            interrupting.result()
        assert lease_files(root) == []
        with engine.reading() as info:
            assert info.tag == "a"


# --- other processes --------------------------------------------------------------

READER = """
import sys
import aiockpt.sync
with aiockpt.sync.CheckpointEngine(sys.argv[1]) as engine:
    with engine.reading() as info:
        print(info.tag, flush=True)
        sys.stdin.read()
"""


@pytest.mark.dist
def test_the_lease_of_a_reader_that_is_killed_ends_at_once(root):
    with Engine(root, SMALL) as engine:
        save(engine, "a", 1)
        with subprocess.Popen(
            [sys.executable, "-c", READER, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as reader:
            assert reader.stdout.readline() == "a\n"
            with pytest.raises(EngineStateError, match=f"1 reader .*-{reader.pid}-"):
                engine.delete("a")
            reader.kill()
            reader.wait(LIMIT_S)
            assert len(lease_files(root)) == 1
            engine.delete("a")
    assert leftovers(root) == []


@pytest.mark.dist
def test_a_forked_child_that_leaves_the_block_does_not_end_its_parents_lease(root):
    script = """
import os, sys, warnings
import aiockpt, aiockpt.sync
warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads
root = sys.argv[1]
engine = aiockpt.sync.CheckpointEngine(root)
with aiockpt.sync.CheckpointEngine(root) as other:
    with engine.reading("a"):
        child = os.fork()
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            try:
                other.delete("a")
            except aiockpt.EngineStateError:
                print("refused")
    if not child:
        os._exit(7)
    other.delete("a")
    print(other.latest())
engine.close()
"""
    with Engine(root, RING_8_MIB) as engine:
        save(engine, "a", 1)
    done = run_script(script, root)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.split() == ["7", "refused", "None"]
