"""The disk as a power cut leaves it, at any moment of a log: row 6."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.places import run_command
from faults.power.flush_log import FLUSH, MARK, WRITE, Entry

NUM_DROPS = 5
BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Cut:
    """A moment at which the power is cut.

    Attributes:
        flush: The number of the last flush before it, from 1; 0 if there was none.
        drop: 0: at the flush itself; else the number of a cut after it, by which some
            writes have been lost that no flush followed.
        records: What a writer had told by then.
    """

    flush: int
    drop: int
    records: Sequence[dict[str, Any]] = field(repr=False)


class Replay:
    """Plays a log to an image, flush by flush."""

    def __init__(self, base: Path, entries: Sequence[Entry], seed: int) -> None:
        """Plays to `base`, the image as it was before the first entry."""
        self._base = base
        self._entries = entries
        self._choices = random.Random(seed)
        self._ends = [i for i, entry in enumerate(entries) if entry.kind == FLUSH]

    @property
    def num_flushes(self) -> int:
        """How many flushes there are."""
        return len(self._ends)

    def cuts(self, image: Path) -> Iterator[Cut]:
        """Makes `image` the disk of each cut, one after the other.

        Of what was not flushed each write is there or is not, with even odds; every
        second time each of its blocks. What was logged before a flush is flushed.
        """
        starts = [0, *(end + 1 for end in self._ends)]
        ends = [*self._ends, None]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            _copy(self._base, image)
            yield Cut(number, 0, _records(self._entries[:start]))
            unflushed = self._entries[start:end]
            for drop in range(1, NUM_DROPS + 1):
                length = self._choices.randint(0, len(unflushed))
                pieces = unflushed[:length]
                if drop % 2:
                    pieces = [block for entry in pieces for block in _blocks(entry)]
                _copy(self._base, image)
                _write(image, [e for e in pieces if self._choices.random() < 0.5])
                yield Cut(number, drop, _records(self._entries[: start + length]))
            _write(self._base, unflushed)


def _blocks(entry: Entry) -> Iterator[Entry]:
    """A write, in the blocks that reach a disk whole."""
    for start in range(0, len(entry.data), BLOCK_BYTES):
        part = entry.data[start : start + BLOCK_BYTES]
        yield Entry(entry.kind, entry.offset + start, part)


def _copy(source: Path, target: Path) -> None:
    run_command("cp", "--sparse=always", source, target)


def _write(image: Path, entries: Sequence[Entry]) -> None:
    descriptor = os.open(image, os.O_WRONLY)
    try:
        for entry in entries:
            if entry.kind == WRITE:
                os.pwrite(descriptor, entry.data, entry.offset)
    finally:
        os.close(descriptor)


def _records(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    marks = b"".join(entry.data for entry in entries if entry.kind == MARK)
    told = [json.loads(line) for line in marks.splitlines()]
    return [record for record in told if "pid" not in record]
