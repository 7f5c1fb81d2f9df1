"""The results of the fault matrix, from their first line to the page of the docs.

    python tests/faults/report.py begin                  prints the new file
    python tests/faults/report.py note FILE "TEXT"       what has to be known of it
    python tests/faults/report.py write docs/faults.md

`begin` makes a file of results, named by machine, time and commit, whose first line is
the machine; the matrix (`--faults-report`) and `peers.py` add to it. `write` makes the
page of all files that are kept, which may be parts of one run: a fault's counts are
taken from the last of them that has it. It fails where a row is missing or was run at the
counts of the ordinary tests, or something was not survived.
"""

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RESULTS = HERE / "results"

# What makes the fault of each row. Every one of these must be in the results.
TOOLS = {
    1: "calls intercepted in the process",
    2: "calls intercepted in the process",
    3: "SIGKILL in a forked process",
    4: "SIGKILL in a job of four processes",
    5: "shutdown ioctl on a loop image; btrfs: copied image",
    6: "log of a FUSE disk, replayed on loop images",
    7: "calls intercepted; thin loop images",
    8: "asyncio",
    9: "edited files; calls intercepted",
    10: "small and forbidden file systems, limits of the process",
    11: "calls intercepted; cgroup",
    12: "calls intercepted; fsfreeze, blkio, SIGSTOP",
    13: "processes, threads and tasks",
    14: "iptables and tc between two network namespaces",
    16: "a catalogue of files; hypothesis; atheris",
    17: "SIGKILL and errno, one after the other",
    18: "loop images, tmpfs, ramfs, overlay, FUSE",
    20: "aiockpt broken on purpose",
    21: "one process",
}
# The rows of the matrix that are not here, and why.
NOT_RUN = {
    15: "object stores: aiockpt writes to file systems only, so there is nothing to test",
    19: "device-mapper faults and a stopped NFS server, which take a kernel of their own "
    "(User-mode Linux): not run",
}
LOST = ("missing", "older", "unreadable", "wrong", "torn")
SEEN = ("detected", "harmless", "undetected")
COMPARISONS = ("disk", "unflushed", "damage")
NAMES = {"new": "a new name each time", "again": "four names, in turns"}

Record = dict[str, Any]
Topic = tuple[object, ...]


