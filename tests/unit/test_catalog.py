"""A tag is there, whole, or it is not: publishing, finding and deleting."""

import contextlib
import errno
import itertools
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from aiockpt import catalog as catalog_module
from aiockpt.catalog import Catalog
from aiockpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.storage.local import LocalStorage
from catalogs import (
    SOME,
    catalog_at,
    leftovers,
    make_tags,
    names_in,
    prepare,
    publish,
    storage_at,
)
from tracing import FailAt, fail_on, tapped


@pytest.fixture
def catalog(root: Path) -> Iterator[Catalog]:
    with catalog_at(root) as catalog:
        yield catalog


def read(catalog: Catalog, path: str, tag: str | None = None) -> bytes:
    file, entry = catalog.open_file(path, tag)
    with contextlib.closing(file):
        data = bytearray(file.nbytes)
        file.read_into(0, memoryview(data))
    assert zlib.crc32(data) == entry.crc32, "the file is another manifest's"
    return bytes(data)


def tags(catalog: Catalog) -> list[str]:
    return [info.tag for info in catalog.tags()]


def identity(path: Path) -> tuple[int, ...]:
    """What changes where somebody touches the file; looking at it does not."""
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


# --- publishing -------------------------------------------------------------------


def test_a_root_that_does_not_exist_has_no_tags_and_is_not_made(catalog, root):
    assert catalog.tags() == []
    assert catalog.latest() is None
    assert catalog.sweep() == []
    assert not root.exists()


def test_a_published_tag_has_its_files_and_is_latest(catalog, root):
    manifest = publish(catalog, root, "step-1")

    assert names_in(root) == ["latest", "step-1"]
    assert (root / "latest").read_bytes() == b"step-1\n"
    assert catalog.manifest("step-1").attempt == manifest.attempt
    assert [entry.path for entry in manifest.files] == ["model.pt", "sub/opt.pt"]
    assert {path: read(catalog, path) for path in SOME} == SOME
    assert catalog.latest() == "step-1"


def test_tags_are_listed_oldest_first_whatever_their_names(catalog, root):
    for tag in ("c", "a", "b"):
        publish(catalog, root, tag)

    assert tags(catalog) == ["c", "a", "b"]
    assert catalog.latest() == "b"


def test_tags_stay_in_order_when_the_clock_goes_back(catalog, root, monkeypatch):
    times = iter([5_000, 4_000, 4_000, 10])
    monkeypatch.setattr(catalog_module.time, "time_ns", lambda: next(times))

    for tag in ("one", "two", "three", "four"):
        publish(catalog, root, tag)

    assert tags(catalog) == ["one", "two", "three", "four"]
    assert [info.published_ns for info in catalog.tags()] == [5000, 5001, 5002, 5003]


def test_a_tag_is_not_published_twice(catalog, root):
    publish(catalog, root, "step-1")

    with pytest.raises(EngineStateError, match="overwrite=True"):
        publish(catalog, root, "step-1", {"model.pt": b"other"})

    assert read(catalog, "model.pt") == SOME["model.pt"]
    assert catalog.latest() == "step-1"


def test_the_empty_directory_that_a_trainer_made_becomes_the_tag(catalog, root):
    (root / "step-1").mkdir(parents=True)

    catalog.check_free("step-1")
    publish(catalog, root, "step-1")

    assert tags(catalog) == ["step-1"]


