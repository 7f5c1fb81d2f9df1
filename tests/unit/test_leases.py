"""A lease keeps a tag from being deleted, and ends with whoever holds it."""

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from aiockpt.catalog import Catalog
from aiockpt.errors import (
    CheckpointNotFoundError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.leases import Lease
from catalogs import SOME, catalog_at, leftovers, make_tags, names_in, publish
from gates import LIMIT_S
from tracing import Moment, fail_on, tapped


def take(catalog: Catalog, tag: str | None = None) -> Lease:
    return catalog.leases.take(catalog, tag)


def lease_files(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".aiockpt").glob("reading.*"))


def assert_whole(root: Path, tag: str) -> None:
    for path, data in SOME.items():
        assert (root / tag / path).read_bytes() == data


def test_a_tag_is_not_deleted_while_anybody_holds_a_lease_on_it(root):
    make_tags(root, "a", "b")
    with catalog_at(root) as catalog, catalog_at(root) as other:
        leases = [take(catalog, "a"), take(catalog, "a"), take(other, "a")]
        assert [lease.info.tag for lease in leases] == ["a"] * 3
        other.open_work()
        for count in ("3 readers", "2 readers", "1 reader "):
            with pytest.raises(EngineStateError, match=f"'a' is being read by {count}"):
                other.delete("a")
            assert_whole(root, "a")
            owner = other if len(leases) == 1 else catalog
            owner.leases.release(leases.pop(0))
        other.delete("a")
        assert names_in(root) == ["b", "latest"]
    assert leftovers(root) == []


def test_a_lease_holds_its_own_tag_only(root):
    make_tags(root, "a", "b")
    with catalog_at(root) as catalog:
        lease = take(catalog, "b")
        catalog.open_work()
        catalog.delete("a")
        catalog.leases.release(lease)
    assert names_in(root) == ["b", "latest"]


def test_a_lease_that_is_released_twice_is_released_once(root):
    make_tags(root, "a")
    with catalog_at(root) as catalog:
        first, second = take(catalog), take(catalog)
        catalog.leases.release(first)
        catalog.leases.release(first)
        assert len(lease_files(root)) == 1
        catalog.leases.release_all()
        catalog.leases.release(second)
    assert lease_files(root) == []


def test_without_a_name_the_lease_is_on_the_latest(root):
    make_tags(root, "b", "a")
    with catalog_at(root) as catalog:
        lease = take(catalog)
        assert lease.info == catalog.tags()[-1]
        assert lease.info.tag == "a"
        catalog.leases.release(lease)


def test_a_lease_on_what_is_not_there_is_refused_and_leaves_nothing(root):
    with catalog_at(root) as catalog:
        for tag in ("a", None):
            with pytest.raises(CheckpointNotFoundError):
                take(catalog, tag)
        assert not root.exists()
        make_tags(root, "a")
        with pytest.raises(CheckpointNotFoundError, match="published: a"):
            take(catalog, "b")
        with pytest.raises(InvalidArgumentError):
            take(catalog, "../a")
    assert leftovers(root) == []


def test_a_tag_of_the_longest_name_can_be_held(root):
    tag = "t" * 255
    make_tags(root, tag)
    with catalog_at(root) as catalog:
        lease = take(catalog, tag)
        catalog.open_work()
        with pytest.raises(EngineStateError, match="1 reader"):
            catalog.delete(tag)
        catalog.leases.release(lease)


def test_what_a_dead_reader_left_holds_nothing_and_goes_with_the_tag(root):
    make_tags(root, "a")
    with catalog_at(root) as catalog:
        lease = take(catalog)
        # As the kernel does it for the dead.
        lease.lock.release()
        assert len(lease_files(root)) == 1
        catalog.open_work()
        catalog.delete("a")
        assert lease_files(root) == []


def test_leases_of_another_users_readers_hold_and_end_like_any_other(root):
    make_tags(root, "a")

    def fault(moment: Moment) -> None:
        # Files of others can be read, and be removed from a directory that is shared.
        is_open = moment.name in ("open", "create") and "/reading." in moment.path
        if is_open and moment.args[0] & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(errno.EACCES, "of another user")

    with catalog_at(root) as catalog, catalog_at(root) as reader:
        lease = take(reader)
        catalog.open_work()
        with tapped(fault):
            with pytest.raises(EngineStateError, match="1 reader"):
                catalog.delete("a")
            lease.lock.release()
            catalog.delete("a")
    assert leftovers(root) == []


def test_a_sweep_removes_what_dead_readers_left_and_no_more(root):
    make_tags(root, "a", "b")
    with catalog_at(root) as catalog, catalog_at(root) as other:
        take(catalog, "a").lock.release()
        living = take(catalog, "b")
        assert len(lease_files(root)) == 2
        other.sweep()
        assert lease_files(root) == [Path(living.path).name]
        catalog.leases.release(living)
    assert leftovers(root) == []


