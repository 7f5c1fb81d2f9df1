"""`aiockpt.formats.zip_directory`: what stands where, and what is refused."""

import contextlib
import io
import struct
import zipfile
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import CorruptCheckpointError
from aiockpt.formats import torch_zip
from aiockpt.formats.zip_directory import Directory, data_offset, parse_directory
from aiockpt.formats.zip_end import TAIL_BYTES, DirectorySpan, find_directory
from aiockpt.image import Data, Literal, Seal

GIB = 1 << 30
U32_MAX = 0xFFFF_FFFF


def saved(obj: object) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


FILE = saved({"a": torch.arange(5), "b": torch.empty(0), "c": torch.ones(300)})


def directory_of(file: bytes) -> Directory:
    span = find_directory(file[-TAIL_BYTES:], len(file))
    assert span is not None
    return parse_directory(file[span.offset : span.offset + span.nbytes], span)


def contents_of(file: bytes) -> dict[str, bytes]:
    """Reads every record as a loader would."""
    contents = {}
    for name, entry in directory_of(file).entries.items():
        header = file[entry.header_offset : entry.header_offset + entry.header_nbytes]
        start = data_offset(entry, header)
        contents[name] = file[start : start + entry.nbytes]
        assert len(contents[name]) == entry.nbytes
    return contents


def contents_by_zipfile(file: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return {
            name.partition("/")[2]: archive.read(name) for name in archive.namelist()
        }


def zipped(
    names: list[str], *, force_zip64: bool = False, method: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive by Python's writer: lengths and CRC in the local headers."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in names:
            with archive.open(name, "w", force_zip64=force_zip64) as record:
                record.write(b"contents of " + name.encode())
    return file.getvalue()


def test_every_record_of_a_torch_file_is_found():
    assert contents_of(FILE) == contents_by_zipfile(FILE)
    reader = torch._C.PyTorchFileReader(io.BytesIO(FILE))
    directory = directory_of(FILE)
    assert directory.archive == "archive"
    assert list(directory.entries) == reader.get_all_records()
    for name, entry in directory.entries.items():
        header = FILE[entry.header_offset :]
        assert data_offset(entry, header) == reader.get_record_offset(name)
        assert entry.header_offset == reader.get_record_header_offset(name)


def test_the_archive_may_have_any_name(tmp_path):
    for name in ("model.x.pt", "a..b.pt", "mod\u00e8le.pt"):
        torch.save(torch.ones(3), tmp_path / name)
        file = (tmp_path / name).read_bytes()
        assert contents_of(file) == contents_by_zipfile(file)
    renamed = zipped(["mod\u00e8le/data.pkl", "mod\u00e8le/data/0"])
    assert directory_of(renamed).archive == "mod\u00e8le"


@pytest.mark.parametrize("force_zip64", [False, True])
def test_lengths_may_stand_in_the_local_headers(force_zip64):
    file = zipped(["m/data.pkl", "m/data/0", "m/version"], force_zip64=force_zip64)
    assert contents_of(file) == contents_by_zipfile(file)


def test_a_file_without_checksums_is_read():
    torch.serialization.set_crc32_options(False)
    try:
        file = saved(torch.ones(5))
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(contents_of(file)["data/0"]) == 20


@pytest.mark.parametrize("num_zeros", [1, 4096, 65_535])
def test_zeros_behind_the_end_record_are_padding(num_zeros):
    assert contents_of(FILE + bytes(num_zeros)) == contents_of(FILE)


@pytest.mark.parametrize("comment", [b"x", b"PK" * 2000, b"y" * 65_535])
def test_a_comment_is_skipped(comment):
    with_comment = FILE[:-2] + struct.pack("<H", len(comment)) + comment
    assert contents_of(with_comment) == contents_of(FILE)


def test_a_tail_that_is_too_short_is_told_from_a_broken_file():
    file = saved([torch.ones(20_000)])
    span = find_directory(file[-TAIL_BYTES:], len(file))
    assert len(file) > TAIL_BYTES
    assert span is not None
    for nbytes in range(98):
        assert find_directory(file[len(file) - nbytes :], len(file)) is None
    for nbytes in (98, 99, 1000, TAIL_BYTES - 1, len(file)):
        assert find_directory(file[-nbytes:], len(file)) == span
    far = file[:-2] + struct.pack("<H", 65_535) + bytes(65_535)
    assert find_directory(far[-TAIL_BYTES + 1 :], len(far)) is None
    assert find_directory(far[-TAIL_BYTES:], len(far)) == span


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([100, 5 * GIB, 6 * GIB + 3, 7, 0, 9], id="far offsets"),
        pytest.param([100, U32_MAX, 1], id="length of 32 one-bits"),
        pytest.param([1] * 70_000, id="more records than 16 bits count"),
    ],
)
def test_records_and_offsets_beyond_32_bits_are_read(sizes):
    layout = torch_zip.layout(sizes)
    crcs = list(range(len(sizes)))
    pieces: dict[int, bytes] = {}
    starts = {}
    for extent in layout.extents:
        if isinstance(extent, Data):
            starts[extent.record] = extent.offset
        elif isinstance(extent, Literal):
            pieces[extent.offset] = extent.data
        elif isinstance(extent, Seal):
            pieces[extent.offset] = extent.render(crcs)
    tail = pieces[layout.extents[-1].offset]
    span = find_directory(tail[-TAIL_BYTES:], layout.nbytes)
    assert span is not None
    at = span.offset - layout.nbytes
    directory = parse_directory(tail[at : at + span.nbytes], span)
    entries = [directory.entries["data.pkl"]]
    entries += [directory.entries[f"data/{i}"] for i in range(len(sizes) - 1)]
    assert [entry.nbytes for entry in entries] == sizes
    assert [entry.crc32 for entry in entries] == crcs
    for record, start in list(starts.items())[:100]:
        entry = entries[record]
        before = max(at for at in pieces if at <= entry.header_offset)
        header = pieces[before][entry.header_offset - before :]
        assert data_offset(entry, header) == start


