"""Whatever is done to a good file, it is read or refused."""

import json
import pickle

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hostile import pickles, safetensors_cases
from hostile.fuzzing import (
    TARGETS,
    fuzz_directory,
    fuzz_file,
    fuzz_outline,
    fuzz_pickle,
    fuzz_safetensors_header,
)
from hostile.zip_files import (
    END,
    END64,
    ENTRY,
    LOCAL,
    LOCATOR,
    Record,
    Table,
    records,
    zip_file,
)

FUZZED = "fuzzed by hypothesis"

# These cost little each, and much of what is tried is refused at once.
more_examples = settings(max_examples=6 * settings.default.max_examples)

BYTES = st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), st.integers(0, 255))


@st.composite
def mutations(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A good input with a few edits: bytes, splices, repetitions, cuts."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        stop = draw(st.integers(start, min(start + 64, len(data))))
        other = draw(st.sampled_from(seeds))
        taken = draw(st.integers(0, len(other)))
        piece = draw(
            st.one_of(
                st.lists(BYTES, min_size=1, max_size=8).map(bytes),
                st.just(other[taken : taken + 64]),
                st.integers(1, 50).map(lambda n, part=data[start:stop]: part * n),
                st.just(b""),
            )
        )
        if draw(st.booleans()):
            stop = start + len(piece)
        data = data[:start] + piece + data[stop:]
    return data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))]


@pytest.mark.parametrize("name", TARGETS)
@more_examples
@given(data=st.data())
def test_a_damaged_input_is_read_or_refused(cases, name, data):
    target = TARGETS[name]
    damaged = data.draw(mutations(target.seeds))
    with cases.case(16, FUZZED, name):
        target.run(damaged)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(cases, name, data):
    with cases.case(16, FUZZED, name):
        TARGETS[name].run(data)


# --- edits of structure -----------------------------------------------------------