@pytest.mark.parametrize("is_overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_a_foreign_name_is_neither_taken_nor_touched(catalog, root, kind, is_overwrite):
    publish(catalog, root, "old")
    place = root / "step-1"
    if kind == "file":
        place.write_bytes(b"mine")
    elif kind == "directory":
        place.mkdir()
        (place / "notes").write_bytes(b"mine")
    else:
        place.symlink_to(root / "nowhere")
    before = identity(place)

    with pytest.raises(InvalidArgumentError, match="is not a tag"):
        catalog.check_free("step-1", is_overwrite=is_overwrite)
    with pytest.raises(InvalidArgumentError, match="is not a tag"):
        publish(catalog, root, "step-1", is_overwrite=is_overwrite)

    assert identity(place) == before
    assert tags(catalog) == ["old"]
    assert catalog.latest() == "old"
    assert not [name for name in leftovers(root) if name.startswith("latest.")]


def test_an_overwritten_tag_is_the_new_one_and_the_newest(catalog, root):
    publish(catalog, root, "one")
    publish(catalog, root, "two")

    publish(catalog, root, "one", {"other.pt": b"new"}, is_overwrite=True)

    assert tags(catalog) == ["two", "one"]
    assert read(catalog, "other.pt") == b"new"
    assert names_in(root / "one") == ["other.pt"]


def test_overwriting_what_is_not_there_publishes_it(catalog, root):
    publish(catalog, root, "one", is_overwrite=True)

    assert tags(catalog) == ["one"]


def test_a_tag_with_a_broken_manifest_can_be_overwritten(catalog, root):
    publish(catalog, root, "one")
    damage(root / "one" / ".aiockpt" / "manifest.json")

    publish(catalog, root, "one", {"new.pt": b"new"}, is_overwrite=True)

    assert read(catalog, "new.pt") == b"new"


# --- failing at the last moment ---------------------------------------------------


def publish_failing(catalog: Catalog, root: Path, tag: str, fault, **kwargs) -> None:
    with tapped(fault), pytest.raises(StorageError) as caught:
        publish(catalog, root, tag, **kwargs)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("sync", [0, 1], ids=["after the rename", "after latest"])
def test_a_commit_whose_last_syncs_fail_is_taken_back(catalog, root, sync):
    publish(catalog, root, "one")
    publish(catalog, root, "two")

    publish_failing(
        catalog, root, "three", fail_on("fsync", root.name, errno.EIO, after=sync)
    )

    assert tags(catalog) == ["one", "two"]
    assert (root / "latest").read_bytes() == b"two\n"
    assert not (root / "three").exists()
    assert not [name for name in leftovers(root) if name.startswith("latest.")]


@pytest.mark.parametrize("sync", [0, 1], ids=["after the exchange", "after latest"])
def test_an_overwrite_whose_last_syncs_fail_is_taken_back(catalog, root, sync):
    publish(catalog, root, "one")
    publish(catalog, root, "two")

    fault = fail_on("fsync", root.name, errno.EIO, after=sync)
    publish_failing(catalog, root, "one", fault, is_overwrite=True)

    assert read(catalog, "model.pt", "one") == SOME["model.pt"]
    assert tags(catalog) == ["one", "two"]
    assert (root / "latest").read_bytes() == b"two\n"


@pytest.mark.parametrize("sync", [0, 1])
def test_a_first_commit_whose_last_syncs_fail_leaves_no_pointer(catalog, root, sync):
    catalog.open_work()

    publish_failing(
        catalog, root, "one", fail_on("fsync", root.name, errno.EIO, after=sync)
    )

    assert names_in(root) == []
    assert catalog.latest() is None


def test_a_pointer_that_cannot_be_written_is_not_left_behind(catalog, root):
    publish(catalog, root, "one")

    def fault(moment):
        if moment.name == "write" and "/latest." in moment.path:
            raise OSError(errno.EIO, "no")

    publish_failing(catalog, root, "two", fault)

    assert not [name for name in leftovers(root) if name.startswith("latest.")]
    assert catalog.latest() == "one"


# --- finding ----------------------------------------------------------------------


def test_what_is_foreign_in_a_root_is_not_a_tag(catalog, root):
    publish(catalog, root, "one")
    (root / "empty").write_bytes(b"")
    (root / "notes.txt").write_bytes(b"text")
    (root / "logs").mkdir()
    (root / "logs" / "model.pt").write_bytes(b"")
    (root / "half" / ".aiockpt").mkdir(parents=True)
    shutil.copytree(root / "one", root / ".hidden")
    (root / "link").symlink_to(root / "one")

    assert tags(catalog) == ["one"]
    assert catalog.latest() == "one"


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 500, None])
def test_a_broken_manifest_is_left_out_with_a_warning_and_reported(
    catalog, root, content, caplog
):
    publish(catalog, root, "one")
    publish(catalog, root, "two")
    manifest = root / "two" / ".aiockpt" / "manifest.json"
    if content is None:
        damage(manifest)
    else:
        manifest.write_bytes(content)

    with caplog.at_level(logging.WARNING, "aiockpt"):
        assert tags(catalog) == ["one"]
    assert "two" in caplog.text
    with pytest.raises(CorruptCheckpointError) as caught:
        catalog.manifest("two")
    assert caught.value.path == str(manifest)
    assert catalog.latest() == "one"


def test_a_manifest_that_is_no_file_is_left_out(catalog, root):
    publish(catalog, root, "one")
    (root / "two" / ".aiockpt" / "manifest.json").mkdir(parents=True)

    assert tags(catalog) == ["one"]
    with pytest.raises(StorageError):
        catalog.manifest("two")


def test_a_tag_under_another_name_is_not_that_tag(catalog, root):
    publish(catalog, root, "one")
    shutil.copytree(root / "one", root / "copy")

    assert tags(catalog) == ["one"]
    with pytest.raises(CorruptCheckpointError, match="'one'"):
        catalog.manifest("copy")