# ------------------------------------------------------------------ refusals


def refused(file: bytes) -> CorruptCheckpointError:
    with pytest.raises(CorruptCheckpointError) as caught:
        contents_of(file)
    return caught.value


def entry_positions(file: bytes) -> list[int]:
    """Where the directory's entries stand."""
    span = find_directory(file[-TAIL_BYTES:], len(file))
    assert span is not None
    found, at = [], span.offset
    while file.startswith(b"PK\x01\x02", at):
        found.append(at)
        at += 46 + sum(struct.unpack_from("<HHH", file, at + 28))
    return found


def patched(file: bytes, at: int, layout: str, value: int) -> bytes:
    out = bytearray(file)
    struct.pack_into(layout, out, at, value)
    return bytes(out)


def in_entry(index: int, field: int, layout: str, value: int) -> bytes:
    """`FILE` with one field of one directory entry overwritten."""
    return patched(FILE, entry_positions(FILE)[index] + field, layout, value)


def in_header(name: str, field: int, layout: str, value: int) -> bytes:
    """`FILE` with one field of one local header overwritten."""
    at = directory_of(FILE).entries[name].header_offset
    return patched(FILE, at + field, layout, value)


END = len(FILE) - 22
END64 = END - 76


@pytest.mark.parametrize(
    ("file", "message"),
    [
        pytest.param(b"", "no zip end record", id="no bytes"),
        pytest.param(b"x" * 200_000, "no zip end record", id="another kind of file"),
        pytest.param(FILE[:-1], "no zip end record", id="last byte gone"),
        pytest.param(FILE[: END64 - 5], "no zip end record", id="end gone"),
        pytest.param(FILE[1000:], "locator disagree", id="start gone"),
        pytest.param(
            zipped(["m/data.pkl"])[10:], "said to end at", id="start gone, no zip64"
        ),
        pytest.param(b"x" + FILE, "disagree", id="a byte before everything"),
        pytest.param(FILE + b"\1", "comment and zeros", id="a byte behind"),
        pytest.param(
            FILE[:-2] + b"\5\0" + b"abc", "comment and zeros", id="comment cut off"
        ),
        pytest.param(patched(FILE, END + 4, "<H", 1), "split", id="disk"),
        pytest.param(patched(FILE, END + 8, "<H", 8), "split", id="disk's count"),
        pytest.param(
            patched(FILE, END + 12, "<I", 9), "end records disagree", id="size"
        ),
        pytest.param(
            patched(FILE, END + 16, "<I", 9), "end records disagree", id="offset"
        ),
        pytest.param(patched(FILE, END64, "<I", 0), "no zip64 end", id="no zip64"),
        pytest.param(
            patched(FILE, END64 + 4, "<Q", 45), "locator disagree", id="zip64 length"
        ),
        pytest.param(
            patched(FILE, END64 + 24, "<Q", 8), "locator disagree", id="zip64 count"
        ),
        pytest.param(
            patched(FILE, END - 4, "<I", 2), "locator disagree", id="two disks"
        ),
        pytest.param(
            patched(FILE, END - 12, "<Q", END64 - 1), "locator disagree", id="locator"
        ),
    ],
)
def test_end_records_that_do_not_hold_together_are_refused(file, message):
    assert message in str(refused(file))


