"""One engine's work under faults, in this process, and what must hold afterwards."""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    EngineStateError,
    StorageError,
)
from aiockpt.manifest import TagInfo
from aiockpt.opening import TagOptions
from aiockpt.retention import KeepLast
from aiockpt.testing.faults import Fault, Injection, inject
from aiockpt.testing.roots import assert_root_consistent
from catalogs import catalog_at
from workloads import (
    SMALL,
    START,
    WORKLOADS,
    Engine,
    Workload,
    assert_whole,
    make_start,
    save,
    state,
)

# What changes the disk: between two of these, a killed process leaves the same.
CHANGING = (
    "create", "exchange", "fallocate", "flock", "ftruncate", "link", "mkdir", "pwrite",
    "rename", "rmdir", "unlink", "write",
)  # fmt: skip
# Calls that only clean up: where they fail, the next engine does it.
CLEANING = {"unlink", "rmdir"}


def load_latest(engine: Engine) -> None:
    """Loads the files of the latest tag, verified to the last byte."""
    assert_whole(engine, engine.latest(), 2)


def recover(engine: Engine) -> None:
    """What the first engine after a crash does: it sweeps, looks, and tidies up."""
    engine.sweep()
    engine.latest()
    # It may have gone in the crash.
    with contextlib.suppress(CheckpointNotFoundError):
        engine.delete("older")


def save_weights(engine: Engine, tag: str, seed: int) -> None:
    """Saves and commits weights in two shards, and text as it stands."""
    engine.create(tag)
    engine.save_sharded(state(seed), max_shard_bytes=1 << 20)
    engine.save_bytes(f"seed: {seed}", "sub/notes.txt")
    engine.commit(tag)


def save_in_time(engine: Engine, tag: str, seed: int) -> None:
    """The same as `save`, in one call that has a deadline."""
    files = {"model.pt": state(seed), "sub/opt.pt": {"seed": seed}}
    engine.save_before(600, tag, files)


def save_among_files_of_others(engine: Engine, tag: str, seed: int) -> None:
    """Overwrites a tag; what others put into its directory stays in it."""
    options = TagOptions(is_overwrite=True, adopts=True)
    engine._runtime.spawn(engine._runtime.open_tags.create(tag, options)).result()
    engine.save(state(seed), "model.pt")
    engine.save({"seed": seed}, "sub/opt.pt")
    engine.commit(tag)


def read_under_a_lease(engine: Engine) -> None:
    """Waits for a tag and reads it under a lease; nobody removes it meanwhile."""
    with engine.reading(engine.wait_for(newer_than="older").tag):
        assert_whole(engine, "old", 2)
        try:
            engine.delete("old")
        except EngineStateError:
            return
        raise AssertionError("a tag was deleted while it was read")


ALL_WORKLOADS: dict[str, Workload] = {
    **WORKLOADS,
    "save weights": Workload(
        lambda e: save_weights(e, "new", 4), START, {**START, "new": 4}
    ),
    "save in time": Workload(
        lambda e: save_in_time(e, "new", 3), START, {**START, "new": 3}
    ),
    "save among files of others": Workload(
        lambda e: save_among_files_of_others(e, "old", 3), START, {"older": 1, "old": 3}
    ),
    "save and prune": Workload(
        lambda e: save(e, "new", 3), START, {"old": 2, "new": 3}
    ),
    "load": Workload(load_latest, START, START),
    "read under a lease": Workload(read_under_a_lease, START, START),
    "preflight": Workload(lambda e: e.preflight(), START, START),
    "recover": Workload(recover, START, {"old": 2}),
}
# These meet fewer errors in the ordinary run: much of what they do others do as well.
NEWER = (
    "save weights", "save in time", "save among files of others", "read under a lease",
    "preflight",
)  # fmt: skip
# What is saved under each seed.
SEEDS = {1: save, 2: save, 3: save, 4: save_weights}
CONFIGS = {"save and prune": SMALL | {"retention": [KeepLast(2)]}}

# What somebody put into the directory of a tag, and where it is taken to be looked at.
NOTE, ASIDE = "old/notes/mine.txt", "note"
NOTED = {"save among files of others"}


def put_note(root: Path, name: str) -> None:
    """Before a workload for which it matters, somebody puts a file into a tag."""
    (root.parent / ASIDE).unlink(missing_ok=True)
    if name in NOTED:
        (root / NOTE).parent.mkdir()
        (root / NOTE).write_text("mine")


def take_note(root: Path, name: str) -> None:
    """What was put into a tag is there still; it is taken away again. Idempotent."""
    aside = root.parent / ASIDE
    if name in NOTED and not aside.exists():
        assert (root / NOTE).exists(), "what somebody put into a tag is gone"
        (root / NOTE).rename(aside)
        (root / NOTE).parent.rmdir()
        assert aside.read_text() == "mine"


def make_template(root: Path) -> Path:
    """A root as it is before each of the workloads."""
    for seed in SEEDS:
        sums_of(seed)
    return make_start(root)


