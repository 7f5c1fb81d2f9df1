"""`aiockpt.image`: a layout cut into chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.image import Copy, Data, Layout, Literal, Seal, chunks
from rendering import render


def seal(offset: int, nbytes: int, record: int) -> Seal:
    """Repeats the record's CRC."""
    return Seal(
        offset,
        nbytes,
        record,
        record + 1,
        lambda crcs: (crcs[record].to_bytes(4, "little") * nbytes)[:nbytes],
    )


def literal(offset: int, data: bytes) -> Literal:
    return Literal(offset, len(data), data)


@st.composite
def images(draw: st.DrawFn) -> tuple[Layout, list[bytes]]:
    """Layouts of all kinds of extents, empty ones too, and their records."""
    extents: list[Literal | Data | Seal] = []
    records: list[bytes] = []
    offset = 0
    for kind in draw(st.lists(st.sampled_from("lds"), max_size=12)):
        data = draw(st.binary(max_size=20))
        if kind == "l":
            extents.append(literal(offset, data))
        elif kind == "d":
            extents.append(Data(offset, len(data), len(records)))
            records.append(data)
        elif records:
            extents.append(seal(offset, len(data), len(records) - 1))
        offset = extents[-1].offset + extents[-1].nbytes if extents else 0
    return Layout(offset, extents), records


@given(images(), st.integers(1, 50))
def test_chunks_state_the_same_file_whatever_their_size(image, chunk_bytes):
    layout, records = image
    assert render(layout, records, chunk_bytes) == render(layout, records, 1 << 20)


@given(images(), st.integers(1, 50))
def test_only_the_last_chunk_is_shorter(image, chunk_bytes):
    layout, _ = image
    cut = list(chunks(layout, chunk_bytes))
    assert [chunk.index for chunk in cut] == list(range(len(cut)))
    assert [chunk.offset for chunk in cut] == list(range(0, layout.nbytes, chunk_bytes))
    assert all(chunk.nbytes == chunk_bytes for chunk in cut[:-1])
    assert sum(chunk.nbytes for chunk in cut) == layout.nbytes


@given(images(), st.integers(1, 50))
def test_no_piece_of_a_chunk_is_empty(image, chunk_bytes):
    for chunk in chunks(image[0], chunk_bytes):
        assert all(data for _, data in chunk.literals)
        assert all(copy.nbytes for copy in chunk.copies)
        assert all(start < stop for _, start, stop, _ in chunk.seals)


def test_an_image_without_bytes_has_no_chunks():
    assert list(chunks(Layout(0, []), 64)) == []
    assert list(chunks(Layout(0, [Data(0, 0, 0), literal(0, b"")]), 64)) == []


def test_a_record_longer_than_a_chunk_is_copied_in_order():
    layout = Layout(23, [literal(0, b"abc"), Data(3, 20, 0)])
    copies = [chunk.copies for chunk in chunks(layout, 8)]
    assert copies == [
        [Copy(3, 0, 0, 5)],
        [Copy(0, 0, 5, 8)],
        [Copy(0, 0, 13, 7)],
    ]


def test_an_extent_that_ends_with_its_chunk_leaves_nothing_to_the_next():
    layout = Layout(12, [Data(0, 8, 0), literal(8, b"abcd")])
    first, second = chunks(layout, 8)
    assert (first.nbytes, first.copies, first.literals) == (8, [Copy(0, 0, 0, 8)], [])
    assert (second.copies, second.literals) == ([], [(0, b"abcd")])


@pytest.mark.parametrize("chunk_bytes", [1, 3, 5, 8])
def test_a_seal_over_several_chunks_is_told_in_slices(chunk_bytes):
    layout = Layout(13, [Data(0, 5, 0), seal(5, 8, 0)])
    slices = [
        piece[:3] for chunk in chunks(layout, chunk_bytes) for piece in chunk.seals
    ]
    assert [start for _, start, _ in slices] == [
        0,
        *(stop for _, _, stop in slices[:-1]),
    ]
    assert slices[-1][2] == 8