def with_count(count: int) -> bytes:
    file = patched(FILE, END64 + 24, "<Q", count)
    file = patched(file, END64 + 32, "<Q", count)
    file = patched(file, END + 8, "<H", min(count, 0xFFFF))
    return patched(file, END + 10, "<H", min(count, 0xFFFF))


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "cannot have 0 entries"),
        (1, "has bytes behind its 1 entries"),
        (8, "has bytes behind its 8 entries"),
        (10, "malformed|cut off"),
        (100_000, "cannot have 100000 entries"),
        (1 << 40, "cannot have"),
        ((1 << 64) - 1, "cannot have"),
    ],
)
def test_a_wrong_number_of_entries_is_refused(count, message):
    with pytest.raises(CorruptCheckpointError, match=message):
        contents_of(with_count(count))


def test_a_directory_too_long_to_be_one_is_refused_before_it_is_read():
    nbytes = 2 * GIB
    offset = 1000
    end64 = struct.pack(
        "<IQHHIIQQQQ", 0x06064B50, 44, 0, 0, 0, 0, 1000, 1000, nbytes, offset
    )
    locator = struct.pack("<IIQI", 0x07064B50, 0, offset + nbytes, 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1000, 1000, nbytes, offset, 0)
    tail = bytes(TAIL_BYTES) + end64 + locator + end
    with pytest.raises(CorruptCheckpointError, match="more than the"):
        find_directory(tail, offset + nbytes + 98)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        pytest.param(in_entry(3, 0, "<I", 0), "malformed", id="signature"),
        pytest.param(
            in_entry(3, 10, "<H", 8), r"compressed \(method 8\)", id="deflate"
        ),
        pytest.param(in_entry(3, 8, "<H", 0x0809), "encrypted", id="encrypted"),
        pytest.param(in_entry(3, 8, "<H", 0x0848), "unknown kind", id="unknown flag"),
        pytest.param(in_entry(3, 34, "<H", 1), "in another file", id="disk"),
        pytest.param(in_entry(4, 20, "<I", 41), "two lengths", id="stored length"),
        pytest.param(in_entry(4, 42, "<I", 0), "reaches beyond", id="same place"),
        pytest.param(in_entry(4, 42, "<I", 1 << 31), "reaches beyond", id="outside"),
        pytest.param(in_entry(4, 42, "<I", END64), "reaches beyond", id="in the end"),
        pytest.param(in_entry(4, 28, "<H", 0xFFFF), "malformed", id="name's length"),
        pytest.param(in_entry(8, 32, "<H", 1), "malformed", id="comment's length"),
    ],
)
def test_an_entry_that_torch_would_not_write_is_refused(file, message):
    error = refused(file)
    with pytest.raises(CorruptCheckpointError, match=message):
        raise error
    assert error.offset is not None


