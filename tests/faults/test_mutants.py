"""Row 20: the matrix catches every aiockpt that is broken on purpose."""

import errno
import math
import shutil
import threading
from collections import UserDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from aiockpt.errors import CheckpointError, UnsafePickleError
from aiockpt.storage.local import LocalStorage
from aiockpt.testing.faults import Delay, Fail, Fault, Short, inject
from aiockpt.testing.roots import assert_root_consistent
from aiockpt.testing.storage_contract import StorageContract
from aiockpt.testing.system_calls import Moment
from aiockpt.threads import WorkerPool
from catalogs import SOME, catalog_at, prepare
from faults import mutants
from faults.damage import FILES, assert_detected, flipped, make_two_tags, replaced
from faults.driver import assert_survived, link_root, published_seeds, spoil
from faults.matrix import Cases
from faults.mutants import Mutant
from faults.pairs import assert_both_tell, pair, save_together, spoil_pair, told_files
from faults.sweeps import Sweep
from gates import LIMIT_S, in_thread
from tracing import check_commit_order, tapped
from workloads import SMALL, START, Engine, content, save, state

# A count of its own: a mutant's failures are no failures of the rows.
NOT_COUNTED = Cases(is_long=False)

Row = Callable[[Path], object]


def errors_once(template: Path) -> None:
    Sweep(NOT_COUNTED, 1, "", template, "save").errors(lambda _: errno.EIO, num_times=1)


def errors_for_ever(template: Path) -> None:
    Sweep(NOT_COUNTED, 1, "", template, "overwrite the latest").errors(
        lambda _: errno.EIO, num_times=math.inf
    )


def short_writes(template: Path) -> None:
    Sweep(NOT_COUNTED, 2, "", template, "save").short(Short(Fraction(1, 2)))


def failed_syncs(template: Path) -> None:
    Sweep(NOT_COUNTED, 7, "", template, "save").failed("fsync")


def order(template: Path) -> None:
    """What strace asserts: no call of a commit too late, too early or left out."""
    root = template.with_name("fresh") / "runs"
    with Engine(root, SMALL) as engine, tapped() as tap:
        save(engine, "tag", 1)
        calls, returned = list(tap.calls), tap.now()
    check_commit_order(calls, str(root), "tag", ["model.pt", "sub/opt.pt"], returned)


def acknowledged(template: Path) -> None:
    """When a commit has returned, the tag is there, before anything else is done."""
    root = link_root(template)
    with Engine(root, SMALL) as engine:
        save(engine, "new", 3)
        assert_root_consistent(root, acked=["older", "old", "new"])


def commit_during_writes(template: Path) -> None:
    """A commit of files that the disk is slow to take waits for them."""
    root = link_root(template)
    disk = threading.Event()
    with Engine(root, SMALL) as engine:
        engine.create("new")
        with inject(Fault("pwrite", Delay(disk.wait), num_times=math.inf)):
            handle = engine.save(state(3), "model.pt")
            attempt = engine._runtime.open_tags.get("new")
            committing = in_thread(lambda: engine.commit("new"))
            while not (attempt._is_sealed and handle.progress.planned_bytes):
                pass
            for _ in range(50):
                engine.latest()  # turns of the engine's loop, and of its clerks
            is_early = (root / "new").exists()
            disk.set()
            committing.exception(LIMIT_S)
        assert not is_early
        assert content(engine.load("model.pt", tag="new")) == content(state(3))


