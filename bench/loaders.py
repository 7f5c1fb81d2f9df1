"""Who loads what in the benchmark of loading, and the files that are loaded."""

import asyncio
import json
import mmap
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from measuring import (
    Clock,
    Raw,
    read_raw,
    touch_mapping,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import aiockpt

SEED = 20
NUM_TENSORS = 300
TAG = "step-1"
CONFIG = {"host_cache_size": 0.5, "parser_threads": 4}

# ---------------------------------------------------------------- what is loaded


@dataclass(frozen=True)
class Files:
    """One state in a directory: as a published tag, and as a safetensors file.

    Attributes:
        directory: Where the files are, absolute and without links.
        numels: Elements of each tensor, all float32.
    """

    directory: Path
    numels: list[int]

    @classmethod
    def in_directory(cls, directory: Path) -> Self:
        """What another process has described there."""
        return cls(directory, json.loads((directory / "numels.json").read_text()))

    def describe(self) -> None:
        """Writes down for other processes what the state is."""
        (self.directory / "numels.json").write_text(json.dumps(self.numels))

    @property
    def torch_zip(self) -> Path:
        """The file of the published tag; `torch.save` writes the same bytes."""
        return self.directory / TAG / "model.pt"

    @property
    def safetensors(self) -> Path:
        """The same tensors as safetensors writes them."""
        return self.directory / "model.safetensors"

    @property
    def names(self) -> list[str]:
        """The tensors' keys."""
        return [f"layers.{index}.weight" for index in range(len(self.numels))]

    @property
    def middle(self) -> str:
        """The key that is loaded where only one is."""
        return self.names[len(self.numels) // 2]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it was saved; the same in every process."""
        index = int(name.split(".")[1])
        generator = torch.Generator().manual_seed(SEED + index)
        return torch.rand(self.numels[index], generator=generator)

    def targets(self) -> dict[str, torch.Tensor]:
        """A state dict to fill, in memory that was touched."""
        shapes = zip(self.names, self.numels, strict=True)
        return {name: torch.ones(numel) for name, numel in shapes}

    async def save(self) -> None:
        """Writes and syncs the files."""
        state = {name: self.tensor(name) for name in self.names}
        async with aiockpt.CheckpointEngine(self.directory, CONFIG) as engine:
            await engine.create(TAG)
            await engine.save(state, "model.pt")
            await engine.commit(TAG)
        save_file(state, self.safetensors)
        os.sync()


def small_numels(num_tensors: int, max_kib: int) -> list[int]:
    """Tensors of 1 to `max_kib` KiB, as many between 1 and 2 as between 2 and 4."""
    rng = random.Random(SEED)  # noqa: S311 - the same sizes every time
    return [int(256 * max_kib ** rng.random()) for _ in range(num_tensors)]


# ----------------------------------------------------------------- the contenders

Load = Callable[[Files, Clock], Any]
"""Loads, under the clock, and returns what was loaded: tensors by name, or `Raw`."""


def raw(files: Files, clock: Clock, *, is_touched: bool = True) -> Raw:
    """The whole file from the disk."""
    return read_raw(files.torch_zip, clock, is_touched=is_touched)


def raw_tensor(files: Files, clock: Clock) -> Raw:
    """As many bytes as the middle tensor has, from the middle of the file."""
    pages = files.torch_zip.stat().st_size // 2 // mmap.PAGESIZE
    nbytes = files.tensor(files.middle).nbytes
    return read_raw(files.torch_zip, clock, offset=pages * mmap.PAGESIZE, nbytes=nbytes)


def engine_load(files: Files, clock: Clock, **options: Any) -> Any:
    """The engine's `load` of the published tag."""

    async def load() -> Any:
        async with aiockpt.CheckpointEngine(files.directory, CONFIG) as engine:
            with clock.reading(files.torch_zip):
                return await engine.load("model.pt", **options)

    return asyncio.run(load())


def file_load(files: Files, clock: Clock, **options: Any) -> Any:
    """The load of one file, which knows no manifest."""

    async def load() -> Any:
        with clock.reading(files.torch_zip):
            return await aiockpt.load(files.torch_zip, **options)

    return asyncio.run(load())


@dataclass(frozen=True)
class Reader:
    """Another loader.

    Attributes:
        load: Takes a path, returns tensors by name.
        is_lazy: Whether it maps the file and leaves the reading to page faults.
        is_safetensors: Of which container it is.
    """

    load: Callable[[Path], Any]
    is_lazy: bool
    is_safetensors: bool = False

    def path_in(self, files: Files) -> Path:
        """The file that it loads."""
        return files.safetensors if self.is_safetensors else files.torch_zip


def theirs(files: Files, clock: Clock, reader: Reader) -> Any:
    """Another loader's load, then a look at every page where it maps the file."""
    path = reader.path_in(files)
    with clock.reading(path):
        state = reader.load(path)
        if reader.is_lazy:
            touch_mapping(path)
    return state


def ours_into(files: Files, clock: Clock, load: Callable[..., Any]) -> Any:
    """Either of our loads, into targets."""
    targets = files.targets()
    load(files, clock, into=targets)
    return targets


def theirs_into(files: Files, clock: Clock, reader: Reader) -> Any:
    """Another loader's load, then a copy as `load_state_dict` makes it."""
    path, targets = reader.path_in(files), files.targets()
    with clock.reading(path):
        state = reader.load(path)
        for name, target in targets.items():
            target.copy_(state[name])
    return targets


def our_tensor(files: Files, clock: Clock, load: Callable[..., Any]) -> Any:
    """Either of our loads, of one key."""
    return load(files, clock, keys=[files.middle])


def torch_tensor(files: Files, clock: Clock) -> Any:
    """A copy of one tensor of a mapped file."""
    name = files.middle
    with clock.reading(files.torch_zip):
        return {name: torch.load(files.torch_zip, mmap=True)[name].clone()}


def safetensors_tensor(files: Files, clock: Clock) -> Any:
    """A copy of one tensor, which `get_tensor` maps."""
    name = files.middle
    with clock.reading(files.safetensors):
        with safe_open(files.safetensors, framework="pt") as file:
            return {name: file.get_tensor(name).clone()}


TORCH = Reader(torch.load, is_lazy=False)
TORCH_MMAP = Reader(partial(torch.load, mmap=True), is_lazy=True)
SAFETENSORS = Reader(load_file, is_lazy=True, is_safetensors=True)

# In each case the raw disk comes first; the first of ours is what others compare to.
CASES: dict[str, dict[str, Load]] = {
    "fresh": {
        "raw, touched memory": raw,
        "raw, fresh memory": partial(raw, is_touched=False),
        "aiockpt engine": engine_load,
        "aiockpt file": file_load,
        "aiockpt file, unverified": partial(file_load, verify=False),
        "torch.load": partial(theirs, reader=TORCH),
        "torch.load mmap, touched": partial(theirs, reader=TORCH_MMAP),
        "safetensors, touched": partial(theirs, reader=SAFETENSORS),
    },
    "into": {
        "raw, touched memory": raw,
        "aiockpt engine": partial(ours_into, load=engine_load),
        "aiockpt file": partial(ours_into, load=file_load),
        "torch.load, copied": partial(theirs_into, reader=TORCH),
        "torch.load mmap, copied": partial(theirs_into, reader=TORCH_MMAP),
        "safetensors, copied": partial(theirs_into, reader=SAFETENSORS),
    },
    "partial": {
        "raw, touched memory": raw_tensor,
        "aiockpt engine": partial(our_tensor, load=engine_load),
        "aiockpt file": partial(our_tensor, load=file_load),
        "torch.load mmap, cloned": torch_tensor,
        "safetensors, cloned": safetensors_tensor,
    },
    "small": {
        "raw, touched memory": raw,
        "aiockpt engine": engine_load,
        "aiockpt file": file_load,
        "torch.load": partial(theirs, reader=TORCH),
        "safetensors, touched": partial(theirs, reader=SAFETENSORS),
    },
    "checksum": {
        "raw, touched memory": raw,
        "aiockpt engine": engine_load,
        "aiockpt engine, unverified": partial(engine_load, verify=False),
        "aiockpt file": file_load,
        "aiockpt file, unverified": partial(file_load, verify=False),
    },
}
