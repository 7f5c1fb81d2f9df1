"""Safetensors files whose header lies, beside some that are merely odd."""

import json
import struct
from functools import partial

from hostile.case import Case, harmless

_INFO = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
_DATA = struct.pack("<4f", *range(4))


def made(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header, told or true length, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = made({"w": _INFO, "__metadata__": {"format": "pt"}}, _DATA)


def _case(label: str, data: bytes) -> Case:
    return Case(f"safetensors: {label}", partial(bytes, data))


def _one(data: bytes = _DATA, **changes: object) -> bytes:
    return made({"w": {**_INFO, **changes}}, data)


def _two(first: tuple[int, int], second: tuple[int, int], nbytes: int) -> bytes:
    header = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in {"a": first, "b": second}.items()
    }
    return made(header, bytes(nbytes))


def _lengths() -> list[Case]:
    text = GOOD[8 : len(GOOD) - 16]
    lengths = [0, 1, len(text) - 1, len(text) + 1, len(text) + 17, 100_000_001]
    lengths += [1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    cases = [
        _case(f"a header said to be {length:#x} long", made(text, _DATA, length))
        for length in lengths
    ]
    cuts = [7, 8, 9, 8 + len(text) // 2, 8 + len(text), len(GOOD) - 1]
    cases += [_case(f"cut off at {nbytes}", GOOD[:nbytes]) for nbytes in cuts]
    over = json.dumps({"w": _INFO}).encode().ljust(100_000_001)
    return [
        *cases,
        Case("safetensors: a header over 100 MB", partial(made, over, _DATA)),
        _case("a byte behind it", GOOD + b"\0"),
        _case("a page behind it", GOOD + bytes(4096)),
    ]


def _texts() -> list[Case]:
    entry = json.dumps(_INFO).encode()
    texts = {
        "not JSON": b"{nonsense}",
        "JSON cut off": b'{"w": ' + entry,
        "JSON and more": b"{}{}",
        "a list": b"[]",
        "null": b"null",
        "white space first": b" {}",
        "a byte order mark": b"\xef\xbb\xbf{}",
        "not UTF-8": b'{"\xff": 1}',
        "UTF-16": '{"w": 1}'.encode("utf-16-le"),
        "half a surrogate": b'{"\\ud800": ' + entry + b"}",
        "two tensors of one name": b'{"w": ' + entry + b', "w": ' + entry + b"}",
        "two names that are one, escaped": b'{"w": '
        + entry
        + b', "\\u0077": '
        + entry
        + b"}",
        "two shapes": b'{"w": {"shape": [], ' + entry[1:] + b"}",
        "two metadata": b'{"__metadata__": {}, "__metadata__": {}}',
        "two metadata values": b'{"__metadata__": {"a": "1", "a": "2"}}',
        "a million brackets": b'{"w": ' + b"[" * 1_000_000,
        "a million braces": b'{"w":' * 1_000_000,
        "a number of a million digits": b'{"w": ' + b"9" * 1_000_000 + b"}",
        "a string that never ends": b'{"' + b"w" * 1_000_000,
        "comments": b'{/* */"w": ' + entry + b"}",
        "single quotes": b"{'w': 1}",
        "NaN for a tensor": b'{"w": NaN}',
        "Infinity for an offset": b'{"w": {"dtype":"U8","shape":[],"data_offsets":[0,Infinity]}}',
    }
    return [_case(label, made(text, _DATA)) for label, text in texts.items()]


def _values() -> list[Case]:
    shapes = {
        "negative": [-2, -2],
        "larger": [2, 3],
        "smaller": [2, 1],
        "fractional": [2.0, 2.0],
        "of text": ["2", "2"],
        "of booleans": [True, 4],
        "of null": [None],
        "nested": [[2, 2]],
        "a number": 4,
        "null": None,
        "2**63": [1 << 63],
        "2**64": [1 << 64],
        "overflowing to 4": [1 << 62, 4, 4],
        "overflowing, and empty": [1 << 62, 4, 0],
        "of 100 000 dimensions": [1 << 32] * 100_000,
    }
    cases = [_case(f"a shape {label}", _one(shape=s)) for label, s in shapes.items()]
    offsets = {
        "reversed": [16, 0],
        "negative": [-16, 0],
        "beyond the file": [0, 17],
        "far beyond the file": [0, 1 << 62],
        "too short": [0, 15],
        "late": [1, 17],
        "at 2**63": [1 << 63, (1 << 63) + 16],
        "at 2**64": [(1 << 64) - 16, 1 << 64],
        "one": [0],
        "three": [0, 8, 16],
        "fractional": [0.0, 16.0],
        "in exponents": [0, 1.6e1],
        "null": None,
    }
    cases += [
        _case(f"offsets {label}", _one(data_offsets=o)) for label, o in offsets.items()
    ]
    dtypes = ["F33", "f32", "", "F4", "F8_E8M0", None, 32, ["F32"], "F64", "U8"]
    cases += [_case(f"a dtype {dtype!r}", _one(dtype=dtype)) for dtype in dtypes]
    cases += [
        _case(
            f"without {field}",
            made(
                {
                    "w": _INFO.keys() - {field}
                    and {name: value for name, value in _INFO.items() if name != field}
                },
                _DATA,
            ),
        )
        for field in _INFO
    ]
    return [*cases, _case("a field nobody knows", _one(codec="zstd"))]


def _places() -> list[Case]:
    places = {
        "tensors that overlap": _two((0, 3), (2, 4), 4),
        "a tensor in another": _two((0, 4), (1, 2), 4),
        "two tensors in one place": _two((0, 4), (0, 4), 4),
        "a hole between tensors": _two((0, 2), (3, 4), 4),
        "a hole before all tensors": _two((1, 2), (2, 4), 4),
        "bytes of no tensor": _two((0, 2), (2, 3), 4),
        "data and no tensor": made({}, b"x"),
    }
    cases = [_case(label, data) for label, data in places.items()]
    metadata = [
        {"a": 1},
        {"a": None},
        {"a": ["b"]},
        {"a": {"b": "c"}},
        "text",
        None,
        [],
    ]
    cases += [
        _case(f"metadata {value!r}", made({"__metadata__": value, "w": _INFO}, _DATA))
        for value in metadata
    ]
    return cases


def _odd() -> list[Case]:
    names = [
        "",
        "../../evil",
        "/etc/passwd",
        "a\0b",
        "a\\b",
        "w\n\x1b[2J",
        "x" * 100_000,
    ]
    files = {f"a tensor {name[:20]!r}": made({name: _INFO}, _DATA) for name in names}
    files |= {
        "as it should be": GOOD,
        "no tensors": made({}),
        "a padded header": made(json.dumps({"w": _INFO}).encode() + b" " * 999, _DATA),
        "tensors of no elements": _two((0, 0), (0, 0), 0),
        "no dimensions": made(
            {"w": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, b"x"
        ),
        "2**62 wide, and empty": made(
            {"w": {"dtype": "U8", "shape": [1 << 62, 0], "data_offsets": [0, 0]}}
        ),
    }
    return [
        harmless(f"safetensors: {label}", partial(bytes, data))
        for label, data in files.items()
    ]


CASES = [*_lengths(), *_texts(), *_values(), *_places(), *_odd()]