def test_a_tag_that_is_missing_is_not_found_and_those_there_are_listed(catalog, root):
    publish(catalog, root, "one")
    publish(catalog, root, "two")

    with pytest.raises(CheckpointNotFoundError, match=r"'three'.*one, two"):
        catalog.manifest("three")
    with pytest.raises(CheckpointNotFoundError, match="one, two"):
        catalog.open_file("model.pt", "three")


def test_a_listing_survives_a_manifest_that_cannot_be_read(catalog, root, caplog):
    publish(catalog, root, "one")
    publish(catalog, root, "two")

    with tapped(fail_on("pread", "two/.aiockpt/manifest.json", errno.EIO)):
        assert tags(catalog) == ["one"]
    assert "two" in caplog.text


# --- opening a file ---------------------------------------------------------------


def test_a_file_comes_from_the_latest_tag_or_the_one_that_is_named(catalog, root):
    publish(catalog, root, "one", {"model.pt": b"1"})
    publish(catalog, root, "two", {"model.pt": b"2"})

    assert read(catalog, "model.pt") == b"2"
    assert read(catalog, "model.pt", "one") == b"1"
    assert read(catalog, f"{root}/one/model.pt") == b"1"
    assert read(catalog, f"{root}/one/model.pt", "one") == b"1"


def test_an_absolute_path_of_another_tag_is_refused(catalog, root):
    make_tags(root, "one", "two")

    with pytest.raises(InvalidArgumentError):
        catalog.open_file(f"{root}/one/model.pt", "two")


def test_a_file_that_is_missing_is_not_found_and_those_there_are_listed(catalog, root):
    publish(catalog, root, "one")

    with pytest.raises(CheckpointNotFoundError, match=r"'model\.pt', 'sub/opt\.pt'"):
        catalog.open_file("other.pt", None)
    with pytest.raises(CheckpointNotFoundError, match="nothing is published"):
        catalog_for_nothing = Catalog(storage_at(root / "nowhere"))
        catalog_for_nothing.open_file("model.pt", None)


def test_a_file_that_is_on_the_disk_but_not_in_the_manifest_is_not_found(catalog, root):
    publish(catalog, root, "one")
    (root / "one" / "extra.pt").write_bytes(b"")

    with pytest.raises(CheckpointNotFoundError):
        catalog.open_file("extra.pt", None)


@pytest.mark.parametrize(
    "path",
    ["", "..", "../one/model.pt", "/etc/passwd", ".aiockpt/manifest.json", 5, None],
)
def test_a_path_that_is_no_file_of_a_tag_is_refused(catalog, root, path):
    publish(catalog, root, "one")

    with pytest.raises(InvalidArgumentError):
        catalog.open_file(path, None)


@pytest.mark.parametrize("nbytes", [0, 599, 601])
def test_a_file_of_another_length_is_corrupt(catalog, root, nbytes):
    publish(catalog, root, "one")
    (root / "one" / "model.pt").write_bytes(bytes(nbytes))

    with pytest.raises(CorruptCheckpointError) as caught:
        catalog.open_file("model.pt", None)

    assert caught.value.path == str(root / "one" / "model.pt")
    assert caught.value.offset == min(nbytes, 600)


def test_a_file_that_was_replaced_by_a_link_is_refused(catalog, root):
    publish(catalog, root, "one")
    (root / "one" / "model.pt").rename(root / "elsewhere")
    (root / "one" / "model.pt").symlink_to(root / "elsewhere")

    with pytest.raises(StorageError):
        catalog.open_file("model.pt", None)


class Interrupted:
    """Storage in which something happens just before a certain file is opened."""

    def __init__(self, root: Path, path: str, event: Callable[[], object]) -> None:
        self._storage = storage_at(root)
        self._path = path
        self._events = iter([event])

    def open_read(self, path: str):
        if path.endswith(self._path):
            for event in self._events:
                event()
        return self._storage.open_read(path)

    def read_bytes(self, path: str, max_bytes: int) -> bytes:
        if path.endswith(self._path):
            for event in self._events:
                event()
        return self._storage.read_bytes(path, max_bytes)

    def __getattr__(self, name: str):
        return getattr(self._storage, name)