def link_root(template: Path, name: str = "root") -> Path:
    """A copy of a root, in the place of the copy before it.

    Its files are those of the template, linked: whoever writes into a published one
    is found out by every later case.
    """
    root = template.with_name(name)
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root, copy_function=os.link)
    # Opened for writing by every engine, and the only file that ever is.
    for lock in root.glob(".aiockpt/**/*lock"):
        lock.unlink()
        lock.touch()
    return root


@dataclass
class Outcome:
    """What came of a workload.

    Attributes:
        is_done: Whether it was acknowledged.
        errors: What its calls raised, `close` included.
    """

    is_done: bool = False
    errors: list[CheckpointError] = field(default_factory=list)


def run(
    root: Path, work: Callable[[Engine], object], config: Mapping[str, object] = SMALL
) -> Outcome:
    """Runs a workload to its end, by an engine of its own that is then closed."""
    outcome = Outcome()
    engine = Engine(root, config)
    try:
        work(engine)
        outcome.is_done = True
    except CheckpointError as error:
        outcome.errors.append(error)
    finally:
        try:
            engine.close()
        except CheckpointError as error:
            outcome.errors.append(error)
    return outcome


def spoil(root: Path, name: str, *faults: Fault) -> tuple[Outcome, Injection]:
    """Runs a workload into faults."""
    put_note(root, name)
    with inject(*faults) as injection:
        outcome = run(root, ALL_WORKLOADS[name].work, CONFIGS.get(name, SMALL))
    return outcome, injection


def assert_errors_name(outcome: Outcome, number: int, root: Path) -> None:
    """Whatever was raised tells the errno, in the system's words, and the file."""
    for error in outcome.errors:
        reported: BaseException | None = error
        if not isinstance(error, StorageError):
            # A later call on a tag that has failed: the failure is its cause.
            reported = error.__cause__
        assert isinstance(reported, StorageError), repr(error)
        assert reported.errno == number, repr(reported)
        assert str(reported.filename).startswith(str(root))
        assert reported.strerror


def assert_survived(root: Path, name: str, outcome: Outcome, *, may_stay: bool) -> None:
    """All is whole, what was acknowledged is there, and all goes on.

    Args:
        root: The root.
        name: The workload's name.
        outcome: What came of it.
        may_stay: Whether it may be there although it was not acknowledged.
    """
    take_note(root, name)
    before, after = dict(ALL_WORKLOADS[name].before), dict(ALL_WORKLOADS[name].after)
    allowed = [after] if outcome.is_done else [before]
    if may_stay and not outcome.is_done:
        allowed.append(after)
    if is_tidying(name):
        # What remains to be pruned is worth a warning only.
        allowed.append({**before, **after})
    found = published_seeds(root)
    assert found in allowed, f"{found}, not one of {allowed}"
    go_on(root, found, has_failed=not outcome.is_done)
    assert_root_consistent(root, is_swept=True)


def go_on(root: Path, found: Mapping[str, int], *, has_failed: bool) -> None:
    """The next engine finds the tags, cleans up, and saves what failed again."""
    with Engine(root, SMALL) as engine:
        assert engine.latest() == [*found][-1]
        if not has_failed:
            return
        tag = "new" if "new" not in found else [*found][-1]
        engine.create(tag, overwrite=tag in found)
        engine.save({"seed": 4}, "sub/opt.pt")
        engine.commit(tag)
        assert engine.latest() == tag
        assert engine.load("sub/opt.pt") == {"seed": 4}


def published_seeds(root: Path) -> dict[str, int]:
    """The tags of a consistent root, oldest first, and what they are.

    They are told by the sums of their files, which are compared with the bytes: a
    hundred times faster than loading them, for thousands of cases.
    """
    tags = assert_root_consistent(root)
    with catalog_at(root) as reader:
        infos = reader.tags()
    assert [info.tag for info in infos] == tags, "a reader sees other tags"
    return {info.tag: _seed_of(info) for info in infos}


def _seed_of(info: TagInfo) -> int:
    found = {entry.path: entry.crc32 for entry in info.files}
    seeds = [seed for seed in SEEDS if sums_of(seed) == found]
    assert seeds, f"tag {info.tag!r} is what nobody saved: {found}"
    return seeds[0]


@functools.cache
def sums_of(seed: int) -> dict[str, int]:
    """The CRC-32 of the files that are saved under a seed, when nothing goes wrong."""
    with tempfile.TemporaryDirectory() as path, Engine(path, SMALL) as engine:
        SEEDS[seed](engine, "tag", seed)
        if SEEDS[seed] is save:
            assert_whole(engine, "tag", seed)
        (info,) = engine.tags()
        return {entry.path: entry.crc32 for entry in info.files}


def is_tidying(name: str) -> bool:
    """Whether a workload goes on, unasked, after it was acknowledged."""
    return name in CONFIGS
