"""How a file is cut into runs that are read into one piece of memory each."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.formats.zip_directory import Entry
from aiockpt.loading.reading import Region
from aiockpt.loading.segments import segments

MIB = 1 << 20
LARGE = 4 * MIB
GAP = 64 << 10


def region(name, offset, nbytes, num_header=0):
    entry = None
    if num_header:
        entry = Entry(name, offset - num_header, nbytes, 0, 1 << 60, b"", True)
    return Region(name, offset, nbytes, None, entry)


def names(segment):
    found = [tile.region.name for tile in segment.tiles if tile.region is not None]
    return list(dict.fromkeys(found))


def test_a_large_region_has_its_memory_for_itself_and_what_little_follows():
    rows = [
        region("a", 100, LARGE, 50),
        region("b", 200 + LARGE, 10, 50),
        region("c", 1000 + LARGE, LARGE, 50),
    ]
    found = segments(rows, {"a", "b", "c"}, None)
    assert [names(segment) for segment in found] == [["a"], ["b"], ["c"]]
    assert found[0].start == 50
    assert found[0].stop == found[1].start == 100 + LARGE


def test_small_regions_share_memory_up_to_a_limit():
    rows = [region(f"{i}", i * MIB, MIB) for i in range(40)]
    found = segments(rows, {row.name for row in rows}, None)
    assert [len(names(segment)) for segment in found] == [17, 17, 6]


def test_what_is_far_apart_is_not_read_over():
    rows = [
        region("a", 0, 10),
        region("b", 10 + GAP, 10),
        region("c", 21 + 2 * GAP, 10),
    ]
    found = segments(rows, {"a", "b", "c"}, None)
    assert [names(segment) for segment in found] == [["a", "b"], ["c"]]


def test_a_whole_file_is_read_whole_and_large_gaps_do_not_stay_in_memory():
    rows = [region("a", 5 * MIB, 10), region("b", 7 * MIB, 10)]
    found = segments(rows, {"a", "b"}, 9 * MIB)
    assert found[0].start == 0
    assert found[-1].stop == 9 * MIB
    assert all(one.stop == other.start for one, other in pairwise(found))
    kept = [segment for segment in found if segment.is_kept]
    assert [names(segment) for segment in kept] == [["a"], ["b"]]
    assert all(segment.stop - segment.start <= 10 + GAP for segment in kept)


def test_nothing_to_read_is_no_segment():
    assert segments([], (), None) == []
    assert segments([], (), 0) == []


sizes = st.one_of(
    st.integers(0, 300), st.sampled_from([GAP, GAP + 1, LARGE - 1, LARGE, 20 * MIB])
)


@given(
    parts=st.lists(
        st.tuples(sizes, st.integers(0, 60), sizes, st.booleans()), max_size=30
    ),
    tail=sizes,
    is_whole=st.booleans(),
)
def test_every_region_is_read_once_in_order_without_holes(parts, tail, is_whole):
    rows, kept, at = [], set(), 0
    for number, (gap, num_header, nbytes, is_kept) in enumerate(parts):
        at += gap + num_header
        rows.append(region(str(number), at, nbytes, num_header))
        kept |= {str(number)} if is_kept else set()
        at += nbytes
    whole_nbytes = at + tail if is_whole else None

    found = segments(rows[::-1], kept, whole_nbytes)

    tiles = [tile for segment in found for tile in segment.tiles]
    assert all(
        one.stop == other.start
        for segment in found
        for one, other in pairwise(segment.tiles)
    )
    assert [tile.start for tile in tiles] == sorted(tile.start for tile in tiles)
    data = [tile for tile in tiles if tile.region is not None and not tile.is_header]
    assert sorted(tile.region.name for tile in data) == sorted(row.name for row in rows)
    assert all(tile.stop - tile.start == tile.region.nbytes for tile in data)
    for segment in found:
        inside = set(names(segment))
        assert segment.is_kept == bool(inside & kept)
    if is_whole:
        assert sum(tile.stop - tile.start for tile in tiles) == whole_nbytes
    headers = {tile.region.name for tile in tiles if tile.is_header}
    assert headers == {row.name for row in rows if row.entry is not None}


@pytest.mark.parametrize("nbytes", [LARGE - 1, LARGE])
def test_a_header_stays_with_its_data(nbytes):
    (found,) = segments([region("a", 5000, nbytes, 700)], {"a"}, None)
    assert [tile.is_header for tile in found.tiles] == [True, False]