def flipped_bytes(template: Path) -> None:
    root = make_two_tags(template.with_name("tags"))
    with Engine(root, SMALL) as engine:
        for name in FILES:
            path = root / "one" / name
            data = path.read_bytes()
            for byte in range(700, len(data), len(data) // 20):
                with replaced(path, flipped(data, 8 * byte)):
                    assert_detected(engine, "one", name)


def hostile_pickle(template: Path) -> None:
    """A class that is not allowed is refused, and not made."""
    root = link_root(template)
    torch.save(UserDict(x=1), root.with_name("hostile.pt"))
    data = root.with_name("hostile.pt").read_bytes()
    with catalog_at(root) as catalog:
        prepared = prepare(catalog, root, {"model.pt": data})
        catalog.publish("new", is_overwrite=False, **prepared)
    with Engine(root, SMALL) as engine, pytest.raises(UnsafePickleError):
        engine.load("model.pt")


def cancelled_write(template: Path) -> None:
    workers = WorkerPool(1, "test-worker")
    root = link_root(template)
    contract = StorageContract()
    try:
        contract.test_a_cancelled_write_has_ended_when_it_returns(
            LocalStorage(str(root), workers)
        )
    finally:
        workers.shutdown()


def sweep_during_a_save(template: Path) -> None:
    root = link_root(template)
    with Engine(root, SMALL) as saving:
        saving.create("new")
        saving.save({"seed": 3}, "model.pt").written()
        with Engine(root, SMALL) as other:
            assert other.sweep() == []
        assert [*(root / ".aiockpt" / "work").rglob("model.pt")]
        saving.commit("new")
        assert saving.load("model.pt") == {"seed": 3}


def two_committers(template: Path) -> None:
    root = link_root(template)
    with catalog_at(root) as one, catalog_at(root) as other:
        first, second = prepare(one, root), prepare(other, root, {"f": b"other"})
        one.publish("new", is_overwrite=False, **first)
        with pytest.raises(CheckpointError):
            other.publish("new", is_overwrite=False, **second)
        assert {entry.path for entry in one.manifest("new").files} == {*SOME}


def failure_of_a_rank(template: Path) -> None:
    """Both ranks tell at once what failed on one of them; nothing is to be seen.

    It fails once the other has told what it has. Failing earlier, it removes what the
    other is writing: that one then has nothing to publish, be it right or wrong.
    """
    root = link_root(template)
    with pair(root, timeout_s=10.0) as ranks, told_files(0) as has_told:

        def fail_late(moment: Moment) -> object:
            assert has_told.wait(LIMIT_S), "rank 0 has told nothing"
            return Fail(errno.EIO)(moment)

        fault = Fault("pwrite", fail_late, path="sub/opt.pt")
        outcome, _ = spoil_pair(ranks, save_together, fault)
        assert_both_tell(outcome.errors, "Input/output error")
        assert published_seeds(root) == START


def reading(template: Path) -> None:
    outcome, _ = spoil(link_root(template), "read under a lease")
    assert outcome.is_done


def files_of_others(template: Path) -> None:
    root, name = link_root(template), "save among files of others"
    outcome, _ = spoil(root, name)
    assert_survived(root, name, outcome, may_stay=False)


# Each mutant, and a row that it does not survive. Whose calls are in a wrong order is held
# against the order itself: a cut of the power would have to fall between two of them.
MUTANTS: dict[str, tuple[Mutant, Row]] = {
    "no file sync": (mutants.no_file_sync, order),
    "no directory sync": (mutants.no_directory_sync, order),
    "rename before sync": (mutants.files_synced_after_the_rename, order),
    "sync before flush": (mutants.manifest_synced_before_it_is_written, order),
    "unlink, then rename": (
        mutants.old_tag_removed_before_the_new_one_is_shown,
        errors_for_ever,
    ),
    "manifest before files": (
        mutants.published_before_the_files_are_written,
        commit_during_writes,
    ),
    "short write ignored": (mutants.short_write_taken_for_a_whole_one, short_writes),
    "sync tried again": (mutants.failed_sync_tried_again, failed_syncs),
    "failed sync not undone": (mutants.failed_sync_of_a_tag_not_undone, errors_once),
    "checksums off": (mutants.checksums_not_looked_at, flipped_bytes),
    "acknowledged before rename": (
        mutants.acknowledged_before_the_rename,
        acknowledged,
    ),
    "latest before manifest": (mutants.latest_moved_before_the_tag_is_there, order),
    "latest in place": (mutants.latest_written_in_place, order),
    "pickle fallback": (mutants.unsafe_pickle_run_after_all, hostile_pickle),
    "write abandoned": (mutants.write_left_behind_when_cancelled, cancelled_write),
    "living engines swept": (mutants.living_engines_swept, sweep_during_a_save),
    "no lock, last one wins": (mutants.tags_changed_without_the_lock, two_committers),
    "errors swallowed": (mutants.errors_of_the_disk_swallowed, errors_once),
    "failure of a rank not told": (
        mutants.failure_of_a_rank_told_to_nobody,
        failure_of_a_rank,
    ),
    "manifest before words of ranks": (
        mutants.published_before_all_ranks_have_told,
        failure_of_a_rank,
    ),
    "leases ignored": (mutants.leases_not_looked_at, reading),
    "files of others lost": (mutants.files_of_others_left_behind, files_of_others),
}
CAUGHT = (AssertionError, pytest.fail.Exception)


@pytest.fixture
def fresh(template: Path, memory: Path) -> Path:
    """A template of its own: what a mutant breaks must not be found by others."""
    place = memory / "mutants"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return shutil.copytree(template, place / "template")


@pytest.mark.leaks("what a mutant leaves behind")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(cases, fresh, monkeypatch, name):
    mutant, row = MUTANTS[name]
    with monkeypatch.context() as patch:
        mutant(patch)
        with cases.case(20, name, row.__name__), pytest.raises(CAUGHT):
            row(fresh)


@pytest.mark.parametrize("row", dict.fromkeys(row for _, row in MUTANTS.values()))
def test_aiockpt_as_it_is_is_not_caught(fresh, row):
    row(fresh)


def test_every_mutant_has_a_row():
    made = {mutant for mutant, _ in MUTANTS.values()}
    known = {
        value
        for value in vars(mutants).values()
        if getattr(value, "__module__", "") == mutants.__name__
    }
    assert made == known
