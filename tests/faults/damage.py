"""A published file whose bytes are not those that were written: row 9."""

import contextlib
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from aiockpt.errors import CorruptCheckpointError
from workloads import SMALL, Engine

BLOCK = 4096
# A few blocks, so that thousands of loads take seconds.
STATE = {"w": torch.arange(2500), "b": torch.randn(700), "step": 3}
TENSORS = {"w": STATE["w"], "b": STATE["b"]}
FILES = ("model.pt", "model.safetensors")


def make_two_tags(root: Path) -> Path:
    """A root with the tags "one" and "two", which differ in every tensor."""
    with Engine(root, SMALL) as engine:
        for number, tag in enumerate(("one", "two"), 1):
            engine.create(tag)
            engine.save({**STATE, "w": number * STATE["w"]}, FILES[0])
            engine.save({**TENSORS, "w": number * STATE["w"]}, FILES[1])
            engine.commit(tag)
    return root


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Generator[None]:
    """The file has other bytes, in an inode of their own, until the block ends."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    path.write_bytes(data)
    try:
        yield
    finally:
        aside.rename(path)


def flipped(data: bytes, bit: int) -> bytes:
    """The same with one bit changed, counted through all bytes."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def assert_detected(engine: Engine, tag: str, name: str) -> CorruptCheckpointError:
    """Loading the file fails, by its name; nothing is handed out."""
    path = f"{engine.root}/{tag}/{name}"
    with pytest.raises(CorruptCheckpointError) as caught:
        engine.load(name, tag=tag)
    error = caught.value
    assert error.path == path, repr(error)
    assert error.offset is None or error.offset >= 0
    return error
