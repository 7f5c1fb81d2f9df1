"""`latest` names the newest published tag, whatever has happened to the file."""

import errno
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiockpt.sync
from aiockpt.catalog import Catalog
from aiockpt.errors import StorageError
from catalogs import SOME, catalog_at, leftovers, make_tags, publish
from tracing import FailAt, Moment, fail_on, tapped


@pytest.fixture
def catalog(root: Path) -> Iterator[Catalog]:
    """In a root with the tags `one` and `two`."""
    make_tags(root, "one", "two")
    with catalog_at(root) as catalog:
        yield catalog


def pointers_under_way(root: Path) -> list[str]:
    return [name for name in leftovers(root) if name.startswith("latest.")]


# --- repair -----------------------------------------------------------------------

WRONG = {
    "missing": None,
    "empty": b"",
    "newline": b"\n",
    "torn": b"tw",
    "dangling": b"three\n",
    "outside": b"../root/two\n",
    "not text": b"\xff\xfe\x00t",
    "zeros": bytes(4),
    "several": b"one\ntwo\n",
    "not a tag": b"latest\n",
    "huge": b"two\n" * 10_000,
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_a_pointer_that_names_no_tag_is_repaired(catalog, root, content, caplog):
    (root / "latest").unlink()
    if content is not None:
        (root / "latest").write_bytes(content)

    with caplog.at_level(logging.WARNING, "aiockpt"):
        assert catalog.latest() == "two"

    assert (root / "latest").read_bytes() == b"two\n"
    assert "two" in caplog.text
    assert pointers_under_way(root) == []


@pytest.mark.parametrize("kind", ["link", "fifo", "dangling link"])
def test_a_pointer_that_is_no_file_is_replaced(catalog, root, kind):
    pointer = root / "latest"
    pointer.unlink()
    if kind == "fifo":
        os.mkfifo(pointer)
    else:
        pointer.symlink_to(root / ("one" if kind == "link" else "nowhere"))

    assert catalog.latest() == "two"

    assert pointer.read_bytes() == b"two\n"
    assert not pointer.is_symlink()
    assert (root / "one").is_dir()


def test_a_directory_in_the_pointers_place_is_left_alone(catalog, root, caplog):
    (root / "latest").unlink()
    (root / "latest").mkdir()

    assert catalog.latest() == "two"

    assert (root / "latest").is_dir()
    assert "could not be repaired" in caplog.text
    assert pointers_under_way(root) == []


@pytest.mark.parametrize("content", [b"one", b"one\n", b"one\r\n", b" one \n"])
def test_a_pointer_that_somebody_set_to_another_tag_is_followed(catalog, root, content):
    (root / "latest").write_bytes(content)

    assert catalog.latest() == "one"
    assert (root / "latest").read_bytes() == content


def test_the_newest_tag_that_is_whole_is_taken(catalog, root):
    (root / "two" / ".aiockpt" / "manifest.json").write_bytes(b"")

    assert catalog.latest() == "one"
    assert (root / "latest").read_bytes() == b"one\n"


def test_a_pointer_in_a_root_with_nothing_published_means_nothing(root):
    root.mkdir()
    (root / "latest").write_bytes(b"one\n")

    with catalog_at(root) as catalog:
        assert catalog.latest() is None
    assert (root / "latest").exists()


def test_a_root_that_cannot_be_written_has_a_latest_tag_all_the_same(
    catalog, root, caplog
):
    (root / "latest").unlink()

    with tapped(fail_on("open", ".aiockpt/lock", errno.EROFS)):
        assert catalog.latest() == "two"

    assert "could not be repaired" in caplog.text
    assert not (root / "latest").exists()


def test_a_copy_of_the_tags_alone_has_a_latest_tag(catalog, root, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for tag in ("one", "two"):
        (root / tag).rename(copy / tag)

    with catalog_at(copy) as of_copy:
        assert of_copy.latest() == "two"


def test_a_pointer_that_somebody_repairs_meanwhile_is_theirs(catalog, root):
    (root / "latest").unlink()
    repairs = iter([b"one\n"])

    def repair(moment: Moment) -> None:
        if moment.name == "flock":
            for content in repairs:
                (root / "latest").write_bytes(content)

    with tapped(repair):
        assert catalog.latest() == "one"
    assert (root / "latest").read_bytes() == b"one\n"


def test_a_tag_that_is_deleted_during_the_repair_is_not_named(catalog, root):
    (root / "latest").unlink()
    deletions = iter(["two"])

    def delete(moment: Moment) -> None:
        if moment.name == "flock":
            for tag in deletions:
                with catalog_at(root) as other:
                    other.open_work()
                    other.delete(tag)
                (root / "latest").unlink(missing_ok=True)

    with tapped(delete):
        assert catalog.latest() == "one"
    assert (root / "latest").read_bytes() == b"one\n"


# --- an error is never answered with another tag ----------------------------------


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE]
)
@pytest.mark.parametrize("pointer", ["there", "missing"])
@pytest.mark.parametrize("num_times", [1, float("inf")], ids=["once", "for ever"])
def test_an_error_of_the_file_system_is_raised_and_no_older_tag_taken(
    catalog, root, number, pointer, num_times
):
    catalog.open_work()
    num_raised = 0
    for index in itertools.count(1):
        if pointer == "missing":
            (root / "latest").unlink(missing_ok=True)
        fault = FailAt(index, number, num_times=num_times)
        raised: StorageError | None = None
        with tapped(fault):
            try:
                assert catalog.latest() == "two", f"after {fault.failed}"
            except StorageError as error:
                raised = error
        if raised is not None:
            num_raised += 1
            assert raised.errno == number
            assert raised.filename
        if fault.failed is None:
            break
        assert catalog.latest() == "two"
        assert (root / "latest").read_bytes() == b"two\n"
        if num_times > 1:
            # What could not be removed then is removed now.
            catalog.sweep()
        assert pointers_under_way(root) == []
    assert num_raised > 3


