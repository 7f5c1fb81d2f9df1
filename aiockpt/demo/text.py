"""Training text that every machine has, and the order in which it is read."""

__all__ = ["CORPUS_BYTES", "Batches", "standard_library"]

import sysconfig
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

CORPUS_BYTES = 2 << 20


class Position(TypedDict):
    """Where `Batches` stands: all that it needs to go on from there."""

    seed: int
    epoch: int
    taken: int


def standard_library(max_bytes: int = CORPUS_BYTES) -> bytes:
    """The first `max_bytes` of Python's own top-level modules, in order of name."""
    corpus = bytearray()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(corpus) >= max_bytes:
            break
        corpus += source.read_bytes()
    return bytes(corpus[:max_bytes])


class Batches:
    """Batches of windows of a text; each epoch reads them shuffled, none twice."""

    def __init__(
        self, corpus: bytes, *, context: int, batch_size: int, seed: int
    ) -> None:
        """Stands at the first batch of the first epoch.

        Args:
            corpus: The text; what is left over after the last window is not read.
            context: Tokens to predict per window, which is one longer.
            batch_size: Windows per batch.
            seed: Decides the order, together with the epoch.
        """
        length = context + 1
        num_windows = len(corpus) // length
        whole = torch.frombuffer(bytearray(corpus), dtype=torch.uint8)
        self._windows = whole[: num_windows * length].view(num_windows, length)
        self._batch_size = batch_size
        self._at: Position = {"seed": seed, "epoch": 0, "taken": 0}
        self._order = self._shuffled()

    def next(self) -> Tensor:
        """The next batch of tokens, int64 `(batch_size, context + 1)`."""
        if self._at["taken"] + self._batch_size > len(self._order):
            self._at["epoch"] += 1
            self._at["taken"] = 0
            self._order = self._shuffled()
        start = self._at["taken"]
        self._at["taken"] = start + self._batch_size
        return self._windows[self._order[start : self._at["taken"]]].long()

    def state_dict(self) -> Position:
        """A copy of the position."""
        return self._at.copy()

    def load_state_dict(self, position: Position) -> None:
        """Stands where `position` was taken, whatever the seed was here."""
        self._at = position.copy()
        self._order = self._shuffled()

    def _shuffled(self) -> Tensor:
        # A generator of its own: the order does not depend on what else draws.
        generator = torch.Generator()
        generator.manual_seed(self._at["seed"] * 1_000_003 + self._at["epoch"])
        return torch.randperm(len(self._windows), generator=generator)