@pytest.mark.parametrize(
    ("at", "tag"),
    [
        ("latest", None),
        ("manifest.json", None),
        ("model.pt", None),
        ("manifest.json", "one"),
        ("model.pt", "one"),
    ],
)
@pytest.mark.parametrize("new", [b"new", b"longer " * 1000, b"NEW!!!" * 100])
def test_a_file_that_is_overwritten_on_the_way_is_the_new_one(
    catalog, root, at, tag, new
):
    publish(catalog, root, "one")

    def overwrite() -> None:
        publish(catalog, root, "one", {"model.pt": new}, is_overwrite=True)

    reader = Catalog(Interrupted(root, at, overwrite))

    assert read(reader, "model.pt", tag) == new


@pytest.mark.parametrize("at", ["one/model.pt", "one/.aiockpt/manifest.json"])
def test_the_latest_file_is_found_though_its_tag_is_deleted_on_the_way(
    catalog, root, at
):
    publish(catalog, root, "one")

    def move_on() -> None:
        publish(catalog, root, "two", {"model.pt": b"new"})
        catalog.delete("one")

    reader = Catalog(Interrupted(root, at, move_on))

    assert read(reader, "model.pt") == b"new"


def test_a_file_whose_tag_is_deleted_on_the_way_is_not_found(catalog, root):
    publish(catalog, root, "one")
    reader = Catalog(Interrupted(root, "model.pt", lambda: catalog.delete("one")))

    with pytest.raises(CheckpointNotFoundError, match="no tag 'one'"):
        reader.open_file("model.pt", "one")


def test_no_error_on_the_way_to_a_file_leaves_it_open(catalog, root):
    publish(catalog, root, "one")
    for index in itertools.count(1):
        fault = FailAt(index, errno.EIO)
        with tapped(fault):
            with contextlib.suppress(StorageError):
                assert read(catalog, "model.pt") == SOME["model.pt"]
        if fault.failed is None:
            break
    assert index > 20


def test_a_manifest_is_found_though_the_tag_is_overwritten_on_the_way(catalog, root):
    publish(catalog, root, "one")
    removals = iter([root / "one" / ".aiockpt" / "manifest.json"])

    def overwrite(moment) -> None:
        # The walk has come to the old directory when the old file goes.
        if moment.name == "open" and moment.path.endswith("manifest.json"):
            for path in removals:
                kept = path.read_bytes()
                path.unlink()
                try:
                    moment.make()
                finally:
                    path.write_bytes(kept)

    with tapped(overwrite):
        assert catalog.manifest("one").tag == "one"


# --- deleting ---------------------------------------------------------------------


def test_a_deleted_tag_is_gone_with_its_files(catalog, root):
    publish(catalog, root, "one")
    publish(catalog, root, "two")

    catalog.delete("one")

    assert names_in(root) == ["latest", "two"]
    assert tags(catalog) == ["two"]
    assert catalog.latest() == "two"


def test_latest_goes_back_to_the_newest_that_is_left(catalog, root):
    for tag in ("b", "a", "c"):
        publish(catalog, root, tag)

    catalog.delete("c")

    assert (root / "latest").read_bytes() == b"a\n"


def test_with_the_last_tag_latest_goes_too(catalog, root):
    publish(catalog, root, "one")

    catalog.delete("one")

    assert names_in(root) == []
    assert catalog.latest() is None


def test_a_tag_is_hidden_durably_before_a_byte_of_it_is_removed(catalog, root):
    publish(catalog, root, "one")
    publish(catalog, root, "two")

    with tapped() as tap:
        catalog.delete("one")

    calls = sorted(tap.calls, key=lambda call: call.begin)
    names = [(call.name, call.path) for call in calls]
    hidden = names.index(("rename", f"{root}/one"))
    synced = names.index(("fsync", str(root)), hidden)
    first_removed = next(i for i, (name, _) in enumerate(names) if name == "unlink")
    assert hidden < synced < first_removed


@pytest.mark.parametrize("tag", ["two", "foreign"])
def test_what_is_no_tag_cannot_be_deleted(catalog, root, tag):
    publish(catalog, root, "one")
    (root / "foreign").mkdir()
    (root / "foreign" / "f").write_bytes(b"mine")

    with pytest.raises(CheckpointNotFoundError, match="published: one"):
        catalog.open_work()
        catalog.delete(tag)

    assert names_in(root) == ["foreign", "latest", "one"]
    assert (root / "foreign" / "f").exists()


@pytest.mark.parametrize("tag", ["..", "../other", ".aiockpt", "latest", "", "a/b"])
def test_nothing_outside_can_be_deleted(catalog, root, tag):
    publish(catalog, root, "one")

    with pytest.raises(InvalidArgumentError):
        catalog.delete(tag)

    assert tags(catalog) == ["one"]