# --- what a crash leaves half done ------------------------------------------------


def half_publish(catalog: Catalog, root: Path, tag: str) -> Path:
    """Publishes a tag and dies just before the pointer moves; the pointer to be."""
    before = (root / "latest").read_bytes()
    manifest = publish(catalog, root, tag)
    (root / "latest").write_bytes(before)
    pending = root / ".aiockpt" / f"latest.{manifest.attempt}"
    pending.write_bytes(f"{tag}\n".encode())
    return pending


def test_a_sweep_finishes_the_pointer_of_a_tag_that_was_published(catalog, root):
    pending = half_publish(catalog, root, "three")
    assert catalog.latest() == "two"

    catalog.sweep()

    assert catalog.latest() == "three"
    assert not pending.exists()


def test_the_next_commit_comes_after_a_pointer_that_was_half_done(catalog, root):
    catalog.open_work()
    with catalog_at(root) as dead:
        half_publish(dead, root, "three")

    publish(catalog, root, "four")
    catalog.sweep()

    assert catalog.latest() == "four"
    assert [info.tag for info in catalog.tags()] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("content", [b"", b"tw", b"one\n", b"three\n", b"\xff"])
def test_a_sweep_drops_the_pointer_of_a_tag_that_was_not_published(
    catalog, root, content
):
    pending = root / ".aiockpt" / "latest.some-engine.1"
    pending.write_bytes(content)

    catalog.sweep()

    assert catalog.latest() == "two"
    assert not pending.exists()


def test_a_pointer_that_cannot_be_read_is_neither_finished_nor_dropped(catalog, root):
    pending = half_publish(catalog, root, "three")

    with tapped(fail_on("pread", pending.name, errno.EIO)), pytest.raises(StorageError):
        catalog.sweep()
    assert pending.exists()
    catalog.sweep()

    assert catalog.latest() == "three"


def test_a_deletion_that_dies_before_the_pointer_moves_is_repaired(catalog, root):
    catalog.open_work()
    directory, _ = catalog.new_directory()
    os.rename(root / "two", root / directory)

    assert catalog.latest() == "one"
    assert (root / "latest").read_bytes() == b"one\n"


def test_an_engine_finishes_what_a_dead_one_began(catalog, root):
    half_publish(catalog, root, "three")

    with aiockpt.sync.CheckpointEngine(root, {"host_cache_size": 8 / 1024}) as engine:
        assert engine.latest() == "three"


def test_every_reader_sees_a_whole_pointer_at_every_call_of_a_commit(root):
    make_tags(root, "old")
    seen = []

    def look(_moment: Moment) -> None:
        seen.append((root / "latest").read_bytes())

    with catalog_at(root) as catalog, tapped(look):
        publish(catalog, root, "new", SOME)

    assert set(seen) == {b"old\n", b"new\n"}
