"""An asyncio-native checkpoint engine for PyTorch training.

    async with aiockpt.CheckpointEngine("runs/gpt") as engine:
        await engine.create("step-100")
        await engine.save(model.state_dict(), "model.pt")
        optimizer.step()                     # waits for the copy, not for the disk
        await engine.commit("step-100")      # durable, published atomically

The files are real `torch.save` (or safetensors) files: any tool opens them.
"""

__all__ = [
    "CheckpointEngine",
    "CheckpointError",
    "CheckpointFile",
    "CheckpointNotFoundError",
    "CommitReport",
    "CorruptCheckpointError",
    "DeadlineError",
    "EngineConfig",
    "EngineStateError",
    "InvalidArgumentError",
    "KeepEvery",
    "KeepLast",
    "PeerError",
    "PreflightReport",
    "SaveHandle",
    "StagingError",
    "StorageError",
    "TagInfo",
    "TornSnapshotError",
    "UnsafePickleError",
    "load",
    "open",
    "save",
]

from aiockpt.access import CheckpointFile
from aiockpt.config import EngineConfig
from aiockpt.engine import CheckpointEngine, SaveHandle
from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DeadlineError,
    EngineStateError,
    InvalidArgumentError,
    PeerError,
    StagingError,
    StorageError,
    TornSnapshotError,
    UnsafePickleError,
)
from aiockpt.events import CommitReport
from aiockpt.manifest import TagInfo
from aiockpt.onefile import load, save
from aiockpt.onefile import open_file as open  # noqa: A004 - as `torch.load` is `load`
from aiockpt.preflight import PreflightReport
from aiockpt.retention import KeepEvery, KeepLast
