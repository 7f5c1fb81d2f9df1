"""Torch files whose container lies: every header field, every boundary, every name."""

import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from hostile.case import CORRUPT, INVALID, Case, Expected, harmless
from hostile.pickles import GOOD
from hostile.zip_files import (
    DEFLATED,
    ELEMENTS,
    LOCAL,
    U32_MAX,
    Record,
    boundaries,
    changed,
    records,
    zip_file,
)

# Record 2 is the storage, of 32 bytes.
STORAGE = 2
_FAR = (1 << 63) - 1
_WRONG = {
    "local": {
        "signature": [0, 0x02014B50],
        "flags": [0x0801, 0x0840, 0x2800, 0xFFFF],
        "method": [DEFLATED, 12, 99, 0xFFFF],
        "crc": [0, 1],
        "stored": [0, 31, 33, 1 << 31],
        "size": [0, 31, 33, 1 << 31],
        "num_name": [0, 13, 15, 0xFFFF],
        "num_extra": [1, 4, 0xFFFF],
    },
    "entry": {
        "signature": [0, 0x04034B50],
        "flags": [0x0801, 0x0840, 0x2800, 0xFFFF],
        "method": [DEFLATED, 12, 99, 0xFFFF],
        "crc": [0, 1],
        "stored": [0, 31, 33, U32_MAX],
        "size": [0, 31, 33, U32_MAX],
        "num_name": [0, 13, 15, 0xFFFF],
        "num_extra": [1, 46, 0xFFFF],
        "num_comment": [1, 46, 0xFFFF],
        "disk": [1, 0xFFFF],
        "offset": [0, 1, 1 << 31, U32_MAX - 1, U32_MAX],
    },
    "end64": {
        "signature": [0],
        "rest": [0, 43, 45, _FAR],
        "disk": [1],
        "first_disk": [1],
        "on_disk": [0, 3, 5, _FAR],
        "count": [0, 3, 5, 1 << 32, _FAR],
        "nbytes": [0, 1, 1 << 32, _FAR, (1 << 64) - 1],
        "offset": [0, 1, 1 << 32, _FAR, (1 << 64) - 1],
    },
    "locator": {
        "signature": [0],
        "disk": [1],
        "offset": [0, 1, _FAR, (1 << 64) - 1],
        "num_disks": [0, 2, U32_MAX],
    },
    "end": {
        "signature": [0],
        "disk": [1, 0xFFFF],
        "first_disk": [1, 0xFFFF],
        "on_disk": [0, 3, 5],
        "count": [0, 3, 5],
        "nbytes": [0, 1],
        "offset": [0, 1],
        "num_comment": [1, 0xFFFF],
    },
}
# What says nothing about where or what a record is.
_IDLE = {
    "local": {"flags": 0x0808, "needed": 0xFFFF, "time": 0xFFFF, "date": 0xFFFF},
    "entry": {
        "made_by": 0xFFFF,
        "needed": 0xFFFF,
        "time": 0xFFFF,
        "date": 0xFFFF,
        "internal": 0xFFFF,
        "external": 0o100644 << 16,
    },
    "end64": {"made_by": 0xFFFF, "needed": 0xFFFF},
}


def _with(where: str, field: str, value: int) -> bytes:
    """The good file with one field wrong: of the storage, or of the end records."""
    lie = {field: value}
    if where in ("local", "entry"):
        return zip_file(changed(STORAGE, **{where: lie}))
    return zip_file(**{where: lie})


def _fields() -> list[Case]:
    wrong = [
        Case(f"zip: {where} {field} {value:#x}", partial(_with, where, field, value))
        for where, fields in _WRONG.items()
        for field, values in fields.items()
        for value in values
    ]
    idle = [
        harmless(
            f"zip: {where} {field} {value:#x}", partial(_with, where, field, value)
        )
        for where, fields in _IDLE.items()
        for field, value in fields.items()
    ]
    return wrong + idle


def _case(label: str, all_records: Sequence[Record], load: Expected = CORRUPT) -> Case:
    return Case(f"zip: {label}", partial(zip_file, all_records), load, load, load)


def _zip64(*numbers: int, kind: int = 1) -> bytes:
    body = struct.pack(f"<{len(numbers)}Q", *numbers)
    return struct.pack("<HH", kind, len(body)) + body


