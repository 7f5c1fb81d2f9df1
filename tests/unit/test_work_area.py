"""Where engines work in a root: one leader in each, alive while its lock is held."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from aiockpt.storage.local import LocalStorage
from aiockpt.work_area import WorkArea
from catalogs import leftovers, storage_at
from gates import LIMIT_S, Gate, in_thread

NUM_RANKS = 8


def area_at(root: Path) -> WorkArea:
    root.mkdir(exist_ok=True)
    return WorkArea(storage_at(root))


@pytest.fixture
def first(tmp_path: Path) -> Iterator[WorkArea]:
    """That of rank 0."""
    area = area_at(tmp_path / "zero")
    area.open()
    yield area
    area.close()


def join_all(areas: list[WorkArea], directory: str) -> list[bool]:
    """Ranks 1, 2, ... join at once; whether each of them leads."""
    gate = Gate()

    def join(area: WorkArea, rank: int) -> bool:
        gate.pass_through()
        return area.join(directory, rank)

    joining = [
        in_thread(lambda area=area, rank=rank: join(area, rank))
        for rank, area in enumerate(areas, 1)
    ]
    gate.open()
    return [each.result(LIMIT_S) for each in joining]


@pytest.mark.parametrize("round_", range(10))
def test_of_all_ranks_with_one_disk_one_makes_the_directory(first, tmp_path, round_):
    directory, _ = first.new_directory()
    areas = [area_at(tmp_path / "one") for _ in range(NUM_RANKS)]
    leads = join_all(areas, directory)
    assert leads.count(True) == 1
    assert {area.place(directory) for area in areas} == {leads.index(True) + 1}
    areas[0].discard(directory)
    for area in areas:
        area.close()
    assert leftovers(tmp_path / "one") == []


def test_a_root_that_is_rank_0_s_has_no_other_leader(first, tmp_path):
    directory, _ = first.new_directory()
    areas = [area_at(tmp_path / "zero") for _ in range(NUM_RANKS)]
    assert join_all(areas, directory) == [False] * NUM_RANKS
    assert {area.place(directory) for area in areas} == {0}
    for area in areas:
        area.close()
    # What they close is not what rank 0 works in.
    assert (tmp_path / "zero" / directory).is_dir()


def test_a_rank_that_sees_the_directory_late_does_not_lead(
    first, tmp_path, monkeypatch
):
    directory, _ = first.new_directory()
    area = area_at(tmp_path / "zero")
    monkeypatch.setattr(LocalStorage, "exists", lambda *_: False)
    assert not area.join(directory, 1)
    assert area.place(directory) == 0
    area.close()
    assert (tmp_path / "zero" / directory).is_dir()


def test_where_a_rank_has_joined_nobody_sweeps_until_it_has_closed(first, tmp_path):
    directory, _ = first.new_directory()
    area, other = area_at(tmp_path / "one"), area_at(tmp_path / "one")
    assert area.join(directory, 1)
    assert other.sweep() == []
    assert (tmp_path / "one" / directory).is_dir()
    area.discard(directory)
    area.close()
    other.close()
    assert leftovers(tmp_path / "one") == []


@pytest.mark.parametrize("closing", [0, 1])
def test_a_rank_that_closes_takes_nothing_from_those_that_joined_with_it(
    first, tmp_path, closing
):
    directory, _ = first.new_directory()
    areas = [area_at(tmp_path / "one") for _ in range(2)]
    join_all(areas, directory)
    areas[closing].close()
    file = tmp_path / "one" / directory / "file"
    file.write_bytes(b"1")
    # It is still somebody's: nobody sweeps it.
    assert area_at(tmp_path / "one").sweep() == []
    areas[1 - closing].close()
    # What is left there may be an old tag: that is for a later process to sweep.
    assert file.exists()
    assert area_at(tmp_path / "one").sweep() == [directory.split("/")[-2]]
    assert leftovers(tmp_path / "one") == []


def test_a_second_directory_of_one_job_has_a_leader_again(first, tmp_path):
    areas = [area_at(tmp_path / "one") for _ in range(2)]
    for _ in range(2):
        directory, _ = first.new_directory()
        leads = join_all(areas, directory)
        assert leads.count(True) == 1
        for area in areas:
            area.discard(directory)
        assert not (tmp_path / "one" / f"{directory}.place").exists()
    for area in areas:
        area.close()


def test_what_may_be_the_only_copy_of_a_tag_is_neither_discarded_nor_closed_away(
    first, tmp_path
):
    directory, _ = first.new_directory()
    first.in_doubt.add(directory)
    first.discard(directory)
    first.close()
    assert (tmp_path / "zero" / directory).is_dir()


def test_a_work_area_that_is_closed_twice_is_closed(tmp_path):
    area = area_at(tmp_path / "one")
    assert area.open()
    assert not area.open()
    area.close()
    area.close()
    assert leftovers(tmp_path / "one") == []
