"""`aiockpt.parts`: a file dealt out to members, and its checksums put together."""

import random
import zlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.checksums import Checksums
from aiockpt.formats import torch_zip
from aiockpt.image import Data, Extent, Layout, Literal, Seal, chunks
from aiockpt.parts import Part, Totals, combine, digest, part_of
from aiockpt.plan import FilePlan
from rendering import render


def plan_of(
    layout: Layout, records: Sequence[bytes], chunk_bytes: int
) -> tuple[FilePlan, bytes]:
    """The plan of a file, and what the file is when it is made in one piece."""
    pieces = list(chunks(layout, chunk_bytes))
    plan = FilePlan(layout.nbytes, len(records), pieces, list(records))
    return plan, render(layout, records, chunk_bytes)


def written_by(plan: FilePlan, num_members: int) -> tuple[bytes, Totals, list[Part]]:
    """The file as its members make it, one after the other."""
    file = bytearray(b"\xee" * plan.nbytes)
    parts = [part_of(plan, member, num_members) for member in range(num_members)]
    words = [write(part, file) for part in parts]
    totals = Totals.unpack(combine(plan, words).pack())
    for part in parts:
        for late in part.late_seals:
            data = late.render(totals.record_crcs)
            file[late.offset : late.offset + len(data)] = data
    return bytes(file), totals, parts


def write(part: Part, file: bytearray) -> bytes:
    """Does a member's first pass, as the saver does; the member's word."""
    sums = Checksums(part.plan.num_records, len(part.plan.chunks))
    for index, chunk in enumerate(part.plan.chunks):
        assert chunk.index == index
        view = memoryview(bytearray(b"\xa5") * chunk.nbytes)
        for at, data in chunk.literals:
            view[at : at + len(data)] = data
        for copy in chunk.copies:
            source = part.plan.sources[copy.record]
            assert isinstance(source, bytes)
            piece = source[copy.start : copy.start + copy.nbytes]
            view[copy.at : copy.at + copy.nbytes] = piece
        sums.seal(chunk, view)
        file[chunk.offset : chunk.offset + chunk.nbytes] = view
    return part.word(sums.file_crc32(), sums.record_crcs)


def seal_of(first: int, stop: int) -> Callable[[Sequence[int]], bytes]:
    return lambda crcs: b"".join(crc.to_bytes(4, "big") for crc in crcs[first:stop])


def layout_of(records: Sequence[bytes]) -> Layout:
    """As in a zip file: a literal, data and a seal per record, a seal over all."""
    extents: list[Extent] = []
    offset = 0
    for number, record in enumerate(records):
        literal = b"PK%d" % (number % 10)
        seal = Seal(
            offset + 3 + len(record), 4, number, number + 1, seal_of(number, number + 1)
        )
        extents += [
            Literal(offset, 3, literal),
            Data(offset + 3, len(record), number),
            seal,
        ]
        offset += 7 + len(record)
    nbytes = 4 * len(records)
    last = Seal(offset, nbytes, 0, len(records), seal_of(0, len(records)))
    return Layout(offset + nbytes, [*extents, last])


RECORDS = st.lists(
    st.sampled_from((0, 1, 3, 4, 5, 9, 40, 130)), min_size=1, max_size=12
).map(lambda sizes: [random.Random(str(sizes)).randbytes(size) for size in sizes])


# --- the file -------------------------------------------------------------------------


@given(RECORDS, st.integers(1, 60), st.integers(1, 7))
def test_the_parts_make_the_file_and_its_checksum(records, chunk_bytes, num_members):
    records[0] = records[0] or b"pickle"
    plan, expected = plan_of(layout_of(records), records, chunk_bytes)
    file, totals, parts = written_by(plan, num_members)
    assert file == expected
    assert totals.file_crc == zlib.crc32(expected)
    if any(part.late_seals for part in parts):
        assert list(totals.record_crcs) == [zlib.crc32(record) for record in records]
    else:
        assert not totals.record_crcs


@given(RECORDS, st.sampled_from((1, 7, 64, 100, 500)), st.integers(2, 5))
def test_the_parts_make_the_file_of_torch(records, chunk_bytes, num_members):
    records[0] = records[0] or b"pickle"
    layout = torch_zip.layout([len(record) for record in records])
    plan, expected = plan_of(layout, records, chunk_bytes)
    file, totals, _ = written_by(plan, num_members)
    assert file == expected
    assert totals.file_crc == zlib.crc32(expected)


