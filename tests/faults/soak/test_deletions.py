"""What the soak found of deletions, shown in one."""

import pytest

from aiockpt.errors import CheckpointNotFoundError
from catalogs import catalog_at, leftovers, make_tags


def test_a_deletion_that_finds_no_tag_leaves_nothing_behind(root):
    make_tags(root, "one")
    with catalog_at(root) as catalog:
        catalog.open_work()
        before = leftovers(root)
        for _ in range(3):
            with pytest.raises(CheckpointNotFoundError):
                catalog.delete("two")

        assert leftovers(root) == before
