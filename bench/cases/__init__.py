"""What is asked: each case is a question, with the cells that answer it."""

__all__ = ["CASES"]

from bench.cases import beating, committing, devices, loading, saving, training
from bench.cases.base import Case

_ALL = [
    case
    for room in (saving, loading, training, beating, committing, devices)
    for case in room.CASES
]
# What the targets are about comes first: a run that is cut short still tells it.
_ORDER = (
    *("throughput", "small", "stall", "load", "into", "partial", "gap", "steps", "gil"),
    *("checksum", "commit", "growth", "field", "into_all"),
    *("gpu_save", "gpu_load", "gpu_into"),
)
CASES: dict[str, Case] = {
    case.name: case for case in sorted(_ALL, key=lambda each: _ORDER.index(each.name))
}
