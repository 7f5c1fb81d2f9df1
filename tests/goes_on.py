"""An engine that has to go on, whatever it is asked to do."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import torch

from aiockpt import CheckpointEngine
from gates import RING_8_MIB

KEPT = {"w": torch.arange(6.0), "step": 7}


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` but the engines' own work, with its content."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if path.relative_to(root).parts[0] != ".aiockpt"
    }


@contextlib.asynccontextmanager
async def engine_that_goes_on(
    root: Path, **settings: object
) -> AsyncIterator[CheckpointEngine]:
    """An engine with the published tag "kept"; afterwards it works and has lost nothing.

    The block is to do what is refused, and to leave no tag open but "open".
    """
    async with CheckpointEngine(root, RING_8_MIB | settings) as engine:
        await engine.create("kept")
        await engine.save(KEPT, "model.pt")
        await engine.commit("kept")
        await engine.create("open")
        before = tree(root)
        yield engine
        assert tree(root) == before
        await engine.save(KEPT, "last.pt", tag="open")
        await engine.commit("open")
        for tag, path in (("kept", "model.pt"), ("open", "last.pt")):
            loaded = await engine.load(path, tag=tag)
            assert torch.equal(loaded["w"], KEPT["w"])
        assert engine.ring_bytes[0] == 0
    assert list((root / ".aiockpt" / "work").iterdir()) == []
