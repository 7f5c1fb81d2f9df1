"""Things to do with an engine whose outcome can be checked to the last byte."""

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import aiockpt.sync

Engine = aiockpt.sync.CheckpointEngine

# Chunks of 1 MiB: the larger file below takes three writes.
SMALL = {"host_cache_size": 8 / 1024, "parser_threads": 2}


@functools.cache
def state(seed: int) -> dict[str, torch.Tensor]:
    """What is saved under a seed; do not change it."""
    return {"w": torch.arange(seed, seed + 300_000), "b": torch.arange(seed)}


def content(state: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """The bytes of a state's tensors."""
    return {key: value.numpy().tobytes() for key, value in state.items()}


def save(engine: Engine, tag: str, seed: int, *, overwrite: bool = False) -> None:
    """Saves and commits two files, one of them below a directory."""
    engine.create(tag, overwrite=overwrite)
    engine.save(state(seed), "model.pt")
    engine.save({"seed": seed}, "sub/opt.pt")
    engine.commit(tag)


def assert_whole(engine: Engine, tag: str, seed: int) -> None:
    """The tag is what `save` saved under the seed, to the last byte."""
    assert content(engine.load("model.pt", tag=tag)) == content(state(seed))
    assert engine.load("sub/opt.pt", tag=tag) == {"seed": seed}


def seeds(engine: Engine) -> dict[str, int]:
    """All tags, oldest first, and what they are; each of them is whole."""
    found = {}
    for info in engine.tags():
        found[info.tag] = engine.load("sub/opt.pt", tag=info.tag)["seed"]
        assert_whole(engine, info.tag, found[info.tag])
    return found


@dataclass(frozen=True)
class Workload:
    """Something to do, and what the tags are before and after it.

    Attributes:
        work: What is done with an engine.
        before: Tags and their seeds, oldest first.
        after: The same, when it is done.
    """

    work: Callable[[Engine], object]
    before: Mapping[str, int]
    after: Mapping[str, int]


START = {"older": 1, "old": 2}


def make_start(root: Path) -> Path:
    """A root as it is before each of the workloads."""
    with Engine(root, SMALL) as engine:
        for tag, seed in START.items():
            save(engine, tag, seed)
    return root


def copy_root(template: Path) -> Path:
    """A copy of a root, in the place of the copy before it."""
    root = template.with_name("root")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root)
    return root


WORKLOADS = {
    "save": Workload(lambda e: save(e, "new", 3), START, {**START, "new": 3}),
    "overwrite the latest": Workload(
        lambda e: save(e, "old", 3, overwrite=True), START, {"older": 1, "old": 3}
    ),
    "overwrite an older": Workload(
        lambda e: save(e, "older", 3, overwrite=True), START, {"old": 2, "older": 3}
    ),
    "delete the latest": Workload(lambda e: e.delete("old"), START, {"older": 1}),
    "delete an older": Workload(lambda e: e.delete("older"), START, {"old": 2}),
}
