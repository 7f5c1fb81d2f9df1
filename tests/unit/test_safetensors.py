"""`aiockpt.formats.safetensors`: what the official library writes and reads."""

import json
import struct
from collections import OrderedDict

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.formats.safetensors import (
    MAX_HEADER_BYTES,
    header_nbytes,
    parse_header,
    plan,
)
from aiockpt.image import Data
from rendering import render

OFFICIAL_DTYPES = list(safetensors.torch._TYPES.values())


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def written(tensors, metadata=None, chunk_bytes=1 << 20) -> bytes:
    layout, order = plan(tensors, metadata)
    return render(layout, [bytes_of(tensor) for _, tensor in order], chunk_bytes)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(shape) * 9).to(dtype)


def of_all_dtypes() -> dict[str, torch.Tensor]:
    """Two of each, in an order that is not the file's."""
    tensors = {}
    for index, dtype in enumerate(OFFICIAL_DTYPES):
        tensors[f"z{index}"] = random_tensor((index % 3 + 1, 5), dtype)
        tensors[f"a{index}"] = random_tensor((3,), dtype)
    return tensors


FLAT = torch.arange(12.0)
CASES = {
    "nothing": ({}, None),
    "one": ({"w": torch.arange(5)}, None),
    "every dtype": (of_all_dtypes(), None),
    "metadata": ({"w": torch.ones(3)}, {"format": "pt"}),
    "empty metadata": ({"w": torch.ones(3)}, {}),
    "scalar and empty": (
        {"s": torch.tensor(3), "e": torch.empty(0), "f": torch.empty(2, 0, 3)},
        None,
    ),
    "odd names": (
        {'"\\/\b\f\n\r\t\0\x1f\x7f': FLAT[:1], "\u2028\u00e9\U0001f600": FLAT[1:2]},
        {'"\\\n': "\u00e9\0"},
    ),
    "names beyond ASCII": ({c: torch.ones(2) for c in "a\uffff\U0001f600\u00e9"}, None),
    "parts of one storage": ({"a": FLAT[:6], "b": FLAT[6:]}, None),
    "parameters": (torch.nn.Linear(3, 2).state_dict(), None),
    "300 tensors": ({f"t.{i}": torch.ones(i % 7) for i in range(300)}, None),
}


@pytest.mark.parametrize("chunk_bytes", [7, 64, 1 << 20])
@pytest.mark.parametrize(("tensors", "metadata"), CASES.values(), ids=CASES.keys())
def test_the_file_is_what_the_official_writer_makes(tensors, metadata, chunk_bytes):
    file = written(tensors, metadata, chunk_bytes)
    assert file == safetensors.torch.save(tensors, metadata)


@pytest.mark.parametrize(("tensors", "metadata"), CASES.values(), ids=CASES.keys())
def test_the_official_reader_reads_the_file(tensors, metadata, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(written(tensors, metadata))
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bytes_of(loaded[name]) == bytes_of(tensor)
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata() or None) == (metadata or None)


@pytest.mark.parametrize(("tensors", "metadata"), CASES.values(), ids=CASES.keys())
def test_what_the_official_writer_made_is_read(tensors, metadata):
    file = safetensors.torch.save(tensors, metadata)
    header = parse_header(file[: header_nbytes(file[:8], len(file))], len(file))
    assert header.metadata == metadata
    assert header.entries.keys() == tensors.keys()
    for name, entry in header.entries.items():
        assert entry.name == name
        assert entry.dtype == tensors[name].dtype
        assert entry.shape == tuple(tensors[name].shape)
        data = file[entry.start : entry.start + entry.nbytes]
        assert data == bytes_of(tensors[name])


def test_several_metadata_entries_are_written_in_one_order():
    tensors = {"w": torch.ones(2)}
    one, other = {"b": "2", "a": "1", "c": "3"}, {"c": "3", "a": "1", "b": "2"}
    assert written(tensors, one) == written(tensors, other)
    file = written(tensors, one)
    assert parse_header(file, len(file)).metadata == one