def _zip64_lies() -> list[Case]:
    wide = {"stored": U32_MAX, "size": U32_MAX, "offset": U32_MAX}
    extras = {
        "no zip64 extra": b"",
        "a zip64 extra cut off": _zip64(32, 32, 0)[:-1],
        "a zip64 extra of two numbers": _zip64(32, 32),
        "a zip64 extra of another kind": _zip64(32, 32, 0, kind=2),
        "a zip64 length of 2**63": _zip64(1 << 63, 1 << 63, 0),
        "a zip64 length of 2**64 - 1": _zip64((1 << 64) - 1, (1 << 64) - 1, 0),
        "two zip64 lengths": _zip64(32, 33, 0),
        "a zip64 offset of 2**63": _zip64(32, 32, 1 << 63),
        "a zip64 offset of another record": _zip64(32, 32, 0),
        "a zip64 sum that overflows": _zip64((1 << 64) - 32, (1 << 64) - 32, 32),
    }
    return [
        _case(label, changed(STORAGE, entry=wide, entry_extra=extra))
        for label, extra in extras.items()
    ]


def _names() -> list[Case]:
    names = {
        "no name": b"",
        "only a slash": b"/",
        "an absolute name": b"/etc/cron.d/x",
        "a name that goes up": b"../../evil",
        "a name that goes up inside": b"archive/../../evil",
        "a name that ends by going up": b"archive/data/..",
        "a name with a dot": b"archive/./data/0",
        "a name with an empty part": b"archive//data/0",
        "a directory": b"archive/data/",
        "a name with NUL": b"archive/data/0\0.txt",
        "a name that is not UTF-8": b"archive/data/\xff\xfe",
        "half a surrogate in a name": b"archive/data/\xed\xa0\x80",
        "a name of another archive": b"evil/data/0",
        "a name without an archive": b"data.pkl",
        "a TorchScript archive": b"archive/constants.pkl",
    }
    cases = [
        _case(label, [*records(), Record(name, b"x")]) for label, name in names.items()
    ]
    odd = {
        "a name with a backslash": b"archive/..\\..\\evil",
        "a name with a drive": b"archive/C:/evil",
        "a name of 60 000 bytes": b"archive/" + b"x" * 60_000,
        "a name with line breaks": b"archive/a\r\nb\x1b[2J",
        "a record nobody refers to": b"archive/data/9",
    }
    cases += [
        harmless(f"zip: {label}", partial(zip_file, [*records(), Record(name, b"x")]))
        for label, name in odd.items()
    ]
    renamed = changed(STORAGE, name=b"archive/data/1")
    lost = Case("zip: the storage under another name", partial(zip_file, renamed))
    return [*cases, replace(lost, verify=None)]


def _nested() -> list[Record]:
    """The good records, one more, and one that stands inside that one's data."""
    inner = Record(b"archive/data/2", b"twice")
    truth = inner.fields() | {"signature": 0x04034B50}
    outer = Record(b"archive/data/1", LOCAL.pack(truth, {}) + inner.name + inner.data)
    start = boundaries()["entry-0"] + LOCAL.struct.size + len(outer.name)
    # The local header that is written for it behind the others is never looked at.
    listed = Record(inner.name, inner.data, entry={"offset": start})
    return [*records(), outer, listed]


