"""`aiockpt.formats.torch_zip`: byte for byte what `torch.save` writes."""

import io
import itertools
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.formats import torch_zip
from aiockpt.image import Data, Layout, Literal, Seal
from rendering import render, rendered

GIB = 1 << 30
U32_MAX = 0xFFFF_FFFF
ID_NAME = "archive/.data/serialization_id"


def saved_by_torch(obj: object) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def records_of(file: bytes) -> list[bytes]:
    """The pickle and the storages."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        names = set(archive.namelist())
        storages = itertools.takewhile(
            names.__contains__, (f"archive/data/{i}" for i in itertools.count())
        )
        return [archive.read("archive/data.pkl"), *map(archive.read, storages)]


def use_id_of(file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the serialization id, a digest of torch's own, that of `file`."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        digits = archive.read(ID_NAME)
    monkeypatch.setattr(torch_zip, "_serialization_id", lambda names, crcs: digits)


def render_like(file: bytes, chunk_bytes: int) -> bytes:
    records = records_of(file)
    layout = torch_zip.layout([len(record) for record in records])
    return render(layout, records, chunk_bytes)


def model_state() -> dict[str, object]:
    model = torch.nn.Sequential(
        torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)
    )
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 7)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}


TIED = torch.arange(10.0)
STATES = {
    "no storage": {"step": 3, "loss": 0.5},
    "one tensor": torch.arange(5),
    "model and optimizer": model_state(),
    "empty storages between": [
        torch.empty(0),
        torch.ones(3),
        torch.empty(0),
        torch.empty(0, 4),
        torch.ones(1, dtype=torch.int8),
    ],
    "empty storage last": [torch.ones(3), torch.empty(0)],
    "only empty storages": [torch.empty(0), torch.empty(0)],
    "300 tensors of all lengths": [
        torch.arange(n % 67, dtype=torch.uint8) for n in range(300)
    ],
    "views of one storage": OrderedDict(a=TIED, b=TIED[2:5], c=TIED.view(2, 5)),
    "a long record": torch.arange(300_000, dtype=torch.int32),
    "a long pickle": {"x" * 100_000: torch.ones(2)},
}


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_the_file_is_what_torch_writes_byte_for_byte(state, chunk_bytes, monkeypatch):
    expected = saved_by_torch(state)
    use_id_of(expected, monkeypatch)
    assert render_like(expected, chunk_bytes) == expected


class Segments(io.RawIOBase):
    """A file that keeps what is written and skips what is skipped."""

    def __init__(self) -> None:
        self.at = 0
        self.written: list[tuple[int, bytes]] = []

    def write(self, data) -> int:
        self.written.append((self.at, bytes(data)))
        self.at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == io.SEEK_CUR
        self.at += offset
        return self.at


def skeleton_by_torch(sizes: list[int]) -> tuple[list[tuple[int, bytes]], bytes]:
    """What torch writes around records of these sizes, and its serialization id."""
    file = Segments()
    writer = torch._C.PyTorchFileWriter(file, True, 64)
    writer.write_record_metadata("data.pkl", sizes[0])
    for name, data in ((".format_version", "1"), (".storage_alignment", "64")):
        writer.write_record(name, data, len(data))
    writer.write_record("byteorder", "little", len("little"))
    for index, nbytes in enumerate(sizes[1:]):
        writer.write_record_metadata(f"data/{index}", nbytes)
    writer.write_end_of_file()
    return file.written, writer.serialization_id().encode()


def joined(pieces: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Runs of bytes: pieces that touch are put together."""
    runs: list[tuple[int, bytearray]] = []
    for at, data in pieces:
        if runs and runs[-1][0] + len(runs[-1][1]) == at:
            runs[-1][1].extend(data)
        elif data:
            runs.append((at, bytearray(data)))
    return [(at, bytes(run)) for at, run in runs]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([100, 5 * GIB], id="one long record"),
        pytest.param([100, 5 * GIB, 6 * GIB + 3, 7, 0, 9], id="far offsets"),
        pytest.param([100, U32_MAX, 1], id="length of 32 one-bits"),
        pytest.param([100, U32_MAX - 1, 1], id="the longest short record"),
        pytest.param([5 * GIB], id="a long pickle"),
        pytest.param([100, U32_MAX - 896, 0, 0], id="offsets around 4 GiB"),
        pytest.param([100, *([GIB] * 5), 0], id="an empty record far out"),
        pytest.param([64] * 70_000, id="more records than 16 bits count"),
    ],
)
def test_records_and_offsets_beyond_32_bits_are_written_as_torch_does(
    sizes, monkeypatch
):
    expected, digits = skeleton_by_torch(sizes)
    monkeypatch.setattr(torch_zip, "_serialization_id", lambda names, crcs: digits)
    layout = torch_zip.layout(sizes)
    # torch, which sees no data, writes the CRC of nothing
    crcs = [0] * len(sizes)
    pieces: list[tuple[int, bytes]] = []
    for extent in layout.extents:
        if isinstance(extent, Literal):
            pieces.append((extent.offset, extent.data))
        elif isinstance(extent, Seal):
            pieces.append((extent.offset, extent.render(crcs)))
    assert joined(pieces) == joined(expected)
    assert layout.nbytes == expected[-1][0] + len(expected[-1][1])