@st.composite
def lies(draw: st.DrawFn, table: Table) -> dict[str, int]:
    """Some fields of a header, and what they say instead; mostly none."""
    code = table.struct.format.lstrip("<")
    found = {}
    for name in draw(st.lists(st.sampled_from(table.fields), max_size=2)):
        num_bits = {"H": 16, "I": 32, "Q": 64}[code[table.fields.index(name)]]
        top = (1 << num_bits) - 1
        edges = [0, 1, 8, 31, 33, top // 2, top // 2 + 1, top - 1, top]
        value = st.one_of(
            st.sampled_from(edges), st.integers(0, 700), st.integers(0, top)
        )
        found[name] = draw(value)
    return found


NAMES = st.one_of(
    st.sampled_from([record.name for record in records()]),
    st.sampled_from([b"archive/data/1", b"archive/../x", b"/", b"", b"archive/\xff"]),
    st.binary(max_size=20),
)


@st.composite
def records_of_a_file(draw: st.DrawFn) -> list[Record]:
    """The records of a good file: left out, repeated, renamed, with lies about them."""
    chosen = draw(
        st.one_of(st.just(records()), st.lists(st.sampled_from(records()), max_size=5))
    )
    is_sound = st.booleans()
    return [
        record
        if draw(is_sound)
        else Record(
            draw(st.one_of(st.just(record.name), NAMES)),
            draw(st.one_of(st.just(record.data), st.binary(max_size=40))),
            draw(lies(LOCAL)),
            draw(lies(ENTRY)),
            draw(st.binary(max_size=30)),
            draw(st.binary(max_size=30)),
        )
        for record in chosen
    ]


@st.composite
def end_records(draw: st.DrawFn) -> dict[str, dict[str, int]]:
    """What the end records say otherwise; of the number of records, all the same."""
    ends = {
        "end64": draw(lies(END64)),
        "locator": draw(lies(LOCATOR)),
        "end": draw(lies(END)),
    }
    if draw(st.booleans()):
        count = draw(st.integers(0, 9))
        for name in ("end64", "end"):
            ends[name] |= {"on_disk": count, "count": count}
    return ends if draw(st.booleans()) else {}


@more_examples
@given(all_records=records_of_a_file(), ends=end_records(), gap=st.binary(max_size=40))
def test_a_file_of_lies_is_read_or_refused(cases, all_records, ends, gap):
    data = zip_file(all_records, gap=gap, **ends)
    with cases.case(16, FUZZED, "a file of lies"):
        fuzz_directory(data)
        fuzz_file(data)


SIMPLE_OPCODES = [
    getattr(pickle, name)
    for name in ["MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "BINPERSID", "MEMOIZE", "STOP"]
]  # fmt: skip
SMALL = st.integers(-2, 12)
NUMBERS = st.one_of(SMALL, st.sampled_from([1 << 31, 1 << 62, 1 << 63, -(1 << 63)]))
GLOBALS = [
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "FloatStorage"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "device"),
    ("torch.nn.parameter", "Parameter"),
    ("torch", "Tensor"),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("builtins", "set"),
    ("builtins", "bytearray"),
    ("builtins", "complex"),
    ("_codecs", "encode"),
    ("posix", "getcwd"),
]
# A few numbers: what torch is asked to make stays small, so that memory that is only
# reserved does not tell a slow example from a hang.
TENSORS = st.builds(
    lambda shape, stride, offset: pickles.tensor(
        shape=tuple(shape), stride=tuple(stride), offset=offset
    ),
    st.lists(SMALL, max_size=3),
    st.lists(SMALL, max_size=3),
    NUMBERS,
)
STORAGES = st.builds(
    pickles.storage,
    st.sampled_from(["0", "1", "", "../0"]),
    NUMBERS,
    st.sampled_from(["FloatStorage", "ByteStorage", "NoStorage"]),
    st.sampled_from(["cpu", "meta", "cuda:0", "nowhere"]),
)
WORDS = st.one_of(
    st.sampled_from(SIMPLE_OPCODES),
    st.sampled_from(GLOBALS).map(lambda pair: pickles.name(*pair)),
    NUMBERS.map(pickles.number),
    st.text(max_size=3).map(pickles.text),
    st.integers(0, 3).map(pickles.put),
    st.integers(0, 3).map(pickles.get),
    TENSORS,
    STORAGES,
)
VALUES = st.recursive(
    st.one_of(NUMBERS.map(pickles.number), st.just(b"N"), TENSORS, STORAGES),
    lambda part: st.one_of(
        st.lists(part, max_size=4).map(lambda parts: pickles.list_of(*parts)),
        st.lists(part, max_size=4).map(lambda parts: pickles.tuple_of(*parts)),
        st.lists(st.tuples(part, part), max_size=3).map(
            lambda pairs: pickles.dict_of(*pairs)
        ),
        st.builds(
            lambda pair, args: pickles.call(pickles.name(*pair), *args),
            st.sampled_from(GLOBALS),
            st.lists(part, max_size=7),
        ),
    ),
    max_leaves=12,
)


@more_examples
@given(body=st.one_of(VALUES, st.lists(WORDS, max_size=25).map(b"".join)))
def test_a_pickle_of_any_words_is_loaded_or_refused(cases, body):
    data = pickles.whole(body)
    with cases.case(16, FUZZED, "a pickle"):
        fuzz_outline(data)
        fuzz_pickle(data)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        NUMBERS,
        st.floats(),
        st.sampled_from(["F32", "U8", "BOOL", "w", "__metadata__", "dtype", "shape"]),
        st.text(max_size=3),
    ),
    lambda part: st.one_of(
        st.lists(part, max_size=3),
        st.dictionaries(st.text(max_size=3), part, max_size=3),
    ),
    max_leaves=8,
)
TENSOR_INFOS = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "U8", "BOOL", "I64"]), JSON),
        "shape": st.one_of(st.lists(SMALL, max_size=3), JSON),
        "data_offsets": st.one_of(st.lists(SMALL, min_size=2, max_size=2), JSON),
    },
    optional={"codec": JSON},
)
HEADERS = st.dictionaries(
    st.one_of(st.sampled_from(["w", "__metadata__"]), st.text(max_size=3)),
    st.one_of(TENSOR_INFOS, JSON),
    max_size=3,
)


@more_examples
@given(
    header=HEADERS,
    num_bytes=st.integers(0, 16),
    length=st.one_of(st.none(), st.integers(0, 1 << 64 - 1)),
)
def test_a_header_of_any_json_is_read_or_refused(cases, header, num_bytes, length):
    text = json.dumps(header).encode()
    data = safetensors_cases.made(text, bytes(num_bytes), length)
    with cases.case(16, FUZZED, "a header"):
        fuzz_safetensors_header(data)
        fuzz_file(data)