def test_a_record_may_not_reach_into_the_next():
    at = entry_positions(FILE)[4]
    for nbytes, is_refused in ((40, False), (200, True), (1 << 31, True)):
        file = patched(FILE, at + 20, "<I", nbytes)
        file = patched(file, at + 24, "<I", nbytes)
        if is_refused:
            assert "reaches beyond" in str(refused(file))
        else:
            contents_of(file)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["m/data.pkl", "other/data/0"], "not a plain path"),
        (["m/data.pkl", "m/../data/0"], "not a plain path"),
        (["m/data.pkl", "m/.."], "not a plain path"),
        (["m/data.pkl", "m//etc/passwd"], "not a plain path"),
        (["m/data.pkl", "m/./data/0"], "not a plain path"),
        (["/data.pkl"], "not a plain path"),
        (["../data.pkl"], "not a plain path"),
        (["data.pkl"], "not a plain path"),
        (["m/data.pkl", "m/data/"], "not a plain path"),
        (["m/data.pkl", "m/constants.pkl"], "TorchScript"),
    ],
)
def test_a_name_that_is_no_plain_path_is_refused(names, message):
    assert message in str(refused(zipped(names)))


@pytest.mark.parametrize(
    "wrong", [b"d\0ta/0", b"d\xff\xfea/0"], ids=["NUL", "not UTF-8"]
)
def test_a_name_that_is_no_text_is_refused(wrong):
    file = zipped(["m/data.pkl", "m/data/0"]).replace(b"data/0", wrong)
    assert "not a plain path" in str(refused(file))


def test_two_records_of_one_name_are_refused():
    file = zipped(["m/data.pkl", "m/data/0", "m/data/1"]).replace(b"data/1", b"data/0")
    assert "two records 'm/data/0'" in str(refused(file))


def test_a_compressed_archive_is_refused():
    file = zipped(["m/data.pkl", "m/data/0"], method=zipfile.ZIP_DEFLATED)
    assert "compressed (method 8)" in str(refused(file))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        pytest.param(in_header("data/0", 0, "<I", 0), "is not there", id="signature"),
        pytest.param(in_header("data/0", 8, "<H", 8), "compressed", id="deflate"),
        pytest.param(in_header("data/0", 6, "<H", 0x0809), "encrypted", id="encrypted"),
        pytest.param(
            in_header("data/0", 35, "<B", ord("x")), "another record's", id="name"
        ),
        pytest.param(
            in_header("data/0", 26, "<H", 13), "another record's", id="shorter name"
        ),
        pytest.param(
            in_header("data/0", 26, "<H", 15), "another record's", id="longer name"
        ),
        pytest.param(
            in_header("data/0", 28, "<H", 0xFFFF), "puts its end beyond", id="extra"
        ),
        pytest.param(in_header("data/0", 22, "<I", 39), "another length", id="length"),
        pytest.param(in_header("data/0", 18, "<I", 39), "another length", id="stored"),
        pytest.param(in_header("data/0", 14, "<I", 1), "another length", id="crc"),
        pytest.param(
            in_header("data/0", 6, "<H", 0x0800), "another length", id="no descriptor"
        ),
    ],
)
def test_a_local_header_that_contradicts_the_directory_is_refused(file, message):
    error = refused(file)
    assert message in str(error)
    assert "'archive/data/0'" in str(error)
    assert error.offset == directory_of(FILE).entries["data/0"].header_offset


def test_a_local_header_that_is_cut_off_is_refused():
    entry = directory_of(FILE).entries["data/0"]
    header = FILE[entry.header_offset : entry.header_offset + entry.header_nbytes]
    data_offset(entry, header)
    for nbytes in range(len(header)):
        with pytest.raises(CorruptCheckpointError, match="cut off"):
            data_offset(entry, header[:nbytes])


def test_a_directory_that_is_cut_off_is_refused():
    span = find_directory(FILE, len(FILE))
    assert span is not None
    data = FILE[span.offset : span.offset + span.nbytes]
    for nbytes in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            parse_directory(data[:nbytes], span)


def listed(name: bytes, nbytes: int, offset: int, extra: bytes = b"") -> bytes:
    """A directory entry; numbers that do not fit are left to the extra."""
    nbytes, offset = min(nbytes, U32_MAX), min(offset, U32_MAX)
    numbers = (0, nbytes, nbytes, len(name), len(extra))
    return struct.pack("<I12xIIIHH10xI", 0x02014B50, *numbers, offset) + name + extra


def parsed(*entries: bytes, end: int) -> Directory:
    data = b"".join(entries)
    return parse_directory(data, DirectorySpan(end, len(data), len(entries)))