def machine() -> Record:
    """Where and of what the results are."""
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "safetensors": version("safetensors"),
        "commit": _commit(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def _commit() -> str:
    """The commit, marked where the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    return done.stdout.strip()


def begin() -> Path:
    """A file of results that has only its first line."""
    about = machine()
    RESULTS.mkdir(exist_ok=True)
    now = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M")
    path = RESULTS / f"faults_{about['cores']}cores_{now}_{about['commit']}.jsonl"
    path.write_text(json.dumps({"machine": about}) + "\n", encoding="utf-8")
    return path


def note(path: Path, text: str) -> None:
    """Adds to results what has to be known of them: what was left out, say."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"note": text}) + "\n")


@dataclass(frozen=True)
class Source:
    """One file of results.

    Attributes:
        name: Its path, below the repository.
        about: Where and of what it is.
        records: The other lines.
    """

    name: str
    about: Record
    records: Sequence[Record]

    @classmethod
    def read(cls, path: Path) -> "Source":
        """The file at a path."""
        lines = path.read_text(encoding="utf-8").splitlines()
        first, *records = [json.loads(line) for line in lines]
        name = str(path.resolve().relative_to(REPOSITORY))
        return cls(name, first["machine"], records)

    @property
    def notes(self) -> list[str]:
        """What has to be known of it."""
        return [record["note"] for record in self.records if "note" in record]

    def topics(self) -> set[Topic]:
        """What it has results on."""
        return {topic for record in self.records if (topic := _topic(record))}


def _topic(record: Record) -> Topic:
    """A fault, or a comparison: all results on it come from one file."""
    if "row" in record:
        return record["row"], record["fault"]
    return tuple(kind for kind in COMPARISONS if kind in record)


def _is_replaced(record: Record, later: AbstractSet[Topic]) -> bool:
    """Whether later files have results on all that it is about."""
    if "failed" not in record:
        return _topic(record) in later
    topics = {tuple(topic) for topic in record["topics"]}
    return bool(topics) and topics <= later


def newest(sources: Sequence[Source]) -> list[Source]:
    """Those that have results on what no later one has, and these results."""
    left: list[Source] = []
    later: set[Topic] = set()
    for source in reversed(sources):
        kept = [each for each in source.records if not _is_replaced(each, later)]
        # Of what was replaced, failures do not matter any more; of the last, they do.
        if any(map(_topic, kept)) or not left:
            left.insert(0, replace(source, records=kept))
        later |= source.topics()
    return left


def problems(records: Sequence[Record]) -> Iterator[str]:
    """What is missing in the results, and what was not survived."""
    rows = {record["row"] for record in records if "row" in record}
    yield from (f"row {row} was not run" for row in sorted(TOOLS.keys() - rows))
    for record in records:
        if "failed" in record:
            yield f"failed: {record['failed']}"
        if record.get("cases") == 0:
            yield f"nothing was tried: {record}"
        if record.get("run") == "ordinary":
            yield f"not at its long count: {record}"
        if record.get("survived") != record.get("cases"):
            yield f"not survived: {record}"
        lost = [record.get(key, 0) for key in (*LOST, "undetected")]
        if record.get("contender") == "aiockpt" and any(lost):
            yield f"lost by aiockpt: {record}"
    for kind in COMPARISONS:
        if not any(kind in record for record in records):
            yield f"no comparison by {kind}"


# --- the page ---------------------------------------------------------------------

HEAD = """# Faults

What aiockpt was put through, and how much of it it survived. This page is made of files
of results; nothing in it is written by hand:

{sources}
To repeat it, as root:

```sh
python3 -m pip install nox && python3 -m nox -s faults
```

*Long* is a run at the counts that are aimed for, *0.1 of long* at a tenth of them, where
that is more than the ordinary run of the tests; a fuzzer is run for some seconds. A case
is survived if all that must hold held: what was acknowledged is there and loads to the
last bit, nothing torn can be seen, errors name their cause, and the next engine goes on.
A mutant is survived if it was caught. Rows 5 and 6 cut the power of file systems on images
of their own: in row 5 all that the file system had not yet handed to its disk is lost, at
any moment of a save; in row 6 also what the disk was not told to flush, in part and in any
order.

"""

OTHERS = """
Not in this table are

"""

PEERS = """
## Beside its peers

Each in its ordinary use, in one process; what was saved is acknowledged when the call
has returned. The power is cut within a tenth of a second of an acknowledgement, and
before half of the cuts the kernel writes back what it caches at any moment. Saves that
are older than the kernel's write-back, usually half a minute, are not at risk by this.

- *missing*, *unreadable*: acknowledged, and it is gone, or fails to load.
- *older*: acknowledged, and what was there before is there still.
- *wrong*: loads without an error, and is not what was saved.
- *torn*: never acknowledged, has its name, and fails to load.

"""

UNFLUSHED = """
### What a disk was not told to flush

A few saves on a disk that logs what reaches it, and its flushes. The power is cut at
each flush, and five times between it and the next, with some of the writes in between
lost. Acknowledged saves are counted with each cut again. Who never syncs has few cuts,
at the flushes of the file system itself.

"""

DAMAGE = """
### Damaged files

One change to one file of a saved checkpoint, which is then loaded: *detected* by an
error, *harmless* where what was saved is loaded all the same, or *undetected*.

"""


def merged(rows: Iterable[Record]) -> list[Record]:
    """One record for each kind of fault; several runs may have added to one."""
    found: dict[tuple[int, str, str], Record] = {}
    for record in rows:
        key = record["row"], record["fault"], record["run"]
        if key not in found:
            found[key] = {**record, "cases": 0, "survived": 0}
        for count in ("cases", "survived"):
            found[key][count] += record[count]
    return [found[key] for key in sorted(found)]


_SOURCE = (
    "- `{name}`: commit {commit}, {date}; {cores} cores, Linux {kernel}, "
    "Python {python}, torch {torch}, safetensors {safetensors}; {what}.\n"
)


def _listed(source: Source) -> str:
    rows = sorted({each["row"] for each in source.records if "row" in each})
    what = [f"rows {', '.join(map(str, rows))}"] if rows else []
    if {(kind,) for kind in COMPARISONS} & source.topics():
        what.append("peers")
    line = _SOURCE.format(name=source.name, what=" and ".join(what), **source.about)
    return line + "".join(f"    - {note}\n" for note in source.notes)


def page(sources: Sequence[Source]) -> str:
    """The page of these results."""
    records = [record for source in sources for record in source.records]
    rows = [record for record in records if "row" in record]
    faults = merged(rows)
    disks = [record for record in records if "disk" in record]
    unflushed = [record for record in records if "unflushed" in record]
    damages = [record for record in records if "damage" in record]
    return (
        HEAD.format(sources="".join(map(_listed, sources)))
        + _table(
            ("row", "name", "fault", "tool", "run", "cases", "survived"),
            ({**record, "tool": TOOLS[record["row"]]} for record in faults),
        )
        + f"\n{sum(record['survived'] for record in rows):,} of "
        + f"{sum(record['cases'] for record in rows):,} cases survived.\n"
        + _failed(
            list({record["failed"]: None for record in records if "failed" in record})
        )
        + OTHERS
        + "".join(f"- row {row}, {why}.\n" for row, why in NOT_RUN.items())
        + PEERS
        + _table(
            ("disk", "saved under", "contender", "cuts", "acknowledged", *LOST),
            ({**record, "saved under": NAMES[record["names"]]} for record in disks),
        )
        + UNFLUSHED
        + _table(
            ("unflushed", "contender", "saves", "cuts", "acknowledged", *LOST),
            unflushed,
        )
        + DAMAGE
        + _table(("damage", "contender", *SEEN), damages)
    )


def _failed(tests: Sequence[str]) -> str:
    listed = "".join(f"- `{test}`\n" for test in tests)
    return f"\nTests that failed:\n\n{listed}" if tests else ""


def _table(columns: Sequence[str], records: Iterable[Record]) -> str:
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(record[column]) for column in columns] for record in records]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kept() -> list[Source]:
    """What the page is made of."""
    paths = sorted(RESULTS.glob("faults_*.jsonl"), key=_when)
    return newest([Source.read(path) for path in paths])


def _when(path: Path) -> str:
    """The time in a name: `faults_2cores_20261128T1930_COMMIT.jsonl`."""
    return path.name.split("_")[2]


def write(target: Path) -> None:
    """Writes the page; then fails if anything is amiss."""
    sources = kept()
    target.write_text(page(sources), encoding="utf-8")
    records = [record for source in sources for record in source.records]
    if found := list(problems(records)):
        sys.exit("\n".join(found))


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    commands.add_parser("begin").set_defaults(
        run=lambda _: sys.stdout.write(f"{begin()}\n")
    )
    noting = commands.add_parser("note")
    noting.add_argument("results", type=Path)
    noting.add_argument("text")
    noting.set_defaults(run=lambda given: note(given.results, given.text))
    writing = commands.add_parser("write")
    writing.add_argument("target", type=Path)
    writing.set_defaults(run=lambda given: write(given.target))
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