def test_empty_metadata_of_an_empty_file_is_valid_json():
    # the official writer (0.8.0) makes `{},"__metadata__":{}}` of it
    file = written({}, {})
    assert json.loads(file[8:]) == {"__metadata__": {}}
    assert safetensors.torch.load(file) == {}


def test_every_tensor_is_aligned_to_its_elements():
    layout, order = plan(of_all_dtypes(), None)
    for extent in layout.extents:
        if isinstance(extent, Data):
            assert extent.offset % order[extent.record][1].dtype.itemsize == 0


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.tuples(
            st.sampled_from(OFFICIAL_DTYPES), st.lists(st.integers(0, 4), max_size=3)
        ),
        max_size=12,
    ),
    st.one_of(
        st.none(), st.dictionaries(st.text("ab\u00e9", max_size=3), st.text("xy"))
    ),
    st.integers(1, 200),
)
def test_any_tensors_survive_the_round_trip(specs, metadata, chunk_bytes):
    tensors = {
        name: random_tensor(tuple(shape), d) for name, (d, shape) in specs.items()
    }
    file = written(tensors, metadata, chunk_bytes)
    header = parse_header(file, len(file))
    assert header.metadata == metadata
    assert header.data_start % 8 == 0
    loaded = safetensors.torch.load(file)
    assert header.entries.keys() == loaded.keys() == tensors.keys()
    end = header.data_start
    for name, entry in header.entries.items():
        assert entry.start == end
        end += entry.nbytes
        assert file[entry.start : end] == bytes_of(tensors[name])
        assert bytes_of(loaded[name]) == bytes_of(tensors[name])
    assert end == len(file)
    if metadata is None or (len(metadata) < 2 and tensors):
        assert file == safetensors.torch.save(tensors, metadata)


# --------------------------------------------------------- refused when saving


