"""What dead engines left goes away; what living ones hold is never touched."""

import asyncio
import contextlib
import errno
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import aiockpt
import aiockpt.sync
from aiockpt.catalog import Catalog
from aiockpt.errors import StorageError
from catalogs import catalog_at, leftovers, make_tags, names_in, prepare, storage_at
from tracing import FailAt, Moment, fail_on, tapped

SMALL = {"host_cache_size": 8 / 1024, "parser_threads": 1}


def dead_engines(root: Path, *nums_attempts: int) -> list[str]:
    """Engines that died in the middle of so many attempts each; their names."""
    catalogs = [Catalog(storage_at(root)) for _ in nums_attempts]
    for catalog, num_attempts in zip(catalogs, nums_attempts, strict=True):
        for _ in range(num_attempts):
            prepare(catalog, root)
    for catalog in catalogs:
        # The kernel lets go of a dead process's locks, and does nothing else.
        for lock in catalog._area._locks.values():
            lock.release()
    return [catalog._area._engine for catalog in catalogs]


def dead_engine(root: Path) -> str:
    return dead_engines(root, 2)[0]


@pytest.fixture
def catalog(root: Path) -> Iterator[Catalog]:
    make_tags(root, "one")
    with catalog_at(root) as catalog:
        yield catalog


def test_what_a_dead_engine_left_is_removed_and_the_tags_are_not(catalog, root):
    dead = dead_engines(root, 1, 3, 2)
    assert leftovers(root)

    assert sorted(catalog.sweep()) == sorted(dead)

    assert leftovers(root) == []
    assert names_in(root) == ["latest", "one"]
    assert catalog.sweep() == []


def test_what_a_living_engine_of_this_process_holds_is_untouched(catalog, root):
    with catalog_at(root) as living:
        prepare(living, root)
        dead = dead_engine(root)
        before = [name for name in leftovers(root) if dead not in name]

        assert catalog.sweep() == [dead]
        assert leftovers(root) == before
        assert living.sweep() == []
        assert leftovers(root) == before


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "r+")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_what_an_engine_of_another_process_holds_is_untouched_until_it_dies(
    catalog, root
):
    other = dead_engine(root)
    lock = root / ".aiockpt" / "work" / f"{other}.lock"
    program = [sys.executable, "-c", HOLD, lock]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdin=pipe, stdout=pipe) as process:
        assert process.stdout.readline() == b"held\n"
        before = leftovers(root)

        assert catalog.sweep() == []
        assert leftovers(root) == before
        process.kill()

    assert catalog.sweep() == [other]
    assert leftovers(root) == []


def test_age_says_nothing_about_life(catalog, root):
    with catalog_at(root) as living:
        prepare(living, root)
        for path in (root / ".aiockpt" / "work").rglob("*"):
            path.touch()
            subprocess.run(["touch", "-d", "2001-01-01", path], check=True)
        before = leftovers(root)

        catalog.sweep()

        assert leftovers(root) == before


def lock_without_directory(root: Path) -> None:
    (root / ".aiockpt" / "work" / "host-1-abcd.lock").write_bytes(b"")


def directory_without_lock(root: Path) -> None:
    (root / ".aiockpt" / "work" / "host-1-abcd" / "3" / "sub").mkdir(parents=True)


def pointer_half_written(root: Path) -> None:
    (root / ".aiockpt" / "latest.host-1-abcd.3").write_bytes(b"on")


@pytest.mark.parametrize(
    "leave", [lock_without_directory, directory_without_lock, pointer_half_written]
)
def test_what_a_crash_at_the_edge_of_a_life_leaves_is_removed(
    catalog, root, leave: Callable[[Path], None]
):
    leave(root)

    catalog.sweep()

    assert leftovers(root) == []
    assert catalog.latest() == "one"


def test_an_engine_that_is_just_starting_is_not_taken_for_dead(catalog, root):
    sweeps = iter([catalog])

    def sweep_between_open_and_lock(moment: Moment) -> None:
        if moment.name == "flock" and "/work/" in moment.path:
            for sweeper in sweeps:
                sweeper.sweep()

    with catalog_at(root) as starting, tapped(sweep_between_open_and_lock):
        starting.open_work()
        prepare(starting, root)
        before = leftovers(root)
        assert catalog.sweep() == []

        assert leftovers(root) == before != []


def test_a_lock_without_a_directory_is_no_dead_engine(catalog, root):
    """Of one that is just starting it is there before it is held."""
    lock = root / ".aiockpt" / "work" / "starting.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.touch()
    assert catalog.sweep() == []
    assert not lock.exists()


def test_no_link_is_followed_out_of_a_dead_engines_directory(catalog, root, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "f").write_bytes(b"mine")
    dead = dead_engine(root)
    (root / ".aiockpt" / "work" / dead / "1" / "link").symlink_to(precious)
    (root / ".aiockpt" / "work" / "stray").symlink_to(precious)

    catalog.sweep()

    assert (precious / "f").read_bytes() == b"mine"


def test_a_sweep_that_fails_midway_is_completed_by_the_next(root):
    make_tags(root, "one")
    for index in itertools.count(1):
        dead_engine(root)
        fault = FailAt(index, errno.EIO)
        with tapped(fault), catalog_at(root) as catalog:
            with contextlib.suppress(StorageError):
                catalog.sweep()
        if fault.failed is None:
            break
        with catalog_at(root) as catalog:
            catalog.sweep()
            assert leftovers(root) == [], f"after {fault.failed}"
            assert catalog.latest() == "one"
    assert index > 10


# --- engines sweep when they start ------------------------------------------------


def test_an_engine_sweeps_when_it_starts(root):
    make_tags(root, "one")
    dead_engine(root)

    async def start() -> tuple[list[str], str | None]:
        async with aiockpt.CheckpointEngine(root, SMALL) as engine:
            return leftovers(root), await engine.latest()

    assert asyncio.run(start()) == ([], "one")


def test_an_engine_without_a_context_manager_sweeps_with_its_first_tag(root):
    make_tags(root, "one")
    dead = dead_engine(root)

    engine = aiockpt.sync.CheckpointEngine(root, SMALL)
    engine.create("two")
    names = leftovers(root)
    engine.abort("two")
    engine.close()

    assert names
    assert not [name for name in names if dead in name]


def test_leftovers_of_a_tag_do_not_hinder_the_same_tag(root):
    make_tags(root, "one")
    dead_engine(root)

    with aiockpt.sync.CheckpointEngine(root, SMALL) as engine:
        engine.create("two")
        engine.save({"x": torch.arange(3)}, "model.pt")
        engine.commit("two")

        assert names_in(root / "two") == ["model.pt"]
    assert leftovers(root) == []


def test_an_engine_can_be_asked_to_sweep(root):
    make_tags(root, "one")
    with aiockpt.sync.CheckpointEngine(root, SMALL) as engine:
        dead = dead_engine(root)

        assert engine.sweep() == [dead]


def test_an_engine_starts_in_a_root_that_it_cannot_sweep(root, caplog):
    make_tags(root, "one")
    dead_engine(root)

    with tapped(fail_on("open", ".lock", errno.EROFS)):
        with aiockpt.sync.CheckpointEngine(root, SMALL) as engine:
            assert engine.latest() == "one"

    assert "could not be swept" in caplog.text


def test_an_engine_only_reading_makes_nothing_in_its_root(root):
    with aiockpt.sync.CheckpointEngine(root, SMALL) as engine:
        assert engine.latest() is None
        assert engine.tags() == []
        assert engine.sweep() == []
    assert not root.exists()
