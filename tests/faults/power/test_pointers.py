"""Pointers as power cuts on btrfs leave them: found there, shown without a disk."""

import os
from pathlib import Path

from aiockpt.testing.roots import assert_root_consistent
from catalogs import catalog_at, make_tags


def old_name(root: Path, tag: str) -> Path:
    """Where the pointer to a tag was before it became `latest`."""
    with catalog_at(root) as catalog:
        return root / ".aiockpt" / f"latest.{catalog.manifest(tag).attempt}"


def test_a_pointer_that_has_its_old_name_as_well_loses_it(root):
    make_tags(root, "one")
    os.link(root / "latest", old_name(root, "one"))

    with catalog_at(root) as catalog:
        catalog.sweep()

    assert_root_consistent(root, acked=["one"], is_swept=True)


def test_a_pointer_that_was_latest_once_does_not_become_it_again(root):
    make_tags(root, "one", "two")
    old_name(root, "one").write_text("one\n")

    with catalog_at(root) as catalog:
        catalog.sweep()

    assert (root / "latest").read_text() == "two\n"
    assert_root_consistent(root, acked=["one", "two"], is_swept=True)