def test_a_tag_that_is_overwritten_is_still_held(root):
    make_tags(root, "a")
    with catalog_at(root) as catalog:
        lease = take(catalog)
        new = publish(catalog, root, "a", {"new.pt": b"new"}, is_overwrite=True)
        assert new.published_ns > lease.info.published_ns
        with pytest.raises(EngineStateError, match="is being read"):
            catalog.delete("a")
        catalog.leases.release(lease)


def test_what_is_open_stays_readable_when_its_tag_is_overwritten(root):
    make_tags(root, "a")
    with catalog_at(root) as catalog:
        lease = take(catalog)
        file, entry = catalog.open_file("model.pt", "a")
        publish(catalog, root, "a", {"new.pt": b"new"}, is_overwrite=True)
        data = bytearray(entry.nbytes)
        file.read_into(0, memoryview(data))
        assert data == SOME["model.pt"]
        file.close()
        catalog.leases.release(lease)


def test_a_root_that_cannot_be_written_gives_no_lease_and_says_why(root):
    make_tags(root, "a")
    with catalog_at(root) as catalog:
        with tapped(fail_on("open", "lock", 30)):
            with pytest.raises(StorageError, match="Read-only"):
                take(catalog)
        # Locked, and then the manifest cannot be read.
        with tapped(fail_on("open", "manifest.json", 5, after=1)):
            with pytest.raises(StorageError):
                take(catalog, "a")
    assert leftovers(root) == []


def test_a_lease_whose_file_cannot_be_removed_has_ended_all_the_same(root, caplog):
    make_tags(root, "a")
    with catalog_at(root) as catalog:
        lease = take(catalog)
        with tapped(fail_on("unlink", "", 5)):
            with caplog.at_level(logging.WARNING, "aiockpt"):
                catalog.leases.release(lease)
        assert "lease" in caplog.text
        catalog.open_work()
        catalog.delete("a")
    assert leftovers(root) == []


# --- a reader and a deleter at once -----------------------------------------------


class Meeting:
    """Has another thread begin its work at one certain call of this one's.

    The call goes on when the other has ended, or has come to a lock that is held.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, at: int, work: Callable[[], object]
    ) -> None:
        self.outcome: Future[object] | None = None
        self._pool = pool
        self._at = at
        self._work = work
        self._own = threading.get_ident()
        self._num_calls = 0
        self._goes_on = threading.Event()

    def __call__(self, moment: Moment) -> None:
        if threading.get_ident() != self._own:
            if moment.name == "flock" and would_block(*moment.args):
                self._goes_on.set()
            return
        self._num_calls += 1
        if self._num_calls == self._at:
            self.outcome = self._pool.submit(self._work)
            self.outcome.add_done_callback(lambda _: self._goes_on.set())
            assert self._goes_on.wait(LIMIT_S)


def would_block(descriptor: int, kind: int) -> bool:
    """Whether taking a lock has to wait; if not, it has been taken."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return not kind & fcntl.LOCK_NB
    return False


def outcome_of(work: Callable[[], object]) -> object:
    try:
        return work()
    except (CheckpointNotFoundError, EngineStateError) as error:
        return error


@pytest.mark.parametrize("tag", ["b", None])
@pytest.mark.parametrize("begins", ["delete", "take"])
def test_at_any_call_a_reader_gets_a_whole_tag_or_none(root, begins, tag):
    make_tags(root, "a", "b")
    outcomes = set()
    with (
        catalog_at(root) as deleter,
        catalog_at(root) as reader,
        ThreadPoolExecutor(1) as pool,
    ):
        deleter.open_work()
        works: dict[str, Callable[[], object]] = {
            "delete": lambda: outcome_of(lambda: deleter.delete("b")),
            "take": lambda: outcome_of(lambda: take(reader, tag)),
        }
        own = works.pop(begins)
        (other,) = works.values()
        at = 0
        while True:
            at += 1
            meeting = Meeting(pool, at, other)
            with tapped(meeting):
                results = [own()]
                if meeting.outcome is None:
                    break
                results.append(meeting.outcome.result(LIMIT_S))
            if begins == "take":
                results.reverse()
            outcomes.add(check_meeting(root, *results))
            reader.leases.release_all()
            if not (root / "b").exists():
                publish(deleter, root, "b")
        reader.leases.release_all()
    assert at > 10
    assert outcomes == {"kept", "deleted"}


def check_meeting(root: Path, deleted: object, lease: object) -> str:
    """What came of the tag b: both sides have to agree."""
    if isinstance(deleted, EngineStateError):
        assert_whole(root, "b")
        return "kept"
    assert deleted is None
    assert not (root / "b").exists()
    if isinstance(lease, Lease):
        # The next latest; or the lease was over before the tag went.
        assert lease.info.tag == "a"
        assert_whole(root, "a")
    else:
        assert isinstance(lease, CheckpointNotFoundError)
    return "deleted"