def test_a_file_without_seals_needs_no_second_look():
    layout = Layout(100, [Literal(0, 10, b"0123456789"), Data(10, 90, 0)])
    plan, expected = plan_of(layout, [bytes(range(90))], 16)
    file, totals, _ = written_by(plan, 3)
    assert file == expected
    assert totals == Totals(zlib.crc32(expected), [])


# --- the dealing ----------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 12))
def test_every_chunk_is_one_members_and_no_member_has_two_more_than_another(
    num_chunks, num_members
):
    record = bytes(num_chunks * 8)
    extents = [Data(0, len(record), 0)] if record else []
    plan, _ = plan_of(Layout(len(record), extents), [record], 8)
    parts = [part_of(plan, member, num_members) for member in range(num_members)]
    dealt = [chunk.offset for part in parts for chunk in part.plan.chunks]
    assert dealt == [chunk.offset for chunk in plan.chunks]
    nums = [len(part.plan.chunks) for part in parts]
    assert max(nums) - min(nums) <= 1
    assert [part.plan.nbytes for part in parts] == [8 * num for num in nums]
    for index, chunk in enumerate(plan.chunks):
        owner = parts[index * num_members // num_chunks]
        assert chunk.offset in [mine.offset for mine in owner.plan.chunks]


def test_a_part_has_the_sources_of_the_whole_so_that_both_are_let_go_of_together():
    plan, _ = plan_of(layout_of([b"abc", b"def"]), [b"abc", b"def"], 4)
    part = part_of(plan, 1, 2)
    assert part.plan.sources is plan.sources


def test_dealing_out_a_plan_leaves_it_as_it_is():
    # Plans of an unchanged structure share their chunks.
    plan, _ = plan_of(layout_of([b"a" * 50, b"b" * 50]), [b"a" * 50, b"b" * 50], 16)
    before = repr(plan.chunks)
    for member in range(3):
        part_of(plan, member, 3)
    assert repr(plan.chunks) == before


# --- late seals -----------------------------------------------------------------------


def test_only_seals_of_records_that_begin_before_the_part_are_late():
    # Records of 25 bytes with literal and seal take 32; two chunks take one of them.
    records = [bytes([number]) * 25 for number in range(4)]
    plan, _ = plan_of(layout_of(records), records, 16)
    first, second, third = (part_of(plan, member, 3) for member in range(3))
    assert not first.late_seals
    assert [late.seal.first for late in second.late_seals] == [1]
    assert [late.seal.first for late in third.late_seals] == [0]
    assert list(second.piece_nbytes) == [1, 2]


@pytest.mark.parametrize("chunk_bytes", range(33, 37))
def test_a_seal_across_the_boundary_of_two_parts_is_late_in_the_second_only(
    chunk_bytes,
):
    # The seal of the first record is at 33 to 36.
    records = [b"x" * 30]
    plan, expected = plan_of(layout_of(records), records, chunk_bytes)
    assert len(plan.chunks) == 2
    first, second = part_of(plan, 0, 2), part_of(plan, 1, 2)
    assert not first.late_seals
    assert second.late_seals[0].offset == chunk_bytes
    assert second.late_seals[0].start == chunk_bytes - 33
    assert written_by(plan, 2)[0] == expected


def test_a_late_seal_over_several_chunks_is_one_write():
    records = [bytes([number]) for number in range(200)]
    plan, expected = plan_of(layout_of(records), records, 50)
    tail = part_of(plan, 2, 3)
    assert sum(late.seal.stop == 200 for late in tail.late_seals) == 1
    assert written_by(plan, 3)[0] == expected


def test_a_part_in_the_middle_of_one_record_has_all_of_its_seals_late():
    records = [b"p", bytes(range(256)) * 4]
    plan, expected = plan_of(layout_of(records), records, 16)
    for member in range(1, 5):
        part = part_of(plan, member, 5)
        assert not any(chunk.seals for chunk in part.plan.chunks)
    assert written_by(plan, 5)[0] == expected


# --- what members compare -------------------------------------------------------------


def test_the_digest_is_the_same_however_the_file_is_cut():
    records = [b"pickle", b"x" * 90]
    digests = {
        digest(plan_of(layout_of(records), records, chunk_bytes)[0])
        for chunk_bytes in (1, 2, 16, 200)
    }
    assert len(digests) == 1


def test_the_digest_tells_other_literals():
    header = [Literal(0, 4, b"head"), Data(4, 9, 0)]
    other = [Literal(0, 4, b"heap"), Data(4, 9, 0)]
    one, two = (
        digest(plan_of(Layout(13, extents), [b"x" * 9], 8)[0])
        for extents in (header, other)
    )
    assert one[0] == two[0]
    assert one[1] != two[1]
