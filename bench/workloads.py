"""What is saved: state dicts of a given size, the same in every process."""

__all__ = ["GIB", "KIB", "MIB", "SEED", "Scale", "Workload", "flatten", "shared"]

import mmap
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from bench.scratch import shared_file

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
SEED = 20

_ALIGNMENT = 64


class Scale(StrEnum):
    """How much is measured: to be published, to try a change, or to see it run."""

    FULL = "full"
    MEDIUM = "medium"
    TINY = "tiny"

    def size(self, nbytes: int) -> int:
        """The bytes of what has `nbytes` at full scale."""
        parts = {Scale.FULL: 1, Scale.MEDIUM: 8, Scale.TINY: 512}
        return max(nbytes // parts[self], min(nbytes, 2 * MIB))

    def number(self, number: int) -> int:
        """The number of things of which there are `number` at full scale."""
        parts = {Scale.FULL: 1, Scale.MEDIUM: 4, Scale.TINY: 200}
        return max(number // parts[self], min(number, 20))

    def repeats(self, number: int) -> int:
        """The repeats of what is repeated `number` times at full scale."""
        return {Scale.FULL: number, Scale.MEDIUM: min(number, 2), Scale.TINY: 1}[self]

    def seconds(self, seconds: float) -> float:
        """The length of a pause."""
        return seconds / {Scale.FULL: 1, Scale.MEDIUM: 2, Scale.TINY: 20}[self]


@dataclass(frozen=True)
class Workload:
    """One state dict of float32 tensors.

    Attributes:
        nbytes: Bytes of all tensors.
        num_tensors: How many there are.
        spread: 1 for tensors of equal size; else how many times the largest may be as
            large as the smallest, with as many in each octave between.
        is_nested: Whether the tensors stand in dicts of dicts, as a model's and an
            optimizer's do, or in one flat dict.
        device: Where the tensors are.
    """

    nbytes: int
    num_tensors: int = 300
    spread: int = 1
    is_nested: bool = False
    device: str = "cpu"

    @property
    def is_on_gpu(self) -> bool:
        """Whether the tensors are on a CUDA device."""
        return torch.device(self.device).type == "cuda"

    @property
    def label(self) -> str:
        """A name for tables."""
        size = (
            f"{self.nbytes / GIB:g} GiB"
            if self.nbytes >= GIB // 4
            else f"{self.nbytes / MIB:g} MiB"
        )
        return f"{size}, {self.num_tensors} tensors"

    def numels(self) -> list[int]:
        """Elements of each tensor."""
        rng = random.Random(SEED)  # noqa: S311 - the same sizes every time
        weights = [self.spread ** rng.random() for _ in range(self.num_tensors)]
        unit = self.nbytes / 4 / sum(weights)
        return [max(1, int(weight * unit)) for weight in weights]

    def state(self, memory: mmap.mmap) -> dict[str, Any]:
        """The state dict, whose tensors are slices of `memory`, or copies on a GPU."""
        tensors: dict[str, Any] = {}
        offset = 0
        for index, numel in enumerate(self.numels()):
            values = torch.frombuffer(
                memory, dtype=torch.float32, count=numel, offset=offset
            )
            tensors[f"layers.{index}.weight"] = values.to(self.device)
            offset += _aligned(4 * numel)
        return _nest(tensors) if self.is_nested else tensors

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that `state` needs."""
        return sum(_aligned(4 * numel) for numel in self.numels())

    @property
    def middle(self) -> str:
        """The key that is loaded where only one is."""
        return f"layers.{self.num_tensors // 2}.weight"


def flatten(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of nested dicts, by the path of keys that leads to them."""
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            inner = flatten({str(name): each for name, each in value.items()})
            found |= {f"{key}/{name}": each for name, each in inner.items()}
        elif isinstance(value, torch.Tensor):
            found[key] = value
    return found


@contextmanager
def shared(workload: Workload) -> Iterator[Path]:
    """A file in memory with the bytes of all tensors, seeded; gone afterwards.

    All contenders save the same memory, so that a state of many GiB is there once.
    """
    with shared_file(workload.memory_bytes) as path:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), workload.memory_bytes)
        generator = torch.Generator().manual_seed(SEED)
        whole = torch.frombuffer(memory, dtype=torch.float32)
        for piece in whole.split(16 * MIB):
            piece.uniform_(generator=generator)
        yield path


def mapped(path: Path) -> mmap.mmap:
    """The memory of `shared`, in another process, with all its pages there.

    They are the trainer's: what touching them costs is no contender's.
    """
    with path.open("r+b") as file:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return mmap.mmap(file.fileno(), 0, flags=flags)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _nest(tensors: dict[str, Any]) -> dict[str, Any]:
    """In blocks of a hundred layers, each a dict of its own."""
    blocks: dict[str, Any] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        block = blocks.setdefault(f"block {index // 100}", {})
        block[name.split(".")[1]] = {"weight": tensor}
    return {"model": blocks}
