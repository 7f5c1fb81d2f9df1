"""Files that others put into a tag's directory survive its publication."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiockpt.catalog import Catalog
from aiockpt.errors import InvalidArgumentError, StorageError
from aiockpt.storage import local
from aiockpt.testing.faults import Fail, Fault, inject
from aiockpt.testing.system_calls import Moment, tapped
from catalogs import SOME, catalog_at, leftovers, prepare, publish


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def catalog(root: Path) -> Iterator[Catalog]:
    with catalog_at(root) as catalog:
        yield catalog


def put_foreign(root: Path, tag: str) -> dict[str, bytes]:
    """What a trainer and a person left in a tag's directory."""
    content = {"notes.txt": b"mine", "offload/0/a.swp": b"a" * 5000, "empty": b""}
    for path, data in content.items():
        full = root / tag / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_bytes(data)
    (root / tag / "link").symlink_to("notes.txt")
    return content


def assert_foreign(root: Path, tag: str, content: dict[str, bytes]) -> None:
    found = {path: (root / tag / path).read_bytes() for path in content}
    assert found == content
    assert os.readlink(root / tag / "link") == "notes.txt"


def publish_over(catalog: Catalog, root: Path, tag: str, **options: object) -> None:
    prepared = prepare(catalog, root)
    catalog.publish(tag, **prepared, is_overwrite=True, adopts=True, **options)
    catalog.discard(prepared["directory"])


def test_foreign_files_stay_in_a_directory_that_becomes_a_tag(catalog, root):
    content = put_foreign(root, "a")
    catalog.check_free("a", is_foreign_kept=True)
    publish_over(catalog, root, "a")
    assert_foreign(root, "a", content)
    assert catalog.latest() == "a"
    assert {entry.path for entry in catalog.manifest("a").files} == set(SOME)


def test_foreign_files_stay_when_a_tag_is_overwritten_and_its_own_do_not(catalog, root):
    publish(catalog, root, "a", {"old.pt": b"old", **SOME})
    content = put_foreign(root, "a")
    publish_over(catalog, root, "a")
    assert_foreign(root, "a", content)
    assert not (root / "a/old.pt").exists()
    assert (root / "a/model.pt").read_bytes() == SOME["model.pt"]


def test_a_foreign_file_does_not_replace_one_that_was_saved(catalog, root):
    (root / "a").mkdir(parents=True)
    (root / "a/model.pt").write_bytes(b"foreign")
    publish_over(catalog, root, "a")
    assert (root / "a/model.pt").read_bytes() == SOME["model.pt"]


def test_a_file_that_comes_while_a_tag_is_published_is_kept(catalog, root):
    put_foreign(root, "a")

    def come_late(moment: Moment) -> object:
        if moment.name == "exchange":
            (root / "a/late").mkdir()
            (root / "a/late/file").write_bytes(b"late")
        return moment.make()

    with tapped(come_late):
        publish_over(catalog, root, "a")
    assert (root / "a/late/file").read_bytes() == b"late"


@pytest.mark.parametrize("name", ["link", "exchange", "fsync"])
def test_foreign_files_are_untouched_by_a_publication_that_fails(catalog, root, name):
    content = put_foreign(root, "a")
    prepared = prepare(catalog, root)
    number = 0
    while True:
        number += 1
        fault = Fault(name, Fail(errno.EIO), nth=number)
        with inject(fault) as injection:
            with contextlib.suppress(StorageError):
                catalog.publish("a", **prepared, is_overwrite=True, adopts=True)
        assert_foreign(root, "a", content)
        if not injection.spoiled:
            return
        assert catalog.latest() is None
        catalog.discard(prepared["directory"])
        prepared = prepare(catalog, root)


def test_without_hard_links_foreign_files_are_copied(catalog, root, monkeypatch):
    content = put_foreign(root, "a")

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(local.os, "link", refuse)
    publish_over(catalog, root, "a")
    assert_foreign(root, "a", content)


def test_where_nobody_asked_for_it_foreign_files_are_in_the_way(catalog, root):
    put_foreign(root, "a")
    with pytest.raises(InvalidArgumentError, match="not a tag"):
        catalog.check_free("a")
    (root / "file").write_bytes(b"")
    with pytest.raises(InvalidArgumentError, match="not a tag"):
        catalog.check_free("file", is_foreign_kept=True)


def test_latest_stays_where_it_is_if_a_tag_is_not_to_move_it(catalog, root):
    publish(catalog, root, "a")
    publish_over(catalog, root, "b", points_latest=False)
    assert catalog.latest() == "a"
    assert [info.tag for info in catalog.tags()] == ["a", "b"]
    assert leftovers(root) == [name for name in leftovers(root) if "work/" in name]


def test_latest_is_left_alone_by_a_failure_that_was_not_to_move_it(catalog, root):
    publish(catalog, root, "a")
    prepared = prepare(catalog, root)
    broken = Fault("fsync", Fail(errno.EIO), path=str(root))
    with inject(broken) as injection, pytest.raises(StorageError):
        catalog.publish("b", **prepared, is_overwrite=False, points_latest=False)
    assert injection.spoiled
    assert (root / "latest").read_text() == "a\n"
    assert [info.tag for info in catalog.tags()] == ["a"]


def test_a_tag_that_is_retracted_was_never_there(catalog, root):
    publish(catalog, root, "a")
    prepared = prepare(catalog, root)
    manifest = catalog.publish("b", **prepared, is_overwrite=False)
    catalog.retract(manifest, prepared["directory"])
    assert catalog.latest() == "a"
    assert [info.tag for info in catalog.tags()] == ["a"]


def test_a_tag_that_was_overwritten_is_back_when_that_is_retracted(catalog, root):
    publish(catalog, root, "a", {"model.pt": b"old"})
    publish(catalog, root, "b")
    prepared = prepare(catalog, root)
    manifest = catalog.publish("a", **prepared, is_overwrite=True)
    catalog.retract(manifest, prepared["directory"])
    assert (root / "a/model.pt").read_bytes() == b"old"
    assert catalog.latest() == "b"


def test_only_what_was_published_by_it_is_retracted(catalog, root):
    prepared = prepare(catalog, root)
    manifest = catalog.publish("a", **prepared, is_overwrite=False)
    publish(catalog, root, "a", {"model.pt": b"newer"}, is_overwrite=True)
    catalog.retract(manifest, prepared["directory"])
    assert (root / "a/model.pt").read_bytes() == b"newer"


def test_a_tag_that_is_published_stays_so_where_late_files_cannot_be_looked_for(
    catalog, root, caplog
):
    content = put_foreign(root, "a")
    prepared = prepare(catalog, root)
    unreadable = Fault("scandir", Fail(errno.EIO), path=prepared["directory"])
    with inject(unreadable) as injection:
        catalog.publish("a", **prepared, is_overwrite=True, adopts=True)
    assert injection.spoiled
    assert catalog.latest() == "a"
    assert_foreign(root, "a", content)
    assert "are lost" in caplog.text