@pytest.mark.parametrize("past", [*range(-160, 200, 16), -2, -1, 1])
def test_the_switch_to_long_fields_comes_at_the_same_byte_as_torchs(past, monkeypatch):
    start = torch_zip.layout([1, 1]).extents[-2].offset
    # the third local header stands at `U32_MAX + past`
    sizes = [1, U32_MAX + past - start - 16, 5, 200, 0, 3]
    expected, digits = skeleton_by_torch(sizes)
    monkeypatch.setattr(torch_zip, "_serialization_id", lambda names, crcs: digits)
    tail = torch_zip.layout(sizes).extents[-1]
    assert isinstance(tail, Seal)
    assert tail.offset + tail.nbytes == expected[-1][0] + len(expected[-1][1])
    *_, (_, data) = joined(expected)
    assert tail.render([0] * len(sizes)).endswith(data[-tail.nbytes :])


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_python_and_torch_read_the_file(state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    file = render_like(saved_by_torch(state), 4096)
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert archive.testzip() is None
    path = tmp_path / "renamed.pt"
    path.write_bytes(file)
    for mode in (
        {"weights_only": True},
        {"weights_only": False},
        {"weights_only": True, "mmap": True},
        {"weights_only": False, "mmap": True},
    ):
        loaded = torch.load(path, **mode)
        torch.testing.assert_close(loaded, state, rtol=0, atol=0)
    torch.load(path, map_location="meta", weights_only=True)
    with torch.utils.serialization.config.patch("load.calculate_storage_offsets", True):
        loaded = torch.load(path, weights_only=True)
    torch.testing.assert_close(loaded, state, rtol=0, atol=0)


def test_the_offsets_that_torch_computes_are_those_of_the_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    state = [torch.ones(n % 5 * 13 + 1) for n in range(40)]
    file = saved_by_torch(state)
    path = tmp_path / "m.pt"
    path.write_bytes(render_like(file, 1 << 20))
    loaded = torch.load(path, map_location="meta", weights_only=True)
    layout = torch_zip.layout([len(record) for record in records_of(file)])
    expected = {e.record: e.offset for e in layout.extents if isinstance(e, Data)}
    assert [t.untyped_storage()._checkpoint_offset for t in loaded] == [
        expected[index + 1] for index in range(len(state))
    ]


def test_equal_files_have_equal_serialization_ids_and_others_do_not():
    def id_of(*records: bytes) -> bytes:
        layout = torch_zip.layout([len(record) for record in records])
        file = io.BytesIO(render(layout, records, 4096))
        with zipfile.ZipFile(file) as archive:
            return archive.read(ID_NAME)

    ids = [id_of(b"abc", b"de"), id_of(b"abc", b"dX"), id_of(b"abc", b"de", b"")]
    assert id_of(b"abc", b"de") == ids[0]
    assert len(set(ids)) == len(ids)
    assert all(len(digits) == 40 and digits.isdigit() for digits in ids)
    # the first half tells the names apart, the second the contents
    assert ids[0][:20] == ids[1][:20] != ids[2][:20]
    assert ids[0][20:] != ids[1][20:]


@st.composite
def record_lists(draw: st.DrawFn) -> list[bytes]:
    sizes = draw(st.lists(st.integers(0, 300), min_size=1, max_size=30))
    return [bytes([index % 251]) * nbytes for index, nbytes in enumerate(sizes)]


@given(record_lists(), st.integers(1, 2000))
def test_the_file_does_not_depend_on_the_size_of_chunks(records, chunk_bytes):
    layout = torch_zip.layout([len(record) for record in records])
    file = render(layout, records, chunk_bytes)
    assert file == render(layout, records, 1 << 20)
    assert records_of(file) == records


def assert_tiles(layout: Layout) -> None:
    end = 0
    for extent in layout.extents:
        assert extent.offset == end
        assert extent.nbytes > 0
        end += extent.nbytes
    assert end == layout.nbytes


@given(st.lists(st.integers(0, 1 << 33), min_size=1, max_size=40))
def test_extents_tile_the_file_and_alternate_with_records(sizes):
    layout = torch_zip.layout(sizes)
    assert_tiles(layout)
    records = [extent for extent in layout.extents if isinstance(extent, Data)]
    expected = [(index, nbytes) for index, nbytes in enumerate(sizes) if nbytes]
    assert [(extent.record, extent.nbytes) for extent in records] == expected
    assert all(extent.offset % 64 == 0 for extent in records)
    # whatever stands between two records is one extent
    assert len(layout.extents) == 2 * len(records) + 1
    for extent in layout.extents:
        if isinstance(extent, Seal):
            rendered(extent, [7] * len(sizes))
    tail = layout.extents[-1]
    assert isinstance(tail, Seal)
    assert (tail.first, tail.stop) == (0, len(sizes))
