"""What is asked: each case is a question, with the cells that answer it."""

__all__ = ["CASES"]

from bench.cases import beating, committing, loading, saving, training
from bench.cases.base import Case

CASES: dict[str, Case] = {
    case.name: case
    for room in (saving, loading, training, beating, committing)
    for case in room.CASES
}