def _layouts() -> list[Case]:
    whole = records()
    pickle, order, storage, version = whole
    twice = Record(storage.name, bytes(32))
    hidden = Record(b"archive/data/1", bytes(32), entry={"offset": 0})
    nested = Record(b"archive/data/1", bytes(4), entry={"offset": 60})
    inside = zip_file()
    huge = Record(storage.name, ELEMENTS, entry={"stored": 1 << 31, "size": 1 << 31})
    agreeing = {"stored": 1 << 30, "size": 1 << 30}
    giant = Record(storage.name, ELEMENTS, local=agreeing, entry=agreeing)
    squeezed = Record(
        storage.name,
        bytes(8),
        local={"method": DEFLATED, "size": 1 << 30},
        entry={"method": DEFLATED, "size": 1 << 30},
    )
    locked = Record(storage.name, ELEMENTS, local={"flags": 1}, entry={"flags": 1})
    mismatched = Record(storage.name, ELEMENTS, local={"crc": 7}, entry={"crc": 7})
    wrong_pickle = Record(pickle.name, GOOD, local={"crc": 7}, entry={"crc": 7})
    only_entry = Record(storage.name, ELEMENTS, local={"signature": 0})
    cases = [
        _case("no records", []),
        _case("no pickle", whole[1:]),
        _case("no version", whole[:-1]),
        _case("two records of one name", [*whole, twice]),
        _case("two pickles", [*whole, pickle]),
        _case("two records in one place", [*whole, hidden]),
        _case("a record in another", _nested()),
        _case("a record in the middle of another", [*whole, nested]),
        _case("a storage of 2 GiB that is not there", [pickle, order, huge, version]),
        _case("a storage of 1 GiB by both accounts", [pickle, order, giant, version]),
        _case("a deflated bomb", [pickle, order, squeezed, version]),
        _case("an encrypted storage", [pickle, order, locked, version]),
        _case("a storage with a wrong sum", [pickle, order, mismatched, version]),
        _case("a pickle with a wrong sum", [wrong_pickle, order, storage, version]),
        _case("a storage without a header", [pickle, order, only_entry, version]),
        _case("a version of letters", changed(3, data=b"three")),
        _case("a version of nothing", changed(3, data=b"")),
        _case("a negative version", changed(3, data=b"-3")),
        _case("a version of 5000 digits", changed(3, data=b"3" * 5000), INVALID),
        _case("a version of the future", changed(3, data=b"11\n"), INVALID),
        _case("a big-endian file", changed(1, data=b"big"), INVALID),
        _case("no byte order that there is", changed(1, data=b"middle"), INVALID),
        Case("zip: 5000 bytes before it", lambda: bytes(5000) + inside),
        Case("zip: a zip in front of a zip", lambda: inside + inside),
        Case("zip: a byte behind it", lambda: inside + b"\1"),
        Case("zip: a comment cut off", lambda: inside[:-2] + b"\5\0abc"),
        Case("zip: only an end record", lambda: b"PK\3\4" + inside[-22:]),
        harmless("zip: zeros behind it", lambda: inside + bytes(4096)),
        harmless("zip: no byte order", partial(zip_file, [pickle, storage, version])),
        harmless("zip: records in another order", partial(zip_file, whole[::-1])),
        harmless("zip: a gap before the directory", partial(zip_file, gap=bytes(99))),
    ]
    # What is said of sums is not looked at where nothing is read.
    unread = {"zip: a storage with a wrong sum"}
    short = [replace(c, inspect=None) if c.name in unread else c for c in cases]
    lengths = {0: "no bytes", 28: "28 bytes", 31: "31 bytes", 33: "33 bytes"}
    for nbytes, label in lengths.items():
        found = _case(f"a storage of {label}", changed(STORAGE, data=bytes(nbytes)))
        short.append(replace(found, verify=None))
    return short


def _cuts() -> list[Case]:
    whole = zip_file()
    at = boundaries()
    cases = [
        Case(f"zip: cut off {delta:+d} of {name}", partial(_cut, whole, start + delta))
        for name, start in at.items()
        for delta in (-1, 0, 1)
        if start + delta >= 0
    ]
    gone = [
        Case(f"zip: without the bytes before {name}", partial(_tail, whole, start))
        for name, start in at.items()
        if start
    ]
    return cases + gone


def _cut(data: bytes, nbytes: int) -> bytes:
    return data[:nbytes]


def _tail(data: bytes, start: int) -> bytes:
    return data[start:]


def _strangers() -> list[Case]:
    contents = {
        "no bytes": b"",
        "a byte": b"x",
        "zeros": bytes(70_000),
        "PK": b"PK",
        "a header's start": b"PK\3\4",
        "end records only": b"PK\5\6" + bytes(18),
        "an end record cut off": b"PK\3\4PK\5\6" + bytes(9),
        "a hundred end records": b"PK\3\4" + (b"PK\5\6" + bytes(18)) * 100,
        "text": b"Not a checkpoint, but a letter to its reader.\n" * 100,
        "a bare pickle": GOOD,
        "an ELF file": b"\x7fELF\2\1\1" + bytes(505),
        "gzip": b"\x1f\x8b\x08" + bytes(509),
    }
    return [
        Case(f"no checkpoint: {label}", partial(bytes, content))
        for label, content in contents.items()
    ]


CASES = [
    *_fields(),
    *_zip64_lies(),
    *_names(),
    *_layouts(),
    *_cuts(),
    *_strangers(),
]