def test_the_zip64_extra_is_found_among_others():
    zip64 = struct.pack("<HHQQQ", 1, 24, 5 * GIB, 5 * GIB, 7 * GIB)
    other = struct.pack("<HHQQQ", 0x1234, 24, 1, 2, 3)
    for extra in (zip64, other + zip64, other + zip64 + other, zip64 + b"\1"):
        directory = parsed(listed(b"m/a", 1 << 33, 1 << 33, extra), end=20 * GIB)
        entry = directory.entries["a"]
        assert (entry.nbytes, entry.header_offset) == (5 * GIB, 7 * GIB)
    only_offset = struct.pack("<HHQ", 1, 8, 7 * GIB)
    directory = parsed(listed(b"m/a", 5, 1 << 33, only_offset), end=20 * GIB)
    assert directory.entries["a"].header_offset == 7 * GIB


@pytest.mark.parametrize(
    "extra",
    [
        b"",
        b"\1",
        b"\1\0",
        struct.pack("<HH", 1, 24),
        struct.pack("<HHQQ", 1, 16, 5, 5),
        struct.pack("<HHQQQ", 1, 23, 5, 5, 0),
        struct.pack("<HHQQQ", 0x1234, 24, 5, 5, 0),
        struct.pack("<HHHHQQQ", 0x1234, 28, 1, 24, 5, 5, 0),
    ],
)
def test_an_entry_without_its_zip64_fields_is_refused(extra):
    with pytest.raises(CorruptCheckpointError, match="lacks its zip64 fields"):
        parsed(listed(b"m/a", U32_MAX, U32_MAX, extra), end=20 * GIB)


def test_local_headers_may_not_overlap():
    assert parsed(listed(b"m/a", 0, 0), listed(b"m/b", 7, 33), end=73).entries
    for offset, end in ((32, 73), (33, 72)):
        with pytest.raises(CorruptCheckpointError, match="reaches beyond"):
            parsed(listed(b"m/a", 0, 0), listed(b"m/b", 7, offset), end=end)


def test_a_long_name_does_not_flood_the_message():
    file = zipped(["m/data.pkl", "m/" + "x" * 60_000 + "/../y"])
    assert len(str(refused(file))) < 300


# ----------------------------------------------------------------------- fuzz


def mutations(file: bytes) -> st.SearchStrategy[bytes]:
    """The file with some bytes of its tables changed, or its end cut off."""
    first_table = entry_positions(file)[0]
    positions = st.one_of(
        st.integers(0, len(file) - 1), st.integers(first_table, len(file) - 1)
    )
    interesting = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])
    changes = st.lists(
        st.tuples(
            positions, st.one_of(interesting, st.integers(0, 255)), st.integers(1, 8)
        ),
        min_size=1,
        max_size=6,
    )

    def apply(changed: list[tuple[int, int, int]], num_cut: int) -> bytes:
        out = bytearray(file)
        for at, value, nbytes in changed:
            out[at : at + nbytes] = bytes([value]) * min(nbytes, len(out) - at)
        return bytes(out[: len(out) - num_cut])

    return st.builds(apply, changes, st.sampled_from([0, 0, 0, 1, 22, 100]))


def assert_read_or_refused(file: bytes, read: Callable[[bytes], object]) -> None:
    with contextlib.suppress(CorruptCheckpointError):
        read(file)


@given(mutations(FILE))
def test_a_damaged_torch_file_is_read_or_refused(file):
    assert_read_or_refused(file, contents_of)


@given(mutations(zipped(["m/data.pkl", "m/data/0", "m/version"], force_zip64=True)))
def test_a_damaged_archive_of_another_writer_is_read_or_refused(file):
    assert_read_or_refused(file, contents_of)


@given(st.binary(max_size=300), st.integers(0, 1000))
def test_any_bytes_are_a_directory_or_refused(data, num_records):
    span = DirectorySpan(1 << 20, len(data), num_records + 1)
    assert_read_or_refused(data, lambda data: parse_directory(data, span))


@given(st.binary(max_size=300), st.integers(0, 1 << 66))
def test_any_bytes_are_a_tail_or_refused(data, before):
    assert_read_or_refused(
        data + FILE[-98:], lambda tail: find_directory(tail, len(tail) + before)
    )