def test_a_broken_tag_can_be_deleted(catalog, root):
    publish(catalog, root, "one")
    publish(catalog, root, "two")
    damage(root / "two" / ".aiockpt" / "manifest.json")

    catalog.delete("two")

    assert names_in(root) == ["latest", "one"]
    assert catalog.latest() == "one"


# --- the work area ----------------------------------------------------------------


def test_a_closed_work_area_leaves_nothing_behind(root):
    with catalog_at(root) as catalog:
        prepare(catalog, root)
        prepare(catalog, root)
        assert leftovers(root)

    assert leftovers(root) == []
    catalog.close_work()


def test_opening_a_work_area_again_does_nothing(catalog, root):
    catalog.open_work()
    before = leftovers(root)

    catalog.open_work()

    assert leftovers(root) == before


def test_every_attempt_has_a_directory_and_a_name_of_its_own(root):
    with catalog_at(root) as one, catalog_at(root) as two:
        made = [prepare(catalog, root) for catalog in (one, two, one, two)]

    assert len({str(attempt["directory"]) for attempt in made}) == 4
    assert len({str(attempt["attempt"]) for attempt in made}) == 4


def test_the_versions_that_wrote_a_tag_are_on_record(catalog, root, monkeypatch):
    installed = metadata.version("aiockpt")
    # Where descriptors or memory are short, a commit cannot look them up.
    monkeypatch.delattr(metadata, "version")

    versions = publish(catalog, root, "one").versions

    assert versions == {"aiockpt": installed, "torch": torch.__version__}


def test_an_overwrite_that_can_neither_be_synced_nor_undone_keeps_both_copies(
    root, monkeypatch
):
    with catalog_at(root) as catalog:
        publish(catalog, root, "one", {"model.pt": b"old"})
        prepared = prepare(catalog, root, {"model.pt": b"new"})
        swapped: list[str] = []
        exchange, sync_dir = LocalStorage.exchange, LocalStorage.sync_dir

        def swap_once(storage: LocalStorage, one: str, other: str) -> None:
            if swapped:
                raise StorageError(errno.EIO, "gone", other)
            exchange(storage, one, other)
            swapped.append(other)

        def sync_until_swapped(storage: LocalStorage, path: str) -> None:
            if swapped:
                raise StorageError(errno.EIO, "gone", path)
            sync_dir(storage, path)

        monkeypatch.setattr(LocalStorage, "exchange", swap_once)
        monkeypatch.setattr(LocalStorage, "sync_dir", sync_until_swapped)
        with pytest.raises(StorageError, match="gone"):
            catalog.publish("one", **prepared, is_overwrite=True)

        directory = str(prepared["directory"])
        catalog.discard(directory)
        assert (root / directory / "model.pt").read_bytes() == b"old"
        assert (root / "one" / "model.pt").read_bytes() == b"new"
    assert (root / directory / "model.pt").read_bytes() == b"old"


def test_a_tag_that_was_replaced_meanwhile_is_not_the_one_to_be_deleted(catalog, root):
    old = publish(catalog, root, "a").published_ns
    new = publish(catalog, root, "a", is_overwrite=True).published_ns
    publish(catalog, root, "b")
    with pytest.raises(EngineStateError, match="replaced"):
        catalog.expire("a", old)
    assert catalog.manifest("a").published_ns == new
    catalog.expire("a", new)
    assert [info.tag for info in catalog.tags()] == ["b"]


def test_a_tag_does_not_expire_where_all_that_came_after_it_are_gone(catalog, root):
    old = publish(catalog, root, "a").published_ns
    publish(catalog, root, "b")
    catalog.delete("b")
    with pytest.raises(EngineStateError, match="newest"):
        catalog.expire("a", old)
    assert catalog.latest() == "a"


def test_a_commit_is_after_all_others_whatever_the_clock_says(
    catalog, root, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("time.time_ns", lambda: 2**62)
        publish(catalog, root, "a")
        newest = publish(catalog, root, "b", points_latest=False)
    with catalog_at(root) as another:
        later = publish(another, root, "c")
    assert later.published_ns > newest.published_ns
    assert catalog.latest() == "c"


def test_latest_does_not_go_back_to_a_commit_that_was_begun_earlier(catalog, root):
    publish(catalog, root, "b", number=2)
    publish(catalog, root, "a", number=1)
    assert catalog.latest() == "b"
    # Nor is it kept from going on, by whomever.
    publish(catalog, root, "c", number=3)
    assert catalog.latest() == "c"
    with catalog_at(root) as another:
        publish(another, root, "d", number=1)
    publish(catalog, root, "e", number=2)
    assert catalog.latest() == "e"
