"""Torch files with one lie each, written field by field."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hostile.pickles import GOOD

ELEMENTS = struct.pack("<8f", *range(8))
STORED, DEFLATED = 0, 8
U32_MAX = 0xFFFF_FFFF
FLAGS_UTF8 = 0x0800

Lies = Mapping[str, int]


@dataclass(frozen=True)
class Table:
    """A fixed structure of the format, its fields by name."""

    struct: struct.Struct
    fields: Sequence[str]

    def pack(self, truth: Lies, lies: Lies) -> bytes:
        assert lies.keys() <= set(self.fields)
        values = {**truth, **lies}
        return self.struct.pack(*(values.get(name, 0) for name in self.fields))


def _table(layout: str, fields: str) -> Table:
    return Table(struct.Struct(layout), fields.split())


LOCAL = _table(
    "<IHHHHHIIIHH",
    "signature needed flags method time date crc stored size num_name num_extra",
)
ENTRY = _table(
    "<IHHHHHHIIIHHHHHII",
    "signature made_by needed flags method time date crc stored size num_name "
    "num_extra num_comment disk internal external offset",
)
END64 = _table(
    "<IQHHIIQQQQ",
    "signature rest made_by needed disk first_disk on_disk count nbytes offset",
)
LOCATOR = _table("<IIQI", "signature disk offset num_disks")
END = _table(
    "<IHHHHIIH", "signature disk first_disk on_disk count nbytes offset num_comment"
)


@dataclass(frozen=True)
class Record:
    """One record, and what its headers say otherwise than is true."""

    name: bytes
    data: bytes
    local: Lies = field(default_factory=dict)
    entry: Lies = field(default_factory=dict)
    local_extra: bytes = b""
    entry_extra: bytes = b""

    def fields(self) -> dict[str, int]:
        return {
            "needed": 45,
            "flags": FLAGS_UTF8,
            "method": STORED,
            "crc": zlib.crc32(self.data),
            "stored": len(self.data),
            "size": len(self.data),
            "num_name": len(self.name),
        }


def records(
    pickle: bytes = GOOD, storage: bytes = ELEMENTS, *, archive: bytes = b"archive"
) -> list[Record]:
    """The records of a good file: its pickle, a storage and what torch wants."""
    return [
        Record(archive + b"/data.pkl", pickle),
        Record(archive + b"/byteorder", b"little"),
        Record(archive + b"/data/0", storage),
        Record(archive + b"/version", b"3\n"),
    ]


def changed(index: int, **changes: object) -> list[Record]:
    """`records()` with one of them made anew; `data` alone keeps the headers true."""
    all_records = records()
    old = all_records[index]
    all_records[index] = Record(**{"name": old.name, "data": old.data, **changes})
    return all_records


def zip_file(
    all_records: Sequence[Record] | None = None,
    *,
    end64: Lies | None = None,
    locator: Lies | None = None,
    end: Lies | None = None,
    gap: bytes = b"",
) -> bytes:
    """A zip file of the records; `gap` stands between them and the directory."""
    body, directory = bytearray(), bytearray()
    all_records = records() if all_records is None else all_records
    for record in all_records:
        truth = record.fields()
        offset = len(body)
        extras = {"signature": 0x04034B50, "num_extra": len(record.local_extra)}
        body += LOCAL.pack(truth | extras, record.local)
        body += record.name + record.local_extra + record.data
        extras = {"signature": 0x02014B50, "num_extra": len(record.entry_extra)}
        directory += ENTRY.pack(truth | extras | {"offset": offset}, record.entry)
        directory += record.name + record.entry_extra
    start = len(body) + len(gap)
    totals = {
        "on_disk": len(all_records),
        "count": len(all_records),
        "nbytes": len(directory),
        "offset": start,
    }
    at = start + len(directory)
    return b"".join(
        (
            bytes(body),
            gap,
            bytes(directory),
            END64.pack({"signature": 0x06064B50, "rest": 44} | totals, end64 or {}),
            LOCATOR.pack(
                {"signature": 0x07064B50, "offset": at, "num_disks": 1}, locator or {}
            ),
            END.pack({"signature": 0x06054B50} | totals, end or {}),
        )
    )


def torch_file(pickle: bytes, storage: bytes = ELEMENTS) -> bytes:
    """A sound container around any pickle."""
    return zip_file(records(pickle, storage))


def boundaries() -> dict[str, int]:
    """Where the parts of the good file start, by name."""
    at, found = 0, {}
    for number, record in enumerate(records()):
        found[f"header-{number}"] = at
        found[f"name-{number}"] = at + LOCAL.struct.size
        found[f"data-{number}"] = at + LOCAL.struct.size + len(record.name)
        at = found[f"data-{number}"] + len(record.data)
    for number, record in enumerate(records()):
        found[f"entry-{number}"] = at
        at += ENTRY.struct.size + len(record.name)
    for name, table in (("end64", END64), ("locator", LOCATOR), ("end", END)):
        found[name] = at
        at += table.struct.size
    return found