class Wrapper(torch.Tensor):
    """A tensor that keeps its data elsewhere."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func)


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def freed(nbytes_left: int) -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(nbytes_left)
    return tensor


ONES = torch.ones(4)
COMPLEX = torch.ones(4, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([ONES], ["mapping", "list"]),
        ({1: ONES}, ["1", "int"]),
        ({("a", "b"): ONES}, ["('a', 'b')", "tuple"]),
        ({"\ud800": ONES}, ["Unicode", "\\ud800"]),
        ({"__metadata__": ONES}, ["'__metadata__'"]),
        ({"x": 3}, ["'x'", "int"]),
        ({"x": {"y": ONES}}, ["'x'", "dict", "flatten"]),
        ({"x": None}, ["'x'", "NoneType"]),
        ({"x": ONES.untyped_storage()}, ["'x'", "UntypedStorage"]),
        ({"x": torch.eye(2).to_sparse()}, ["'x'", "torch.sparse_coo"]),
        ({"x": torch.eye(2).to_mkldnn()}, ["'x'", "torch._mkldnn"]),
        ({"x": torch.ones(2, device="meta")}, ["'x'", "meta"]),
        ({"x": torch.ones(2, dtype=torch.complex128)}, ["'x'", "torch.complex128"]),
        ({"x": torch.ones(2, 3).t()}, ["'x'", ".contiguous()"]),
        ({"x": ONES[::2]}, ["'x'", ".contiguous()"]),
        ({"x": torch.ones(1).expand(3)}, ["'x'", ".contiguous()"]),
        ({"x": COMPLEX.conj()}, ["'x'", "resolve_conj()"]),
        ({"x": torch._neg_view(ONES)}, ["'x'", "resolve_neg()"]),
        ({"x": fake()}, ["'x'", "FakeTensor has no memory"]),
        ({"x": Wrapper()}, ["'x'", "Wrapper has no memory"]),
        ({"x": freed(0)}, ["'x'", "has no memory"]),
        ({"x": freed(8)}, ["'x'", "has no memory"]),
        ({"x": ONES, "y": ONES}, ["'x'", "'y'", "share memory"]),
        ({"x": ONES, "z": COMPLEX, "y": ONES[3:]}, ["'x'", "'y'", "share memory"]),
        ({"x": ONES[:3], "y": ONES[2:]}, ["'x'", "'y'", "share memory"]),
        ({"x": ONES, "y": ONES.view(torch.int32)}, ["'x'", "'y'", "share memory"]),
        (
            {"x": ONES, "y": torch.from_numpy(ONES.numpy())},
            ["'x'", "'y'", "share memory"],
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(tensors, words):
    with pytest.raises(InvalidArgumentError) as caught:
        plan(tensors, None)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantized_and_nested_tensors_are_refused():
    quantized = torch.quantize_per_tensor(ONES, 1.0, 0, torch.qint8)
    with pytest.raises(InvalidArgumentError, match="'q': it is quantized"):
        plan({"q": quantized}, None)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([ONES, ONES[:2]], layout=layout)
        with pytest.raises(InvalidArgumentError, match="'n': it is nested"):
            plan({"n": nested}, None)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"epoch": 3}, ["'epoch'", "3", "int"]),
        ({3: "x"}, ["metadata key", "3", "int"]),
        ({"k": "\ud800"}, ["'k'", "Unicode"]),
        (["x"], ["metadata", "list"]),
    ],
)
def test_metadata_that_is_not_text_is_refused_by_name(metadata, words):
    with pytest.raises(InvalidArgumentError) as caught:
        plan({"w": ONES}, metadata)
    for word in words:
        assert word in str(caught.value)


def test_a_header_that_no_reader_would_accept_is_refused():
    with pytest.raises(InvalidArgumentError, match="100000000"):
        plan({"w": ONES}, {"k": "x" * MAX_HEADER_BYTES})


def test_tensors_of_no_elements_share_nothing():
    empty = torch.empty(0)
    file = written(OrderedDict(a=empty, b=empty))
    assert parse_header(file, len(file)).entries.keys() == {"a", "b"}


# -------------------------------------------------------- refused when loading


def made(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list, dtype: str = "U8", **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def test_a_header_in_any_order_with_any_padding_is_read():
    text = json.dumps({"b": entry(4, 6, [2]), "a": entry(0, 4, [1], "F32")}, indent=2)
    header = parse_header(
        made(text.encode() + b" \n\t" * 9, bytes(6)), 8 + 27 + len(text) + 6
    )
    assert list(header.entries) == ["a", "b"]
    assert [e.start - header.data_start for e in header.entries.values()] == [0, 4]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "no room"),
        (b"\0" * 7, "no room"),
        (struct.pack("<Q", 100_000_001), "more than the 100000000"),
        (struct.pack("<Q", (1 << 64) - 1), "more than the 100000000"),
        (struct.pack("<Q", 100) + b"{}", "the file has 10"),
        (made(b""), "start with"),
        (made(b" {}"), "start with"),
        (made(b"[]"), "start with"),
        (made(b"\xef\xbb\xbf{}"), "start with"),
        (made(b"{"), "malformed"),
        (made(b"{}{}"), "malformed"),
        (made(b'{"\xff": 1}'), "malformed"),
        (made(b'{"a":' + b"[" * 100_000), "malformed"),
        (made(b'{"a":' * 100_000), "malformed"),
        (made(b'{"a":' + b"9" * 5000 + b"}"), "malformed"),
        (made(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "malf"),
        (made(b'{"__metadata__":{"a":"\\ud800"}}'), "malformed"),
        (made(b'{"__metadata__":{"a":"1","a":"2"}}'), "two values under the key 'a'"),
        (made(b'{"__metadata__":{},"__metadata__":{}}'), "two values"),
        (
            made(
                b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
                b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
            ),
            "two values under the key 'a'",
        ),
        (
            made(b'{"a":{"dtype":"U8","shape":[1],"shape":[0],"data_offsets":[0,0]}}'),
            "two values under the key 'shape'",
        ),
        (made({"__metadata__": {"a": 1}}), "malformed"),
        (made({"__metadata__": None}), "malformed"),
        (made({"a": None}), "malformed"),
        (made({"a": entry(0, 0, [0], more=1)}), "malformed"),
        (made({"a": {"dtype": "U8", "shape": [0]}}), "malformed"),
        (made({"a": entry(0, 1, [True])}, b"x"), "malformed"),
        (made({"a": entry(0, 1, [1.0])}, b"x"), "malformed"),
        (made({"a": entry(0, 1, ["1"])}, b"x"), "malformed"),
        (made({"a": entry(0, 1, [-1])}, b"x"), "malformed"),
        (made({"a": entry(0, 0, [0, 1 << 63])}), "malformed"),
        (made({"a": entry(-1, 0, [1])}), "malformed"),
        (made({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0]}}), "malformed"),
        (made({"a": entry(0, 1, [1], "U9")}, b"x"), "unknown dtype 'U9'"),
        (made({"a": entry(0, 1, [1], "F4")}, b"x"), "unknown dtype 'F4'"),
        (made({"a": entry(0, 1, [2])}, b"x"), "is not what"),
        (made({"a": entry(0, 1, [1], "F32")}, b"x"), "is not what"),
        (made({"a": entry(0, 2, [1])}, b"xx"), "is not what"),
        (made({"a": entry(1, 0, [1])}, b"x"), "starts at"),
        (made({"a": entry(0, 1, []), "b": entry(1, 0, [])}, b"x"), "starts at|is not"),
        (made({"a": entry(0, 0, [1 << 62, 4, 0])}), "beyond 64 bits"),
        (made({"a": entry(0, 0, [1 << 62] * 5000)}), "beyond 64 bits"),
        (made({"a": entry(1, 2, [1])}, b"xx"), "starts at"),
        (made({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, b"xxx"), "starts at"),
        (made({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, b"xxx"), "starts at"),
        (made({"a": entry(0, 2, [2]), "b": entry(0, 2, [2])}, b"xx"), "starts at"),
        (made({"a": entry(0, 1, [1])}, b"xx"), "the file at"),
        (made({"a": entry(0, 2, [2])}, b"x"), "the file at"),
        (made({}, b"x"), "the file at"),
    ],
)
def test_a_malformed_file_is_refused(file, message):
    with pytest.raises(CorruptCheckpointError, match=message):
        parse_header(file, len(file))


def test_a_fault_names_the_tensor_and_the_place():
    file = made({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, b"xxx")
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_header(file, len(file))
    assert (caught.value.key, caught.value.offset) == ("b", len(file) - 2)


def test_a_header_that_was_not_read_whole_is_refused():
    file = written({"w": ONES})
    end = header_nbytes(file[:8], len(file))
    assert parse_header(file[:end], len(file)) == parse_header(file, len(file))
    for nbytes in range(end):
        with pytest.raises(CorruptCheckpointError):
            parse_header(file[:nbytes], len(file))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 400),
            st.one_of(st.sampled_from(b'[]{}",:0 9-'), st.integers(0, 255)),
        ),
        max_size=6,
    ),
    st.integers(0, 30),
)
def test_a_damaged_file_is_read_or_refused(changes, num_cut):
    file = bytearray(
        written({"a": ONES, "b": COMPLEX, "c": torch.empty(2, 0)}, {"k": "v"})
    )
    for at, value in changes:
        file[at % len(file)] = value
    damaged = bytes(file[: len(file) - num_cut])
    try:
        header = parse_header(damaged, len(damaged))
    except CorruptCheckpointError:
        return
    # what is accepted, the official reader accepts, and reads the same
    official = dict(safetensors.deserialize(damaged))
    assert header.entries.keys() == official.keys()
    for name, found in header.entries.items():
        assert list(found.shape) == official[name]["shape"]
        data = damaged[found.start : found.start + found.nbytes]
        assert data == bytes(official[name]["data"])
